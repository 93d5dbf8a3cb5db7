"""Products with packed weights on a GPU: codes of 2, 4 or 8 bits are read as they lie and become numbers on the chip.

At batch 1 decoding reads every weight once for two operations, so its time is that of the bytes. The kernels read the
codes once, 16 bytes a thread, and add in float32. A few rows of input take `_few_rows`, one program for some outputs
and all inputs; more rows fill a tensor core's tile (`_rows`); from DENSE_ROWS on, arithmetic costs more than bytes and
one dense product of decoded weights is cheaper.

Columns are interleaved within runs: the k-th code of word i of a run stands for column k * words + i of the run. Lanes
next to each other then read inputs next to each other. All columns of a run share a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RUNS = (128, 64, 32)  # columns of a run, the longest that divides a group is taken
FEW_ROWS = 8
DENSE_ROWS = 128
# rows of input -> rows, outputs and words of a tile, warps: the fastest of those tried on an H100
FEW = {1: (1, 4, 512, 4), 2: (2, 4, 512, 4), 4: (4, 4, 256, 4), 8: (8, 2, 256, 4)}
PARTS = 4  # programs that share the columns of a tile: without, too few run at once to hide what memory takes


def run_columns(width: int) -> int | None:
    """Columns of a run for groups of `width` columns; None where no run fits."""
    return next((columns for columns in RUNS if width % columns == 0), None)


def interleave(codes: Tensor, bits: int, run: int) -> Tensor:
    """uint8 codes [N, K] -> int32 words [N, K * bits / 32], interleaved within runs, K a multiple of them."""
    per_word = 32 // bits
    runs = codes.view(len(codes), -1, per_word, run // per_word).to(torch.int64)
    steps = torch.arange(0, 32, bits, device=codes.device)[:, None]
    return (runs << steps).sum(2).to(torch.int32).flatten(1).contiguous()


@triton.jit
def _few_rows(
    x,
    words,
    scale,
    zero,
    y,
    rows,
    outputs,
    ROW_WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] (code[n, k] - zero[n, g]) scale[n, g], for all m and BLOCK_OUT n.

    A code needs no conversion: bits below the 24th of a float's pattern are the number they would be as an integer,
    times 2^-149. Masked where they lie and multiplied by an input that was scaled up by as much, codes cost two
    instructions each. It is exact for |x| < 2^27.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    m = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_here, n_here = m < rows, n < outputs
    row = n.to(tl.int64)[:, None] * ROW_WORDS
    total = tl.zeros([ROWS, BLOCK_OUT, BLOCK_WORDS], dtype=tl.float32)
    for start in range(0, ROW_WORDS, BLOCK_WORDS):
        i = start + tl.arange(0, BLOCK_WORDS)
        here = i < ROW_WORDS
        both = n_here[:, None] & here[None, :]
        word = tl.load(words + row + i[None, :], mask=both, other=0)
        late = word >> 8
        place = n[:, None] * GROUPS + (i // GROUP_WORDS)[None, :]
        s = tl.load(scale + place, mask=both, other=0).to(tl.float32)
        z = tl.load(zero + place, mask=both, other=0).to(tl.float32)
        first = (i // RUN) * (RUN * PER_WORD) + i % RUN
        inputs = x + m[:, None] * (ROW_WORDS * PER_WORD) + first[None, :]
        product = tl.zeros([ROWS, BLOCK_OUT, BLOCK_WORDS], dtype=tl.float32)
        summed = tl.zeros([ROWS, BLOCK_WORDS], dtype=tl.float32)
        for k in tl.static_range(PER_WORD):
            value = tl.load(inputs + k * RUN, mask=m_here[:, None] & here[None, :], other=0).to(tl.float32)
            summed += value
            if (k + 1) * BITS <= 24:
                code = (word & (((1 << BITS) - 1) << (k * BITS))).to(tl.float32, bitcast=True)
                lifted = value * 2.0 ** (100 - k * BITS)
            else:
                code = (late & (((1 << BITS) - 1) << (k * BITS - 8))).to(tl.float32, bitcast=True)
                lifted = value * 2.0 ** (108 - k * BITS)
            product += code[None, :, :] * lifted[:, None, :]
        total += s[None, :, :] * (product * 2.0**49 - z[None, :, :] * summed[:, None, :])
    place = m[:, None] * outputs + n[None, :]
    tl.store(y + place, tl.sum(total, 2).to(y.dtype.element_ty), mask=m_here[:, None] & n_here[None, :])


@triton.jit
def _rows(
    x,
    words,
    scale,
    zero,
    y,
    rows,
    outputs,
    ROW_WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The same for BLOCK_ROWS rows of inputs at once, on the matrix units; weights are rounded to x's dtype.

    Columns are shared out among PARTS programs, whose sums are added afterwards: y is [PARTS, M, N], float32.
    """
    PART_WORDS: tl.constexpr = tl.cdiv(tl.cdiv(ROW_WORDS, BLOCK_WORDS), PARTS) * BLOCK_WORDS
    part = tl.program_id(2)
    PER_WORD: tl.constexpr = 32 // BITS
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_here, n_here = m < rows, n < outputs
    row = n.to(tl.int64)[:, None] * ROW_WORDS
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, PART_WORDS, BLOCK_WORDS):
        i = part * PART_WORDS + start + tl.arange(0, BLOCK_WORDS)
        here = i < ROW_WORDS
        both = n_here[:, None] & here[None, :]
        word = tl.load(words + row + i[None, :], mask=both, other=0)
        place = n[:, None] * GROUPS + (i // GROUP_WORDS)[None, :]
        s = tl.load(scale + place, mask=both, other=0).to(tl.float32)
        z = tl.load(zero + place, mask=both, other=0).to(tl.float32)
        first = (i // RUN) * (RUN * PER_WORD) + i % RUN
        inputs = x + m.to(tl.int64)[:, None] * (ROW_WORDS * PER_WORD) + first[None, :]
        for k in tl.static_range(PER_WORD):
            value = tl.load(inputs + k * RUN, mask=m_here[:, None] & here[None, :], other=0)
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
    ROW_WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """out[n, k] = (code[n, k] - zero[n, g]) scale[n, g], in order of columns."""
    PER_WORD: tl.constexpr = 32 // BITS
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    here = i < ROW_WORDS
    word = tl.load(words + n * ROW_WORDS + i, mask=here, other=0)
    place = n * GROUPS + i // GROUP_WORDS
    s = tl.load(scale + place, mask=here, other=0).to(tl.float32)
    z = tl.load(zero + place, mask=here, other=0).to(tl.float32)
    first = n * ROW_WORDS * PER_WORD + (i // RUN) * (RUN * PER_WORD) + i % RUN
    for k in tl.static_range(PER_WORD):
        code = (word >> (BITS * k)) & ((1 << BITS) - 1)
        tl.store(out + first + k * RUN, ((code.to(tl.float32) - z) * s).to(out.dtype.element_ty), mask=here)


@torch.library.custom_op("harness::packed_product", mutates_args=())
def packed_product(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x [M, K] times the weights [N, K] of packed codes -> [M, N] in x's dtype.

    words: int32 of `interleave`, [N, K * bits / 32]; scale: [N, G]; zero: uint8 [N, G]; groups of K / G columns.
    """
    rows, columns = x.shape
    outputs, row_words = words.shape
    groups = scale.shape[1]
    run = run_columns(columns // groups) * bits // 32
    shape = (outputs, row_words, groups, row_words // groups)
    x = x.contiguous()
    if rows >= DENSE_ROWS:
        dense = x.new_empty(outputs, columns)
        grid = (outputs, triton.cdiv(row_words, 256))
        _decode[grid](words, scale, zero, dense, *shape[1:], bits, run, 256)
        return x @ dense.t()
    if rows <= FEW_ROWS:
        y = x.new_empty(rows, outputs)
        few, block, wide, warps = FEW[triton.next_power_of_2(rows)]
        wide = min(wide, triton.next_power_of_2(row_words))
        grid = (triton.cdiv(outputs, block),)
        _few_rows[grid](x, words, scale, zero, y, rows, *shape, bits, run, few, block, wide, num_warps=warps)
        return y
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    sums = x.new_empty(PARTS, rows, outputs, dtype=torch.float32)
    grid = (triton.cdiv(rows, tile), triton.cdiv(outputs, 32), PARTS)
    _rows[grid](x, words, scale, zero, sums, rows, *shape, bits, run, tile, 32, 64, PARTS, num_warps=4, num_stages=3)
    return sums.sum(0).to(x.dtype)


@packed_product.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])
