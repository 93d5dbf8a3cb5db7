"""How often intervals of few windows hold the mean of all: of token losses that a run kept.

    python tests/benchmarks/interval_coverage.py SAMPLES/perplexity-….parquet [ANOTHER_ROW/perplexity-….parquet]

Windows are drawn anew, with replacement, from those of the file; with two files also the differences between them. For
plain percentiles of bootstrap resamples and for the intervals of `harness.statistics`, on 256 tokens of each window.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd

from harness import statistics

DRAWS = 600
TOKENS = 256


def main() -> None:
    """Print, for 8, 16 and 64 windows, in how many of 100 draws either interval holds the mean."""
    losses = [pd.read_parquet(path) for path in sys.argv[1:3]]
    series = {"loss": windows_of(losses[0], losses[0]["loss"])}
    if len(losses) == 2:
        series["difference"] = windows_of(losses[0], losses[1]["loss"] - losses[0]["loss"])
    generator = np.random.default_rng(0)
    for name, values in series.items():
        for count in (8, 16, 64):
            held = np.zeros(2)
            for _ in range(DRAWS):
                drawn = values[generator.integers(len(values), size=count)].ravel()
                means = statistics.block_means(drawn, values.shape[1], 1000, generator)
                both = np.quantile(means, [0.025, 0.975]), statistics.bootstrap_interval(means, count)
                held += [low <= values.mean() <= high for low, high in both]
            percentiles, ours = 100 * held / DRAWS
            print(f"{name}, {count} windows: percentiles {percentiles:.0f}, ours {ours:.0f} of 100", flush=True)


def windows_of(table: pd.DataFrame, values: pd.Series) -> np.ndarray:
    """The first tokens of every window: [W, tokens]."""
    return values.to_numpy(np.float64).reshape(table["window"].nunique(), -1)[:, :TOKENS]


if __name__ == "__main__":
    main()
