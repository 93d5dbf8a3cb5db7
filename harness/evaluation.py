"""What a probe is, what it may use, and the evaluator that runs every probe on a model in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from harness.corpus import Corpus
    from harness.environment import Hardware
    from harness.method import LanguageModel, Progress
    from harness.records import Measurement

Stage = Literal["evaluate", "time"]


@dataclass(frozen=True)
class Context:
    """All that a probe may use besides the model."""

    corpus: Corpus
    hardware: Hardware
    artifact: Path  # the folder that the model was loaded from
    samples: Path  # where this run keeps token losses, question outcomes and raw timings
    reference: Path | None  # the same folder of the dense run; None when this is the dense run itself
    cache: Path  # files worth keeping between runs: downloads, measured ceilings
    seed: int
    progress: Progress


class Probe(Protocol):
    """Measures one aspect of a model through its engine, or counts the module; never asks how it was compressed.

    `stage` says in which process it runs: "evaluate" (quality; the engine is prepared for scoring) or
    "time" (speed and memory; a fresh process, the engine prepared for decoding).
    `compares` is true when it reads the outcomes of the dense run (`context.reference`).
    """

    stage: Stage
    compares: bool

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """The measurements, in the order a reader expects them."""
