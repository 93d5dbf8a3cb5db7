"""Load: arrivals are a Poisson process, and every figure has its closed form on stamps that are made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny_models import context, language_model

from harness.errors import ConfigError
from harness.probes.load import Load, latencies, poisson_arrivals, served_per_second

MANY = 20_000


def arrivals(rate, requests=MANY, seed=0):
    return poisson_arrivals(rate, requests, np.random.default_rng(seed))


@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_gaps_are_exponential_with_the_offered_rate(rate):
    """Mean and deviation are both 1/rate, and the share of gaps beyond t is exp(-rate t)."""
    gaps = np.diff(arrivals(rate))
    standard_error = 1 / rate / np.sqrt(len(gaps))
    assert abs(gaps.mean() - 1 / rate) < 4 * standard_error
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05)
    for t in (0.5 / rate, 1 / rate, 3 / rate):
        assert (gaps > t).mean() == pytest.approx(np.exp(-rate * t), abs=0.015)


def test_counts_in_equal_spans_have_equal_mean_and_variance_and_do_not_depend_on_each_other():
    times = arrivals(10.0)
    counts = np.histogram(times, np.arange(0, times[-1], 1.0))[0]
    assert counts.mean() == pytest.approx(10, rel=0.05)
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) < 4 / np.sqrt(len(counts))


def test_arrivals_start_at_zero_follow_the_seed_and_scale_with_the_rate():
    times = arrivals(2.0, 50)
    assert times[0] == 0
    assert len(times) == 50
    assert (np.diff(times) > 0).all()
    assert np.array_equal(times, arrivals(2.0, 50))
    assert not np.array_equal(times, arrivals(2.0, 50, seed=1))
    np.testing.assert_allclose(arrivals(4.0, 50), times / 2)  # the same requests, twice as fast
    assert not arrivals(None, 50).any()


def test_latencies_have_vllms_definitions():
    stamps = np.array([[0, 0.5, 0.6, 0.8], [0, 1.0, 1.0, 1.6]])
    times = latencies(stamps)
    np.testing.assert_allclose(times.first, [0.5, 1.0])
    np.testing.assert_allclose(times.per_token, [0.3 / 2, 0.6 / 2])  # after the first: n - 1 of them
    np.testing.assert_allclose(times.whole, [0.8, 1.6])
    np.testing.assert_allclose(times.gaps, [0.1, 0.2, 0.0, 0.6])
    # the first arrives at 0, the last token is there at 2 + 1.6
    assert served_per_second(stamps, np.array([0.0, 2.0])) == pytest.approx(2 / 3.6)


class OneServer:
    """Serves one request at a time: FIRST seconds to its first token, LATER to each of the others."""

    FIRST, LATER = 0.5, 0.1

    def __init__(self, preempted: int = 0) -> None:
        self.calls, self.preempted = [], preempted

    def requests(self, prompts, new_tokens, arrivals):
        self.calls.append((prompts, new_tokens, arrivals))
        stamps, free = np.zeros((len(prompts), 1 + new_tokens)), 0.0
        for row, arrival in enumerate(arrivals):
            start = max(free, arrival)
            stamps[row, 1:] = start + self.FIRST + self.LATER * np.arange(new_tokens) - arrival
            free = arrival + stamps[row, -1]
        return stamps, self.preempted

    def kernels(self):
        return "by hand, float32"


@pytest.fixture
def measured(tmp_path):
    """Ten requests at once, and ten at a rate that the server never queues at."""
    lm, where = language_model(), context(tmp_path, decoding_dtype="float32")
    lm.engine = OneServer()
    found = list(Load([None, 0.001], 10, 7, 6, warm_up=2).measure(lm, where))
    return lm.engine, found, where


def value(found, metric, on):
    return next(m for m in found if m.metric == metric and on in m.on).value


def test_without_a_queue_a_request_takes_what_it_takes_alone(measured):
    _, found, _ = measured
    alone = {"time_to_first_token": 500, "time_per_output_token": 100, "request_latency": 1000}
    for name, milliseconds in alone.items():
        for percentile in (50, 90, 99):
            assert value(found, f"{name}_p{percentile}_ms", "Poisson 0.001/s") == pytest.approx(milliseconds)


def test_all_at_once_the_last_one_waits_for_all_the_others(measured):
    """Each takes one second: the k-th of ten has its first token after k - 1 + 0.5 seconds."""
    _, found, _ = measured
    assert value(found, "requests_per_second", "all at once") == pytest.approx(1.0)
    assert value(found, "output_tokens_per_second", "all at once") == pytest.approx(6.0)
    first = 1e3 * (np.arange(10) + 0.5)
    for percentile in (50, 90, 99):
        expected = np.percentile(first, percentile)
        assert value(found, f"time_to_first_token_p{percentile}_ms", "all at once") == pytest.approx(expected)
    assert value(found, "time_per_output_token_p99_ms", "all at once") == pytest.approx(
        100
    )  # it waits before, not within


def test_the_workload_is_named_warmed_up_and_the_same_for_all(measured, tmp_path):
    engine, found, where = measured
    assert {m.on for m in found} == {
        "10 requests, all at once, prompt 7, 6 new, float32",
        "10 requests, Poisson 0.001/s, prompt 7, 6 new, float32",
    }
    shapes = [(tuple(prompts.shape), new_tokens) for prompts, new_tokens, _ in engine.calls]
    assert shapes == [((2, 7), 6), ((10, 7), 6), ((10, 7), 6)]
    other = language_model()
    other.engine = OneServer()
    list(Load([None], 10, 7, 6, warm_up=0).measure(other, where))
    assert other.engine.calls[0][0].equal(engine.calls[1][0])


def test_raw_stamps_are_kept(measured):
    _, found, where = measured
    raw = pd.read_parquet(where.samples / "load.parquet")
    assert len(raw) == 2 * 10 * 7
    at_once = raw[raw["rate"].isna() & (raw["token"] == 1)]
    assert 1e3 * at_once["seconds"].median() == value(found, "time_to_first_token_p50_ms", "all at once")


def test_a_server_that_does_not_keep_up_or_runs_out_of_cache_is_said(tmp_path):
    lm, where = language_model(), context(tmp_path, decoding_dtype="float32")
    lm.engine = OneServer(preempted=3)
    (slow, *_) = Load([20.0], 10, 7, 6, warm_up=0).measure(lm, where)
    assert "requests were unfinished when the last one came" in slow.note
    assert "3 requests put back, the cache was full" in slow.note
    assert slow.value < 20
    (fast, *_) = Load([0.01], 10, 7, 6, warm_up=0).measure(lm, where)
    assert "unfinished" not in fast.note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": []}, "rates"),
        ({"rates": [0.0]}, r"rates=\[0.0\]"),
        ({"requests": 1}, "requests=1"),
        ({"new_tokens": 1}, "new_tokens=1"),
    ],
)
def test_a_load_that_means_nothing_is_refused(change, message):
    values = {"rates": [1.0], "requests": 4, "prompt_tokens": 4, "new_tokens": 4, "warm_up": 0}
    with pytest.raises(ConfigError, match=message):
        Load(**(values | change))
