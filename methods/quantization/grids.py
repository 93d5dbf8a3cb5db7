"""Uniform integer grids: which 2^bits values a group of weights may take.

A weight is stored as an integer code 0 .. 2^bits - 1 and means `scale * (code - zero)`. The rule is min-max with an
integer zero point, zero itself always on the grid (GPTQ's rule and compressed-tensors'): exact zeros stay zero.
Scales are rounded to the type they are stored in *before* weights are encoded, so what is evaluated is what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import ConfigError

if TYPE_CHECKING:
    from methods.quantization.linear import PackedLinear


@dataclass(frozen=True)
class Scales:
    """Where the grid of every group lies. All groups of a weight [R, C]: G per row, or one for the whole tensor."""

    scale: Tensor  # [R, G] ([1, 1] for a tensor-wide grid), storage dtype
    zero: Tensor | None  # like scale, int32, code that means 0; None for code books, whose values hold a 0
    stored: dict[str, Tensor] = field(default_factory=dict)  # what a layer keeps beside or instead of the scale


class Grid(Protocol):
    """What a weight matrix can be rounded to: `2^bits` values a group, placed by a scale."""

    bits: int

    def width(self, columns: int) -> int:
        """Input channels per group."""

    def groups(self, columns: int) -> int:
        """Groups per row."""

    def check(self, name: str, columns: int) -> None:
        """Raise ConfigError unless `columns` input channels can be grouped as configured."""

    def fit(self, weight: Tensor, dtype: torch.dtype, limit: Tensor | None = None) -> Scales:
        """The grid of every group of `weight` [R, C], scales in `dtype`."""

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Nearest codes of `weight` [R, C], uint8."""

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes [R, C] mean."""

    def round(self, weight: Tensor, scales: Scales) -> Tensor:
        """`weight` [R, C] moved to the nearest points of the grid."""

    def layer(self) -> type[PackedLinear]:
        """The class of layers that store weights on this grid."""


@dataclass(frozen=True)
class IntegerGrid:
    """An integer grid per group of weights.

    bits: 2 to 8.
    symmetric: the zero point is the middle code (full range: absmax falls half a step outside the top code).
    group_size: input channels that share a scale; None is one group per row, "tensor" one for the whole matrix.
    short_group: allow a shorter last group where the channels do not divide; otherwise that is an error.
    """

    bits: int
    symmetric: bool = False
    group_size: int | Literal["tensor"] | None = 128
    short_group: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits}: an integer grid has 2 to 8 bits; use method=dense for 16")
        size = self.group_size
        if size is None or size == "tensor":
            return
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(
                f"grid.group_size={size}: must be a positive integer, null for one group per row, or tensor"
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def width(self, columns: int) -> int:
        """Input channels per group."""
        return columns if self.group_size in (None, "tensor") else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Groups per row."""
        return -(-columns // self.width(columns))

    def check(self, name: str, columns: int) -> None:
        """Raise ConfigError unless `columns` input channels split into groups as configured."""
        if isinstance(self.group_size, int) and columns % self.group_size and not self.short_group:
            raise ConfigError(
                f"{name}: {columns} input channels do not split into groups of {self.group_size}; choose a divisor, "
                "grid.short_group=true for a shorter last group, or grid.group_size=null for one group per row"
            )

    def fit(self, weight: Tensor, dtype: torch.dtype, limit: Tensor | None = None) -> Scales:
        """The grid of every group of `weight` [R, C], scales in `dtype`.

        limit: [R, G], clip the range of each group to at most ±limit before fitting (None: no clipping).
        A group of zeros gets the smallest scale that `dtype` has, and decodes to zeros.
        """
        low, high = self.group_range(weight)
        if limit is not None:
            low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        return self.fit_range(low, high, dtype)

    def group_range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each group of `weight` [R, C], 0 between them: [R, G] each."""
        grouped = self.grouped(weight)
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def fit_range(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Scales:
        """The grids from `low` to `high` [R, G], low ≤ 0 ≤ high, scales in `dtype`."""
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        kind = torch.finfo(dtype)
        scale = ((high - low) / self.top).to(dtype).clamp(min=kind.smallest_normal * kind.eps)
        if self.symmetric:
            zero = torch.full_like(scale, 2 ** (self.bits - 1), dtype=torch.int32)
        else:
            zero = (-low / scale.to(low.dtype)).round().clamp(0, self.top).to(torch.int32)
        return Scales(scale, zero)

    def group_maximum(self, weight: Tensor) -> Tensor:
        """Largest |w| of each group of `weight` [R, C]: [R, G] ([1, 1] for a tensor-wide grid)."""
        return self.grouped(weight).abs().amax(-1)

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Nearest codes of `weight` [R, C], uint8."""
        grouped = self.grouped(weight)
        scale, zero = scales.scale[..., None].to(weight.dtype), scales.zero[..., None].to(weight.dtype)
        codes = (grouped / scale).round_().add_(zero).clamp_(0, self.top).to(torch.uint8)
        return self.ungrouped(codes, weight.shape)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes [R, C] mean, in `dtype`."""
        grouped = self.grouped(codes).to(dtype)
        scale, zero = scales.scale[..., None].to(dtype), scales.zero[..., None].to(dtype)
        return self.ungrouped((grouped - zero).mul_(scale), codes.shape)

    def round(self, weight: Tensor, scales: Scales) -> Tensor:
        """`weight` [R, C] moved to the nearest points of the grid: decode(encode(weight)) without the codes."""
        scale, zero = scales.scale[..., None].to(weight.dtype), scales.zero[..., None].to(weight.dtype)
        codes = (self.grouped(weight) / scale).round_().add_(zero).clamp_(0, self.top)
        return self.ungrouped(codes.sub_(zero).mul_(scale), weight.shape)

    def layer(self) -> type[PackedLinear]:
        """The class of layers that store weights on this grid."""
        from methods.quantization.linear import QuantizedLinear

        return QuantizedLinear

    def grouped(self, weight: Tensor) -> Tensor:
        """[R, C] -> [R, G, g]; a short last group is filled up with zeros, which every grid contains."""
        if self.group_size == "tensor":
            return weight.reshape(1, 1, -1)
        rows, columns = weight.shape
        missing = self.groups(columns) * self.width(columns) - columns
        return functional.pad(weight, (0, missing)).view(rows, self.groups(columns), -1)

    def ungrouped(self, grouped: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `grouped`, for a weight of this shape."""
        if self.group_size == "tensor":
            return grouped.view(shape)
        return grouped.flatten(1)[:, : shape[1]]


def require_integers(grid: Grid, method: str) -> None:
    """Raise ConfigError for a grid that is not an IntegerGrid."""
    if not isinstance(grid, IntegerGrid):
        raise ConfigError(
            f"{method} works on integer grids, not on a {type(grid).__name__}; use grid@method.grid=int_group64, "
            "or another of int_*"
        )
