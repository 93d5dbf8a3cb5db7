"""Intervals and paired tests. Pure: arrays in, numbers out, every random draw from a generator that is handed in.

Two arms of a comparison saw the same tokens and the same questions, so differences are taken before averages.
All intervals are two-sided 95 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import atan, comb, cos, erfc, pi, sin, sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tables use p-values alone: they need not wait for numpy
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]

Z_95 = 1.959963984540054  # the normal quantile of 0.975
RESAMPLES = 2000
LEVEL = 0.05  # p-values below it tell two arms apart


def block_means(values: ArrayLike, block: int, resamples: int, generator: np.random.Generator) -> NDArray:
    """Means of moving-block bootstrap resamples: values [N, ...] -> [resamples, ...].

    Neighbouring tokens share a context, so whole blocks of `block` consecutive values are drawn, at every
    possible start (Künsch 1989), until they make up N values. The blocks wrap around the end (Politis and
    Romano 1992), so that every value is equally likely to be drawn. A series no longer than a block is one block.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if not count:
        raise ValueError("no values to resample")
    block, drawn = _blocks(count, block)
    extended = np.concatenate([np.zeros_like(values[:1]), values, values[: block - 1]]).cumsum(0)
    sums = extended[block:] - extended[:-block]  # of the block that starts at each of the N places
    starts = generator.integers(count, size=(resamples, drawn))
    return sums[starts].mean(1) / block


def _blocks(count: int, block: int) -> tuple[int, int]:
    """The length of a block, at most half of `count` values, and how many make up as many."""
    block = min(block, max(1, count // 2))
    return block, max(1, round(count / block))


@cache
def expansion(units: int) -> float:
    """How many standard deviations of resampled means, of so many units, half of a 95 % interval must have.

    t √(n / (n - 1)) instead of 1.96: a resample of n units varies less than the units' own spread says, and that spread
    is itself an estimate (Hesterberg 2015, The American Statistician 69, expanded percentile interval). Of 8 windows,
    percentiles alone cover 88 to 91 in 100.
    """
    units = max(2, units)
    return student_quantile(units - 1) * sqrt(units / (units - 1))


def bootstrap_interval(resampled: ArrayLike, units: int) -> Interval:
    """95 % interval from resampled means of so many units: expanded percentiles (Hesterberg 2015)."""
    import numpy as np

    tail = two_sided(expansion(units)) / 2
    low, high = np.quantile(np.asarray(resampled), [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(
    values: ArrayLike, block: int, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Interval of the mean of a series, by moving-block bootstrap."""
    means = block_means(values, block, resamples, generator)
    return bootstrap_interval(means, _blocks(len(values), block)[1])


def perplexity_interval(
    losses: ArrayLike, block: int, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Interval of exp(mean loss). Token losses in nats, in reading order; `block` is one window."""
    import numpy as np

    low, high = mean_interval(losses, block, generator, resamples)
    return float(np.exp(low)), float(np.exp(high))


def paired_difference_interval(
    ours: ArrayLike, theirs: ArrayLike, block: int, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Interval of mean(ours - theirs) over the same tokens."""
    return mean_interval(_paired(ours, theirs), block, generator, resamples)


def paired_perplexity_ratio_interval(
    ours: ArrayLike, theirs: ArrayLike, block: int, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Interval:
    """Interval of perplexity(ours) / perplexity(theirs) over the same tokens: exp of the mean difference of losses."""
    return perplexity_interval(_paired(ours, theirs), block, generator, resamples)


def _paired(ours: ArrayLike, theirs: ArrayLike) -> NDArray:
    import numpy as np

    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values must match: {ours.shape} and {theirs.shape}")
    return ours - theirs


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Exact two-sided p-value that two arms are equally good, given the questions that only one of them answered.

    Under that hypothesis each such question fell either way with probability 1/2 (McNemar 1947, exact form).
    """
    discordant = only_ours + only_theirs
    tail = sum(comb(discordant, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def wilson_interval(successes: float, trials: int) -> Interval:
    """Interval of a proportion (Wilson 1927); unlike the normal one it stays in [0, 1] and has a width at 0 and 1."""
    if trials < 1:
        raise ValueError("a proportion needs at least one trial")
    share = successes / trials
    spread = Z_95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # at 0 and 1 the ends are exact, whatever rounding says
    return (centre - half if successes else 0.0), (centre + half if successes < trials else 1.0)


def median_interval(values: ArrayLike) -> Interval | None:
    """Interval of the median between two order statistics: no assumption on the distribution.

    The k-th smallest and k-th largest value enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    None below 6 values: even the extremes of 5 enclose it with 93.75 % only.
    """
    import numpy as np

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    count = len(ordered)
    below, k = 0.0, 0  # below = P(Binomial(count, 1/2) < k)
    while k < count and below + comb(count, k) / 2**count <= 0.025:
        below += comb(count, k) / 2**count
        k += 1
    return (float(ordered[k - 1]), float(ordered[-k])) if k else None


def student_interval(values: ArrayLike) -> Interval | None:
    """Interval of the mean of values that do not depend on each other, by Student's t; None for fewer than 2."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    mean, half = values.mean(), student_quantile(len(values) - 1) * values.std(ddof=1) / sqrt(len(values))
    return float(mean - half), float(mean + half)


def ratio_interval(values: ArrayLike, weights: ArrayLike) -> Interval | None:
    """Interval of sum(values) / sum(weights) over units that do not depend on each other; None for fewer than 2.

    Student's t on the residuals values - ratio weights (Cochran 1977, equation 6.13).
    """
    import numpy as np

    values, weights = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    ratio = values.sum() / weights.sum()
    around = student_interval((values - ratio * weights) / weights.mean())
    return None if around is None else (float(ratio + around[0]), float(ratio + around[1]))


def relative_half_width(centre: float, interval: Interval | None) -> float:
    """Half the width of an interval as a share of its centre; infinite where there is no interval."""
    if interval is None or centre == 0:
        return float("inf")
    return (interval[1] - interval[0]) / 2 / abs(centre)


def two_sided(distance: float) -> float:
    """Probability that a normal variable lies at least this many standard deviations from its mean."""
    return erfc(abs(distance) / sqrt(2))


def paired_p_value(
    ours: ArrayLike, theirs: ArrayLike, block: int, generator: np.random.Generator, resamples: int = RESAMPLES
) -> float:
    """Two-sided p-value that two arms have the same mean over the same tokens.

    The spread of the mean difference is that of moving-block bootstrap resamples, so that neighbours may resemble each
    other. Of n blocks it is n / (n - 1) wider in variance, and the mean follows Student's t with n - 1 degrees of
    freedom: with eight windows, the normal distribution would find nothing different in 8 of 100 instead of 5.
    """
    difference = _paired(ours, theirs)
    count = max(2, round(len(difference) / block))
    spread = float(block_means(difference, block, resamples, generator).std()) * sqrt(count / (count - 1))
    mean = float(difference.mean())
    if spread == 0:
        return float(mean == 0)
    return student_two_sided(mean / spread, count - 1)


def student_two_sided(distance: float, freedom: int) -> float:
    """Probability that Student's t lies at least this far from 0, for whole degrees of freedom.

    The finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4; beyond 300 degrees it is the normal distribution's.
    """
    if freedom > 300:
        return two_sided(distance)
    angle = atan(abs(distance) / sqrt(freedom))
    square = cos(angle) ** 2
    odd = freedom % 2
    total, term = 0.0, cos(angle) if odd else 1.0
    for k in range(1, (freedom - odd) // 2 + 1):
        total += term
        term *= square * (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    inside = 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total
    return max(0.0, 1 - inside)


def student_quantile(freedom: int) -> float:
    """What Student's t is beyond in 5 of 100 cases, both sides together."""
    low, high = 0.0, 20.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if student_two_sided(middle, freedom) > LEVEL else (low, middle)
    return low


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, raised so that all of them together are wrong as rarely as one (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none is below a smaller one's. Needs no independence.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(order) - place) * p_values[index]))
        adjusted[index] = least
    return adjusted


def difference_quantile(values: ArrayLike) -> float | None:
    """What two runs of the same thing differ by less than, 95 times in 100, given k of them; None for fewer than 2.

    t · √2 · s, with t the 0.975 quantile of Student's distribution for k - 1 degrees of freedom.
    """
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    if values.min() == values.max():
        return 0.0  # their mean may be rounded to another number
    return float(student_quantile(len(values) - 1) * sqrt(2) * values.std(ddof=1))
