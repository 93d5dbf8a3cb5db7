"""Linears that round while they are trained: the arithmetic of the packed layer, with gradients straight through."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.quantization.activations import InputGrid, straight_through
from methods.quantization.grids import Grid, IntegerGrid


class FakeQuantLinear(nn.Module):
    """y = q(x) ŵᵀ + b, where ŵ = `weigh()` is computed at every call and q rounds the inputs if they have a grid."""

    def __init__(self, linear: nn.Linear, weigh: Callable[[], Tensor], inputs: InputGrid | None) -> None:
        super().__init__()
        self.linear, self.weigh, self.inputs = linear, weigh, inputs

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.inputs is not None:
            x = straight_through(x, self.inputs.round(x))
        return functional.linear(x, self.weigh(), self.linear.bias)


def rounded_straight_through(weight: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """W [R, C] on its own grid, with the gradient of W."""
    with torch.no_grad():
        rounded = grid.round(weight, grid.fit(weight, dtype))
    return straight_through(weight, rounded)


def round_between(grid: IntegerGrid, weight: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """W [R, C] on the integer grid from `low` to `high` [R, G] (low ≤ 0 ≤ high), differentiable in all three.

    What `grid.fit_range(low, high, dtype)` and `grid.round` compute, with gradients straight through every rounding.
    """
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / grid.top
    kind = torch.finfo(dtype)
    stored = scale.to(dtype).clamp(min=kind.smallest_normal * kind.eps).to(scale.dtype)
    scale = straight_through(scale, stored)[..., None]
    if grid.symmetric:
        zero: Tensor | int = 2 ** (grid.bits - 1)
    else:
        offset = -low[..., None] / scale
        zero = straight_through(offset, offset.round()).clamp(0, grid.top)
    scaled = grid.grouped(weight) / scale
    codes = (straight_through(scaled, scaled.round()) + zero).clamp(0, grid.top)
    return grid.ungrouped((codes - zero) * scale, weight.shape)
