"""Records → tables, in the survey's order: Markdown, LaTeX, HTML and CSV, from records only.

    python -m harness.tables table_1                                  prints table I, writes results/tables/table_1.*
    python -m harness.tables all paths.results=DIR model=NAME         every table, of one model
    python -m harness.tables table_1 across=model                     models side by side under one protocol
    python -m harness.tables table_1 strict=true                      an error instead of several blocks

One block of a table holds rows that may be compared: the same model, hardware, engine, machine, text and protocol
(the `on` of every measurement). Whatever differs in one of these stands in a block of its own; no column ever mixes
two.
"""

from __future__ import annotations

import difflib
import gc
import json
import math
import multiprocessing
import re
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from harness import markup
from harness.comparison import Arm, Judge, Kept
from harness.curve_plot import learning_curves
from harness.environment import telling
from harness.errors import ConfigError
from harness.noise_floor import read_floors
from harness.record_index import read_all
from harness.records import (
    OFF_GRID,
    REMOVED_SHARE,
    WITH_ZEROS,
    Measurement,
    RunRecord,
    write_text_atomically,
)
from harness.side_by_side import KINDS, in_one
from harness.table_formats import Block, Cell, Row, to_html, to_latex, to_markdown
from harness.taxonomy import DENSE, GROUPS, SURVEY, SYSTEMS, TABLES, Group, Table, placement, table_named
from harness.wheels import default_cache

RESULTS = Path(__file__).resolve().parents[1] / "results"

# Two records whose measurements of these differ in `on` ran another protocol.
SPEED_METRICS = frozenset(("time_to_first_token_ms", "time_per_output_token_ms", "decode_tokens_per_second"))
PROTOCOL_METRICS = SPEED_METRICS | {"perplexity", "accuracy"}
COMPARED_WITH_DENSE = PROTOCOL_METRICS
SHORT = {"perplexity", "kl_divergence", "accuracy", "rouge_l", "decoding_speedup", "effective_bits_per_weight"}
SHORT |= {"stored_bytes", "compress_seconds"}
SAME_AS_DENSE = "≈"
COLLAPSED = "✗"
WIDTH = 160  # characters of a line of a table in a file
MANY = 2000  # records whose CSV file is worth a process of its own
LONGEST_TITLE = 32
MOST_WORDS = 4  # settings in brackets behind a title
LONGEST_TASK = 12  # characters of a head
LONGEST_NOTE = 400  # characters of a failure's reason below a table; the CSV file has all


@dataclass(frozen=True)
class Quantity:
    """How one metric is shown: a short head with its unit, and its digits.

    every_workload: a column for each `on` found; otherwise the smallest batch, or the first measured, alone.
    longest: the one with the longest context, which the head names.
    """

    metric: str
    head: str
    show: Callable[[float], str]
    scale: float = 1.0
    interval: Callable[[float], str] | None = None
    every_workload: bool = False
    longest: bool = False


def _significant(digits: int) -> Callable[[float], str]:
    """Format with this many significant digits, never in exponents, whole numbers in full."""

    def show(value: float) -> str:
        if value == 0:
            return "0"
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"

    return show


def _fixed(decimals: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{decimals}f}"


QUANTITIES = (
    Quantity("perplexity", "PPL", _significant(4), interval=_significant(3), every_workload=True),
    Quantity("kl_divergence", "KL nats", _significant(3), every_workload=True),
    Quantity("top1_agreement", "top-1 %", _fixed(1), scale=100, every_workload=True),
    Quantity("stream_perplexity_ratio", "stream ×", _significant(4), interval=_significant(3), every_workload=True),
    Quantity("accuracy_before", "before %", _fixed(1), scale=100, every_workload=True),
    Quantity("accuracy", "task %", _fixed(1), scale=100, interval=_fixed(0), every_workload=True),
    Quantity("accuracy_with_calculator", "calculator %", _fixed(1), scale=100, interval=_fixed(0), every_workload=True),
    Quantity("rouge_l_before", "ROUGE-L before", _fixed(1), scale=100, every_workload=True),
    Quantity("rouge_l", "ROUGE-L", _fixed(1), scale=100, interval=_fixed(0), every_workload=True),
    Quantity("time_to_first_token_ms", "TTFT ms", _significant(3)),
    Quantity("time_per_output_token_ms", "TPOT ms", _significant(3)),
    Quantity("decode_tokens_per_second", "t/s", _significant(3), every_workload=True),
    Quantity("requests_per_second", "req/s", _significant(3), every_workload=True),
    Quantity("decoding_speedup", "speed-up ×", _significant(3), every_workload=True),
    Quantity("guess_acceptance", "accepted %", _fixed(1), scale=100, every_workload=True),
    Quantity("context_output_token_ms", "TPOT ms", _significant(3), longest=True),
    Quantity("context_cache_bytes", "cache MB", _significant(3), scale=1e-6, longest=True),
    Quantity("context_peak_exponent", "peak ~ n^", _fixed(2), every_workload=True),
    Quantity("cache_slots_per_token", "slots/token", _significant(3), every_workload=True),
    Quantity("effective_bits_per_weight", "bits/w", _fixed(2), every_workload=True),
    Quantity("stored_bytes", "MB", _significant(3), scale=1e-6, every_workload=True),
    Quantity("compress_seconds", "comp. s", _significant(3)),
    Quantity("peak_compress_bytes", "comp. GB", _significant(3), scale=1e-9),
    Quantity("teacher_tokens", "teach. k", _significant(3), scale=1e-3),
    Quantity("training_tokens", "train. k", _significant(3), scale=1e-3),
)


@dataclass(frozen=True)
class Column:
    """A quantity under one protocol or workload. `on` is None where any will do (the first that a record has)."""

    quantity: Quantity
    on: str | None
    head: str
    better: str


@dataclass
class _Notes:
    """Footnotes in order of first use; the same text has one number."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


# ---------------------------------------------------------------------------------------------- what goes together


def comparable(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Split records into blocks whose rows may be compared.

    Equal model, hardware, engine, machine and text come first. Among those, records with the same protocol share a
    block, and one that measured a part of what another block measured (a failed run, speed alone) joins it.
    """
    settings: dict[str, dict[frozenset, list[RunRecord]]] = {}
    for record in records:
        settings.setdefault(_setting(record), {}).setdefault(_protocol(record), []).append(record)
    blocks = []
    for by_protocol in settings.values():
        kept: dict[frozenset, list[RunRecord]] = {}
        for protocol in sorted(by_protocol, key=len, reverse=True):
            for record in by_protocol[protocol]:
                wider = [other for other in kept if protocol < other]
                home = max(wider, key=lambda other: _kinship(record, kept[other]), default=protocol)
                kept.setdefault(home, []).append(record)
        blocks += map(_one_dense, kept.values())
    return blocks


def _setting(record: RunRecord) -> str:
    config = record.config
    keys = [record.model, config.get("model"), telling(config.get("hardware") or {}), config.get("engine")]
    keys += [_evaluated_text(record), machine_in_words(record)]
    return json.dumps(keys, sort_keys=True, default=str)


def _evaluated_text(record: RunRecord) -> Any:
    """The corpus without its calibration text, which belongs to a method, not to the protocol."""
    corpus = record.config.get("corpus")
    return {k: v for k, v in corpus.items() if k != "calibration"} if isinstance(corpus, dict) else corpus


def _protocol(record: RunRecord) -> frozenset[tuple[str, str]]:
    return frozenset((m.metric, m.on) for m in record.measurements if m.metric in PROTOCOL_METRICS)


def _kinship(record: RunRecord, others: list[RunRecord]) -> tuple[int, int]:
    """How well a record fits a block that measured more: the same evaluation first, then the larger block."""
    asked = record.config.get("evaluation")
    return sum(other.config.get("evaluation") == asked for other in others), len(others)


def machine_in_words(record: RunRecord) -> str:
    """The machine in words: "AMD EPYC 9B14, 2 cores"."""
    machine = record.environment.get("machine") or {}
    if not isinstance(machine, dict):
        return str(machine)
    gpus = machine.get("gpus") or []
    counted = [f"{gpus.count(gpu)} × {gpu}" if gpus.count(gpu) > 1 else gpu for gpu in dict.fromkeys(gpus)]
    cores = f"{machine['cores']} cores" if "cores" in machine else ""
    return ", ".join(filter(None, [*counted, machine.get("processor", ""), cores])) or "unknown machine"


def _refuse_several(blocks: list[list[RunRecord]]) -> None:
    """Raise ConfigError when one model on one hardware has records that cannot share a block."""
    seen: dict[tuple[str, str], list[RunRecord]] = {}
    for block in blocks:
        first = seen.setdefault((block[0].model, _hardware_name(block[0])), block)
        if first is not block:
            one, two = _difference(first[0], block[0])
            raise ConfigError(
                f"strict=true: records of {block[0].model} on {_hardware_name(block[0])} do not compare: "
                f"{first[0].id} has {one}; {block[0].id} has {two}. Leave strict out for a block of each"
            )


def _difference(a: RunRecord, b: RunRecord) -> tuple[str, str]:
    if machine_in_words(a) != machine_in_words(b):
        return f'machine "{machine_in_words(a)}"', f'machine "{machine_in_words(b)}"'
    here, there = _protocol(a), _protocol(b)
    if here != there:
        words = [
            " and ".join(f'{metric} on "{on}"' for metric, on in sorted(mine)) or "no measurement of its own"
            for mine in (here - there, there - here)
        ]
        return words[0], words[1]
    for section in ("model", "hardware", "engine", "corpus"):
        if a.config.get(section) != b.config.get(section):
            return f"{section} {a.config.get(section)}", f"{section} {b.config.get(section)}"
    raise AssertionError("blocks differ in their setting or protocol")


def _engine_name(record: RunRecord) -> str:
    """The engine where it is not the one that records leave out."""
    return str((record.config.get("engine") or {}).get("name", ""))


def _hardware_name(record: RunRecord) -> str:
    return str((record.config.get("hardware") or {}).get("name", "unknown hardware"))


# ---------------------------------------------------------------------------------------------------- one block


def blocks_of(
    table: Table,
    records: Sequence[RunRecord],
    strict: bool = False,
    judge: Judge | None = None,
    across: str | None = None,
) -> list[Block]:
    """The blocks of one table. Dense runs come along where a system of the table stands beside them.

    across: "model" or "machine", to set them side by side in one block. Raises ConfigError where they do not compare.
    """
    rows = [r for r in records if _name(r) == DENSE.name or _group(r) in table.groups]
    split = [b for b in comparable(rows) if any(_name(r) != DENSE.name for r in b)]
    if strict:
        _refuse_several(split)
    if across is not None:
        names = {"model": lambda r: r.model, "machine": lambda r: f"{_hardware_name(r)} · {machine_in_words(r)}"}
        return [in_one(split, across, names, _protocol, lambda side: _block(side, table.groups, judge, short=True))]
    return [_block(records, table.groups, judge) for records in split]


def _one_dense(records: list[RunRecord]) -> list[RunRecord]:
    """A block in which one dense model stands once, however many ways its students were asked before they were taught.

    What it answered in each way is in the rows of those students.
    """
    dense = [record for record in records if _name(record) == DENSE.name]
    asked = {m.on for record in records for m in record.measurements if m.metric == "accuracy_before"}
    if len(dense) < 2 or not asked:
        return records
    kept = [m for m in dense[0].measurements if not (m.metric.startswith("accuracy") and m.on in asked)]
    return [replace(dense[0], measurements=kept), *(record for record in records if _name(record) != DENSE.name)]


def _block(
    records: list[RunRecord],
    groups: Sequence[Group] = (),
    judge: Judge | None = None,
    short: bool = False,
    footnotes: bool = True,
) -> Block:
    """One block. With groups, their headings stand between the rows and their systems without a record below.

    short: the columns that most questions are about, without kernels.
    """
    judge = replace(judge or Judge(), tests=set())
    records = sorted(records, key=_order)
    columns = _columns(records)
    kernels = _kernels(records)
    if short:
        timed = next((c for c in columns if c.quantity.metric == "decode_tokens_per_second"), None)
        columns = [c for c in columns if c.quantity.metric in SHORT or c is timed]
        kernels = replace(kernels, each={})
    swept = _sparsities(records)
    labels = row_labels(records)
    notes = _Notes()
    remarks = partial(_remarks, beside=records) if footnotes else lambda _: []
    best, same = _best(records, columns, judge), _same_as_dense(records, columns, judge)
    heads = ["Method", "Bits", *(["sparsity"] if swept else []), *(c.head for c in columns)]
    rows: list[Row] = []
    previous: Group | None = None
    for record in records:
        group = _group(record)
        if groups and group is not None and group is not previous:
            rows.append(Row(group=f"{group.title} ({group.source})"))
            previous = group
        cells = [
            Cell(
                labels[record.id],
                notes=tuple(notes.number(text) for text in remarks(record)),
            ),
            Cell(_widths(record)),
        ]
        if swept:
            cells.append(Cell("" if _sparsity(record) is None else str(_sparsity(record))))
        cells += [_cell(record, c, (record.id, c.head) in best, (record.id, c.head) in same) for c in columns]
        if record.status == "failed":
            gap = next((k for k in range(len(cells) - len(columns), len(cells)) if not cells[k].value), 0)
            cells[gap] = replace(cells[gap], value="failed" if gap else f"{cells[0].value}, failed")
        if kernels.each:
            cells.append(Cell(kernels.each.get(record.id, "")))
        rows.append(Row(tuple(cells)))
    return Block(
        title=" · ".join(
            filter(
                None,
                [records[0].model, _engine_name(records[0]), _hardware_name(records[0]), machine_in_words(records[0])],
            )
        ),
        protocol=tuple(_protocol_lines(records, columns, kernels.shared)),
        heads=(*heads, *(["kernel"] if kernels.each else [])),
        arrows=(*[""] * (len(heads) - len(columns)), *(_arrow(c) for c in columns), *([""] if kernels.each else [])),
        rows=tuple(rows),
        signs=tuple(_signs(rows, judge)),
        notes=tuple(notes.texts),
        absent=_absent(records, groups),
        naming=3 if swept else 2,
        seam=next((len(heads) - len(columns) + k for k, c in enumerate(columns) if _is_speed(c)), None),
    )


@dataclass(frozen=True)
class Description:
    """What a row of a table says of its record besides the numbers.

    bits: as `_widths` has it; sparsity: as asked for, "" without; group: None for a system that the survey has not.
    """

    name: str
    title: str
    bits: str
    sparsity: str
    group: Group | None
    hardware: str
    machine: str
    engine: str
    dense: bool
    collapsed: bool


def describe(record: RunRecord) -> Description:
    """The record in the words of the tables, for whatever shows records in another way."""
    sparsity = _sparsity(record)
    return Description(
        name=_name(record),
        title=_title(record),
        bits=_widths(record),
        sparsity="" if sparsity is None else str(sparsity),
        group=_group(record),
        hardware=_hardware_name(record),
        machine=machine_in_words(record),
        engine=_engine_name(record),
        dense=_name(record) == DENSE.name,
        collapsed=_collapsed(record),
    )


def in_print_order(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Dense first, then as in the survey; the order of the rows of `block_of`."""
    return sorted(records, key=_order)


def block_of(records: Iterable[RunRecord], judge: Judge | None = None) -> Block:
    """Records that may be compared as one block, whatever their family, without headings between the rows."""
    return _block(list(records), judge=judge)


def _name(record: RunRecord) -> str:
    return str(record.card.get("name", ""))


def _activation_bits(record: RunRecord) -> float | None:
    return record.card.get("activation_bits")


def _key_value_bits(record: RunRecord) -> float | None:
    return record.card.get("key_value_bits")


def _widths(record: RunRecord) -> str:
    """Bits of weights, of what they multiply, of cached keys and values: "4", "W4A8", "KV8", "W4A16KV8"."""
    weights, inputs, cached = record.bits, _activation_bits(record), _key_value_bits(record)
    if inputs is None and (cached is None or weights is None):
        return f"{weights:g}" if weights is not None else "" if cached is None else f"KV{cached:g}"
    return f"W{weights or 16:g}A{inputs or 16:g}" + ("" if cached is None else f"KV{cached:g}")


def _group(record: RunRecord) -> Group | None:
    return placement(_name(record), str(record.card.get("taxonomy", "")))


def _order(record: RunRecord) -> tuple:
    """Dense first; groups and systems as in the survey, others after them by name; bits downwards, sparsity upwards."""
    name, group = _name(record), _group(record)
    places = list(GROUPS.values())
    known = list(SYSTEMS)
    return (
        name != DENSE.name,
        places.index(group) if group else len(places),
        known.index(name) if name in SYSTEMS else len(known),
        name,
        -(record.bits if record.bits is not None else -math.inf),
        -(_activation_bits(record) or 16),
        -(_key_value_bits(record) or 16),
        str(_sparsity(record) or ""),
        record.id,
    )


def row_labels(records: Sequence[RunRecord]) -> dict[str, str]:
    """What each row is called: the title, and what sets it apart from rows of the same title and bits."""
    alike: dict[tuple, list[RunRecord]] = {}
    for record in records:
        alike.setdefault((_name(record), _widths(record), str(_sparsity(record))), []).append(record)
    labels = {}
    for same in alike.values():
        apart = _apart({record.id: _leaves(record) for record in same})
        for record in same:
            words = apart[record.id]
            if len(words) > MOST_WORDS:
                words = [record.id[:8]]
            labels[record.id] = _title(record) + (f" ({', '.join(words)})" if words else "")
    return labels


def _apart(leaves: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Record id → "key=value" of what it has and most of the others have not; a key alone where that is clear."""
    keys = sorted({key for found in leaves.values() for key in found})
    differing = [key for key in keys if len({str(found.get(key)) for found in leaves.values()}) > 1]
    differing = [key for key in differing if not key.endswith("._target_")] or differing
    tails = Counter(key.rpartition(".")[2] for key in differing)
    usual = {key: Counter(str(found.get(key)) for found in leaves.values()).most_common(1)[0] for key in differing}
    words: dict[str, list[str]] = {}
    for record, found in leaves.items():
        words[record] = []
        for key in differing:
            value, count = usual[key]
            if found.get(key) is None or (str(found[key]) == value and 2 * count > len(leaves)):
                continue
            tail = key.rpartition(".")[2]
            name = tail if tails[tail] == 1 else ".".join(key.split(".")[-2:])
            words[record].append(f"{name}={found[key]}")
    said = Counter(map(tuple, words.values()))
    return {record: own if said[tuple(own)] == 1 else [record[:8]] for record, own in words.items()}


def _title(record: RunRecord) -> str:
    name = _name(record)
    if name in SYSTEMS:
        return SYSTEMS[name].title
    return _shortened(str(record.card.get("title") or name), LONGEST_TITLE)


def _leaves(record: RunRecord) -> dict[str, Any]:
    """Settings by which two runs of one method may differ: dotted name → value."""
    evaluation = record.config.get("evaluation") or {}
    found: dict[str, Any] = {"seed": record.config.get("seed"), "evaluation": evaluation.get("name")}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)
        else:
            found[prefix] = value

    walk("method", record.config.get("method"))
    if record.card.get("calibrates", True) is True:
        walk("calibration", record.config.get("calibration"))
    return found


def _sparsity(record: RunRecord) -> Any:
    method = record.config.get("method")
    if not isinstance(method, dict):
        return None
    parts = [part for step in (method, *method.get("steps", [])) for part in (step, step.get("pruner") or {})]
    return next((part["sparsity"] for part in parts if part.get("sparsity") is not None), None)


def _sparsities(records: list[RunRecord]) -> bool:
    return any(_sparsity(record) is not None for record in records)


def _measured(record: RunRecord, column: Column) -> Measurement | None:
    if column.on is not None or column.quantity.every_workload:
        found = record.find(column.quantity.metric, column.on)
    else:
        found = record.find(column.quantity.metric)
    if found is None and column.quantity.metric == "stored_bytes" and record.artifact.get("bytes") is not None:
        return Measurement("stored_bytes", record.artifact["bytes"], "bytes", "artifact on disk", "lower")
    return found


def _columns(records: list[RunRecord]) -> list[Column]:
    by_metric: dict[str, list[Measurement]] = {}
    for record in records:
        for m in record.measurements:
            by_metric.setdefault(m.metric, []).append(m)
    columns = []
    for quantity in QUANTITIES:
        found = by_metric.get(quantity.metric, [])
        if not found and quantity.metric == "stored_bytes" and any(r.artifact.get("bytes") for r in records):
            columns.append(Column(quantity, None, quantity.head, "lower"))
        elif found and quantity.longest:
            on = max((m.on for m in found), key=_context)
            head = f"{quantity.head} at {_context(on):.0f}"
            columns.append(Column(quantity, on, head, found[0].better))
        elif found and quantity.every_workload:
            workloads = sorted(dict.fromkeys(m.on for m in found), key=_batch)
            heads = _short_names(workloads)
            columns += [
                Column(quantity, on, f"{quantity.head} {heads[on]}".strip(), b)
                for on in workloads
                for b in [next(m.better for m in found if m.on == on)]
            ]
        elif found and quantity.metric in PROTOCOL_METRICS:
            first = min(found, key=lambda m: _batch(m.on))
            columns.append(Column(quantity, first.on, quantity.head, first.better))
        elif found:
            columns.append(Column(quantity, None, quantity.head, found[0].better))
    return _told_apart([_task_head(column) for column in columns])


def _told_apart(columns: list[Column]) -> list[Column]:
    """Columns of the same head (one task, two ways to judge an answer) get the last part of their `on` added."""
    heads = [column.head for column in columns]

    def apart(column: Column) -> Column:
        if column.on is None or heads.count(column.head) == 1:
            return column
        return replace(column, head=f"{column.head} {column.on.rpartition(', ')[2]}")

    return [apart(column) for column in columns]


def _task_head(column: Column) -> Column:
    """A task's column is named by the first word of its `on`, the task; where that is long, by its last part."""
    if column.quantity.metric != "accuracy" or column.on is None:
        return column
    task = re.split(r"[ ,]", column.on, maxsplit=1)[0]
    return replace(column, head=f"{task if len(task) <= LONGEST_TASK else task.rpartition('_')[2]} %")


def _batch(on: str) -> float:
    found = re.search(r"\bbatch (\d+)", on)
    return float(found[1]) if found else math.inf


def _context(on: str) -> float:
    found = re.search(r"\bcontext (\d+)", on)
    return float(found[1]) if found else 0


def _short_names(workloads: list[str]) -> dict[str, str]:
    """What tells several `on` apart, as short as can be: "batch 4, prompt 128" → "b4"; nothing for a single one."""
    parts = {on: on.split(", ") for on in workloads}
    shared = (
        set.intersection(*(set(p) for p in parts.values())) if len(workloads) > 1 else set(workloads[0].split(", "))
    )
    names = {on: ", ".join(p for p in parts[on] if p not in shared) for on in workloads}
    return {on: re.sub(r"\bbatch (\d+)", r"b\1", name) for on, name in names.items()}


def _cell(record: RunRecord, column: Column, bold: bool, same: bool) -> Cell:
    measurement = _measured(record, column)
    if measurement is None:
        return Cell()
    collapsed = COLLAPSED if "collapsed" in measurement.note else ""
    if measurement.value is None:
        return Cell(sign=collapsed)
    quantity = column.quantity
    scale = 1.0 if measurement.unit == "%" else quantity.scale
    interval = half_width = ""
    if measurement.interval and quantity.interval:
        low, high = (scale * end for end in measurement.interval)
        interval = f"[{quantity.interval(low)}–{quantity.interval(high)}]"
        half_width = f"±{_significant(2)((high - low) / 2)}"
    sign = f"{SAME_AS_DENSE if same else ''} {collapsed}".strip()
    return Cell(quantity.show(scale * measurement.value), interval, half_width, sign, bold)


def _same_as_dense(records: list[RunRecord], columns: list[Column], judge: Judge) -> set[tuple[str, str]]:
    """Record and head of every number that no test tells from the dense run's."""
    dense = next((r for r in records if _name(r) == DENSE.name), None)
    same = set()
    for column in columns:
        if column.quantity.metric in COMPARED_WITH_DENSE:
            reference = _measured(dense, column) if dense else None
            arm = (dense, reference) if reference is not None and reference.value is not None else None
            rows = _arms([r for r in records if _name(r) != DENSE.name], column)
            same |= {(id, column.head) for id in judge.same_as_dense(rows, arm)}
    return same


def _arms(records: Iterable[RunRecord], column: Column) -> list[Arm]:
    """The records that have a number in this column, with it."""
    return [(r, m) for r in records if (m := _measured(r, column)) is not None and m.value is not None]


def _collapsed(record: RunRecord) -> bool:
    return any("collapsed" in m.note for m in record.measurements if m.metric in ("perplexity", "perplexity_ratio"))


def _best(records: list[RunRecord], columns: list[Column], judge: Judge) -> set[tuple[str, str]]:
    """Record and head of every best value, and what ties with it, among rows of equal bits and sparsity.

    A reference, a failed or a collapsed row is no competitor; a value alone or equal to all others is not best.
    """
    rivals: dict[tuple, list[RunRecord]] = {}
    for record in records:
        if _name(record) != DENSE.name and record.status == "finished" and not _collapsed(record):
            rivals.setdefault((_widths(record), str(_sparsity(record))), []).append(record)
    best = set()
    for group in rivals.values():
        for column in columns:
            rows = _arms(group, column)
            if len(rows) > 1:
                ties = _ties(column, rows, judge)
                best |= {(id, column.head) for id in ties if len(ties) < len(rows)}
    return best


def _ties(column: Column, rows: list[Arm], judge: Judge) -> set[str]:
    """Which of these records hold the best value: equal to it in the digits shown, or not told from it by a test."""

    def shown(m: Measurement) -> str:
        return column.quantity.show(column.quantity.scale * m.value)

    top = (min if column.better == "lower" else max)(rows, key=lambda arm: arm[1].value)
    best = shown(top[1])
    return {record.id for record, m in rows if shown(m) == best} | judge.ties(rows, top)


@dataclass(frozen=True)
class _Kernels:
    shared: str
    each: dict[str, str]


def _kernels(records: list[RunRecord]) -> _Kernels:
    """The kernel of every row, and what all rows say besides it (the dtype, mostly), said once."""
    notes = {
        record.id: (record.find("time_per_output_token_ms") or record.find("decode_tokens_per_second") or _NONE).note
        for record in records
    }
    parts = {id: note.partition("; ")[0].split(", ") for id, note in notes.items() if note}
    rest = [set(q[1:]) for q in parts.values()]
    shared = set.intersection(*rest) if rest else set()
    each = {id: ", ".join([q[0], *(p for p in q[1:] if p not in shared)]) for id, q in parts.items()}
    return _Kernels(", ".join(sorted(shared)), each)


_NONE = Measurement("", None, "", "", "lower")


def _remarks(record: RunRecord, beside: Sequence[RunRecord] = ()) -> list[str]:
    """Footnotes of a row: departures from the paper, what its author must say, what else runs it, why it has gaps.

    beside: the other rows of the block; a stack is compared with its steps among them.
    """
    remarks = [*_lines_of(record, "departures"), *_lines_of(record, "notes"), *_additivity(record, beside)]
    remarks += [*_removal(record, beside), *_zeros(record), *_off_grid(record)]
    if record.card.get("runtime"):
        remarks.append(f"other runtimes: {record.card['runtime']}")
    if record.failure:
        remarks.append(_shortened(f"failed in {record.failure.stage}: {record.failure.reason}"))
    remarks += [
        _shortened(f"{m.metric} not measured ({m.on}): {m.note}")
        for m in record.measurements
        if m.value is None and m.note and m.metric in {q.metric for q in QUANTITIES}
    ]
    remarks += [
        _shortened(f"{m.metric} {m.note}")  # e.g. a baseline outside its anchor
        for m in record.measurements
        if m.metric == "perplexity" and m.value is not None and m.note and "collapsed" not in m.note
    ]
    remarks += _doubts_about_speed(record)
    return remarks


def _additivity(record: RunRecord, beside: Sequence[RunRecord]) -> list[str]:
    """What a stack's steps cost alone, what that predicts if losses (nats per token) add up, what was measured."""
    steps = (record.config.get("method") or {}).get("steps") or []
    dense = next((r for r in beside if _name(r) == DENSE.name), None)
    alone = [next((r for r in beside if r.config.get("method") == step), None) for step in steps]
    found = [r.find("perplexity") if r else None for r in (dense, record, *alone)]
    if not steps or any(m is None or m.value is None for m in found):
        return []
    start, measured, *parts = (math.log(m.value) for m in found)
    predicted = math.exp(start + sum(part - start for part in parts))
    listed = ", ".join(f"{_title(r)} {math.exp(part):.4g}" for r, part in zip(alone, parts, strict=True))
    return [
        f"alone: {listed}; if their losses added up, {predicted:.4g}; measured {math.exp(measured):.4g} "
        f"({math.exp(measured) / predicted - 1:+.1%})"
    ]


def _removal(record: RunRecord, beside: Sequence[RunRecord]) -> list[str]:
    """What a structured pruner took out, beside what it was asked for, and the parameters that are left."""
    reached = record.curves.get(REMOVED_SHARE)
    if not reached:
        return []
    parts = [f"{reached[-1][1]:.1%} of the blocks' weights removed, {_sparsity(record)} asked for"]
    dense = next((r for r in beside if _name(r) == DENSE.name), None)
    left, whole = (r.value("parameters") if r else None for r in (record, dense))
    if left and whole:
        parts.append(f"{left:,.0f} of {whole:,.0f} parameters left ({left / whole - 1:+.1%})")
    return ["; ".join(parts)]


def _zeros(record: RunRecord) -> list[str]:
    """That zeros were multiplied like other numbers, where no speed column says which kernel ran."""
    loaded = record.find("loaded_weight_bytes")
    if record.find("time_per_output_token_ms") or loaded is None or WITH_ZEROS not in loaded.note:
        return []
    return [f"runs {WITH_ZEROS}: no faster than dense"]


def _off_grid(record: RunRecord) -> list[str]:
    """That a stack has no longer the bit-width that its row names."""
    off = record.curves.get(OFF_GRID)
    return [f"{off[-1][1]:.0f} linears left the grid of an earlier step and are stored in 16 bits"] if off else []


def _lines_of(record: RunRecord, field: str) -> list[str]:
    lines = record.card.get(field) or []
    return [str(text) for text in ([lines] if isinstance(lines, str) else lines)]


def _doubts_about_speed(record: RunRecord) -> list[str]:
    """What a reader must know before trusting the times: foreign load, repeats that did not settle."""
    doubts: dict[str, list[str]] = {}
    for m in record.measurements:
        if m.metric == "time_per_output_token_ms":
            for part in m.note.split("; ")[1:]:
                if not re.fullmatch(r"\d+ requests", part):
                    doubts.setdefault(m.on.partition(",")[0], []).append(part)
    return [_shortened(f"speed at {on}: {', '.join(parts)}") for on, parts in doubts.items()]


def _shortened(text: str, length: int = LONGEST_NOTE) -> str:
    line = markup.plain(text)
    return line if len(line) <= length else line[: length - 1] + "…"


def _signs(rows: list[Row], judge: Judge) -> list[str]:
    used = " ".join(cell.sign for row in rows for cell in row.cells)
    bold = any(cell.bold for row in rows for cell in row.cells)
    signs = []
    if bold:
        signs.append("bold: best among rows of equal bits, with what no test tells from it")
    if SAME_AS_DENSE in used:
        signs.append(f"{SAME_AS_DENSE}: not to be told from dense")
    if (bold or SAME_AS_DENSE in used) and judge.tests:
        signs.append(f"tests at 5 % for a column together (Holm): {', '.join(sorted(judge.tests))}")
    if COLLAPSED in used:
        signs.append(f"{COLLAPSED}: collapsed, shown but never a reference")
    return signs


def _is_speed(column: Column) -> bool:
    return column.quantity.metric in SPEED_METRICS


def _arrow(column: Column) -> str:
    return "↓" if column.better == "lower" else "↑"


def _absent(records: list[RunRecord], groups: Sequence[Group]) -> str:
    present = {_name(record) for record in records}
    missing = [system.title for group in groups for system in group.systems if system.name not in present]
    return ", ".join(missing)


def _protocol_lines(records: list[RunRecord], columns: list[Column], kernel: str) -> list[str]:
    """What a reader must know before the numbers: model, workloads, text, arithmetic, versions, dates."""
    notes = dict.fromkeys(str((record.config.get("model") or {}).get("note") or "") for record in records)
    lines = [f"Model: {_shortened(note)}" for note in notes if note]
    for metric, words in (("perplexity", "Perplexity"), ("accuracy", "Tasks")):
        on = [c.on for c in columns if c.quantity.metric == metric and c.on]
        if on:
            lines.append(f"{words}: {'; '.join(dict.fromkeys(on))}")
    if any(c.quantity.metric in ("kl_divergence", "top1_agreement") for c in columns):
        lines.append("KL(dense ‖ row) per token and top-1 agreement: against the dense run on the same windows")
    speed = [c for c in columns if c.quantity.metric in PROTOCOL_METRICS and c.on and _batch(c.on) < math.inf]
    if speed:
        on = "; ".join(f"{heads} at {on}" for on, heads in _heads_by_workload(speed).items())
        lines.append(f"Speed: {on}" + (f"; {kernel}" if kernel and not on.endswith(kernel) else ""))
    load = [f"{c.head}: {c.on}" for c in columns if c.quantity.metric == "requests_per_second" and c.on]
    if load:
        lines.append(f"Load: {'; '.join(load)}")
    calibration = {json.dumps(r.config.get("calibration"), sort_keys=True) for r in records if _name(r) != DENSE.name}
    calibration.discard("null")
    if len(calibration) == 1:
        settings = json.loads(calibration.pop())
        if isinstance(settings, dict):
            texts = [(record.environment.get("text") or {}) for record in records]
            source = _distinct(text["calibration"]["name"] for text in texts if text.get("calibration"))
            domain = "in the domain of the evaluation" if any(t.get("calibrated_in_domain") for t in texts) else ""
            facts = [source, *(f"{key} {value}" for key, value in settings.items()), domain]
            lines.append("Calibration: " + ", ".join(filter(None, facts)))
    environments = [record.environment for record in records]
    if _engine_name(records[0]):
        outside = _distinct(
            f"{package} {version}"
            for e in environments
            for package, version in (e.get("engine_versions") or {}).items()
        )
        lines.append(f"Engine: {_engine_name(records[0])}, in an interpreter of its own ({outside})")
    facts = [
        _distinct(f"{e['scoring_dtype']} scoring" for e in environments if e.get("scoring_dtype")),
        _distinct(f"{e['decoding_dtype']} decoding" for e in environments if e.get("decoding_dtype")),
        _distinct(f"{e['threads']} threads" for e in environments if e.get("threads")),
    ]
    for package in ("torch", "transformers"):
        facts.append(
            _distinct(f"{package} {v[package]}" for e in environments if package in (v := e.get("versions") or {}))
        )
    days = sorted(r.finished[:10] for r in records if r.finished)
    if days:
        facts.append(f"measured {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else ""))
    facts.append(_commits(environments))
    lines.append(", ".join(filter(None, facts)))
    return [line for line in lines if line]


def _heads_by_workload(columns: list[Column]) -> dict[str, str]:
    heads: dict[str, list[str]] = {}
    for column in columns:
        heads.setdefault(column.on or "", []).append(column.head.removesuffix(" ms"))
    return {on: ", ".join(names) for on, names in heads.items()}


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _commits(environments: list[dict[str, Any]]) -> str:
    sources = [e.get("source") or {} for e in environments]
    found = _distinct(
        f"{s['commit'][:8]}{' with changes' if s.get('dirty') else ''}" for s in sources if s.get("commit")
    )
    return f"commit {found}" if found else ""


CSV_HEADS = (
    *("model", "hardware", "machine", "group", "method", "title", "bits", "activation_bits", "key_value_bits"),
    *("sparsity", "status", "failed_stage", "failure_reason", "metric", "value", "low", "high", "unit", "on", "better"),
    *("note", "finished", "record", "baseline"),
)


def to_csv(records: Iterable[RunRecord]) -> str:
    """One row per measurement, nothing rounded or left out; a failed run without any has one row of its own.

    Text that a spreadsheet would run as a formula is quoted.
    """
    word = cache(_csv_word)  # the same few stand in every row

    def cells(values: Iterable[Any]) -> str:
        return ",".join([word(v) if isinstance(v, str) else "" if v is None else str(v) for v in values])

    lines = [",".join(CSV_HEADS)]
    for record in records:
        group, failure = _group(record), record.failure
        run = cells(
            (
                *(record.model, _hardware_name(record), machine_in_words(record)),
                group.key if group else str(record.card.get("taxonomy", "")),
                *(_name(record), _title(record), record.bits, _activation_bits(record), _key_value_bits(record)),
                *(_sparsity(record), record.status),
                *((failure.stage, failure.reason) if failure else (None, None)),
            )
        )
        source = cells((record.finished, record.id, record.baseline))
        for m in record.measurements:
            numbers = (m.metric, m.value, *(m.interval or (None, None)))
            lines.append(f"{run},{cells((*numbers, m.unit, m.on, m.better, m.note))},{source}")
        if not record.measurements:
            lines.append(f"{run},{cells([None] * 8)},{source}")
    return "\n".join(lines) + "\n"


def _csv_word(text: str) -> str:
    """A cell of text: no formula, quoted where it must be (RFC 4180)."""
    safe = markup.csv(text)
    return '"' + safe.replace('"', '""') + '"' if re.search('[",\r\n]', safe) else safe


# ---------------------------------------------------------------------------------------------------- entry points


def summary_table(records: Iterable[RunRecord], judge: Judge | None = None) -> str:
    """Markdown table of these records alone, whatever their family: what a sweep ends with. As wide as the terminal."""
    blocks = [_block(block, judge=judge) for block in comparable(records)]
    return to_markdown("", blocks, width=terminal_width())


def short_table(records: Iterable[RunRecord], judge: Judge | None = None) -> str:
    """The same with fewer columns and without footnotes, for the end of a sweep."""
    blocks = [_block(block, judge=judge, short=True, footnotes=False) for block in comparable(records)]
    return to_markdown("", blocks, width=terminal_width())


def judge_of(results: Path) -> Judge:
    """What tells rows of a results folder apart: the outcomes kept there, and the noise floors of its machines."""
    return Judge(Kept(results), read_floors(default_cache(), results))


def terminal_width() -> int:
    """Columns of the terminal, or of `COLUMNS`; 160 where output goes into a file or a pipe."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def write_table(
    table: Table,
    records: Sequence[RunRecord],
    folder: Path,
    strict: bool = False,
    judge: Judge | None = None,
    across: str | None = None,
) -> str:
    """Write `folder/table_N.{md,tex,html,csv}`, each atomically, and return the Markdown."""
    members = [r for r in records if _group(r) in table.groups]
    shown = [r for r in records if _group(r) in table.groups or (members and _name(r) == DENSE.name)]
    title = f"Table {table.number}: {table.title}"
    absent = "" if members else ", ".join(system.title for system in table.systems)
    source = f"systems and order: {SURVEY}"
    with _beside(lambda: write_text_atomically(to_csv(shown), folder / f"{table.name}.csv"), len(shown) >= MANY):
        blocks = blocks_of(table, records, strict, judge, across)
        wide = to_markdown(title, blocks, absent, WIDTH)
        for suffix, content in (
            ("md", f"{wide}\n{source}\n"),
            ("tex", to_latex(title, blocks, absent)),
            ("html", to_html(title, blocks, absent, learning_curves(shown, _curve_title))),
        ):
            write_text_atomically(content, folder / f"{table.name}.{suffix}")
    width = terminal_width()
    return wide if width == WIDTH else to_markdown(title, blocks, absent, width)


@contextmanager
def _beside(work: Callable[[], object], apart: bool) -> Iterator[None]:
    """Do the work while the body runs: in a forked process where it is worth one (`apart`), else after the body.

    Raises OSError when the process did not do it.
    """
    if not apart:
        yield
        work()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside numpy's threads: strings need none
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
    try:
        yield
    finally:
        process.join()
    if process.exitcode:
        raise OSError(f"writing beside the table ended with exit status {process.exitcode}")


def _curve_title(record: RunRecord) -> str:
    bits = f", {record.bits} bits" if record.bits is not None else ""
    return f"{_title(record)}{bits} ({record.model}, {record.id[:6]})"


LISTED = "\n".join(f"  {table.name}  {table.number:>3}  {table.title}" for table in TABLES)
HELP = f"""Print a table of the survey from the records, and write it as Markdown, LaTeX, HTML and CSV.

usage: python -m harness.tables TABLE [OPTION=VALUE ...]

tables
{LISTED}
  all           every one of them

options
  paths.results=DIR   where records/ is read and tables/ is written (default: results)
  model=NAME[,NAME]   records of these models alone
  hardware=NAME[,…]   records of these hardware configurations alone
  across=model        models side by side, under one protocol on one machine; across=machine: machines, one model
  strict=true         an error instead of several blocks when protocols or machines differ
"""
OPTIONS = ("paths.results", "model", "hardware", "across", "strict")


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 when a record could not be read; 2 for what was typed wrong."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0 if arguments else 2
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends quietly
    try:
        names, options = parse(arguments)
        results = Path(options.get("paths.results", RESULTS))
        records, broken = read_folder(results)
        gc.freeze()  # nothing of it is garbage; looking for some takes longer than a table
        records = chosen(records, options)
        folder, judge = results / "tables", judge_of(results)
        strict = options.get("strict", "false").lower() == "true"
        across = options.get("across")
        if across is not None:
            check_name(across, KINDS, "across")
        for name in names:
            print(write_table(table_named(name), records, folder, strict, judge, across))
        print(
            f"written: {folder}/{{{','.join(names)}}}.{{md,tex,html,csv}}"
            if len(names) > 1
            else f"written: {folder}/{names[0]}.{{md,tex,html,csv}}"
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for reason in broken:
        print(f"not read: {reason}", file=sys.stderr)
    return 1 if broken else 0


def parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of tables, and options. Raises ConfigError for a name or option that is none."""
    known = [table.name for table in TABLES]
    names, options = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            check_name(key.lstrip("+"), OPTIONS, "option")
            options[key.lstrip("+")] = value
        else:
            check_name(argument, [*known, "all"], "table")
            names += known if argument == "all" else [argument]
    if not names:
        raise ConfigError(f"no table named: choose from {', '.join([*known, 'all'])}")
    return list(dict.fromkeys(names)), options


def check_name(name: str, choices: Sequence[str], what: str) -> None:
    """Raise ConfigError, with the nearest of the choices, for a name that is none of them."""
    if name not in choices:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), choices, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{what} {name!r} is not one of {', '.join(choices)}.{hint}")


def read_folder(results: Path) -> tuple[list[RunRecord], list[str]]:
    """Every readable record of a results folder, without errors of layers, and why the others are not.

    Raises ConfigError where there is no such folder.
    """
    if not results.is_dir():
        raise ConfigError(f"paths.results={results}: there is no such folder; run `python -m harness` first")
    records, broken = read_all(results, layer_errors=False)
    return [record for _, record in records], broken


def chosen(records: list[RunRecord], options: dict[str, str]) -> list[RunRecord]:
    """Records of the models and hardware that the options name. Raises ConfigError for a name that none has."""
    for key, of in (("model", lambda r: r.model), ("hardware", _hardware_name)):
        wanted = [name for name in options.get(key, "").split(",") if name]
        for name in wanted:
            check_name(name, sorted({of(record) for record in records}), key)
        records = [record for record in records if not wanted or of(record) in wanted]
    return records


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
