"""Which rows differ: planted effects are found on kept outcomes and in records, and none where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from fake_records import CLOZE, EPYC, QUICK, record

from harness import statistics
from harness.comparison import Judge, Kept
from harness.noise_floor import NoiseFloor, NoiseFloors
from harness.records import Measurement

WINDOWS, WINDOW = 16, 64
SPEED = "batch 1, prompt 128, 32 new"


def arm(run, metric="perplexity", on=QUICK):
    return run, run.find(metric, on)


@pytest.fixture
def keep(tmp_path):
    """keep(run, losses=..., right=...) puts outcomes where a run would."""

    def put(run, losses=None, right=None, on=CLOZE):
        folder = tmp_path / run.samples
        folder.mkdir(parents=True, exist_ok=True)
        if losses is not None:
            window = np.repeat(np.arange(WINDOWS), WINDOW)
            pd.DataFrame({"window": window, "loss": losses}).to_parquet(folder / "perplexity-gptq-512.parquet")
        if right is not None:
            rows = [pd.DataFrame({"on": on, "doc_id": range(len(right)), "correct": right})]
            file = folder / "tasks-wikipedia_cloze.parquet"
            rows += [pd.read_parquet(file)] if file.exists() else []
            pd.concat(rows).assign(metric="accuracy").to_parquet(file)

    return put


def test_one_percent_of_perplexity_is_found_where_tokens_were_kept_and_not_where_only_intervals_are(keep, tmp_path):
    rng = np.random.default_rng(0)
    shared = rng.gamma(2, 2, WINDOWS * WINDOW)
    one, other = record("gptq", 4, loss=0.03), record("awq", 4, loss=0.02)
    keep(one, shared + 0.01 + rng.normal(0, 0.05, len(shared)))
    keep(other, shared)
    assert Judge(Kept(tmp_path)).p_value(arm(one), arm(other)) < 1e-3
    assert Judge().p_value(arm(one), arm(other)) > 0.05  # each is known to ±0.8 %
    judge = Judge(Kept(tmp_path))
    assert judge.ties([arm(one), arm(other)], arm(other)) == {other.id}
    assert judge.tests == {"paired on kept tokens and questions"}


def test_rows_without_any_effect_are_told_from_dense_as_rarely_as_stated():
    """Ten equal rows of sixteen windows, many times: in about 5 of 100 tables any is wrongly told from dense."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        rows = []
        for seed in range(10):
            gaps = rng.normal(0, 0.004, WINDOWS)  # of the mean loss of each window
            interval = statistics.paired_perplexity_ratio_interval(gaps, np.zeros(WINDOWS), 1, rng, 200)
            run = replace(record("gptq", 4, method={"seed": seed}), measurements=[
                Measurement("perplexity", 20.0, "ppl", QUICK, "lower"),
                Measurement("perplexity_ratio", np.exp(gaps.mean()), "×", QUICK, "lower", interval),
            ])  # fmt: skip
            rows.append(arm(run))
        wrong += len(Judge().same_as_dense(rows, None)) < 10
    assert 0.02 <= wrong / 200 <= 0.10


@pytest.mark.parametrize("windows", [8, 64])
def test_an_interval_that_just_reaches_no_difference_is_one_chance_in_twenty(windows):
    """Whatever the number of windows: an interval is as wide as the test that reads it."""
    on, dense = f"made-up text, gptq-512, {windows} windows", record("dense")
    edge = Measurement("perplexity_ratio", 1.02, "× dense", on, "lower", (1.0, 1.02**2))
    run = replace(record("gptq", 4), measurements=[Measurement("perplexity", 20.4, "ppl", on, "lower"), edge])
    dense = replace(dense, measurements=[Measurement("perplexity", 20.0, "ppl", on, "lower")])
    assert Judge().p_value(arm(run, "perplexity", on), arm(dense, "perplexity", on)) == pytest.approx(0.05, abs=1e-6)


def test_seconds_beside_other_processes_may_be_longer_by_what_these_took():
    """299 s beside processes that used five times the cores are no longer than 60 s alone, but longer than 30 s."""

    def taking(seconds, note=""):
        return record("gptq", 4), Measurement("compress_seconds", seconds, "s", "text", "lower", note=note)

    disturbed = taking(299.0, "other processes used 500% of the cores meanwhile")
    assert Judge().p_value(disturbed, taking(60.0)) == 1
    assert Judge().p_value(disturbed, taking(30.0)) != 1
    assert Judge().p_value(taking(299.0), taking(60.0)) != 1
    assert Judge().p_value(taking(60.0, disturbed[1].note), taking(299.0)) != 1  # the longer one was alone


def test_a_noise_floor_covers_a_difference_from_dense_that_the_tokens_are_sure_of():
    dense, run = record("dense"), record("gptq", 4, loss=0.02)
    rows = [arm(run)]
    assert Judge().same_as_dense(rows, arm(dense)) == set()
    for share, expected in ((0.03, {run.id}), (0.01, set())):
        floor = NoiseFloor(EPYC, "cpu", 2, 5, "GPTQ", "2026-11-26", {"perplexity": {QUICK: share}})
        assert Judge(floors=NoiseFloors({floor.key: floor})).same_as_dense(rows, arm(dense)) == expected


def test_questions_are_compared_one_by_one(keep, tmp_path):
    one, other = record("gptq", 4), record("awq", 4)
    right = np.tile([1, 0], 100)
    worse = right.copy()
    worse[:24:2] = 0  # twelve lost, none gained
    keep(one, right=right)
    keep(other, right=worse)
    arms = arm(one, "accuracy", CLOZE), arm(other, "accuracy", CLOZE)
    assert Judge(Kept(tmp_path)).p_value(*arms) == pytest.approx(2 / 2**12)
    (tmp_path / other.samples / "tasks-wikipedia_cloze.parquet").unlink()
    keep(other, right=right[:100])
    assert Judge(Kept(tmp_path)).p_value(*arms) == Judge().p_value(*arms), "other questions: the records alone"


def test_one_task_judged_in_two_ways_is_tested_on_the_answers_of_each_way(keep, tmp_path):
    """gsm8k reads an answer strictly and leniently: a column of its own for each, and outcomes in one file."""
    strict, lenient = f"{CLOZE}, strict-match", f"{CLOZE}, flexible-extract"
    one, other = record("gptq", 4), record("awq", 4)
    for run in (one, other):
        run.measurements.extend(Measurement("accuracy", 0.4, "share", on, "higher") for on in (strict, lenient))
    right = np.tile([1, 0], 100)
    worse = right.copy()
    worse[:24:2] = 0
    for run, lost in ((one, right), (other, worse)):
        keep(run, right=right, on=lenient)
        keep(run, right=lost, on=strict)
    judge = Judge(Kept(tmp_path))
    assert judge.p_value(arm(one, "accuracy", lenient), arm(other, "accuracy", lenient)) == 1.0
    assert judge.p_value(arm(one, "accuracy", strict), arm(other, "accuracy", strict)) == pytest.approx(2 / 2**12)


def test_the_exact_test_in_a_note_counts_against_dense():
    run = record("gptq", 4)
    noted = [
        replace(m, note="McNemar p = 0.007; 1 gained, 10 lost") if m.metric == "accuracy_difference" else m
        for m in run.measurements
    ]
    run = replace(run, measurements=noted)
    assert Judge().same_as_dense([arm(run, "accuracy", CLOZE)], None) == set()
    assert Judge().same_as_dense([arm(record("awq", 4), "accuracy", CLOZE)], None) != set()


def test_a_size_is_exact_and_a_time_without_an_interval_is_not_until_a_noise_floor_says_what_it_is():
    one, other = record("gptq", 4), record("awq", 4)
    times, sizes = (
        (arm(one, metric, on), arm(other, metric, on))
        for metric, on in (("decode_tokens_per_second", SPEED), ("stored_bytes", "artifact on disk"))
    )
    bare = tuple((r, replace(m, interval=None)) for r, m in times)
    gap = abs(bare[0][1].value / bare[1][1].value - 1)
    assert 0 < gap < 0.05
    assert Judge().p_value(*bare) == 1.0
    assert Judge().ties([bare[0], bare[1]], bare[0]) == {one.id, other.id}
    far = (bare[1][0], replace(bare[1][1], value=1.2 * bare[0][1].value))
    assert Judge().p_value(bare[0], far) is None
    assert Judge().p_value(sizes[0], (sizes[1][0], replace(sizes[1][1], value=sizes[0][1].value + 1))) is None
    for share, expected in ((2 * gap, 1.0), (gap / 2, None)):
        spreads = {"decode_tokens_per_second": {SPEED: share}}
        floor = NoiseFloor(EPYC, "cpu", 2, 5, "GPTQ", "2026-11-26", spreads)
        assert Judge(floors=NoiseFloors({floor.key: floor})).p_value(*bare) == expected


def test_times_told_apart_by_intervals_of_one_run_say_that_no_noise_floor_stood_behind_them():
    metric = "time_per_output_token_ms"
    one, (other, time) = arm(record("gptq", 4), metric, SPEED), arm(record("awq", 4), metric, SPEED)
    low, high = time.interval
    far = (other, replace(time, value=2 * time.value, interval=(time.value + low, time.value + high)))
    floor = NoiseFloor(EPYC, "cpu", 2, 5, "GPTQ", "2026-11-26", {metric: {SPEED: 0.01}})
    known, unknown = Judge(floors=NoiseFloors({floor.key: floor})), Judge()
    assert known.p_value(one, far) == unknown.p_value(one, far) < 0.05
    assert known.tests == {"intervals"}
    assert unknown.tests == {"intervals of one run each (no noise floor of this machine)"}
