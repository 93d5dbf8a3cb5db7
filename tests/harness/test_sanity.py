"""Anchors and break-even by hand."""

from __future__ import annotations

import pytest

from harness.records import Measurement
from harness.sanity import break_even, check_anchors, distrusted

ON = "wikitext2 evaluation, gptq-2048, 166 windows"
TIMED = "batch 1, prompt 128, 32 new, bfloat16"


def timed(first_ms: float, later_ms: float, on: str = TIMED) -> list[Measurement]:
    return [
        Measurement("time_to_first_token_ms", first_ms, "ms", on, "lower"),
        Measurement("time_per_output_token_ms", later_ms, "ms", on, "lower"),
    ]


@pytest.mark.parametrize(("value", "trusted"), [(5.47, True), (5.50, True), (5.60, False), (5.12, False)])
def test_a_baseline_must_be_within_a_percent_of_its_anchor(value, trusted):
    measured = check_anchors(
        [Measurement("perplexity", value, "ppl", ON, "lower")], {"wikitext2 evaluation, gptq-2048": 5.47}
    )
    assert (distrusted(measured) == "") == trusted


def test_an_anchor_of_another_protocol_says_nothing():
    measured = [Measurement("perplexity", 5.12, "ppl", "wikitext2 evaluation, gptq-4096, 83 windows", "lower")]
    assert check_anchors(measured, {"wikitext2 evaluation, gptq-2048": 5.47}) == measured


def test_an_anchor_is_of_the_whole_text_and_says_nothing_of_its_start():
    start = "wikitext2 evaluation, gptq-2048"
    measured = [Measurement("perplexity", 6.3, "ppl", f"{start}, 32 windows", "lower")]
    assert check_anchors(measured, {start: 5.47}, ["gptq-2048, 32 windows"]) == measured
    assert distrusted(check_anchors(measured, {start: 5.47}, ["gptq-2048, 64 windows"])), "no more than 32 were there"


def test_break_even_is_cost_over_saving_per_request():
    # dense: 100 + 31 * 10 = 410 ms; compressed: 100 + 31 * 6 = 286 ms; 62 s / 124 ms = 500 requests
    (measured,) = break_even(62.0, timed(100, 6), timed(100, 10))
    assert measured.value == pytest.approx(500)


def test_without_a_saving_there_is_no_number_but_a_reason():
    (measured,) = break_even(62.0, timed(100, 12), timed(100, 10))
    assert measured.value is None
    assert "62.0 ms slower" in measured.note


def test_workloads_that_dense_did_not_run_are_left_out():
    assert break_even(62.0, timed(1, 1, "batch 1, prompt 512, 32 new, bfloat16"), timed(1, 2)) == []
    assert break_even(None, timed(1, 1), timed(1, 2)) == []
