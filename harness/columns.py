"""The columns of a table: which numbers are shown, under which protocol or workload, with which digits and head."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from harness.records import Measurement, RunRecord

# Two records whose measurements of these differ in `on` ran another protocol.
SPEED_METRICS = frozenset(("time_to_first_token_ms", "time_per_output_token_ms", "decode_tokens_per_second"))
PROTOCOL_METRICS = SPEED_METRICS | {"perplexity", "accuracy"}
LEAST = 1e-6  # what is smaller would push the other columns away
LONGEST_TASK = 14  # letters: lambada_openai, truthfulqa_mc1


@dataclass(frozen=True)
class Quantity:
    """How one metric is shown: a short head with its unit, and its digits.

    every_workload: a column for each `on` found; otherwise the smallest batch, or the first measured, alone.
    longest: for each batch size the longest context that a record managed, which the head names.
    """

    metric: str
    head: str
    show: Callable[[float], str]
    scale: float = 1.0
    interval: Callable[[float], str] | None = None
    every_workload: bool = False
    longest: bool = False


def significant(digits: int) -> Callable[[float], str]:
    """Format with this many significant digits, whole numbers in full; in exponents only what is rounding of zero."""

    def show(value: float) -> str:
        if value == 0:
            return "0"
        if abs(value) < LEAST:
            return f"{value:.0e}"
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"

    return show


def _fixed(decimals: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{decimals}f}"


QUANTITIES = (
    Quantity("perplexity", "PPL", significant(4), interval=significant(3), every_workload=True),
    Quantity("word_perplexity", "word PPL", significant(4), interval=significant(3), every_workload=True),
    Quantity("kl_divergence", "KL nats", significant(3), every_workload=True),
    Quantity("top1_agreement", "top-1 %", _fixed(1), scale=100, every_workload=True),
    Quantity("stream_perplexity_ratio", "stream ×", significant(4), interval=significant(3), every_workload=True),
    Quantity("accuracy_before", "before %", _fixed(1), scale=100, every_workload=True),
    Quantity("accuracy", "task %", _fixed(1), scale=100, interval=_fixed(0), every_workload=True),
    Quantity("accuracy_with_calculator", "calculator %", _fixed(1), scale=100, interval=_fixed(0), every_workload=True),
    Quantity("rouge_l_before", "ROUGE-L before", _fixed(1), scale=100, every_workload=True),
    Quantity("rouge_l", "ROUGE-L", _fixed(1), scale=100, interval=_fixed(0), every_workload=True),
    Quantity("time_to_first_token_ms", "TTFT ms", significant(3)),
    Quantity("time_per_output_token_ms", "TPOT ms", significant(3)),
    Quantity("decode_tokens_per_second", "t/s", significant(3), every_workload=True),
    Quantity("requests_per_second", "req/s", significant(3), every_workload=True),
    Quantity("decoding_speedup", "speed-up ×", significant(3), every_workload=True),
    Quantity("guess_acceptance", "accepted %", _fixed(1), scale=100, every_workload=True),
    Quantity("context_output_token_ms", "TPOT ms", significant(3), longest=True),
    Quantity("context_cache_bytes", "cache MB", significant(3), scale=1e-6, longest=True),
    Quantity("context_peak_exponent", "peak ~ n^", _fixed(2), every_workload=True),
    Quantity("cache_slots_per_token", "slots/token", significant(3), every_workload=True),
    Quantity("effective_bits_per_weight", "bits/w", _fixed(2), every_workload=True),
    Quantity("stored_bytes", "MB", significant(3), scale=1e-6, every_workload=True),
    Quantity("compress_seconds", "comp. s", significant(3)),
    Quantity("peak_compress_bytes", "comp. GB", significant(3), scale=1e-9),
    Quantity("teacher_tokens", "teach. k", significant(3), scale=1e-3),
    Quantity("training_tokens", "train. k", significant(3), scale=1e-3),
)


@dataclass(frozen=True)
class Column:
    """A quantity under one protocol or workload. `on` is None where any will do (the first that a record has)."""

    quantity: Quantity
    on: str | None
    head: str
    better: str


def measured(records: Iterable[RunRecord], columns: list[Column]) -> list[list[Measurement | None]]:
    """For each record its number in each column, or None."""
    keys = [(column.quantity.metric, column.on) for column in columns]
    stored = [k for k, (metric, _) in enumerate(keys) if metric == "stored_bytes"]
    found = []
    for record in records:
        numbers = record.find_all(keys)
        for k in stored:
            if numbers[k] is None and record.artifact.get("bytes") is not None:
                numbers[k] = Measurement("stored_bytes", record.artifact["bytes"], "bytes", "artifact on disk", "lower")
        found.append(numbers)
    return found


def columns_of(records: list[RunRecord]) -> list[Column]:
    """The columns that these records fill, in the order of QUANTITIES, one workload each."""
    first: dict[tuple[str, str], Measurement] = {}  # with a number, of each workload in the order of appearance
    for record in records:
        for m in record.measurements:
            known = first.get(key := (m.metric, m.on))
            if known is None or (known.value is None and m.value is not None):
                first[key] = m
    by_metric: dict[str, list[Measurement]] = {}
    for m in first.values():
        by_metric.setdefault(m.metric, []).append(m)
    columns = []
    for quantity in QUANTITIES:
        found = by_metric.get(quantity.metric, [])
        if not found and quantity.metric == "stored_bytes" and any(r.artifact.get("bytes") for r in records):
            columns.append(Column(quantity, None, quantity.head, "lower"))
        elif found and quantity.longest:
            columns += _longest(quantity, found)
        elif found and quantity.every_workload:
            workloads = sorted(dict.fromkeys(m.on for m in found), key=batch_of)
            heads = _short_names(workloads)
            columns += [
                Column(quantity, on, f"{quantity.head} {heads[on]}".strip(), b)
                for on in workloads
                for b in [next(m.better for m in found if m.on == on)]
            ]
        elif found and quantity.metric in PROTOCOL_METRICS:
            first = min(found, key=lambda m: batch_of(m.on))
            columns.append(Column(quantity, first.on, quantity.head, first.better))
        elif found:
            columns.append(Column(quantity, None, quantity.head, found[0].better))
    return _told_apart([_task_head(column) for column in columns])


def _longest(quantity: Quantity, found: list[Measurement]) -> list[Column]:
    """A column for each batch size, of its longest context with a number."""
    numbers = [m for m in found if m.value is not None] or found
    chosen = {batch_of(m.on): m.on for m in sorted(numbers, key=lambda m: (-batch_of(m.on), _context(m.on)))}
    heads = {batch: f"{quantity.head} b{batch:.0f}" if len(chosen) > 1 else quantity.head for batch in chosen}
    return [
        Column(quantity, chosen[batch], f"{heads[batch]} at {_context(chosen[batch]):.0f}", found[0].better)
        for batch in sorted(chosen)
    ]


def _told_apart(columns: list[Column]) -> list[Column]:
    """Columns of the same head (one task asked or judged in two ways) get what their `on` differ in added."""
    alike: dict[str, list[str]] = {}
    for column in columns:
        if column.on is not None:
            alike.setdefault(column.head, []).append(column.on)
    names = {head: _short_names(workloads) for head, workloads in alike.items()}

    def apart(column: Column) -> Column:
        if column.on is None or len(alike[column.head]) == 1:
            return column
        return replace(column, head=f"{column.head} {names[column.head][column.on]}".rstrip())

    return [apart(column) for column in columns]


def _task_head(column: Column) -> Column:
    """A task's column is named by the first word of its `on`, the task; where that is long, by its last part."""
    if column.quantity.metric != "accuracy" or column.on is None:
        return column
    task = re.split(r"[ ,]", column.on, maxsplit=1)[0]
    return replace(column, head=f"{task if len(task) <= LONGEST_TASK else task.rpartition('_')[2]} %")


def batch_of(on: str) -> float:
    """Batch size of a workload, infinite where it names none."""
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


def is_speed(column: Column) -> bool:
    """Whether it is one of the speeds that belong to a protocol."""
    return column.quantity.metric in SPEED_METRICS


def arrow_of(column: Column) -> str:
    """Which way is better."""
    return "↓" if column.better == "lower" else "↑"
