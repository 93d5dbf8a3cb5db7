"""Round to nearest: every weight moves to the closest point of its group's grid. No data; the baseline of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from methods.blocks import plain_linears, replace_module
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import QuantizedLinear

if TYPE_CHECKING:
    from torch import nn

    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class RoundToNearest:
    """Rounds every linear of the decoder blocks to `grid`."""

    grid: IntegerGrid

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Replace every linear by its rounded, packed form."""
        linears = plain_linears(base.module)
        for name, linear in linears.items():
            self.grid.check(name, linear.in_features)
        for name, linear in bench.progress.track(linears.items(), "round to nearest", len(linears)):
            replace_module(base.module, name, rounded_linear(linear, self.grid, base.storage_dtype))
        return base


def rounded_linear(linear: nn.Linear, grid: IntegerGrid, dtype: torch.dtype) -> QuantizedLinear:
    """`linear` on the nearest points of `grid`, scales in `dtype`."""
    weight = linear.weight.float()
    scales = grid.fit(weight, dtype)
    return QuantizedLinear.from_codes(linear, grid.encode(weight, scales), scales, grid)
