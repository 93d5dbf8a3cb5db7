"""What a compression method is and what it may use.

A method turns a language model into one that is cheaper to run. It never reports on itself: bits, bytes,
quality and speed are counted from outside, on the artifact that was saved and loaded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Bench:
    """All that a method may use besides the model."""

    corpus: Corpus  # text to calibrate on, train on, or question a teacher with
    generator: torch.Generator  # the only source of randomness
    scratch: Path  # may vanish after the run
    progress: Progress


class Method(Protocol):
    """Turns a language model into one that is cheaper to run."""

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """May rework `base` in place; the caller must use only what is returned."""
