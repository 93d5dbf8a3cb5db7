"""Round to nearest: every weight moves to the closest point of its group's grid. No data; the baseline of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from harness.errors import ConfigError
from methods.blocks import plain_linears, replace_module
from methods.quantization.linear import pack_linear

if TYPE_CHECKING:
    from torch import nn

    from harness.method import Bench, LanguageModel
    from methods.quantization.activations import InputGrid
    from methods.quantization.grids import Grid
    from methods.quantization.linear import PackedLinear


@dataclass(frozen=True)
class RoundToNearest:
    """Rounds every linear of the decoder blocks to `grid`, and its inputs to `inputs` if given (dynamic grids only)."""

    grid: Grid
    inputs: InputGrid | None = None

    def __post_init__(self) -> None:
        if self.inputs is not None and self.inputs.static:
            raise ConfigError(
                "method.inputs.static=true: a static scale comes from calibration, and round to nearest has none; use "
                "method=smoothquant method.smoothing=false"
            )

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Replace every linear by its rounded, packed form."""
        linears = plain_linears(base.module)
        for name, linear in linears.items():
            self.grid.check(name, linear.in_features)
        for name, linear in bench.progress.track(linears.items(), "round to nearest", len(linears)):
            replace_module(base.module, name, rounded_linear(linear, self.grid, base.storage_dtype, self.inputs))
        return base


def rounded_linear(linear: nn.Linear, grid: Grid, dtype: torch.dtype, inputs: InputGrid | None = None) -> PackedLinear:
    """`linear` on the nearest points of `grid`, scales in `dtype`."""
    weight = linear.weight.float()
    scales = grid.fit(weight, dtype)
    return pack_linear(linear, grid.encode(weight, scales), scales, grid, inputs)
