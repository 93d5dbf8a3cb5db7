"""Every record of a results folder, quickly.

Ten thousand records are hundreds of megabytes of JSON, and parsing them takes longer than all that a table does with
them. So what was read once is kept in the cache in a form that loads several times faster, with the size and time of
change of each file: one that changed is parsed again, one that is gone is forgotten. The files stay the only source:
the index may be deleted at any time.

Errors of layers are most of a record, and few ask for them: they have a file of their own.
"""

from __future__ import annotations

import gc
import hashlib
import json
import marshal
import math
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from harness import two_processes
from harness.records import SCHEMA, Failure, Measurement, RunRecord, from_json, write_bytes_atomically
from harness.two_processes import shared_out
from harness.wheels import default_cache

FEWEST = 300  # records below which parsing takes no longer than the index would
VERSION = 4  # of what an entry holds
LAYERS = ("layer_errors", "layer_output_errors")
IN_SECTIONS = ("config", "environment", "cost")  # of which records share sections, hardly ever all of them
CANONICAL = 2  # version of marshal in which equal JSON values have equal bytes

UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
PART = 100  # records that are parsed before another process may take the next ones

State = tuple[int, ...]  # of a file: times of change in ns, place on the disk, bytes
Packed = tuple[tuple[str, ...], bytes]  # names of linears, their errors as doubles, NaN for None
_NOTHING = (None, None)  # an entry that is not there


@dataclass
class Reading:
    """What a folder holds, by place ("model/file.json") in order. The records have no errors of layers.

    layers: those of LAYERS by place, where they were asked for.
    """

    records: dict[str, RunRecord] = field(default_factory=dict)
    layers: dict[str, tuple[Packed, ...]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def read_all(results: Path) -> tuple[list[tuple[Path, RunRecord]], list[str]]:
    """Every readable record below `results/records` with its path, sorted by path; and why the others are not.

    Records may share parts of their configuration and environment: they are for reading only.
    """
    reading = read_packed(results, layers=True)
    records = []
    for place, record in reading.records.items():
        errors = {key: unpacked(packed) for key, packed in zip(LAYERS, reading.layers[place], strict=True)}
        records.append((results / "records" / place, _made(RunRecord, vars(record) | errors)))
    return records, reading.broken


def read_packed(results: Path, layers: bool = False) -> Reading:
    """The same, with errors of layers apart and packed, or without them, which saves most of the memory."""
    reading = Reading()
    files = _files(results / "records")
    with without_collector():
        index = _Index(results, layers, len(files))
        index.read_ahead(files)
        for place, file in files:
            try:
                reading.records[place], packed = index.read(place, file)
            except UNREADABLE as error:
                reading.broken.append(f"{results / 'records' / place} is not a record this version can read: {error}")
                continue
            if layers:
                reading.layers[place] = packed
        index.save()
    return reading


def unpacked(packed: Packed) -> dict[str, float | None]:
    """Errors by the name of the linear."""
    names, values = packed
    return {name: None if math.isnan(value) else value for name, value in zip(names, array("d", values), strict=True)}


def _files(folder: Path) -> list[tuple[str, os.DirEntry]]:
    """Place and entry of every file of a record, in the order of their paths."""
    if not folder.is_dir():
        return []
    found = {}
    for home in os.scandir(folder):
        if home.is_dir():
            found |= {(home.name, file.name): file for file in os.scandir(home) if file.name.endswith(".json")}
    return [("/".join(names), found[names]) for names in sorted(found)]


class _Index:
    """What was read before, and what is read now: records, and errors of layers once they are asked for."""

    def __init__(self, results: Path, layers: bool, count: int) -> None:
        name = hashlib.sha256(str(results.resolve()).encode()).hexdigest()[:16]
        shape = repr([[f.name for f in fields(kind)] for kind in (RunRecord, Measurement, Failure)])
        version = f"{marshal.version}-{SCHEMA}-{VERSION}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}"
        file = default_cache() / "indexes" / f"{name}-{sys.implementation.cache_tag}-{version}"
        self.file = file if count >= FEWEST else None
        self.wanted = layers
        self.kept: dict[str, tuple[State, dict[str, Any]]] = self._loaded("records")
        self.kept_layers: dict[str, tuple[State, tuple[Packed, ...]]] = self._loaded("layers") if layers else {}
        self.now: dict[str, tuple[State, RunRecord, tuple[Packed, ...]]] = {}
        self.changed = False
        self.shared: dict[Any, Any] = {}  # by itself or, what has no hash, by its bytes

    def read_ahead(self, files: Sequence[tuple[str, os.DirEntry]]) -> None:
        """Parse files without an entry in two processes, if they are many. What cannot be read is met again later."""
        known = self.kept.keys() & self.kept_layers.keys() if self.wanted else self.kept.keys()
        new = [(place, file) for place, file in files if place not in known]
        if len(new) < FEWEST or not two_processes.helps():
            return
        parts = [partial(self._parsed_part, new[first : first + PART]) for first in range(0, len(new), PART)]
        for records, layers in shared_out(parts):
            self.kept |= records
            self.kept_layers |= layers
        self.changed = True

    def _parsed_part(self, files: Sequence[tuple[str, os.DirEntry]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Entries of the index for these files, without those that cannot be read."""
        records, layers = {}, {}
        for place, file in files:
            try:
                state = _state(file.stat())
                record, packed = self._parsed(_content(file))
            except UNREADABLE:
                continue  # it is parsed again where the reason is kept
            records[place], layers[place] = (state, _values(record)), (state, packed)
        return records, layers

    def read(self, place: str, file: os.DirEntry) -> tuple[RunRecord, tuple[Packed, ...]]:
        """The record without errors of layers, and those where they are wanted."""
        state = _state(file.stat())  # before it is read
        known, values = self.kept.pop(place, _NOTHING)
        layers = self._kept_layers(place, state) if self.wanted else ()
        if known == state and layers is not None:
            record = _restored(values)
        else:
            record, layers = self._parsed(_content(file))
            self.changed = True
        self.now[place] = (state, record, layers)
        return record, layers

    def save(self) -> None:
        """Keep what was read, if anything is new; a cache that cannot be written is no failure of reading.

        Every file is replaced as a whole and every entry has the state of its file, so neither another process that
        writes at the same time nor one file of the two that is older than the other can do harm.
        """
        if self.file is None or not (self.changed or self.kept):  # an entry that is left is of a file that is gone
            return
        if not self.wanted:
            self.kept_layers = self._loaded("layers") | self.kept_layers  # those that were read ahead
        layers = {
            place: (state, packed or self._kept_layers(place, state)) for place, (state, _, packed) in self.now.items()
        }
        try:
            self._write("records", {place: (state, _values(record)) for place, (state, record, _) in self.now.items()})
            self._write("layers", {place: entry for place, entry in layers.items() if entry[1] is not None})
        except OSError:
            return

    def _kept_layers(self, place: str, state: State) -> tuple[Packed, ...] | None:
        known, packed = self.kept_layers.get(place, _NOTHING)
        return packed if known == state else None

    def _loaded(self, part: str) -> dict[str, Any]:
        if self.file is None:
            return {}
        try:
            return marshal.loads(self.file.with_name(f"{self.file.name}-{part}").read_bytes())
        except (OSError, EOFError, ValueError, TypeError):
            return {}  # none yet, or torn: it is made again

    def _write(self, part: str, entries: dict[str, Any]) -> None:
        write_bytes_atomically(marshal.dumps(entries), self.file.with_name(f"{self.file.name}-{part}"))

    def _parsed(self, content: bytes) -> tuple[RunRecord, tuple[Packed, ...]]:
        """A record with equal parts of all records being one object: stored once, loaded once."""
        data = json.loads(content)
        layers = [_packed(data.pop(key, None) or {}) for key in LAYERS]
        for key, value in data.items():
            if key == "measurements":
                data[key] = [
                    {sys.intern(name): sys.intern(v) if type(v) is str else v for name, v in m.items()} for m in value
                ]
            elif key in IN_SECTIONS and isinstance(value, dict):
                data[key] = {sys.intern(name): self._shared(section) for name, section in value.items()}
            else:
                data[key] = self._shared(value)
        return from_json(data), tuple((self._shared(names), values) for names, values in layers)

    def _shared(self, value: Any) -> Any:
        if isinstance(value, str):
            return sys.intern(value)
        if isinstance(value, tuple):  # names of linears
            return self.shared.setdefault(value, value)
        if isinstance(value, dict | list):
            return self.shared.setdefault(marshal.dumps(value, CANONICAL), value)
        return value


def _content(file: os.DirEntry) -> bytes:
    with open(file, "rb", buffering=0) as opened:
        return opened.read()


def _state(status: os.stat_result) -> State:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_size


def _values(record: RunRecord) -> dict[str, Any]:
    """The fields of a record as marshal can keep them, and what it found out about them that takes long."""
    values = {f.name: getattr(record, f.name) for f in fields(RunRecord)}
    values["measurements"] = [vars(m) for m in record.measurements]
    values["failure"] = vars(record.failure) if record.failure else None
    values["number_texts"] = record.number_texts
    return values


def _restored(values: dict[str, Any]) -> RunRecord:
    """The inverse of `_values`, which it takes over."""
    values["measurements"] = [_made(Measurement, m) for m in values["measurements"]]
    values["failure"] = _made(Failure, values["failure"]) if values["failure"] else None
    return _made(RunRecord, values)


def _made(kind: type, values: dict[str, Any]) -> Any:
    """An instance that has these fields. A frozen class's constructor would take most of the time of reading."""
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", values)
    return made


def _packed(errors: dict[str, float | None]) -> Packed:
    values = array("d", [math.nan if error is None else error for error in errors.values()])
    return tuple(errors), values.tobytes()


@contextmanager
def without_collector() -> Iterator[None]:
    """Millions of new objects, hardly one of them garbage: looking for cycles among them would double the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
