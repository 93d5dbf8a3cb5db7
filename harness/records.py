"""What a run leaves behind: measurements with their protocol, and one JSON record per run.

A record is written atomically (temporary file, flush, rename), so a reader never sees half of one.
A number that was not measured is None in Python, null in JSON and an empty cell in a table; never 0.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness import statistics
from harness.redaction import redacted

SCHEMA = 2

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Measurement:
    """One number with all that is needed to read it alone.

    metric: name from the field, e.g. `perplexity`, `time_per_output_token_ms` (units end the name where it has one).
    value: the number; None when it could not be measured (then `note` says why).
    unit: e.g. "ppl", "nats/token", "ms", "tokens/s", "bytes", "bits".
    on: the protocol and the workload, e.g. "wikipedia-sample evaluation, gptq-512, 16 windows" or
        "batch 1, prompt 128, 32 new". Two numbers compare only when metric and `on` are equal.
    better: which direction is better.
    interval: 95 % interval; None means not estimated, never a stand-in number.
    note: what else a reader must know: the kernel that ran, why a value is missing, a flag such as "collapsed".
    """

    metric: str
    value: float | None
    unit: str
    on: str
    better: Better
    interval: tuple[float, float] | None = None
    note: str = ""


MEASUREMENT_FIELDS = {field.name for field in fields(Measurement)}
WITH_ZEROS = "dense with zeros, no sparse kernel"  # the kernel of a sparse layer that no kernel multiplies faster
# Curves of one point, in which methods note what tables say about them
REMOVED_SHARE = "share of the blocks' weights removed"
OFF_GRID = "linears whose weights left an earlier step's grid"


@dataclass(frozen=True)
class Failure:
    """Why a run has no result: the stage that ended and the reason, in words a user can act on."""

    stage: str
    reason: str


@dataclass(frozen=True)
class RunRecord:
    """Everything about one run. Field names are stable: scripts outside this project rely on them."""

    id: str  # digest of the resolved configuration
    status: Literal["finished", "failed"]
    card: dict[str, Any]  # name, title, taxonomy, paper, departures
    model: str
    bits: float | None  # as asked for; None where the method has no bit-width
    config: dict[str, Any]  # resolved: method, model, hardware, corpus, calibration, evaluation, seed
    measurements: list[Measurement] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # learning curves: [[step, value], ...]
    layer_errors: dict[str, float] = field(default_factory=dict)  # linear -> relative weight error, see layer_errors
    layer_output_errors: dict[str, float] = field(default_factory=dict)  # linear -> relative error of what it puts out
    environment: dict[str, Any] = field(default_factory=dict)
    artifact: dict[str, Any] = field(default_factory=dict)  # path, bytes, sha256
    failure: Failure | None = None
    baseline: str | None = None  # id of the dense record that this one was compared with
    samples: str | None = None  # folder with token and question outcomes, relative to the results folder
    command: str = ""
    started: str = ""  # ISO 8601, UTC
    finished: str = ""
    schema: int = SCHEMA

    def value(self, metric: str, on: str | None = None) -> float | None:
        """The value of the first measurement with this metric (and `on`), or None."""
        found = self.find(metric, on)
        return found.value if found else None

    def find(self, metric: str, on: str | None = None) -> Measurement | None:
        """The first measurement with this metric (and, if given, exactly this `on`)."""
        return self._places.get((metric, on))

    def find_all(self, keys: Iterable[tuple[str, str | None]]) -> list[Measurement | None]:
        """`find` for several metrics, each with its `on` or None."""
        return list(map(self._places.get, keys))

    @cached_property
    def number_texts(self) -> str:
        """For each measurement a line "value,low,high" with all digits, empty where there is none.

        Finding the digits of floats takes most of the time of writing CSV, so the index of records keeps them.
        """
        return "\n".join([_number_text(m) for m in self.measurements])

    @cached_property
    def _places(self) -> dict[tuple[str, str | None], Measurement]:
        """Measurements by metric and `on`, and the first of each metric: tables look thousands of them up."""
        last_first = self.measurements[::-1]  # so that the first of equal keys stays
        return {(m.metric, m.on): m for m in last_first} | {(m.metric, None): m for m in last_first}


def _number_text(m: Measurement) -> str:
    low, high = m.interval or ("", "")
    return f"{'' if m.value is None else m.value},{low},{high}"


def _with_expanded_intervals(data: dict[str, Any]) -> dict[str, Any]:
    """Intervals that were bootstrap percentiles, as wide as `statistics.bootstrap_interval` makes them now."""
    measurements = data.get("measurements")
    if not isinstance(measurements, list):
        return data
    return {**data, "measurements": [_expanded(m) if isinstance(m, dict) else m for m in measurements]}


def _expanded(measurement: dict[str, Any]) -> dict[str, Any]:
    metric, value, ends = (measurement.get(key) for key in ("metric", "value", "interval"))
    units = _units_drawn(str(metric), str(measurement.get("on")))
    if units is None or not isinstance(ends, list) or not all(type(x) in (int, float) for x in (value, *ends)):
        return measurement
    wider = statistics.expansion(units) / statistics.Z_95
    if metric in _BY_FACTORS and min(value, *ends) > 0:
        return measurement | {"interval": [value * (end / value) ** wider for end in ends]}
    most = 1.0 if metric == "top1_agreement" else math.inf
    return measurement | {"interval": [min(most, max(0.0, value + (end - value) * wider)) for end in ends]}


def _units_drawn(metric: str, on: str) -> int | None:
    """How many windows, passages or blocks of a stream the resamples of schema 1 were drawn from."""
    if metric in ("perplexity", "perplexity_ratio", "bits_per_byte", "kl_divergence", "top1_agreement"):
        found = re.search(r", (\d+) windows$", on)
        return int(found[1]) if found else None
    if metric == "decoding_speedup":
        found = re.search(r", (\d+) passages,", on)
        return int(found[1]) if found else None
    if metric in ("stream_perplexity", "stream_perplexity_ratio"):
        found = re.search(r", tokens (\d+) to (\d+)$", on) or re.search(r"-(\d+), past (\d+),", on)
        return round(abs(int(found[2]) - int(found[1])) / 512) if found else None  # blocks of 512 tokens
    return None


# What makes a record of schema N one of schema N + 1, from its JSON values. Schema 1 is the oldest there is.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _with_expanded_intervals}
_BY_FACTORS = {"perplexity", "perplexity_ratio", "stream_perplexity", "stream_perplexity_ratio", "decoding_speedup"}
_NUMBERS = frozenset({float, int, type(None)})
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("id", "status", "model", "command", "started", "finished"), str),
    **dict.fromkeys(("card", "config", "cost", "curves", "layer_errors", "layer_output_errors"), dict),
    **dict.fromkeys(("environment", "artifact"), dict),
    **dict.fromkeys(("baseline", "samples"), str | None),
    "bits": int | float | None,
}


def to_json(record: RunRecord) -> dict[str, Any]:
    """The record as plain JSON values, secrets masked. NaN and infinity are not numbers JSON has: they become null."""
    values = asdict(record)
    for name in ("layer_errors", "layer_output_errors"):  # a dense model, and every older record, has none
        if not values[name]:
            del values[name]
    return redacted(_finite(values))


def from_json(data: dict[str, Any]) -> RunRecord:
    """The inverse of `to_json`; a record of an older schema is brought up to this one by `MIGRATIONS`.

    Raises ValueError for a record of another schema, naming both versions, and for values of other types.
    """
    data = _migrated(data)
    values = dict(data)
    values["measurements"] = [measurement_from_json(m) for m in data.get("measurements", [])]
    values["failure"] = Failure(**data["failure"]) if data.get("failure") else None
    record = RunRecord(**values)
    for name, kind in _KINDS.items():
        if not isinstance(values.get(name, getattr(record, name)), kind):
            raise ValueError(f"its {name} is {str(values[name])[:40]!r}")
    if record.status not in ("finished", "failed"):
        raise ValueError(f"its status is {record.status[:40]!r}")
    if not isinstance(record.card.get("name"), str):
        raise ValueError("its card has no name")
    return record


def _migrated(data: dict[str, Any]) -> dict[str, Any]:
    schema = data.get("schema")
    known = isinstance(schema, int) and not isinstance(schema, bool)
    if known and schema > SCHEMA:
        raise ValueError(
            f"record has schema {schema}; this version reads schema {SCHEMA}: read it with the newer version that "
            "wrote it"
        )
    while known and schema < SCHEMA and schema in MIGRATIONS:
        data = {**MIGRATIONS[schema](data), "schema": schema + 1}
        schema += 1
    if not known or schema != SCHEMA:
        raise ValueError(f"record has schema {schema}; this version reads schema {SCHEMA}")
    return data


def measurement_from_json(data: dict[str, Any]) -> Measurement:
    """One measurement from its JSON values. An interval with an end that is no number is no interval.

    Raises ValueError for a value that is no number and a text that is none.
    """
    interval = data.get("interval")
    known = bool(interval) and None not in interval
    values = {**data, "interval": tuple(interval) if known else None}
    if not (
        type(values["metric"]) is type(values["on"]) is type(values["unit"]) is str
        and type(values["value"]) in _NUMBERS
        and (not known or (len(interval) == 2 and type(interval[0]) in _NUMBERS and type(interval[1]) in _NUMBERS))
    ):
        raise ValueError(f"a measurement of {str(values['metric'])[:40]!r} has values of other types")
    if values.keys() != MEASUREMENT_FIELDS:
        return Measurement(**values)  # fills in what may be missing, and refuses what is unknown
    made = object.__new__(Measurement)  # thousands of records hold hundreds of thousands: a frozen class's constructor
    made.__dict__.update(values)  # would take half the time of reading them
    return made


def write_record(record: RunRecord, path: Path) -> Path:
    """Write the record atomically to `path` and return it."""
    write_json_atomically(to_json(record), path)
    return path


def read_record(path: Path) -> RunRecord:
    """Read one record. Raises ValueError, naming the file, when it is not a record."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a record this version can read: {error}") from error


def read_records(results: Path) -> Iterator[tuple[Path, RunRecord]]:
    """Every record below `results/records`, sorted by path."""
    for path in sorted((results / "records").glob("*/*.json")):
        yield path, read_record(path)


def write_json_atomically(data: Any, path: Path) -> None:
    """Write JSON so that `path` is either the old file or the whole new one, also after a crash."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(text, path)


def write_text_atomically(text: str, path: Path) -> None:
    """Write text so that `path` is either the old file or the whole new one, also after a crash."""
    write_bytes_atomically(text.encode(), path)


def write_bytes_atomically(content: bytes, path: Path) -> None:
    """Write bytes so that `path` is either the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.urandom(16).hex()}.partial")
    try:
        with draft.open("xb") as file:  # readable as the user's files are: colleagues may share the results folder
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Remove what processes that were killed while they wrote `name` left there. Only for who alone may write it."""
    for draft in folder.glob(f".{name if name == '*' else glob.escape(name)}.*.partial"):
        draft.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
