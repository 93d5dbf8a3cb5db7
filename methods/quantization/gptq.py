"""GPTQ: round column by column and let the columns still to come make up for each error (Frantar et al. 2022).

https://arxiv.org/abs/2210.17323, Algorithm 1; activation order and grouping as in the authors' code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from methods.blocks import Block, one_at_a_time, plain_linears
from methods.curvature import Moments, Sweep, blocks_to_calibrate, calibrate_block, sweep_columns
from methods.fused_sweep import FusedColumns
from methods.pruning.masks import removed_before
from methods.quantization.grids import Grid, IntegerGrid, Scales
from methods.quantization.linear import PackedLinear, pack_linear

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.activations import InputGrid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding.

    grid: integers, 8-bit values, or a code book that does not depend on the weights.
    inputs: how the inputs of linears are quantized when the model runs (dynamic grids); calibration sees them exact.
    damping: fraction of the mean of H's diagonal that is added to it.
    activation_order: treat the most active input channels first.
    groups: "static" fits the grid of every group to the original weights; "dynamic" fits it to the updated weights
        when the sweep reaches the group. Dynamic groups in activation order would need an index per channel.
    block_columns: columns after which updates to the rest are applied; changes the cost, not the result.
    sequential: "linear" calibrates each linear on inputs from the already rounded ones before it in its block;
        "block" calibrates a block on its unrounded self.
    working_memory_gib: activations alive at once; a calibration set that does not fit goes through in chunks, with
        the same result at a higher cost. On a GPU, a quarter of it is for hidden states between blocks.
    """

    computes_block_by_block: ClassVar[bool] = True
    grid: Grid
    inputs: InputGrid | None = None
    damping: float = 0.01
    activation_order: bool = True
    groups: Literal["static", "dynamic"] = "static"
    block_columns: int = 128
    sequential: Literal["linear", "block"] = "linear"
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        for name, allowed in (("groups", ("static", "dynamic")), ("sequential", ("linear", "block"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"method.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        for name in ("damping", "block_columns", "working_memory_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be greater than 0")
        if self.activation_order and self.groups == "dynamic":
            raise ConfigError(
                "method.activation_order=true with method.groups=dynamic scatters a group over the row and needs an "
                "index per channel (g_idx), which no fast kernel reads; use method.groups=static, or "
                "method.activation_order=false"
            )
        if self.groups == "dynamic" and (self.grid.group_size == "tensor" or not isinstance(self.grid, IntegerGrid)):
            raise ConfigError("method.groups=dynamic needs an integer grid with groups; use method.groups=static")
        if self.inputs is not None and self.inputs.static:
            raise ConfigError("method.inputs.static=true: GPTQ finds no static scales; use a dynamic grid of inputs")
        if getattr(self.grid, "kind", None) == "quantile" or getattr(self.grid, "double_quantization", False):
            raise ConfigError("GPTQ rounds to grids that stay as they are: no quantile books, no double quantization")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Calibrate and replace the linears of one block after the other."""
        for name, linear in plain_linears(base.module).items():
            self._check(name, linear.in_features)
        blocks, hidden = blocks_to_calibrate(base, bench, self.working_memory_gib, self.sequential)
        for block in bench.progress.track(one_at_a_time(blocks), "GPTQ", len(blocks)):
            hidden = self._compress_block(block, hidden, base.storage_dtype, last=block is blocks[-1])
        return base

    def _check(self, name: str, columns: int) -> None:
        self.grid.check(name, columns)
        size = self.grid.group_size
        if not isinstance(self.grid, IntegerGrid) and isinstance(size, int) and columns % size:
            raise ConfigError(
                f"{name}: {columns} input channels do not split into blocks of {size}, and a block "
                "that crosses rows cannot be solved column by column; choose a divisor for grid.group_size"
            )

    def _compress_block(self, block: Block, hidden: list[Tensor], dtype: torch.dtype, last: bool) -> list[Tensor]:
        linears = block.linears()
        packed: dict[str, PackedLinear] = {}

        def change(names: list[str], moments: Moments) -> None:
            group = [linears[name] for name in names]
            rows = [linear.out_features for linear in group]
            weight = torch.cat([linear.weight for linear in group]).float()
            sweep, scales = self.solve(weight, moments.take_second(), dtype, rows, removed_before(group))
            if sweep.retries:
                log.warning("%s: damping raised %d times to %g", ", ".join(names), sweep.retries, sweep.damping)
            for name, linear, weight, own in zip(names, group, sweep.weight.split(rows), scales, strict=True):
                linear.weight.copy_(weight)
                codes = self.grid.encode(weight, own)
                packed[name] = pack_linear(linear, codes, own, self.grid, self.inputs)

        outputs = calibrate_block(block, hidden, change, self.sequential, last)
        for name, linear in packed.items():
            block.replace(name, linear)
        return outputs

    def solve(
        self, weight: Tensor, moment: Tensor, dtype: torch.dtype, rows: list[int], removed: Tensor | None = None
    ) -> tuple[Sweep, list[Scales]]:
        """Round W [R, C], the weights of linears with `rows` output channels stacked, under H [C, C].

        removed: bool [R, C], weights that stay zero because an earlier method took them out.
        Returns the sweep, and the scales of each linear. Rows do not influence each other, so stacking changes nothing.
        """
        order = moment.diagonal().argsort(descending=True, stable=True) if self.activation_order else None
        live = weight.masked_fill(moment.diagonal() == 0, 0)
        scales = [self.grid.fit(part.contiguous(), dtype) for part in live.split(rows)]
        grids = ColumnGrids(self.grid, scales, rows, weight.shape[1], weight.dtype)
        dynamic = self.groups == "dynamic"
        project, fused = grids.refit_then_round if dynamic else grids.round, grids.fused(dynamic, removed)
        sweep = sweep_columns(
            live, moment, project, self.damping, self.block_columns, order, removed=removed, fused=fused
        )
        return sweep, grids.split(rows)


class ColumnGrids:
    """The grids of stacked weights [R, C], laid out for rounding one column at a time."""

    def __init__(self, grid: Grid, scales: list[Scales], rows: list[int], columns: int, dtype: torch.dtype):
        self.grid, self.width, self.columns = grid, grid.width(columns), columns
        self.storage_dtype = scales[0].scale.dtype

        def stacked(parts: list[Tensor]) -> Tensor:
            whole = torch.cat([part.expand(count, -1) for part, count in zip(parts, rows, strict=True)])
            return whole.T.to(dtype).contiguous()  # [G, R]

        self.scale = stacked([own.scale for own in scales])
        self.zero = None if scales[0].zero is None else stacked([own.zero for own in scales])

    def round(self, column: Tensor, k: int, current: object) -> Tensor:
        """Column k [R] on its groups' grids: the arithmetic of the grid's own `round`."""
        scale = self.scale[k // self.width]
        if self.zero is None:
            return self.grid.round_scaled(column, scale)
        zero = self.zero[k // self.width]
        return (column / scale).round_().add_(zero).clamp_(0, self.grid.top).sub_(zero).mul_(scale)

    def refit_then_round(self, column: Tensor, k: int, current: object) -> Tensor:
        """Like `round`, but at the start of a group its grid is fitted to the present weights."""
        if k % self.width == 0:
            self._refit(k, current(k, min(k + self.width, self.columns)))
        return self.round(column, k, current)

    def _refit(self, k: int, values: Tensor) -> None:
        """Fit the grid of the group that begins with column k to its present values [R, g]."""
        row = IntegerGrid(self.grid.bits, self.grid.symmetric, None)
        fitted = row.fit(values.contiguous(), self.storage_dtype)
        self.scale[k // self.width] = fitted.scale[:, 0].to(self.scale.dtype)
        self.zero[k // self.width] = fitted.zero[:, 0].to(self.zero.dtype)

    def fused(self, dynamic: bool = False, removed: Tensor | None = None) -> FusedColumns | None:
        """What `round`, or `refit_then_round`, does after removing weights (bool [R, C]), for a GPU kernel."""
        if not isinstance(self.grid, IntegerGrid):
            return None

        def begin(first: int, present: Tensor) -> None:
            self._refit(first, present[: self.width].T)

        return FusedColumns(
            self.scale,
            self.zero,
            self.width,
            self.grid.top,
            None if removed is None else removed.T.contiguous(),
            begin=begin if dynamic else None,
            align=self.width,
        )

    def split(self, rows: list[int]) -> list[Scales]:
        """Scales per linear, in the type and shape they are stored in."""
        first = slice(0, 1) if self.grid.group_size == "tensor" else slice(None)
        parts = self.scale.T.to(self.storage_dtype).split(rows)
        if self.zero is None:
            return [Scales(part[first], None) for part in parts]
        zeros = self.zero.T.to(torch.int32).split(rows)
        return [Scales(s[first], z[first]) for s, z in zip(parts, zeros, strict=True)]
