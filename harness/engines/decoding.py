"""What a way to decode must offer, and what it counts while it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from harness.engines.transformers import TransformersEngine


@dataclass
class Counts:
    """What decoding with guesses came to. Of the slowest row of a batch, which sets the pace."""

    passes: int = 0  # of the model, after the prompt's
    tokens: int = 0  # that these passes gave
    guesses: int = 0  # made
    accepted: int = 0  # of the guesses
    examined: int = 0  # guesses that were accepted or were the first to be rejected
    guess_seconds: float = 0.0  # where a clock was given
    check_seconds: float = 0.0
    passes_with: Counter[int] = field(default_factory=Counter)  # how many passes checked so many guesses

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were right, of those that were looked at: α of Leviathan et al. 2023."""
        return self.accepted / self.examined if self.examined else 0.0


class Decoding(Protocol):
    """Another way to generate than one token after the other."""

    name: str  # what a row says about it
    counts: Counts

    def generate(
        self, engine: TransformersEngine, prompt: Tensor, new_tokens: int, mask: Tensor | None
    ) -> Iterator[Tensor]:
        """The tokens of `TransformersEngine.generate`, found in another way."""

    def counting(self, clock: Callable[[], float] | None) -> Decoding:
        """The same with counts of its own; with a clock it waits for the device between guessing and checking."""

    def expected_speedup(self, counts: Counts, step_seconds: float) -> tuple[float, float]:
        """By theory, from what was counted and the seconds of a step of the model alone: with checking several
        tokens as costly as one step, as the theory has it; and with the cost that was clocked."""

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this way again."""
