"""QLoRA: a 4-bit base that stays as it is, and trained low-rank adapters beside it (Dettmers et al. 2023).

https://arxiv.org/abs/2305.14314, Section 3: Y = X · W_NF4 + (α / r) · X Bᵀ Aᵀ, with doubly quantized scales of the base
and adapters on every linear of the blocks. The adapters stay adapters: merging them would round them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from harness.errors import ConfigError
from methods.blocks import block_linears, plain_linears
from methods.low_rank import add_adapters
from methods.quantization.round_to_nearest import RoundToNearest
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.grids import Grid


@dataclass(frozen=True)
class QLoRA:
    """A rounded base and adapters trained by the language-modelling loss on the calibration text.

    rank: r of the adapters. alpha: α; their output counts α / r times.
    """

    grid: Grid
    training: TrainingSettings
    rank: int = 64
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"method.rank={self.rank}: must be at least 1; without adapters it is method=nf4")
        if self.alpha <= 0:
            raise ConfigError(f"method.alpha={self.alpha}: must be greater than 0")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Round, put adapters beside every linear, train them."""
        for name, linear in plain_linears(base.module).items():
            if self.rank > min(linear.weight.shape):
                raise ConfigError(f"method.rank={self.rank}: {name} has {min(linear.weight.shape)} at its smaller side")
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        rounded = RoundToNearest(self.grid).compress(base, bench)
        linears = block_linears(rounded.module)
        for layer in linears.values():
            layer.prepare("scoring", next(rounded.module.parameters()).dtype)  # training reads a dense copy
        seed = bench.generator.initial_seed()
        layers = add_adapters(rounded.module, linears, self.rank, self.alpha, base.storage_dtype, seed)
        parameters = [factor for layer in layers.values() for factor in layer.train_factors()]
        train(rounded.module, parameters, windows, language_modeling_loss, self.training, bench, "QLoRA")
        for layer in layers.values():
            layer.settle()
            layer.prepare("stored", base.storage_dtype)
        return rounded
