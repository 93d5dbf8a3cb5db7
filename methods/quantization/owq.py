"""OWQ: the few input channels that suffer most from rounding stay in 16 bits and absorb the others' errors (Lee 2023).

https://arxiv.org/abs/2306.02272, Section 3: sensitive columns, GPTQ on the rest with those columns last, grids whose
range is searched. What the paper leaves open is as in the authors' code.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.blocks import Block, one_at_a_time, plain_linears
from methods.curvature import Moments, Sweep, blocks_to_calibrate, calibrate_block, sweep_columns
from methods.fused_sweep import FusedColumns
from methods.quantization.grids import IntegerGrid, Scales, require_integers
from methods.quantization.linear import PackedLinear, pack_linear
from methods.quantization.outliers import ColumnOutlierLinear
from methods.quantization.range_search import searched_scales

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OWQ:
    """Second-order rounding around weak columns in 16 bits.

    extra_bits: budget of 16-bit weights: what they may add to the grid's bits, on average over a block.
    search_points, sensitivity_points: steps in which ranges are searched for the grid itself, and for the rounding
        whose error tells how sensitive a column is.
    damping, activation_order, block_columns, sequential, working_memory_gib: as in GPTQ. Groups are static.
    """

    computes_block_by_block: ClassVar[bool] = True
    grid: IntegerGrid
    extra_bits: float = 0.01
    search_points: int = 100
    sensitivity_points: int = 40
    damping: float = 0.01
    activation_order: bool = False
    block_columns: int = 128
    sequential: Literal["linear", "block"] = "block"
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        require_integers(self.grid, "OWQ")
        for name in ("search_points", "sensitivity_points", "damping", "block_columns", "working_memory_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be greater than 0")
        if not 0 <= self.extra_bits < 16 - self.grid.bits:
            raise ConfigError(
                f"method.extra_bits={self.extra_bits}: must be at least 0 and below {16 - self.grid.bits}, where every "
                f"column would stay in 16 bits (the grid has {self.grid.bits})"
            )
        if self.grid.group_size == "tensor":
            raise ConfigError("grid.group_size=tensor: OWQ searches ranges of rows or groups; use null or a number")
        if self.sequential not in ("linear", "block"):
            raise ConfigError(f"method.sequential={self.sequential}: choose one of linear, block")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Calibrate and replace the linears of one block after the other."""
        for name, linear in plain_linears(base.module).items():
            self.grid.check(name, linear.in_features)
        blocks, hidden = blocks_to_calibrate(base, bench, self.working_memory_gib, self.sequential)
        for block in bench.progress.track(one_at_a_time(blocks), "OWQ", len(blocks)):
            hidden = self._compress_block(block, hidden, base.storage_dtype, last=block is blocks[-1])
        return base

    def _compress_block(self, block: Block, hidden: list[Tensor], dtype: torch.dtype, last: bool) -> list[Tensor]:
        linears = block.linears()
        counts = kept_columns(
            {name: (linear.out_features, linear.in_features) for name, linear in linears.items()},
            self.grid.bits,
            self.extra_bits,
        )
        packed: dict[str, PackedLinear] = {}

        def change(names: list[str], moments: Moments) -> None:
            moment = moments.second()
            for name in names:
                linear = linears[name]
                sweep, scales, weak = self.solve(linear.weight.float(), moment, dtype, counts[name])
                if sweep.retries:
                    log.warning("%s: damping raised %d times to %g", name, sweep.retries, sweep.damping)
                packed[name] = self._packed(linear, sweep.weight, scales, weak)
                linear.weight.copy_(packed[name].dequantise())

        outputs = calibrate_block(block, hidden, change, self.sequential, last)
        for name, linear in packed.items():
            block.replace(name, linear)
        return outputs

    def solve(self, weight: Tensor, moment: Tensor, dtype: torch.dtype, count: int) -> tuple[Sweep, Scales, Tensor]:
        """Round W [R, C] under H [C, C] but for `count` columns: the sweep, the scales, and those columns [count]."""
        live = weight.masked_fill(moment.diagonal() == 0, 0)
        weak = self.weak_columns(live, moment, dtype, count)
        kept = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        kept[weak] = True
        scales = searched_scales(self.grid, live.masked_fill(kept, 0), dtype, self.search_points)
        every = torch.arange(len(kept), device=weight.device)
        if self.activation_order:
            every = moment.diagonal().argsort(descending=True, stable=True)
        order = torch.cat([every[~kept[every]], weak])  # the weak ones last: every error reaches them
        is_kept, width = kept.tolist(), self.grid.width(weight.shape[1])
        single = IntegerGrid(self.grid.bits, self.grid.symmetric, None)

        def project(column: Tensor, k: int, current: object) -> Tensor:
            if is_kept[k]:
                return column.to(dtype).to(column.dtype)
            group = slice(k // width, k // width + 1)
            return single.round(column[:, None], Scales(scales.scale[:, group], scales.zero[:, group]))[:, 0]

        stacked = [part.T.to(weight.dtype).contiguous() for part in (scales.scale, scales.zero)]
        fused = FusedColumns(*stacked, width, self.grid.top, kept=kept, kept_dtype=dtype)
        sweep = sweep_columns(weight, moment, project, self.damping, self.block_columns, order, fused=fused)
        return sweep, scales, weak

    def weak_columns(self, weight: Tensor, moment: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        """Indices, ascending, of the `count` columns of W [R, C] with the largest λ_j ‖ΔW_j‖².

        λ_j is H's diagonal without damping; ΔW is what rounding to the nearest point changes.
        """
        if not count:
            return torch.zeros(0, dtype=torch.long, device=weight.device)
        scales = searched_scales(self.grid, weight, dtype, self.sensitivity_points)
        change = self.grid.round(weight, scales).sub_(weight)
        sensitivity = moment.diagonal() * change.square().sum(0)
        return sensitivity.argsort(descending=True, stable=True)[:count].sort().values

    def _packed(self, linear: nn.Linear, weight: Tensor, scales: Scales, weak: Tensor) -> PackedLinear:
        if not len(weak):
            return pack_linear(linear, self.grid.encode(weight, scales), scales, self.grid)
        rounded = weight.index_fill(1, weak, 0)
        bare = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta").train(linear.training)
        packed = pack_linear(bare, self.grid.encode(rounded, scales), scales, self.grid)
        return ColumnOutlierLinear.from_columns(linear, packed, weak, weight[:, weak])


def kept_columns(shapes: dict[str, tuple[int, int]], bits: int, extra_bits: float) -> dict[str, int]:
    """How many columns of each linear [out, in] of a block stay in 16 bits, an even number.

    The budget, extra_bits / (16 - bits) of the block's weights, is shared equally: each linear keeps as many *weights*,
    so a tall matrix keeps fewer columns. For the blocks of Llama and OPT that is the authors' table.
    """
    weights = sum(rows * columns for rows, columns in shapes.values())
    each = extra_bits / (16 - bits) * weights / len(shapes)
    rounded = {name: round(each / rows) for name, (rows, _) in shapes.items()}
    return {name: min(count + count % 2, shapes[name][1]) for name, count in rounded.items()}
