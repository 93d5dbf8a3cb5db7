"""How much memory a cache sets aside for a mixed load, against what its tokens need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from harness.errors import ConfigError
from harness.records import Measurement

if TYPE_CHECKING:
    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

GIBIBYTE = 2**30


@dataclass(frozen=True)
class CacheWaste:
    """A server at one moment: sequences of mixed lengths, each somewhere on its way to its end.

    Final lengths are drawn from a log-normal distribution with the given median and spread, cut at `longest`, which
    is what each sequence may become as far as the server knows; how far each has come is uniform. The engine says how
    many places it sets aside for a sequence (`slots`).

    sequences: at that moment. median, spread: of final lengths, in tokens; spread is of the logarithm.
    """

    sequences: int = 256
    longest: int = 2048
    median: float = 300.0
    spread: float = 1.0

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"caches"})

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.longest < 1:
            raise ConfigError(f"cache sequences={self.sequences}, longest={self.longest}: must be at least 1")
        if self.median <= 0 or self.spread < 0:
            raise ConfigError(f"cache median={self.median}, spread={self.spread}: must not be negative")

    def lengths(self, seed: int) -> np.ndarray:
        """Tokens of each sequence at that moment."""
        generator = np.random.default_rng(seed)
        final = np.exp(np.log(self.median) + self.spread * generator.standard_normal(self.sequences))
        final = np.clip(np.round(final), 1, self.longest)
        return np.ceil(final * generator.uniform(size=self.sequences)).clip(1).astype(int)

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Places for each token of the load, and how many sequences of it a gibibyte holds."""
        tokens = self.lengths(context.seed)
        slots = np.array([lm.engine.slots(int(length), self.longest) for length in tokens])
        on = f"{self.sequences} sequences of {tokens.mean():.0f} tokens on average, at most {self.longest}"
        contiguous = self.longest / tokens.mean()
        note = f"contiguous memory for the longest: {contiguous:.3f}"
        grain = _grain(lm, self.longest)
        if grain:
            closed = 1 + (grain - 1) / 2 / tokens.mean()
            note += f"; blocks of {grain} half full at the end: {closed:.3f}"
        yield Measurement("cache_slots_per_token", float(slots.sum() / tokens.sum()), "slots", on, "lower", note=note)
        dtype = context.hardware.resolved_decoding_dtype()
        # of one token, which takes a whole block where there are blocks
        per_slot = lm.engine.kv_cache_bytes(getattr(torch, dtype), 1) / lm.engine.slots(1, 1)
        yield Measurement(
            "sequences_per_gibibyte",
            GIBIBYTE / (slots.mean() * per_slot),
            "sequences",
            f"{on}, {dtype}",
            "higher",
            note=f"{slots.mean():.0f} slots of {per_slot:.0f} bytes",
        )


def _grain(lm: LanguageModel, longest: int) -> int:
    """Size of the blocks in which a cache grows; 0 where it does not."""
    first = lm.engine.slots(1, longest)
    return first if 1 <= first < longest and lm.engine.slots(first + 1, longest) == 2 * first else 0
