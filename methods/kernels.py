"""GPU kernels in Triton. Import this inside the function that launches one: Triton is not everywhere."""

# Parameters in capitals are constants of the compiled kernel, as Triton's own code writes them.

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves no bits behind the point, ties go to even
FAR = tl.constexpr(1024.0)  # beyond every code, and small enough for ROUNDER


@triton.jit
def nearest_point(x, scale, zero, top):
    """x on the grid `scale * (code - zero)`, code 0..top: IEEE division and rounding, as torch does them."""
    code = tl.minimum(tl.maximum(tl.div_rn(x, scale), -FAR), FAR)
    code = (code + ROUNDER) - ROUNDER
    code = tl.minimum(tl.maximum(code + zero, 0.0), top)
    return (code - zero) * scale


@triton.jit
def nearest_bfloat16(x):
    """Finite x with 8 significant bits, ties to even. Written out: without a GPU, Triton's cast cuts the rest off."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def project_columns(
    work,  # [C, R] float32, in place
    factor,  # [C, C] float32, upper triangular
    errors,  # [COUNT, R] float32, written
    order,  # [C] int32, position -> index of the column
    scale,  # [G, R] float32
    zero,  # [G, R] float32
    removed,  # [C, R] uint8, by index
    kept,  # [C] uint8, by index
    rows,
    columns,
    first,
    width,
    top,
    HAS_GRID: tl.constexpr,
    HAS_REMOVED: tl.constexpr,
    KEPT: tl.constexpr,
    KEEP: tl.constexpr,
    OF: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns first..first + COUNT of ROWS rows: project one, spread its error over those after it, go on.

    OF: where it is not 0, all but KEEP of so many neighbours are removed: those with the lowest (w / U_jj)² when their
    first column is reached, of equals the first; what `removed` says already comes first, and it learns the others.
    """
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    there = r < rows
    place = (first + c).to(tl.int64)[:, None] * rows + r[None, :]
    inside = (c < COUNT)[:, None] & there[None, :]
    tile = tl.load(work + place, mask=inside, other=0.0)
    if OF > 0:
        pivots = tl.load(factor + (first + c).to(tl.int64) * (columns + 1), mask=c < COUNT, other=1.0)
        before = tl.load(removed + place, mask=inside, other=0) != 0
        scores = tile
    for j in range(0, COUNT):
        at = c == j
        column = tl.sum(tl.where(at[:, None], tile, 0.0), axis=0)
        k = tl.load(order + first + j).to(tl.int64)
        projected = column
        if OF > 0:
            if j % OF == 0:
                ratio = tl.div_rn(tile, tl.broadcast_to(pivots[:, None], (COLUMNS, ROWS)))
                scores = tl.where(before, -float("inf"), ratio * ratio)
            own = tl.sum(tl.where(at[:, None], scores, 0.0), axis=0)[None, :]
            rivals = (c // OF == j // OF) & (c < COUNT)
            lower = (scores < own) | ((scores == own) & (c < j)[:, None])
            rank = tl.sum(tl.where(rivals[:, None] & lower, 1, 0), axis=0)
            goes = rank < OF - KEEP
            projected = tl.where(goes, 0.0, projected)
            tl.store(removed + (first + j).to(tl.int64) * rows + r, goes.to(tl.uint8), mask=there)
        elif HAS_REMOVED:
            gone = tl.load(removed + k * rows + r, mask=there, other=0)
            projected = tl.where(gone != 0, 0.0, projected)
        if HAS_GRID:
            group = (k // width) * rows + r
            own_scale = tl.load(scale + group, mask=there, other=1.0)
            own_zero = tl.load(zero + group, mask=there, other=0.0)
            rounded = nearest_point(projected, own_scale, own_zero, top)
            if KEPT == 0:
                projected = rounded
            else:
                stays = tl.load(kept + k) != 0
                if KEPT == 1:
                    projected = tl.where(stays, projected.to(tl.float16).to(tl.float32), rounded)
                else:
                    projected = tl.where(stays, nearest_bfloat16(projected), rounded)
        row = factor + (first + j).to(tl.int64) * columns + first
        error = tl.div_rn(column - projected, tl.load(row + j))
        spread = tl.load(row + c, mask=(c > j) & (c < COUNT), other=0.0)
        tile = tl.where(at[:, None], projected[None, :], tile - spread[:, None] * error[None, :])
        tl.store(errors + j * rows + r, error, mask=there)
    tl.store(work + place, tile, mask=inside)
