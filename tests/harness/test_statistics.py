from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest

from harness import statistics


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def covered(interval, truth) -> bool:
    return interval[0] <= truth <= interval[1]


def correlated(rng, count: int, memory: float) -> np.ndarray:
    """A series with mean 3 whose neighbours resemble each other, as token losses of one text do."""
    noise, series = rng.normal(size=count), np.zeros(count)
    for i in range(1, count):
        series[i] = memory * series[i - 1] + noise[i]
    return series + 3


def test_the_mean_interval_covers_a_planted_mean_nineteen_times_in_twenty():
    rng = generator()
    hits = [covered(statistics.mean_interval(correlated(rng, 800, 0.8), 50, rng, 300), 3.0) for _ in range(200)]
    assert 0.87 <= np.mean(hits) <= 0.99


@pytest.mark.parametrize("windows", [8, 16])
def test_intervals_of_few_windows_cover_as_often_as_they_say(windows):
    """Percentiles alone cover 88 and 92 times in 100 here."""
    rng = generator(windows)
    series = (correlated(rng, 40 * windows, 0.5) for _ in range(400))
    hits = [covered(statistics.mean_interval(values, 40, rng, 1000), 3.0) for values in series]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_an_expanded_interval_is_students_where_resamples_are_normal():
    values = generator().normal(size=12)
    low, high = statistics.student_interval(values)
    spread = values.std() / np.sqrt(12)  # of resampled means
    normal = generator(1).normal(values.mean(), spread, 400_000)
    np.testing.assert_allclose(statistics.bootstrap_interval(normal, 12), (low, high), atol=0.02 * (high - low))


def test_blocks_of_one_miss_the_correlation_that_long_blocks_see():
    series = correlated(generator(), 4000, 0.9)
    short = statistics.mean_interval(series, 1, generator())
    long = statistics.mean_interval(series, 200, generator())
    assert long[1] - long[0] > 2 * (short[1] - short[0])


def test_resampled_means_are_means_of_wrapped_blocks():
    values, block = np.arange(6.0), 2
    possible = {np.mean([(s, (s + 1) % 6) for s in starts]) for starts in product(range(6), repeat=3)}
    means = statistics.block_means(values, block, 500, generator())
    assert all(min(abs(m - p) for p in possible) < 1e-12 for m in means)
    assert set(np.round(means, 6)) <= {round(p, 6) for p in possible}


def test_block_means_of_columns_are_the_columns_block_means():
    values = generator().normal(size=(60, 3))
    together = statistics.block_means(values, 7, 50, generator(1))
    alone = [statistics.block_means(values[:, c], 7, 50, generator(1)) for c in range(3)]
    np.testing.assert_allclose(together, np.stack(alone, 1))


def test_perplexity_of_constant_losses_is_known_exactly():
    low, high = statistics.perplexity_interval(np.full(300, np.log(7.0)), 50, generator())
    np.testing.assert_allclose([low, high], 7.0)


def test_pairing_finds_a_small_planted_effect_that_separate_intervals_hide():
    rng = generator()
    dense = rng.normal(3, 2, size=4000)
    worse = dense + rng.normal(0.02, 0.05, size=4000)
    low, high = statistics.paired_difference_interval(worse, dense, 100, rng)
    assert 0.01 < low < 0.02 < high < 0.03
    ratio = statistics.paired_perplexity_ratio_interval(worse, dense, 100, rng)
    assert 1.0 < ratio[0] < np.exp(0.02) < ratio[1]
    a, b = (statistics.mean_interval(x, 100, rng) for x in (dense, worse))
    assert a[1] > b[0]


def test_one_seed_gives_one_answer():
    values = generator().normal(size=500)
    assert statistics.mean_interval(values, 20, generator(3)) == statistics.mean_interval(values, 20, generator(3))


def test_unpaired_lengths_are_refused():
    with pytest.raises(ValueError, match="must match"):
        statistics.paired_difference_interval([1.0, 2.0], [1.0], 1, generator())


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (0, 12)])
def test_mcnemar_is_the_probability_of_a_split_no_more_even(ours, theirs):
    n = ours + theirs
    observed = abs(ours - theirs)
    brute = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= observed) / 2**n
    assert statistics.mcnemar(ours, theirs) == pytest.approx(brute)


def test_wilson_ends_solve_its_equation_and_stay_inside():
    low, high = statistics.wilson_interval(37, 100)
    for end in (low, high):  # the score test at the ends is exactly significant
        assert abs(0.37 - end) / np.sqrt(end * (1 - end) / 100) == pytest.approx(statistics.Z_95)
    assert statistics.wilson_interval(0, 50)[0] == 0.0 < statistics.wilson_interval(0, 50)[1]
    assert statistics.wilson_interval(50, 50)[1] == 1.0


def test_median_interval_covers_and_tightens():
    rng = generator()
    hits = [covered(statistics.median_interval(rng.exponential(size=31)), np.log(2)) for _ in range(1000)]
    assert 0.94 <= np.mean(hits) <= 0.99
    assert statistics.median_interval(range(5)) is None
    assert statistics.median_interval(range(6)) == (0, 5)
    assert statistics.median_interval(range(100)) == (39, 60)
    assert statistics.relative_half_width(50, (39, 60)) == pytest.approx(0.21)
    assert statistics.relative_half_width(50, None) == float("inf")


def test_the_interval_of_few_values_mean_covers_it_nineteen_times_in_twenty():
    rng = generator(2)
    hits = [covered(statistics.student_interval(rng.normal(3.0, 1.0, 5)), 3.0) for _ in range(2000)]
    assert 0.94 < np.mean(hits) < 0.96
    assert statistics.student_interval([1.0]) is None


def paired_losses(rng, effect: float, windows: int = 64, window: int = 128):
    """Token losses of two arms on the same text, which differ by `effect` nats on average; neighbours resemble."""
    shared = correlated(rng, windows * window, 0.9)
    return shared + effect + 0.05 * (correlated(rng, windows * window, 0.8) - 3), shared


def test_an_effect_of_one_percent_of_perplexity_is_found_and_none_is_found_as_rarely_as_stated():
    rng = generator(3)
    planted = [statistics.paired_p_value(*paired_losses(rng, 0.01), 128, rng, 300) for _ in range(50)]
    assert np.mean(np.array(planted) < statistics.LEVEL) > 0.9
    nothing = [statistics.paired_p_value(*paired_losses(rng, 0.0), 128, rng, 200) for _ in range(160)]
    assert 0.01 < np.mean(np.array(nothing) < statistics.LEVEL) < 0.09
    identical = np.arange(9.0)
    assert statistics.paired_p_value(identical, identical, 3, rng) == 1.0


def test_mcnemar_finds_none_no_more_often_than_stated_and_a_real_loss_of_answers():
    rng = generator(5)
    false = [statistics.mcnemar(*_flips(rng, 0.0)) < statistics.LEVEL for _ in range(400)]
    assert np.mean(false) <= 0.065
    found = [statistics.mcnemar(*_flips(rng, 0.05)) < statistics.LEVEL for _ in range(50)]
    assert np.mean(found) > 0.9


def _flips(rng, lost: float, questions: int = 2000):
    gained = rng.random(questions) < 0.05
    dropped = ~gained & (rng.random(questions) < 0.05 + lost)
    return int(gained.sum()), int(dropped.sum())


def test_holm_by_hand_and_all_tests_together_err_as_rarely_as_one():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []
    rng = generator(8)
    families = [min(statistics.holm(rng.random(20).tolist())) < statistics.LEVEL for _ in range(2000)]
    assert 0.035 < np.mean(families) < 0.065


def test_two_runs_differ_by_less_than_the_floor_nineteen_times_in_twenty():
    rng = generator(13)
    values = rng.normal(100, 3, size=(4000, 5))
    floors = np.array([statistics.difference_quantile(runs) for runs in values])
    fresh = rng.normal(100, 3, size=(4000, 2))
    assert 0.94 < np.mean(np.abs(fresh[:, 0] - fresh[:, 1]) < floors) < 0.96
    assert statistics.difference_quantile([1.0]) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (15, 2.131), (120, 1.980)])
def test_student_s_t_has_its_tabulated_quantiles(freedom, quantile):
    assert statistics.student_two_sided(quantile, freedom) == pytest.approx(0.05, abs=1e-4)
    assert statistics.student_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_few_windows_find_nothing_no_more_often_than_stated():
    rng = generator(21)
    rates = [statistics.paired_p_value(*paired_losses(rng, 0.0, windows=8), 128, rng, 200) < 0.05 for _ in range(200)]
    assert np.mean(rates) < 0.075
