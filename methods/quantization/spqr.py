"""SpQR: groups of 16 weights, scales quantized themselves, and the entries that would err most in 16 bits (2023).

Dettmers et al., https://arxiv.org/abs/2306.03078, Section 4 and Algorithm 1; the settings of the authors' README. The
solver is GPTQ's; a column becomes its rounded self or, entry by entry, what it was.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from methods.blocks import Block, one_at_a_time, plain_linears
from methods.curvature import Moments, Sweep, blocks_to_calibrate, calibrate_block, inverse_factor, sweep_columns
from methods.quantization.outliers import (
    WIDEST,
    SparseOutlierLinear,
    SparseSolution,
    Statistics,
    quantise_statistics,
)

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

log = logging.getLogger(__name__)

NARROWEST = 0.5  # of a group's largest weight: no range is smaller, which keeps zero points within ±2 ranges


@dataclass(frozen=True)
class SpQR:
    """Second-order rounding in tiny groups, outliers apart.

    bits: of a weight that is no outlier; 2 to 8.
    group_size: input channels, in the order of the sweep, that share a scale and a zero point.
    statistics_bits, statistics_rows: bits of a scale and of a zero point; output channels whose scales share a grid.
    outlier_threshold: in units of the error that replacing a weight by its column's mean would make; null for none.
    leave_one_out: fit a group's grid without the weights whose absence would help the others most.
    damping, activation_order, block_columns, sequential, working_memory_gib: as in GPTQ.
    """

    computes_block_by_block: ClassVar[bool] = True
    bits: int
    group_size: int = 16
    statistics_bits: int = 3
    statistics_rows: int = 16
    outlier_threshold: float | None = 0.2
    leave_one_out: bool = True
    damping: float = 1.0
    activation_order: bool = True
    block_columns: int = 128
    sequential: Literal["linear", "block"] = "linear"
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        for name in ("bits", "statistics_bits"):
            if getattr(self, name) not in range(2, 9):
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be 2 to 8")
        for name, least in (("group_size", 2), ("statistics_rows", 1), ("block_columns", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least {least}")
        for name in ("damping", "working_memory_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be greater than 0")
        if self.outlier_threshold is not None and self.outlier_threshold < 0:
            raise ConfigError(f"method.outlier_threshold={self.outlier_threshold}: must not be negative; null for none")
        if self.sequential not in ("linear", "block"):
            raise ConfigError(f"method.sequential={self.sequential}: choose one of linear, block")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Calibrate and replace the linears of one block after the other."""
        for name, linear in plain_linears(base.module).items():
            if linear.in_features % self.group_size or linear.in_features > WIDEST:
                raise ConfigError(
                    f"{name}: {linear.in_features} input channels must be a multiple of method.group_size="
                    f"{self.group_size} and at most {WIDEST}; choose a group size that divides them"
                )
        blocks, hidden = blocks_to_calibrate(base, bench, self.working_memory_gib, self.sequential)
        for index, block in enumerate(bench.progress.track(one_at_a_time(blocks), "SpQR", len(blocks))):
            hidden = self._compress_block(block, hidden, base.storage_dtype, last=block is blocks[-1])
            layers = [layer for layer in block.linears().values() if isinstance(layer, SparseOutlierLinear)]
            outliers = sum(len(layer.outlier_values) for layer in layers)
            bench.log.point("outlier share by block", index, outliers / sum(layer.weight_count for layer in layers))
        return base

    def _compress_block(self, block: Block, hidden: list[Tensor], dtype: torch.dtype, last: bool) -> list[Tensor]:
        linears = block.linears()
        packed: dict[str, SparseOutlierLinear] = {}

        def change(names: list[str], moments: Moments) -> None:
            moment = moments.second()
            for name in names:
                linear = linears[name]
                sweep, solution = self.solve(linear.weight.float(), moment, dtype)
                if sweep.retries:
                    log.warning("%s: damping raised %d times to %g", name, sweep.retries, sweep.damping)
                packed[name] = SparseOutlierLinear.from_solution(
                    linear, solution, self.bits, self.statistics_bits, self.statistics_rows
                )
                linear.weight.copy_(packed[name].dequantise())

        outputs = calibrate_block(block, hidden, change, self.sequential, last)
        for name, linear in packed.items():
            block.replace(name, linear)
        return outputs

    def solve(self, weight: Tensor, moment: Tensor, dtype: torch.dtype) -> tuple[Sweep, SparseSolution]:
        """Round W [R, C] under H [C, C]; outliers and statistics are in `dtype`."""
        order = moment.diagonal().argsort(descending=True, stable=True) if self.activation_order else None
        pivots, damping, retries = _pivots(moment, order, self.damping)
        live = weight.masked_fill(moment.diagonal() == 0, 0)
        stored = live if order is None else live[:, order]
        spread = live.new_zeros(()) if len(live) < 2 else (stored.var(0) / pivots.square()).mean()
        threshold = math.inf if self.outlier_threshold is None else self.outlier_threshold * float(spread)
        groups = _Groups(self, weight.shape, order, pivots, threshold, dtype)
        sweep = sweep_columns(weight, moment, groups.project, damping, self.block_columns, order)
        solved = sweep.weight if order is None else sweep.weight[:, order]
        return Sweep(sweep.weight, sweep.error, damping, retries), groups.solution(solved, order)


class _Groups:
    """The groups of one matrix [R, C]: fitted when the sweep reaches them, then applied column by column."""

    def __init__(
        self,
        method: SpQR,
        shape: torch.Size,
        order: Tensor | None,
        pivots: Tensor,
        threshold: float,
        dtype: torch.dtype,
    ) -> None:
        rows, columns = shape
        self.method, self.threshold, self.dtype = method, threshold, dtype
        self.position = range(columns) if order is None else order.argsort().tolist()
        self.importance = pivots.reciprocal()  # [C], in the order of the sweep
        self.codes = torch.zeros(columns, rows, dtype=torch.uint8, device=pivots.device)
        self.outliers = torch.zeros(columns, rows, dtype=torch.bool, device=pivots.device)
        self.scales: list[Statistics] = []  # [1, R] each
        self.zeros: list[Statistics] = []
        self.scale = self.zero = pivots.new_empty(0)  # [R] of the present group

    def project(self, column: Tensor, k: int, current: object) -> Tensor:
        """Column k [R]: on the grid of its group where that errs little, itself elsewhere."""
        at, size = self.position[k], self.method.group_size
        if at % size == 0:
            self._begin(current(at, at + size), self.importance[at : at + size])
        codes = _encode(column, self.scale, self.zero, self.method.bits)
        rounded = (codes - self.zero).mul_(self.scale)
        self.codes[at] = codes.to(torch.uint8)
        self.outliers[at] = ((column - rounded) * self.importance[at]).square_() > self.threshold
        return torch.where(self.outliers[at], column.to(self.dtype).to(column.dtype), rounded)

    def _begin(self, values: Tensor, importance: Tensor) -> None:
        """Fit scales and zero points to the present `values` [R, g] of a group, and quantize them."""
        if self.method.leave_one_out and self.threshold < math.inf:
            odd = leave_one_out_gain(values, importance, self.method.bits) > self.threshold
            usual = values.masked_fill(odd, 0).sum(1) / (~odd).sum(1).clamp(min=1)
            values = torch.where(odd, usual[:, None], values)
        scale, zero = fit_group(values.amin(1), values.amax(1), self.method.bits)
        kind, rows = torch.finfo(self.dtype), self.method.statistics_rows
        scale.clamp_(min=kind.smallest_normal * kind.eps)
        self.scales.append(quantise_statistics(scale[None], self.method.statistics_bits, rows, self.dtype))
        self.zeros.append(quantise_statistics(zero[None], self.method.statistics_bits, rows, self.dtype))
        self.scale, self.zero = self.scales[-1].decode(rows)[0], self.zeros[-1].decode(rows)[0]

    def solution(self, solved: Tensor, order: Tensor | None) -> SparseSolution:
        """What the sweep found; `solved` [R, C] in its order."""
        scale, zero = (
            Statistics(*(torch.cat([getattr(one, part) for one in kept]) for part in ("codes", "step", "low")))
            for kept in (self.scales, self.zeros)
        )
        return SparseSolution(self.codes.T.contiguous(), scale, zero, self.outliers.T, solved, order)


def fit_group(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, not an integer, that put 2^bits points from `low` to `high`; all of one shape."""
    largest = torch.maximum(low.abs(), high.abs())
    reach = torch.maximum(high - low, NARROWEST * largest).clamp(min=torch.finfo(low.dtype).tiny * 2**bits)
    scale = reach / (2**bits - 1)
    return scale, -low / scale


def leave_one_out_gain(values: Tensor, importance: Tensor, bits: int) -> Tensor:
    """How much less a group errs when its grid is fitted without, and not asked about, one weight.

    values [R, g], importance [g] (1 / U_jj) -> [R, g]: Σ_j (δ_j / U_jj)² with all weights, minus that without each.
    Only the smallest and the largest weight shape the grid; without any other, its own error is what is saved.
    """
    (low, lowest), (high, highest) = values.min(1, keepdim=True), values.max(1, keepdim=True)
    errors = _squared_errors(values, low, high, importance, bits)
    total, gain = errors.sum(1, keepdim=True), errors.clone()
    for at, extreme in ((lowest, math.inf), (highest, -math.inf)):
        rest = values.scatter(1, at, extreme)
        low_left = rest.amin(1, keepdim=True) if extreme > 0 else low
        high_left = rest.amax(1, keepdim=True) if extreme < 0 else high
        without = _squared_errors(values, low_left, high_left, importance, bits).scatter_(1, at, 0).sum(1, keepdim=True)
        gain.scatter_(1, at, total - without)
    return gain


def _squared_errors(values: Tensor, low: Tensor, high: Tensor, importance: Tensor, bits: int) -> Tensor:
    scale, zero = fit_group(low, high, bits)
    rounded = _encode(values, scale, zero, bits).sub_(zero).mul_(scale)
    return rounded.sub_(values).mul_(importance).square_()


def _encode(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes, as floats."""
    return (values / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def _pivots(moment: Tensor, order: Tensor | None, damping: float) -> tuple[Tensor, float, int]:
    """U_jj [C] in the order of the sweep, the damping that was needed, and how often it was raised.

    Infinite where a channel is never active: whatever its weights become costs nothing, so none is an outlier.
    """
    moment = moment if order is None else moment[order][:, order]
    factor, used, retries = inverse_factor(moment, damping)
    return factor.diagonal().masked_fill(moment.diagonal() == 0, math.inf), used, retries
