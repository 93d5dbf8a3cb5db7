"""Every record of a results folder, quickly.

Ten thousand records are hundreds of megabytes of JSON, and parsing them takes longer than all that a table does with
them. So what was read once is kept in the cache in a form that loads several times faster, with the size and time of
change of each file: one that changed is parsed again, one that is gone is forgotten. The files stay the only source:
the index may be deleted at any time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import marshal
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.records import SCHEMA, RunRecord, from_json, write_bytes_atomically
from harness.wheels import default_cache

FEWEST = 300  # records below which parsing takes no longer than the index would
VERSION = 1  # of what an entry holds
LAYERS = ("layer_errors", "layer_output_errors")

# relative path -> (time of change in ns, bytes, record without errors of layers, packed errors of layers)
Entry = tuple[int, int, dict[str, Any], list[tuple[tuple[str, ...], bytes]]]


def read_all(results: Path, layer_errors: bool = True) -> tuple[list[tuple[Path, RunRecord]], list[str]]:
    """Every readable record below `results/records` with its path, sorted by path; and why the others are not.

    layer_errors: False leaves those two fields empty, which saves most of the memory.
    Records may share parts of their configuration and environment: they are for reading only.
    """
    files = sorted((results / "records").glob("*/*.json"))
    records, broken = [], []
    with without_collector():
        index = _Index(results, len(files))
        for path in files:
            try:
                data, layers = index.read(path)
                if layer_errors:
                    data = data | {key: _unpacked(*packed) for key, packed in zip(LAYERS, layers, strict=False)}
                records.append((path, from_json(data)))
            except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                index.drop(path)
                broken.append(f"{path} is not a record this version can read: {error}")
        index.save()
    return records, broken


class _Index:
    """What was read before, and what is read now."""

    def __init__(self, results: Path, count: int) -> None:
        self.results = results
        self.kept: dict[str, Entry] = {}
        self.now: dict[str, Entry] = {}
        self.shared: dict[str, Any] = {}
        name = hashlib.sha256(str(results.resolve()).encode()).hexdigest()[:16]
        version = f"{sys.implementation.cache_tag}-{marshal.version}-{SCHEMA}-{VERSION}"
        self.file = default_cache() / "indexes" / f"{name}-{version}" if count >= FEWEST else None
        if self.file is not None and self.file.exists():
            try:
                self.kept = marshal.loads(self.file.read_bytes())
            except (OSError, EOFError, ValueError, TypeError):
                self.kept = {}  # torn: it is made again

    def read(self, path: Path) -> tuple[dict[str, Any], list]:
        """The record as JSON values, without errors of layers, and those packed."""
        key, state = f"{path.parent.name}/{path.name}", path.stat()
        entry = self.kept.get(key)
        if entry is None or entry[:2] != (state.st_mtime_ns, state.st_size):
            data = json.loads(path.read_bytes())
            layers = [_packed(data.pop(field, None) or {}) for field in LAYERS]
            entry = (state.st_mtime_ns, state.st_size, data, layers)
            if self.file is not None:
                entry = self._with_shared_parts(entry)
        self.now[key] = entry
        return entry[2], entry[3]

    def drop(self, path: Path) -> None:
        """Forget a file that is no record."""
        self.now.pop(f"{path.parent.name}/{path.name}", None)

    def save(self) -> None:
        """Keep what was read, if anything is new; a cache that cannot be written is no failure of reading."""
        if self.file is None or (
            self.now.keys() == self.kept.keys() and all(self.now[key] is entry for key, entry in self.kept.items())
        ):
            return
        try:
            write_bytes_atomically(marshal.dumps(self.now), self.file)
        except OSError:
            return

    def _with_shared_parts(self, entry: Entry) -> Entry:
        """The same entry with equal parts of all records being one object: stored once, loaded once."""
        changed, size, data, layers = entry
        data = {sys.intern(key): self._shared(value) for key, value in data.items() if key != "measurements"} | {
            "measurements": [
                {sys.intern(key): self._shared(value) for key, value in m.items()} for m in data.get("measurements", [])
            ]
        }
        for key in ("config", "environment", "cost"):
            if isinstance(data.get(key), dict):
                data[key] = {sys.intern(name): self._shared(value) for name, value in data[key].items()}
        return changed, size, data, [(self._shared(names), values) for names, values in layers]

    def _shared(self, value: Any) -> Any:
        if isinstance(value, str):
            return sys.intern(value)
        if isinstance(value, dict | list | tuple):
            return self.shared.setdefault(repr(value), value)
        return value


def _packed(errors: dict[str, float]) -> tuple[tuple[str, ...], bytes]:
    return tuple(errors), array("d", errors.values()).tobytes()


def _unpacked(names: tuple[str, ...], values: bytes) -> dict[str, float]:
    return dict(zip(names, array("d", values), strict=True))


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
