"""SmoothQuant: move what is hard to quantize from the inputs into the weights, then quantize both (Xiao et al. 2023).

https://arxiv.org/abs/2211.10438, Section 4: s_j = max|x_j|^α / max|w_j|^(1-α) is divided out of a norm and multiplied
into what reads it. Only norms are producers; every linear of a block is quantized, the smoothed ones and the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from harness.errors import ConfigError
from methods.blocks import Block, decoder_blocks, norm_readers, plain_linears
from methods.curvature import Moments, observed_blocks
from methods.quantization.linear import pack_linear
from methods.quantization.smoothing import find_foldings, fold

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.activations import InputGrid
    from methods.quantization.grids import Grid

SMALLEST_STATISTIC = 1e-5  # authors' code


@dataclass(frozen=True)
class SmoothQuant:
    """Smoothing, then weights and inputs to the nearest.

    grid: of the weights. inputs: of what they multiply; a static grid takes its scale from the calibration text.
    migration: α; 0 leaves all difficulty with the inputs, 1 moves all of it into the weights.
    smoothing: False quantizes without smoothing: the baseline that the paper compares with.
    working_memory_gib: activations alive at once; a larger calibration set goes through in chunks.
    """

    computes_block_by_block: ClassVar[bool] = True
    grid: Grid
    inputs: InputGrid
    migration: float = 0.5
    smoothing: bool = True
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.migration <= 1:
            raise ConfigError(f"method.migration={self.migration}: must lie between 0 and 1")
        if self.inputs is None:
            raise ConfigError("method.inputs=null: SmoothQuant quantizes inputs; use inputs@method.inputs=int8_token")
        if self.working_memory_gib <= 0:
            raise ConfigError(f"method.working_memory_gib={self.working_memory_gib}: must be greater than 0")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Smooth and quantize one block after the other, by statistics of the uncompressed model."""
        for name, linear in plain_linears(base.module).items():
            self.grid.check(name, linear.in_features)
        observed = observed_blocks(base, bench, self.working_memory_gib, matrix=False, magnitudes=True)
        count = len(decoder_blocks(base.module)[1])
        for block, moments, _ in bench.progress.track(observed, "SmoothQuant", count):
            self._compress_block(block, moments, base.storage_dtype)
        return base

    def _compress_block(self, block: Block, moments: dict[str, Moments], dtype: torch.dtype) -> None:
        linears = block.linears()
        largest = {name: found.largest() for name, found in moments.items()}
        if self.smoothing:
            norms = norm_readers(block)
            for folding in find_foldings(block)[0]:
                if folding.producer in norms:
                    weights = [linears[name].weight for name in folding.readers]
                    scale = balance(largest[folding.readers[0]], weights, self.migration)
                    fold(block, folding, scale)
                    largest |= {name: largest[name] / scale for name in folding.readers}
        for name, linear in linears.items():
            weight = linear.weight.float()
            fitted = self.grid.fit(weight, dtype)
            scale = self.inputs.scale_of(largest[name].max()) if self.inputs.static else None
            packed = pack_linear(linear, self.grid.encode(weight, fitted), fitted, self.grid, self.inputs, scale)
            block.replace(name, packed)


def balance(largest: Tensor, weights: list[Tensor], migration: float) -> Tensor:
    """s [C] for inputs with maxima `largest` [C] and all the weights [R_i, C] that read them (Equation 4)."""
    inputs = largest.clamp(min=SMALLEST_STATISTIC)
    weight = torch.stack([w.float().abs().amax(0) for w in weights]).amax(0).clamp(min=SMALLEST_STATISTIC)
    return (inputs**migration / weight ** (1 - migration)).clamp(min=SMALLEST_STATISTIC)
