from __future__ import annotations

import numpy as np
import pytest

from harness.frontier import beaten_by, frontier


def beats(one, other, better, one_ends, other_ends) -> bool:
    """The definition, one criterion at a time."""
    beyond = False
    for k, direction in enumerate(better):
        a, b = one[k], other[k]
        if np.isnan(a) or np.isnan(b):
            return False
        (a_low, a_high), (b_low, b_high) = one_ends[k], other_ends[k]
        if direction == "lower":
            if a > b:
                return False
            beyond |= a_high < b_low
        else:
            if a < b:
                return False
            beyond |= a_low > b_high
    return beyond


@pytest.mark.parametrize("better", [("lower", "higher"), ("higher", "lower", "lower")])
@pytest.mark.parametrize("width", [0.0, 2.0])
def test_the_set_is_what_comparing_every_pair_leaves(better, width, monkeypatch):
    monkeypatch.setattr("harness.frontier.ROWS_AT_ONCE", 7)
    rng = np.random.default_rng(1)
    values = rng.integers(0, 12, size=(60, len(better))).astype(float)  # with ties
    values[rng.random(values.shape) < 0.05] = np.nan
    intervals = values[..., None] + rng.random((*values.shape, 2)) * [-width, width]
    intervals[rng.random(values.shape) < 0.2] = np.nan
    ends = np.where(np.isnan(intervals), values[..., None], intervals)
    pairs = np.array([[beats(values[j], values[i], better, ends[j], ends[i]) for j in range(60)] for i in range(60)])
    whole = ~np.isnan(values).any(1)
    expected = whole & ~pairs.any(1)
    assert 0 < expected.sum() < whole.sum()
    np.testing.assert_array_equal(frontier(values, better, intervals), expected)

    found = beaten_by(values, better, intervals)
    np.testing.assert_array_equal(found >= 0, pairs.any(1))
    for place in np.flatnonzero(found >= 0):
        assert pairs[place, found[place]]
        assert expected[found[place]] or not pairs[place, expected].any()


def test_a_lead_inside_the_intervals_beats_nobody_and_beyond_them_does():
    values = [[1.00, 5.0], [1.01, 5.0]]
    wide, narrow = [[0.9, 1.1], [5, 5]], [[0.999, 1.002], [5, 5]]
    other = [[0.92, 1.12], [5, 5]]
    assert frontier(values, ["lower", "lower"], [wide, other]).tolist() == [True, True]
    assert frontier(values, ["lower", "lower"], [narrow, [[1.005, 1.02], [5, 5]]]).tolist() == [True, False]
    assert frontier(values, ["lower", "lower"]).tolist() == [True, False]


def test_equal_points_all_stand_and_a_missing_value_is_no_winner():
    assert frontier([[1.0], [1.0], [np.nan]], ["lower"]).tolist() == [True, True, False]
    assert frontier(np.empty((0, 2)), ["lower", "higher"]).tolist() == []
    assert beaten_by(np.full((2, 1), np.nan), ["lower"]).tolist() == [-1, -1]


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[N, 2\] for 2 criteria"):
        frontier([[1.0]], ["lower", "higher"])
    with pytest.raises(ValueError, match="intervals must be"):
        frontier([[1.0]], ["lower"], [[1.0, 2.0]])
