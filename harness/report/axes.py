"""What the plots of the report can show: losses of quality, and what is paid for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.frontier import frontier
from harness.noise_floor import assumed
from harness.records import Measurement, RunRecord

LOSS = "loss"
COSTS = ("bits", "latency", "memory", "compression")
MOST_POINTS = 3000  # of a comparison whose non-dominated sets are sought for every pair of axes


@dataclass(frozen=True)
class Axis:
    """A metric under one protocol or workload, as a loss or a cost: less is better.

    kind: LOSS or one of COSTS. on: None where any will do (the first that a record has).
    scale: "log", "linear", or "symlog": linear within ± `constant` and logarithmic beyond, for losses that reach zero.
    factor, offset: what is drawn is factor × value + offset, in `unit`.
    dense: what the dense model has by definition, as drawn; None where it is measured like any other.
    """

    kind: str
    metric: str
    label: str
    unit: str
    scale: str = "log"
    factor: float = 1.0
    offset: float = 0.0
    dense: float | None = None
    constant: float = 1.0
    on: str | None = None

    def find(self, record: RunRecord) -> Measurement | None:
        """The measurement of this axis that has a value."""
        found = record.find(self.metric, self.on)
        return found if found is not None and found.value is not None else None

    def drawn(self, record: RunRecord, reference: bool) -> tuple[float, float, float] | None:
        """Value and ends of the interval as drawn. reference: whether it is dense.

        Without an interval the value stands for its ends, but for a time, which does not repeat exactly.
        """
        found = self.find(record)
        if found is None:
            return (self.dense,) * 3 if reference and self.dense is not None else None
        value = self.factor * found.value + self.offset
        if not found.interval:
            half = assumed(self.metric) / 2 * abs(value)  # on each side of a difference
            return value, value - half, value + half
        low, high = (self.factor * end + self.offset for end in found.interval)
        return value, min(low, high), max(low, high)


PERCENT = 100.0
MEGABYTES = 1e-6
AXES = (
    Axis(LOSS, "perplexity_ratio", "perplexity above dense", "%", "symlog", PERCENT, -PERCENT, 0.0),
    Axis(LOSS, "kl_divergence", "KL divergence from dense", "nats/token", "symlog", dense=0.0, constant=0.003),
    Axis(LOSS, "top1_agreement", "top token differs from dense", "% of tokens", "linear", -PERCENT, PERCENT, 0.0),
    Axis(LOSS, "accuracy_difference", "accuracy lost against dense", "points", "linear", -PERCENT, dense=0.0),
    Axis(LOSS, "accuracy", "wrong answers", "% of questions", "linear", -PERCENT, PERCENT),
    Axis(LOSS, "flips", "answers that flip", "% of questions", "linear", PERCENT, dense=0.0),
    Axis(LOSS, "stream_perplexity_ratio", "perplexity of a long stream above dense", "%", "symlog", PERCENT, -PERCENT),
    Axis(LOSS, "perplexity", "perplexity", "ppl"),
    Axis("bits", "effective_bits_per_weight", "effective bits per weight", "bits"),
    Axis("bits", "model_bits_per_weight", "bits per parameter of the whole model", "bits"),
    Axis("latency", "time_per_output_token_ms", "time per output token", "ms"),
    Axis("latency", "time_to_first_token_ms", "time to first token", "ms"),
    Axis("latency", "inter_token_latency_p99_ms", "inter-token latency, 99th percentile", "ms"),
    Axis("latency", "context_output_token_ms", "time per output token", "ms"),
    Axis("latency", "context_first_token_ms", "time to first token", "ms"),
    Axis("memory", "stored_bytes", "stored", "MB", factor=MEGABYTES),
    Axis("memory", "loaded_weight_bytes", "weights in memory", "MB", factor=MEGABYTES),
    Axis("memory", "peak_memory_bytes", "peak memory", "MB", factor=MEGABYTES),
    Axis("memory", "context_peak_bytes", "peak memory", "MB", factor=MEGABYTES),
    Axis("memory", "context_cache_bytes", "cached keys and values", "MB", factor=MEGABYTES),
    Axis("compression", "compress_seconds", "time to compress", "s"),
    Axis("compression", "peak_compress_bytes", "peak memory while compressing", "GB", factor=1e-9),
    Axis("compression", "training_tokens", "training tokens", "thousand", factor=1e-3),
    Axis("compression", "teacher_tokens", "tokens of the teacher", "thousand", factor=1e-3),
)


def axes_of(records: Sequence[RunRecord], references: frozenset[str]) -> list[Axis]:
    """The axes that some record beside the references (ids) has a value on: one for each protocol or workload.

    What compressing cost is not split by `on`, which says how much a method read.
    """
    found = Counter(
        (m.metric, m.on) for r in records if r.id not in references for m in r.measurements if m.value is not None
    )
    axes = []
    for axis in AXES:
        ons = [on for (metric, on), _ in found.most_common() if metric == axis.metric]
        if axis.kind == "compression":
            axes += [axis] if ons else []
        else:
            axes += [replace(axis, on=on) for on in ons]
    return axes


def fronts(
    records: Sequence[RunRecord], axes: Sequence[Axis], references: frozenset[str], collapsed: frozenset[str]
) -> dict[tuple[int, int], list[int]]:
    """The non-dominated set for each pair of a loss and a cost: places in `axes` -> places in `records`.

    references, collapsed: ids; what collapsed is no choice, however little it costs.
    Of more than MOST_POINTS records, for the first loss and the first cost of each kind alone.
    """
    absent = (np.nan,) * 3
    drawn = np.array(
        [[(r.id not in collapsed and axis.drawn(r, r.id in references)) or absent for axis in axes] for r in records],
        dtype=np.float64,
    ).reshape(len(records), len(axes), 3)
    pairs = list(_pairs(axes, first_alone=len(records) > MOST_POINTS))
    return {pair: np.flatnonzero(_front(drawn[:, pair])).tolist() for pair in pairs}


def _front(drawn: NDArray) -> NDArray[np.bool_]:
    return frontier(drawn[..., 0], ("lower", "lower"), drawn[..., 1:])


def _pairs(axes: Sequence[Axis], first_alone: bool) -> Iterable[tuple[int, int]]:
    losses = [k for k, axis in enumerate(axes) if axis.kind == LOSS]
    for kind in COSTS:
        costs = [k for k, axis in enumerate(axes) if axis.kind == kind]
        if first_alone:
            losses, costs = losses[:1], costs[:1]
        yield from ((loss, cost) for loss in losses for cost in costs)
