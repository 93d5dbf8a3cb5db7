"""Which of several points nothing else beats: the non-dominated set. Pure: arrays in, arrays out.

A point beats another where it is no worse on every criterion and on at least one better beyond both intervals. So a
difference that the intervals do not tell from nothing takes no point out of the set; and as values cannot go round in
a circle, a set with a complete point is never empty. Without intervals this is the Pareto front; of equal points all
stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.records import Better

ROWS_AT_ONCE = 512  # of the N x N comparisons; bounds the memory


def frontier(values: ArrayLike, better: Sequence[Better], intervals: ArrayLike | None = None) -> NDArray[np.bool_]:
    """Whether each point is in the non-dominated set: values [N, C] -> [N].

    better: the direction of each of the C criteria.
    intervals: ends [N, C, 2]; a pair with NaN, and None, means that the value is taken as exact.
    A point with a missing value (NaN) compares with nothing: it is not in the set and keeps no other out of it.
    Raises ValueError for shapes that do not fit.
    """
    costs = _as_costs(values, better, intervals)
    places = np.flatnonzero(complete(values))
    costs = costs[:, places]
    found = np.zeros(len(np.asarray(values)), dtype=bool)
    found[places] = ~(_beaten_of_two(costs) if len(better) == 2 else _beaten(costs))
    return found


def complete(values: ArrayLike) -> NDArray[np.bool_]:
    """Whether each point has a value on every criterion: [N, C] -> [N]."""
    return ~np.isnan(np.asarray(values, dtype=np.float64)).any(1)


def beaten_by(values: ArrayLike, better: Sequence[Better], intervals: ArrayLike | None = None) -> NDArray[np.intp]:
    """For each point the first that beats it, or -1: values [N, C] -> [N]. Arguments and errors as in `frontier`.

    It is one of the non-dominated set where one of those beats the point, so that an explanation names a winner.
    Where intervals differ in width there may be none: a precise point beaten by a vague one that a winner beats.
    """
    costs = _as_costs(values, better, intervals)
    winners = np.flatnonzero(frontier(values, better, intervals))
    found = np.full(costs.shape[1], -1, dtype=np.intp)
    if len(winners):
        beats = _beats(costs, costs[:, winners])
        found = np.where(beats.any(1), winners[beats.argmax(1)], -1)
    for place in np.flatnonzero((found < 0) & complete(values)):
        beats = _beats(costs[:, [place]], costs)[0]
        found[place] = beats.argmax() if beats.any() else -1
    return found


def _beaten(costs: NDArray) -> NDArray[np.bool_]:
    """Whether some other point beats each: costs [3, N, C] -> [N]."""
    rows = np.split(np.arange(costs.shape[1]), range(ROWS_AT_ONCE, costs.shape[1], ROWS_AT_ONCE))
    return np.concatenate([_beats(costs[:, part], costs).any(1) for part in rows])


def _beaten_of_two(costs: NDArray) -> NDArray[np.bool_]:
    """The same for two criteria, in N log N: costs [3, N, 2] -> [N].

    What is better beyond both intervals on one criterion is no worse there. So a point is beaten where, among those
    whose most is below its least on one criterion, the best value on the other is no worse than its own.
    """
    beaten = np.zeros(costs.shape[1], dtype=bool)
    for k in range(2):
        order = costs[2, :, k].argsort()
        best = np.minimum.accumulate(costs[0, order, 1 - k])
        before = np.searchsorted(costs[2, order, k], costs[1, :, k])  # how many lie wholly below
        some = before > 0
        beaten[some] |= best[before[some] - 1] <= costs[0, some, 1 - k]
    return beaten


def _beats(losers: NDArray, winners: NDArray) -> NDArray[np.bool_]:
    """Whether a winner beats a loser: costs [3, L, C] and [3, W, C] -> [L, W]. Comparisons with NaN are false."""
    no_worse = np.ones((losers.shape[1], winners.shape[1]), dtype=bool)
    beyond = np.zeros_like(no_worse)
    for k in range(losers.shape[2]):
        no_worse &= winners[0, None, :, k] <= losers[0, :, None, k]
        beyond |= winners[2, None, :, k] < losers[1, :, None, k]
    return no_worse & beyond


def _as_costs(values: ArrayLike, better: Sequence[Better], intervals: ArrayLike | None) -> NDArray[np.float64]:
    """[value, least, most] as costs: [3, N, C], lower is better, and the ends enclose the value."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(better):
        raise ValueError(f"values must be [N, {len(better)}] for {len(better)} criteria, not {values.shape}")
    signs = np.array([1.0 if direction == "lower" else -1.0 for direction in better])
    cost = values * signs
    if intervals is None:
        return np.stack([cost, cost, cost])
    ends = np.asarray(intervals, dtype=np.float64)
    if ends.shape != (*values.shape, 2):
        raise ValueError(f"intervals must be {(*values.shape, 2)}, not {ends.shape}")
    ends = np.where(np.isnan(ends).any(-1, keepdims=True), values[..., None], ends) * signs[:, None]
    return np.stack([cost, np.minimum(cost, ends.min(-1)), np.maximum(cost, ends.max(-1))])
