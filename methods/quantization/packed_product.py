"""Products with packed weights on a GPU: codes of 2, 4 or 8 bits are read as they lie and become numbers on the chip.

At batch 1 decoding reads every weight once for two operations, so its time is that of the bytes, if there are few
instructions a weight. A few rows of input take `_few_rows`, a program for one row and some outputs; more rows fill a
tensor core's tile (`_rows`); from DENSE_ROWS on, arithmetic costs more than bytes and one dense product of decoded
weights is cheaper.

Words lie in planes: [N, planes, places]. A place stands for `planes * codes of a word` columns of one run of columns,
and so of one group: scale and zero point are read once for all of them. The k-th code of plane p at place e of a run
with S places is column (p * codes + k) * S + e of the run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RUNS = (128, 64, 32)  # columns of a run, the longest that divides a group is taken
PLANES = 4
FEW_ROWS = 8
DENSE_ROWS = 128
# outputs, places, warps of a tile, with as many outputs or more: the fastest of those tried on an H100
FEW_TILES = {8192: (8, 64, 1), 0: (8, 128, 2)}
PARTS = 8  # programs that share the columns of a tile: without, too few run at once to hide what memory takes


def run_columns(width: int) -> int | None:
    """Columns of a run for groups of `width` columns; None where no run fits."""
    return next((columns for columns in RUNS if width % columns == 0), None)


def planes_of(run: int, bits: int) -> int:
    """Planes of words for runs of so many columns."""
    return min(PLANES, run * bits // 32)


def interleave(codes: Tensor, bits: int, run: int) -> Tensor:
    """uint8 codes [N, K] -> int32 words [N, K * bits / 32] in planes, K a multiple of the columns of a run."""
    per_word, planes = 32 // bits, planes_of(run, bits)
    runs = codes.view(len(codes), -1, planes, per_word, run // (planes * per_word)).to(torch.int64)
    steps = torch.arange(0, 32, bits, device=codes.device)[:, None]
    return (runs << steps).sum(3).to(torch.int32).transpose(1, 2).flatten(1).contiguous()


@triton.jit
def _few_rows(
    x,
    words,
    scale,
    zero,
    y,
    outputs,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] (code[n, k] - zero[n, g]) scale[n, g], for one m and BLOCK_OUT n.

    A code needs no conversion: bits below the 24th of a float's pattern are the number they would be as an integer,
    times 2^-149. Masked where they lie and multiplied by an input that was scaled up by as much, codes cost two
    instructions each. It is exact for |x| < 2^27.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    RUN: tl.constexpr = SPREAD * PLANES * PER_WORD
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_here = n < outputs
    row = n.to(tl.int64)[:, None] * (PLANES * PLACES)
    total = tl.zeros([BLOCK_OUT, BLOCK], dtype=tl.float32)
    for start in range(0, PLACES, BLOCK):
        e = start + tl.arange(0, BLOCK)
        here = e < PLACES
        both = n_here[:, None] & here[None, :]
        group = n[:, None] * GROUPS + (e // (PLACES // GROUPS))[None, :]
        s = tl.load(scale + group, mask=both, other=0).to(tl.float32)
        z = tl.load(zero + group, mask=both, other=0).to(tl.float32)
        inputs = x + m * (PLACES * PLANES * PER_WORD) + (e // SPREAD) * RUN + e % SPREAD
        product = tl.zeros([BLOCK_OUT, BLOCK], dtype=tl.float32)
        summed = tl.zeros([BLOCK], dtype=tl.float32)
        for p in tl.static_range(PLANES):
            word = tl.load(words + row + (p * PLACES + e)[None, :], mask=both, other=0)
            late = word >> 8
            for k in tl.static_range(PER_WORD):
                value = tl.load(inputs + (p * PER_WORD + k) * SPREAD, mask=here, other=0).to(tl.float32)
                summed += value
                if (k + 1) * BITS <= 24:
                    code = (word & (((1 << BITS) - 1) << (k * BITS))).to(tl.float32, bitcast=True)
                    lifted = value * 2.0 ** (100 - k * BITS)
                else:
                    code = (late & (((1 << BITS) - 1) << (k * BITS - 8))).to(tl.float32, bitcast=True)
                    lifted = value * 2.0 ** (108 - k * BITS)
                product += code * lifted[None, :]
        total += s * (product * 2.0**49 - z * summed[None, :])
    tl.store(y + m * outputs + n, tl.sum(total, 1).to(y.dtype.element_ty), mask=n_here)


@triton.jit
def _rows(
    x,
    words,
    scale,
    zero,
    y,
    rows,
    outputs,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The same for BLOCK_ROWS rows of inputs at once, on the matrix units; weights are rounded to x's dtype.

    Columns are shared out among PARTS programs, whose sums are added afterwards: y is [PARTS, M, N], float32.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    RUN: tl.constexpr = SPREAD * PLANES * PER_WORD
    PART: tl.constexpr = tl.cdiv(tl.cdiv(PLACES, BLOCK), PARTS) * BLOCK
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    part = tl.program_id(2)
    m_here, n_here = m < rows, n < outputs
    row = n.to(tl.int64)[:, None] * (PLANES * PLACES)
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, PART, BLOCK):
        e = part * PART + start + tl.arange(0, BLOCK)
        here = e < PLACES
        both = n_here[:, None] & here[None, :]
        group = n[:, None] * GROUPS + (e // (PLACES // GROUPS))[None, :]
        s = tl.load(scale + group, mask=both, other=0).to(tl.float32)
        z = tl.load(zero + group, mask=both, other=0).to(tl.float32)
        column = (e // SPREAD) * RUN + e % SPREAD
        inputs = x + m.to(tl.int64)[:, None] * (PLACES * PLANES * PER_WORD) + column[None, :]
        for p in tl.static_range(PLANES):
            word = tl.load(words + row + (p * PLACES + e)[None, :], mask=both, other=0)
            for k in tl.static_range(PER_WORD):
                wanted = m_here[:, None] & here[None, :]
                value = tl.load(inputs + (p * PER_WORD + k) * SPREAD, mask=wanted, other=0)
                code = (word >> (BITS * k)) & ((1 << BITS) - 1)
                weight = ((code.to(tl.float32) - z) * s).to(value.dtype)
                total = tl.dot(value, tl.trans(weight), total)
    place = (part * rows + m).to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=m_here[:, None] & n_here[None, :])


@triton.jit
def _decode(
    words,
    scale,
    zero,
    out,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, k] = (code[n, k] - zero[n, g]) scale[n, g], in order of columns."""
    PER_WORD: tl.constexpr = 32 // BITS
    RUN: tl.constexpr = SPREAD * PLANES * PER_WORD
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = e < PLACES
    group = n * GROUPS + e // (PLACES // GROUPS)
    s = tl.load(scale + group, mask=here, other=0).to(tl.float32)
    z = tl.load(zero + group, mask=here, other=0).to(tl.float32)
    first = n * (PLACES * PLANES * PER_WORD) + (e // SPREAD) * RUN + e % SPREAD
    for p in tl.static_range(PLANES):
        word = tl.load(words + (n * PLANES + p) * PLACES + e, mask=here, other=0)
        for k in tl.static_range(PER_WORD):
            code = (word >> (BITS * k)) & ((1 << BITS) - 1)
            weight = ((code.to(tl.float32) - z) * s).to(out.dtype.element_ty)
            tl.store(out + first + (p * PER_WORD + k) * SPREAD, weight, mask=here)


@torch.library.custom_op("harness::packed_product", mutates_args=())
def packed_product(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x [M, K] times the weights [N, K] of packed codes -> [M, N] in x's dtype.

    words: int32 of `interleave`, [N, K * bits / 32]; scale: [N, G]; zero: uint8 [N, G]; groups of K / G columns.
    """
    rows, columns = x.shape
    outputs, groups = scale.shape
    run = run_columns(columns // groups)
    planes = planes_of(run, bits)
    places = words.shape[1] // planes
    shape = (places, groups, bits, planes, run * bits // (32 * planes))
    x = x.contiguous()
    if rows >= DENSE_ROWS:
        dense = x.new_empty(outputs, columns)
        _decode[(outputs, triton.cdiv(places, 128))](words, scale, zero, dense, *shape, 128)
        return x @ dense.t()
    if rows <= FEW_ROWS:
        y = x.new_empty(rows, outputs)
        block, wide, warps = next(tile for least, tile in FEW_TILES.items() if outputs >= least)
        grid = (rows, triton.cdiv(outputs, block))
        _few_rows[grid](x, words, scale, zero, y, outputs, *shape, block, wide, num_warps=warps)
        return y
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    sums = x.new_empty(PARTS, rows, outputs, dtype=torch.float32)
    grid = (triton.cdiv(rows, tile), triton.cdiv(outputs, 64), PARTS)
    _rows[grid](x, words, scale, zero, sums, rows, outputs, *shape, tile, 64, 16, PARTS, num_warps=4, num_stages=3)
    return sums.sum(0).to(x.dtype)


@packed_product.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])
