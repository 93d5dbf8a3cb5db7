"""What a compression method is and what it may use.

A method turns a language model into one that is cheaper to run. It never reports on itself: bits, bytes,
quality and speed are counted from outside, on the artifact that was saved and loaded again.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from harness.corpus import Corpus

T = TypeVar("T")


class Engine(Protocol):
    """How a model is run. Architecture methods change this, not the weights."""

    def score(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood of each next token: ids [B, T] -> nats [B, T-1], float32."""

    def generate(self, prompt: Tensor, new_tokens: int) -> Iterator[Tensor]:
        """Greedy decoding without early stop: ids [B, P] -> one tensor of ids [B] per decoding step."""


@dataclass
class LanguageModel:
    """A model as every part of the harness sees it."""

    module: nn.Module  # owns every stored byte; a transformers *ForCausalLM
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    storage_dtype: torch.dtype = torch.float16  # 16-bit type of everything that is stored uncompressed, and of scales


class Progress(Protocol):
    """Long work says how far it is."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while showing `what`, how many are done and how long the rest may take."""


@dataclass
class TrainingLog:
    """Learning curves of a run and what it cost beyond its clock; what a killed run wrote is read again.

    file: one JSON line per point; None keeps the log in memory only.
    tokens: how many were trained on.
    spared_seconds: what statistics cost that an earlier run of a sweep had already collected.
    earlier_seconds: what tries took that were killed, up to the point where this one goes on.
    counts: what else it took, by name: questions asked, answers kept, tokens that a teacher wrote.
    """

    file: Path | None = None
    tokens: int = 0
    spared_seconds: float = 0.0
    earlier_seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)  # at each point, of all tries
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            text = self.file.read_text(encoding="utf-8")
            for line in text.splitlines():
                if line.endswith("]"):  # the last line of a killed run may be torn
                    curve, step, value, *seconds = json.loads(line)
                    self.curves.setdefault(curve, {})[step] = value
                    self.seconds.setdefault(curve, {})[step] = seconds[0] if seconds else 0.0
            if not text.endswith("\n"):
                self.file.write_text(f"{text}\n", encoding="utf-8")

    def point(self, curve: str, step: int, value: float) -> None:
        """Note a value; a step that is run again after a kill replaces what it wrote before."""
        seconds = self.earlier_seconds + time.perf_counter() - self.started
        self.curves.setdefault(curve, {})[step] = value
        self.seconds.setdefault(curve, {})[step] = seconds
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps([curve, step, value, round(seconds, 3)]) + "\n")

    def go_on(self, curve: str, step: int) -> None:
        """This try goes on after a point that a killed one left: the time until then counts too."""
        self.earlier_seconds = max(self.earlier_seconds, self.seconds.get(curve, {}).get(step, 0.0))

    def thinned(self, points: int = 200) -> dict[str, list[list[float]]]:
        """Every curve as [[step, value], ...], at most `points` of each, the last among them."""
        kept = {}
        for curve, values in self.curves.items():
            ordered = sorted(values.items())
            stride = -(-len(ordered) // points)
            kept[curve] = [list(pair) for pair in ordered[::-1][::stride][::-1]]
        return kept


@dataclass(frozen=True)
class Bench:
    """All that a method may use besides the model."""

    corpus: Corpus  # text to calibrate on, train on, or question a teacher with
    generator: torch.Generator  # the only source of randomness
    scratch: Path  # outlives a killed run, so that it can go on where it stopped; gone after a finished one
    progress: Progress
    log: TrainingLog = field(default_factory=TrainingLog)
    statistics: Path | None = None  # what the calibration text says about the uncompressed model; shared by a sweep
    cache: Path | None = None  # what is worth keeping between runs: downloads, answers of teachers; None: the scratch
    device: str | None = None  # where a method that goes block by block computes; None: where the model is
    sharded: bool = False  # processes that train a student together hold a part of it each


class Method(Protocol):
    """Turns a language model into one that is cheaper to run.

    One that says `computes_block_by_block: ClassVar[bool] = True` gets the model in host memory when it runs on a GPU,
    takes each decoder block to `bench.device` in its turn, and leaves the result in host memory.
    """

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """May rework `base` in place; the caller must use only what is returned."""
