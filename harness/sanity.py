"""Checks between measuring and recording: is the baseline what it should be, and when has compressing paid?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.records import Measurement

ANCHOR_TOLERANCE = 0.01  # relative; published figures are printed to about this
OUTSIDE = "outside its anchor"
AT_CHANCE = "not told from guessing"  # of a task's right answers


def check_anchors(
    measurements: Sequence[Measurement], anchors: Mapping[str, float], excerpts: Sequence[str] = ()
) -> list[Measurement]:
    """Flag a dense perplexity that differs from the known one.

    anchors: start of a measurement's `on` ("wikitext2 evaluation, gptq-2048") -> the perplexity it must show.
    excerpts: end of the `on` of a protocol that reads a part of the text alone ("gptq-2048, 32 windows"): an anchor is
    of the whole.
    A flagged baseline is recorded, and never compared with: weights, tokenizer or text are not what they claim.
    """
    ends = tuple(f", {excerpt}" for excerpt in excerpts)
    return [m if m.on.endswith(ends) else _checked(m, anchors) for m in measurements]


def _checked(measurement: Measurement, anchors: Mapping[str, float]) -> Measurement:
    if measurement.metric != "perplexity" or measurement.value is None:
        return measurement
    for start, expected in anchors.items():
        if measurement.on.startswith(start) and abs(measurement.value / expected - 1) > ANCHOR_TOLERANCE:
            return replace(measurement, note=f"{OUTSIDE} of {expected}: check weights, tokenizer and text")
    return measurement


def distrusted(measurements: Sequence[Measurement]) -> str:
    """Why a dense run may not be a reference; empty when it may."""
    return next((f"{m.metric} {m.value:.4g} is {m.note}" for m in measurements if OUTSIDE in m.note), "")


def break_even(
    compress_seconds: float | None, own: Sequence[Measurement], dense: Sequence[Measurement]
) -> list[Measurement]:
    """Requests of one sequence after which the time saved has paid for the seconds of compressing.

    A request is the timed one: time to first token, then one output token after another, at the smallest batch.
    One measurement per workload that both runs timed; without a saving the value is empty and the note says so.
    """
    if compress_seconds is None:
        return []
    found = []
    dense_seconds = _request_seconds(dense)
    for on, seconds in _request_seconds(own).items():
        if on not in dense_seconds or not on.startswith("batch 1,"):
            continue
        saving = dense_seconds[on] - seconds
        value = compress_seconds / saving if saving > 0 else None
        note = "" if value is not None else f"no saving: {-saving * 1000:.1f} ms slower per request than dense"
        found.append(Measurement("break_even_requests", value, "requests", on, "lower", note=note))
    return found


def break_even_tokens(compress_seconds: float, own: Measurement, dense: Measurement) -> float | None:
    """Generated tokens after which the time saved on each has paid for the seconds of compressing.

    own, dense: milliseconds per output token of one workload. None where this one is no faster, or not beyond the
    intervals.
    """
    if own.value is None or dense.value is None or own.value >= dense.value:
        return None
    if own.interval and dense.interval and own.interval[1] >= dense.interval[0]:
        return None
    return 1000 * compress_seconds / (dense.value - own.value)


def _request_seconds(measurements: Sequence[Measurement]) -> dict[str, float]:
    first = {m.on: m.value for m in measurements if m.metric == "time_to_first_token_ms" and m.value is not None}
    later = {m.on: m.value for m in measurements if m.metric == "time_per_output_token_ms" and m.value is not None}
    return {on: (first[on] + later[on] * (new_tokens(on) - 1)) / 1000 for on in first.keys() & later.keys()}


def new_tokens(on: str) -> int:
    """Output tokens of a timed workload, read from its description: "batch 1, prompt 128, 32 new, bfloat16"."""
    part = next(part for part in on.split(", ") if part.endswith(" new"))
    return int(part.removesuffix(" new"))
