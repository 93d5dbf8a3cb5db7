"""The column solver as one kernel per block of columns (Triton).

Rows of W do not influence each other: a tile of rows with a block of columns stays on the chip while its columns are
projected one by one, and what they leave for the columns beyond the block is one product. The arithmetic is that of
`methods.curvature.sweep_columns`, which remains the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

ROWS = 32  # of a tile: with 128 columns in float32 that is 32 registers a thread
WARPS = 4


@dataclass(frozen=True)
class FusedColumns:
    """What becomes of a column, as tensors: zero where it is removed, then the nearest point of an integer grid.

    scale, zero: [G, R] in the arithmetic's type, row k // width for column k; None rounds nothing.
    width: columns per group; top: largest code.
    removed: [C, R] bool, by the index of the column.
    keep, of: where `of` is not 0, all but `keep` of so many neighbours are removed as well, those with the lowest
        (w / U_jj)²; `removed` learns which. Columns are then swept in their own order.
    kept: [C] bool, columns that stay what they are, in the type `kept_dtype`.
    begin: called as begin(position, present values [C - position, R]) on a device that has done all columns before
        `position`, a multiple of `align`; it may change scale, zero and removed in place for what follows.
    """

    scale: Tensor | None = None
    zero: Tensor | None = None
    width: int = 1
    top: int = 0
    removed: Tensor | None = None
    kept: Tensor | None = None
    kept_dtype: torch.dtype | None = None
    keep: int = 0
    of: int = 0
    begin: Callable[[int, Tensor], None] | None = None
    align: int = 1

    def runs_on(self, work: Tensor) -> bool:
        """Whether there is a kernel for these columns [C, R]."""
        return work.device.type == "cuda" and work.dtype == torch.float32 and find_spec("triton") is not None


def sweep_fused(work: Tensor, factor: Tensor, order: Tensor, fused: FusedColumns, block_columns: int) -> Tensor:
    """Sweep the columns of work [C, R], float32, in place, in the order they lie; Σ e² of every row [R].

    factor: U [C, C] by position, contiguous; order: position -> index of the column, by which `fused` knows it.
    """
    columns, rows = work.shape
    block = math.gcd(fused.align, block_columns) if fused.begin is not None else block_columns
    if fused.of:
        block = max(fused.of, block - block % fused.of)
    errors = work.new_empty(min(block, columns), rows)
    total = work.new_zeros(rows)
    order = order.to(torch.int32)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        if fused.begin is not None and first % fused.align == 0:
            fused.begin(first, work[first:])
        solve_block(work, factor, order, fused, errors, first, last)
        done = errors[: last - first]
        if last < columns:
            work[last:].addmm_(factor[first:last, last:].T, done, alpha=-1)
        total += done.square().sum(0)
    return total


def solve_block(
    work: Tensor,
    factor: Tensor,
    order: Tensor,
    fused: FusedColumns,
    errors: Tensor,
    first: int,
    last: int,
    rows_per_tile: int = ROWS,
    warps: int = WARPS,
) -> None:
    """Project the columns at positions first..last of work [C, R] in place; errors [last - first, R] are e_j."""
    from methods.kernels import project_columns

    rows = work.shape[1]
    nothing = work  # a pointer that is never followed
    project_columns[(-(-rows // rows_per_tile),)](
        work,
        factor,
        errors,
        order,
        nothing if fused.scale is None else fused.scale,
        nothing if fused.zero is None else fused.zero,
        nothing if fused.removed is None else fused.removed.view(torch.uint8),
        nothing if fused.kept is None else fused.kept.view(torch.uint8),
        rows,
        work.shape[0],
        first,
        fused.width,
        float(fused.top),
        HAS_GRID=fused.scale is not None,
        HAS_REMOVED=fused.removed is not None,
        KEPT={None: 0, torch.float16: 1, torch.bfloat16: 2}[None if fused.kept is None else fused.kept_dtype],
        KEEP=fused.keep,
        OF=fused.of,
        COUNT=last - first,
        ROWS=rows_per_tile,
        COLUMNS=max(16, 1 << (last - first - 1).bit_length()),
        num_warps=warps,
    )
