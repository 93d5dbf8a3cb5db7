"""SparseGPT: take out weights column by column; columns still to come make up for them (Frantar and Alistarh 2023).

https://arxiv.org/abs/2301.00774, Algorithm 1. With a grid, what is kept is rounded in the same sweep (Section 3.4), so
that later columns answer for both errors at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from methods.blocks import Block, one_at_a_time, plain_linears
from methods.curvature import Moments, Sweep, blocks_to_calibrate, calibrate_block, sweep_columns
from methods.fused_sweep import FusedColumns
from methods.pruning.masks import Pattern, lowest, removed_before
from methods.pruning.sparse_linear import SparseLinear
from methods.quantization.gptq import ColumnGrids

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.method import Bench, LanguageModel
    from methods.quantization.grids import IntegerGrid, Scales

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SparseGPT:
    """Second-order pruning, alone or together with rounding.

    sparsity: share that is removed, or N:M.
    grid: integers that the kept weights are rounded to, fitted to the dense weights; None keeps 16 bits.
    damping: fraction of the mean of H's diagonal that is added to it.
    mask_columns: columns whose weights compete for a share; they are chosen when the sweep reaches them.
    block_columns: columns after which updates to the rest are applied; changes the cost, not the result.
    sequential: "block" calibrates a block on its dense self, as the authors do; "linear" each linear on inputs from
        the already pruned ones before it in its block.
    working_memory_gib: activations alive at once; a larger calibration set goes through in chunks.
    """

    computes_block_by_block: ClassVar[bool] = True
    sparsity: float | str
    grid: IntegerGrid | None = None
    damping: float = 0.01
    mask_columns: int = 128
    block_columns: int = 128
    sequential: Literal["linear", "block"] = "block"
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        Pattern.parse(self.sparsity)
        if self.sequential not in ("linear", "block"):
            raise ConfigError(f"method.sequential={self.sequential}: choose one of linear, block")
        for name in ("damping", "mask_columns", "block_columns", "working_memory_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be greater than 0")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Solve every linear on the inputs it has in the model pruned so far."""
        pattern = Pattern.parse(self.sparsity)
        for name, linear in plain_linears(base.module).items():
            pattern.check(name, linear.in_features)
            if self.grid is not None:
                self.grid.check(name, linear.in_features)
        blocks, hidden = blocks_to_calibrate(base, bench, self.working_memory_gib, self.sequential)
        for index, block in enumerate(bench.progress.track(one_at_a_time(blocks), "SparseGPT", len(blocks))):
            hidden = self._compress_block(block, hidden, base.storage_dtype, last=index == len(blocks) - 1)
        return base

    def _compress_block(self, block: Block, hidden: list[Tensor], dtype: torch.dtype, last: bool) -> list[Tensor]:
        linears = block.linears()
        pruned: dict[str, SparseLinear] = {}

        def change(names: list[str], moments: Moments) -> None:
            group = [linears[name] for name in names]
            rows = [linear.out_features for linear in group]
            weight = torch.cat([linear.weight.float() for linear in group])
            sweep, removed, scales = self.solve(weight, moments.take_second(), dtype, rows, removed_before(group))
            if sweep.retries:
                log.warning("%s: damping raised %d times to %g", ", ".join(names), sweep.retries, sweep.damping)
            parts = zip(names, group, sweep.weight.split(rows), removed.split(rows), scales, strict=True)
            for name, linear, kept, gone, own in parts:
                linear.weight.copy_(kept)
                pruned[name] = SparseLinear.from_mask(linear, kept, gone, str(self.pattern), dtype, self.grid, own)

        outputs = calibrate_block(block, hidden, change, self.sequential, last)
        for name, layer in pruned.items():
            block.replace(name, layer)
        return outputs

    @property
    def pattern(self) -> Pattern:
        """What is removed."""
        return Pattern.parse(self.sparsity)

    def solve(
        self, weight: Tensor, moment: Tensor, dtype: torch.dtype, rows: list[int], before: Tensor | None = None
    ) -> tuple[Sweep, Tensor, list[Scales | None]]:
        """Prune W [R, C], the weights of linears with `rows` output channels stacked, under H [C, C].

        before: bool [R, C], what is removed already: it counts for the share, and is chosen first.

        Returns the sweep, the mask [R, C], and the scales of each linear (None without a grid).
        """
        scales: list[Scales | None] = [None] * len(rows)
        finish = rounded = None
        if self.grid is not None:
            scales = [self.grid.fit(part.contiguous(), dtype) for part in weight.split(rows)]
            grids = ColumnGrids(self.grid, scales, rows, weight.shape[1], weight.dtype)
            finish, rounded = grids.round, grids.fused()
        masker = _Masker(self.pattern, self.mask_columns, rows, weight, finish, before)
        sweep = sweep_columns(
            weight,
            moment,
            masker.project,
            self.damping,
            self.block_columns,
            see_pivots=masker.see_pivots,
            fused=masker.fused(rounded),
        )
        return sweep, masker.gone.T, scales


@dataclass
class _Masker:
    """Chooses what to remove when the sweep, from left to right, reaches the first column of a mask block."""

    pattern: Pattern
    mask_columns: int
    rows: list[int]  # output channels of each stacked linear: weights compete within their own
    weight: Tensor
    finish: Callable[[Tensor, int, object], Tensor] | None
    before: Tensor | None = None  # [R, C], removed already
    gone: Tensor = field(init=False)  # [C, R], what is removed
    pivots: Tensor = field(init=False)  # [C]

    def __post_init__(self) -> None:
        self.gone = torch.zeros(self.weight.T.shape, dtype=torch.bool, device=self.weight.device)
        if self.before is not None:
            self.gone.copy_(self.before.T)

    def see_pivots(self, pivots: Tensor) -> None:
        """Take the diagonal of U: w² / U_jj² is what removing w costs once columns before j are settled."""
        self.pivots = pivots

    def project(self, column: Tensor, k: int, current: Callable[[int, int], Tensor]) -> Tensor:
        """Column k [R] without what is removed from it, and rounded if there is a grid."""
        width = self.pattern.of or self.mask_columns
        if k % width == 0:
            last = min(k + width, self.weight.shape[1])
            self.gone[k:last] = self._chosen(k, current(k, last)).T
        kept = column.masked_fill(self.gone[k], 0)
        return kept if self.finish is None else self.finish(kept, k, current)

    def _chosen(self, k: int, present: Tensor) -> Tensor:
        """What to remove of columns from k on, by their present values [R, w]: bool [R, w]."""
        here = slice(k, k + present.shape[1])
        scores = (present / self.pivots[here]).square()
        if self.before is not None:
            scores.masked_fill_(self.before[:, here], -torch.inf)
        return torch.cat([lowest(part, self.pattern, "layer") for part in scores.split(self.rows)])

    def fused(self, rounded: FusedColumns | None) -> FusedColumns:
        """What `project` does, for a GPU kernel that rounds so; it chooses N of M neighbours itself."""
        rounded = replace(rounded or FusedColumns(), removed=self.gone)
        if self.pattern.of is not None:
            return replace(rounded, keep=self.pattern.keep, of=self.pattern.of)

        def begin(first: int, present: Tensor) -> None:
            values = present[: self.mask_columns]
            self.gone[first : first + len(values)] = self._chosen(first, values.T).T

        return replace(rounded, begin=begin, align=self.mask_columns)
