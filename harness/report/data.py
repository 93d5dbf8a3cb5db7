"""Records → what the page shows, as plain JSON values: everything that depends on records and not on a browser.

Whatever repeats from run to run (settings, versions, workloads) stands once, in `shared`, and runs hold its place.
"""

from __future__ import annotations

import base64
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import markup, rows, tables
from harness.command import single_command
from harness.comparison import Judge
from harness.curve_plot import LEAST_POINTS
from harness.errors import ConfigError
from harness.record_index import Packed, Reading, read_packed, unpacked
from harness.records import Measurement, RunRecord
from harness.report.axes import Axis, axes_of, fronts
from harness.scaling_plot import METRICS, points_of
from harness.table_formats import Block, Cell

PUBLISHED = "published"
DIGITS = 6  # of numbers on the page; records have all
MOST_STEPS = 100  # of a learning curve
AT_ONCE = 256  # records whose errors of linears are packed together
READ = re.compile(r"(\d+) MiB a step at ([\d.]+) GB/s")  # in the note of decode_roofline_fraction
TIMED = re.compile(r"batch (\d+), prompt (\d+)[^,]*, (\d+) new")  # its workload


plain = lru_cache(maxsize=65536)(markup.plain)  # the same few words stand in every record


@dataclass
class Shared:
    """Values that are kept once: text made fit to be shown, and whole sections of a configuration."""

    values: list[Any] = field(default_factory=list)
    places: dict[Any, int] = field(default_factory=dict)
    workloads: dict[tuple[str, ...], list[int]] = field(default_factory=dict)

    def texts(self, *texts: str) -> list[int]:
        """Where texts that come together stand in `values`."""
        if texts not in self.workloads:
            self.workloads[texts] = [self.place(text) for text in texts]
        return self.workloads[texts]

    def place(self, value: Any) -> int:
        """Where the value stands in `values`. One that is no text must live as long as this does."""
        key = value if isinstance(value, str) else id(value)
        if key not in self.places:
            whole = (json.dumps(value, sort_keys=True, default=str),)  # not to be taken for a text
            if whole not in self.places:
                self.places[whole] = len(self.values)
                self.values.append(shown(value))
            self.places[key] = self.places[whole]
        return self.places[key]


def shown(value: Any) -> Any:
    """JSON values whose text has no control or direction characters; infinity and NaN become text."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {plain(str(key)): shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value


def rounded(value: float) -> float:
    """DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


step = lru_cache(maxsize=4096)(rounded)  # curves share them


# ------------------------------------------------------------------------------------------------------ reading


@dataclass
class Found:
    """Records by the folder they are in (of a sweep, a machine), and why the others could not be read.

    layers: errors of the linears by folder and id, packed; the records themselves have none, and thinned curves.
    results: where the folders are, with the outcomes that tests compare; None where there are none.
    """

    folders: dict[str, list[RunRecord]] = field(default_factory=dict)
    layers: dict[tuple[str, str], Layers] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    results: Path | None = None


@dataclass(frozen=True)
class Layers:
    """Relative errors of linears, `packed` in the order of the names."""

    names: list[str]
    weights: str
    outputs: str


def read_folders(results: Path) -> Found:
    """All records in `records` folders in and below `results`.

    Published results below a user's own are left out: they are read where `results` names them.
    Raises ConfigError where there is no folder or no record.
    """
    if not results.is_dir():
        raise ConfigError(f"paths.results={results}: there is no such folder; run `python -m harness` first")
    found = Found(results=results)
    for home in sorted(results.glob("**/records")):
        inside = home.relative_to(results).parts
        if inside[0] == PUBLISHED or "records" in inside[:-1]:
            continue
        folder = "/".join(inside[:-1])
        reading = read_packed(home.parent, layers=True)
        found.broken += reading.broken
        if reading.records:
            found.folders[folder] = list(map(_slim, reading.records.values()))
        found.layers |= {(folder, id): layers for id, layers in _layers(reading)}
    if not found.folders and not found.broken:
        raise ConfigError(
            f"{results} holds no records; run `python -m harness`, or read the published ones with "
            f"paths.results=results/{PUBLISHED}"
        )
    return found


def packed(values: Iterable[float | None]) -> str:
    """Numbers from 1e-12 to 1e53 in two bytes each, within 0.12 %, as base64: thousands a record would be the page.

    A little-endian 1000 × (12 + log10 value); 0 for less, 65535 for none.
    """
    return base64.b64encode(_codes(np.array(list(values), dtype=np.float64)).tobytes()).decode()  # NaN for None


def _codes(numbers: NDArray[np.float64]) -> NDArray[np.uint16]:
    codes = np.rint(1000 * (12 + np.log10(np.maximum(numbers, 1e-12)))).clip(0, 65534)
    return np.where(np.isnan(numbers), 65535, codes).astype("<u2")


def _slim(record: RunRecord) -> RunRecord:
    """The record with thinned curves."""
    if not record.curves:
        return record
    return replace(record, curves={name: _thinned(points) for name, points in record.curves.items()})


def _layers(reading: Reading) -> Iterator[tuple[str, Layers]]:
    """Id of each record that has errors of linears, and what the page holds of them."""
    there = [(place, *both) for place, both in reading.layers.items() if both[0][0]]
    lists: dict[tuple[str, ...], list[str]] = {}
    for first in range(0, len(there), AT_ONCE):
        part = there[first : first + AT_ONCE]
        doubles = [values for _, weights, outputs in part for values in (weights[1], _in_order(weights[0], outputs))]
        codes = memoryview(_codes(np.frombuffer(b"".join(doubles))).tobytes())
        ends = [0, *accumulate(len(values) // 4 for values in doubles)]  # two bytes where a double has eight
        texts = (base64.b64encode(codes[start:end]).decode() for start, end in pairwise(ends))
        for place, (names, _), _ in part:
            yield reading.records[place].id, Layers(lists.setdefault(names, list(names)), next(texts), next(texts))


def _in_order(names: tuple[str, ...], packed: Packed) -> bytes:
    """Packed errors in the order of these names, NaN for one that has none."""
    if packed[0] == names:
        return packed[1]
    errors = unpacked(packed)
    return array("d", [math.nan if (error := errors.get(name)) is None else error for name in names]).tobytes()


def _thinned(points: Sequence[Sequence[float | None]]) -> list[Sequence[float]]:
    """At most about MOST_STEPS points, the last one among them; those without a number are left out."""
    points = [point for point in points if None not in point and all(map(math.isfinite, point))]
    every = -(-len(points) // MOST_STEPS)
    return [*points[: len(points) - 1 : every], *points[-1:]] if every > 1 else list(points)


# ------------------------------------------------------------------------------------------------------ the page


def page_data(found: Found, where: str = "") -> dict[str, Any]:
    """Everything on the page. `comparisons` hold runs that may be compared; nothing is drawn across two of them.

    where: the results folder as a user typed it, for commands on the page; "" for the usual one.
    """
    shared = Shared()
    runs: list[dict[str, Any]] = []
    comparisons = []
    scaling = []
    for folder, records in found.folders.items():
        places: dict[str, int] = {}
        judge = tables.judge_of(found.results / folder) if found.results else None
        blocks = sorted(tables.comparable(records), key=len, reverse=True)
        for block in blocks:
            ordered = tables.in_print_order(block)
            about = [rows.describe(record) for record in ordered]
            comparisons.append({"folder": folder, **_comparison(ordered, about, judge, len(runs), shared)})
            places |= {record.id: len(runs) + k for k, record in enumerate(ordered)}
            runs += [
                _run(record, described, folder, found.layers.get((folder, record.id)), shared)
                for record, described in zip(ordered, about, strict=True)
            ]
        scaling += _scaling(records, folder, places)
    _tell_apart(comparisons)
    return {
        "comparisons": [shown(entry | {"table": None}) | {"table": entry["table"]} for entry in comparisons],
        "runs": runs,
        "scaling": shown(scaling),
        "broken": shown(found.broken),
        "results": plain(where),
        "shared": shared.values,
    }


def _comparison(
    records: list[RunRecord], about: list[rows.Description], judge: Judge | None, first: int, shared: Shared
) -> dict[str, Any]:
    """One block: its table, fit to be shown, axes, non-dominated sets. Runs are numbered from `first`."""
    block = tables.block_of(records, judge)
    references, collapsed = (
        frozenset(record.id for record, described in zip(records, about, strict=True) if getattr(described, kind))
        for kind in ("dense", "collapsed")
    )
    axes = axes_of(records, references)
    return {
        "title": block.title,
        "first": first,
        "count": len(records),
        "protocol": list(block.protocol),
        "table": _table(block),
        "axes": [_axis(axis) for axis in axes],
        "fronts": {
            f"{loss},{cost}": [first + k for k in front]
            for (loss, cost), front in fronts(records, axes, references, collapsed).items()
        },
        "environments": _environments(records, first, shared),
    }


def _tell_apart(comparisons: list[dict[str, Any]]) -> None:
    """Comparisons of one title and folder get the first line of their protocol that the others have not."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for comparison in comparisons:
        alike.setdefault((comparison["folder"], comparison["title"]), []).append(comparison)
    for same in alike.values():
        for comparison in same:
            others = [line for other in same if other is not comparison for line in other["protocol"]]
            own = [line for line in comparison["protocol"] if len(same) > 1 and line not in others]
            comparison["apart"] = own[0] if own else ""


def _axis(axis: Axis) -> dict[str, Any]:
    return {f.name: getattr(axis, f.name) for f in fields(axis)} | {"on": axis.on or ""}


def _table(block: Block) -> dict[str, Any]:
    return {
        "heads": shown(block.heads),
        "arrows": list(block.arrows),
        "words": sorted(block.words),
        "rows": [[_cell(cell) for cell in row.cells] for row in block.rows],
        "signs": shown(block.signs),
        "notes": shown(block.notes),
    }


def _cell(cell: Cell) -> list[Any]:
    """[value, interval, sign, bold, notes], without what is empty at the end."""
    parts = [plain(cell.value), cell.interval, cell.sign, int(cell.bold), list(cell.notes)]
    while parts and not parts[-1]:
        parts.pop()
    return parts


def _run(
    record: RunRecord, about: rows.Description, folder: str, layers: Layers | None, shared: Shared
) -> dict[str, Any]:
    run: dict[str, Any] = {
        "id": record.id,
        "folder": folder,
        "method": about.name,
        "title": about.title,
        "bits": about.bits,
        "sparsity": about.sparsity,
        "family": about.group.title if about.group else str(record.card.get("taxonomy") or "other"),
        "dense": about.dense,
        "collapsed": about.collapsed,
        "failed": [record.failure.stage, record.failure.reason] if record.failure else [],
        "command": record.command,
        "alone": _alone(record),
        "started": record.started,
        "finished": record.finished,
        "baseline": record.baseline or "",
        "artifact": str(record.artifact.get("sha256") or ""),
        "paper": str(record.card.get("paper") or ""),
    }
    run = {key: shown(value) for key, value in run.items() if value}
    config = {key: section for key, section in record.config.items() if key != "card" and section is not None}
    environment = {key: section for key, section in record.environment.items() if section}
    run["config"] = {plain(str(key)): shared.place(section) for key, section in config.items()}
    run["environment"] = {plain(str(key)): shared.place(section) for key, section in environment.items()}
    run |= {"layers": [shared.place(layers.names), layers.weights, layers.outputs]} if layers else {}
    batches, contexts = _latencies(record)
    parts = {
        "curves": {
            plain(name): [[step(x), rounded(y)] for x, y in points]
            for name, points in record.curves.items()
            if len(points) >= LEAST_POINTS
        },
        "batches": batches,
        "contexts": contexts,
    }
    run |= {key: part for key, part in parts.items() if part}
    return run | {"measurements": [_measurement(m, shared) for m in record.measurements]}


def _alone(record: RunRecord) -> str:
    """The command for this run alone; nothing where the record's own is none or cannot be read."""
    try:
        return single_command(record) if record.command else ""
    except ValueError:  # a quotation that does not end
        return ""


def _measurement(m: Measurement, shared: Shared) -> list[Any]:
    """[metric, on, value, unit, note, low, high], without what is missing at the end; text is a place in `shared`."""
    metric, on, unit, note = shared.texts(m.metric, m.on, m.unit, m.note)
    value = None if m.value is None else rounded(m.value)
    if m.interval:
        return [metric, on, value, unit, note, rounded(m.interval[0]), rounded(m.interval[1])]
    return [metric, on, value, unit, note]


def _environments(records: Iterable[RunRecord], first: int, shared: Shared) -> list[dict[str, Any]]:
    """Machines, versions and commits that the runs were made with, each with the number of its runs."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        parts = {key: record.environment.get(key) for key in ("machine", "versions", "source", "threads")}
        parts = {key: shared.place(part) for key, part in parts.items() if part}
        entry = found.setdefault(json.dumps(parts), {**parts, "count": 0})
        entry["count"] += 1
    return sorted(found.values(), key=lambda entry: -entry["count"])


# ------------------------------------------------------------------------------------------------------ latency


def _latencies(record: RunRecord) -> tuple[list[list[Any]], list[list[Any]]]:
    """Milliseconds per output token by batch and by context: [workload, size, ms, low, high, least].

    least: what reading every weight and cached byte once would take at the machine's own read bandwidth, or None.
    """
    batches, contexts = [], []
    for m in record.measurements:
        if m.value is None:
            continue
        if m.metric == "time_per_output_token_ms" and (found := re.match(r"batch (\d+), (.*)", m.on)):
            share = record.value("decode_roofline_fraction", m.on)
            batches.append(_latency(m, found[2], found[1], share and share * m.value))
        elif m.metric == "context_output_token_ms" and (found := re.match(r"(batch \d+), context (\d+), (.*)", m.on)):
            contexts.append(_latency(m, f"{found[1]}, {found[3]}", found[2], _least_ms(record, m.on)))
    return batches, contexts


def _latency(m: Measurement, workload: str, size: str, least: float | None) -> list[Any]:
    low, high = m.interval or (m.value, m.value)
    numbers = [rounded(number) for number in (m.value, low, high)]
    return [plain(workload), int(size), *numbers, least and rounded(least)]


def _least_ms(record: RunRecord, on: str) -> float | None:
    """Milliseconds to read the weights and the cache of this context once; None where a number is missing.

    The weights that a step reads, which a table of words is not among, are the roofline's, less the cache that it read.
    """
    roofline, cache = record.find("decode_roofline_fraction"), record.value("context_cache_bytes", on)
    read, timed = (READ.search(roofline.note), TIMED.match(roofline.on)) if roofline else (None, None)
    token = record.value("kv_cache_bytes_per_token")
    if read is None or timed is None or cache is None or token is None:
        return None
    batch, prompt, new = map(int, timed.groups())
    weights = int(read[1]) * 2**20 - batch * (prompt + new / 2) * token
    return (weights + cache) / (float(read[2]) * 1e9) * 1e3


# ------------------------------------------------------------------------------------------------------ scaling


def _scaling(records: Sequence[RunRecord], folder: str, places: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Quality against total model bits: one entry for each machine, metric and protocol. Models share a plot."""
    kept = [r for r in records if r.value("stored_bytes") is not None]
    by_machine: dict[tuple[str, str], list[RunRecord]] = {}
    for record in kept:
        by_machine.setdefault((rows.hardware_name(record), rows.machine_in_words(record)), []).append(record)
    for (hardware, machine), of_machine in by_machine.items():
        for metric, label in METRICS.items():
            protocols = dict.fromkeys(m.on for r in of_machine for m in r.measurements if m.metric == metric)
            for protocol in protocols:
                measured = [r for r in of_machine if r.value(metric, protocol) is not None]
                try:
                    types, dense, on, _ = points_of(measured, metric, protocol)
                except ConfigError:
                    continue  # no data type was measured in this way
                yield {
                    "folder": folder,
                    "title": f"{label}: {on}; {hardware}, {machine}",
                    "metric": label,
                    "points": [
                        [
                            places.get(point.record, -1),
                            f"{point.line if one else 'Dense'}, {point.model}",
                            point.width,
                            point.bits,
                            rounded(point.value),
                            *(rounded(end) for end in point.interval or (point.value, point.value)),
                            int(not one),
                        ]
                        for one, points in ((True, types), (False, dense))
                        for point in points
                    ],
                }
