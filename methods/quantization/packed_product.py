"""Products with packed weights on a GPU: codes of 2, 4 or 8 bits are read as they lie and become numbers on the chip.

At batch 1 decoding reads every weight once for two operations, so its time is that of the bytes. The kernels read the
codes once, 16 bytes a thread, and add in float32. A few rows of input take `_one_row`, one program for some outputs
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
ONE_ROW_LIMIT = 4  # rows of input up to which each is a product of its own
DENSE_ROWS = 128


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
def _one_row(
    x,
    words,
    scale,
    zero,
    y,
    outputs,
    ROW_WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] (code[n, k] - zero[n, g]) scale[n, g], for one m and BLOCK_OUT n."""
    PER_WORD: tl.constexpr = 32 // BITS
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    n_here = n < outputs
    row = n.to(tl.int64)[:, None] * ROW_WORDS
    total = tl.zeros([BLOCK_OUT, BLOCK_WORDS], dtype=tl.float32)
    for start in range(0, ROW_WORDS, BLOCK_WORDS):
        i = start + tl.arange(0, BLOCK_WORDS)
        here = i < ROW_WORDS
        both = n_here[:, None] & here[None, :]
        word = tl.load(words + row + i[None, :], mask=both, other=0)
        place = n[:, None] * GROUPS + (i // GROUP_WORDS)[None, :]
        s = tl.load(scale + place, mask=both, other=0).to(tl.float32)
        z = tl.load(zero + place, mask=both, other=0).to(tl.float32)
        first = m * ROW_WORDS * PER_WORD + (i // RUN) * (RUN * PER_WORD) + i % RUN
        product = tl.zeros([BLOCK_OUT, BLOCK_WORDS], dtype=tl.float32)
        inputs = tl.zeros([BLOCK_WORDS], dtype=tl.float32)
        for k in tl.static_range(PER_WORD):
            value = tl.load(x + first + k * RUN, mask=here, other=0).to(tl.float32)
            code = (word >> (BITS * k)) & ((1 << BITS) - 1)
            product += code.to(tl.float32) * value[None, :]
            inputs += value
        total += s * (product - z * inputs[None, :])
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
    ROW_WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """The same for BLOCK_ROWS rows of inputs at once, on the matrix units; weights are rounded to x's dtype."""
    PER_WORD: tl.constexpr = 32 // BITS
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_here, n_here = m < rows, n < outputs
    row = n.to(tl.int64)[:, None] * ROW_WORDS
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, ROW_WORDS, BLOCK_WORDS):
        i = start + tl.arange(0, BLOCK_WORDS)
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
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
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
    y = x.new_empty(rows, outputs)
    x = x.contiguous()
    if rows >= DENSE_ROWS:
        dense = x.new_empty(outputs, columns)
        grid = (outputs, triton.cdiv(row_words, 256))
        _decode[grid](words, scale, zero, dense, *shape[1:], bits, run, 256)
        return x @ dense.t()
    if rows <= ONE_ROW_LIMIT:
        block = 4
        grid = (rows, triton.cdiv(outputs, block))
        wide = min(512, triton.next_power_of_2(row_words))
        _one_row[grid](x, words, scale, zero, y, *shape, bits, run, block, wide, num_warps=4)
        return y
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    grid = (triton.cdiv(rows, tile), triton.cdiv(outputs, 32))
    _rows[grid](x, words, scale, zero, y, rows, *shape, bits, run, tile, 32, 32, num_warps=4, num_stages=3)
    return y


@packed_product.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])
