"""Products with 4-bit weights on a GPU's matrix units, codes lying in memory as these units want them in registers.

Few rows of input leave a matrix unit nearly idle, but it multiplies 16 outputs by 16 columns with one instruction of a
warp, where products of single numbers take two for each code. Weights are its first operand: m16n8k16 of the PTX ISA,
9.7.15.5.8. A thread holds codes of outputs lane / 4 and lane / 4 + 8. Up to eight rows of input cost what one does.

Words lie as [N / 16, K / 128, 2, 32, 4]: block of outputs, chunk of columns, upper or lower eight outputs, lane, word.
Nibble i of word j of lane l is column 128 chunk + 32 j + 8 (l % 4) + 2 (i % 4) + i / 4 of output 16 block + 8 half +
l / 4: a word is multiplied with 32 columns, the inputs of which a thread reads eight at a time. Nibbles i and i + 4
become a pair of 16-bit numbers by a mask and the bits of 128 (bfloat16) or 1024 (float16), which is taken off again
with the zero point, times the sum of the inputs, a product of ones.

Scale and zero point of a group are one word each, [N / 16, G, 16]: the upper 24 bits of the scale as a float32, which
16-bit scales fit into, and the zero point.
"""

# ruff: noqa: RUF005 - inside kernels Triton adds tuples, it does not unpack them

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from harness.engines.placement import starts_early
from methods.quantization.packed_product import processors

OUTPUTS = 16  # of a block
COLUMNS = 128  # of a chunk
WORD_COLUMNS = 32  # that the words of four threads hold
TILE = 8  # rows of input that cost what one does
MOST_TILES = 2
DENSE_ROWS = 56  # from so many on, decoding and a dense product cost less
CAPABILITY = 8


def takes(outputs: int, columns: int, width: int, bits: int, device: torch.device) -> bool:
    """Whether weights [outputs, columns] in groups of `width` columns can lie so, and the device multiplies them."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    groups = width % WORD_COLUMNS == 0 and (COLUMNS % width == 0 or width % COLUMNS == 0)
    fits = bits == 4 and groups and outputs % OUTPUTS == 0 and columns % COLUMNS == 0 and columns % width == 0
    return fits and torch.cuda.get_device_capability(device)[0] >= CAPABILITY


def fragments(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] of 4 bits -> int32 words [N / 16, K / 128, 2, 32, 4]."""
    outputs, columns = codes.shape
    # N: block, half, row of 8; K: chunk, word, quarter, pair, one of the pair
    parts = codes.view(outputs // OUTPUTS, 2, 8, columns // COLUMNS, 4, 4, 4, 2).to(torch.int64)
    words = (parts << _places(codes.device)).sum((-2, -1)).to(torch.int32)
    return words.permute(0, 3, 1, 2, 5, 4).flatten(3, 4).contiguous()


def codes_of(words: Tensor) -> Tensor:
    """The other way: uint8 codes [N, K]."""
    blocks, chunks = words.shape[:2]
    codes = (words.view(blocks, chunks, 2, 8, 4, 4, 1, 1) >> _places(words.device)) & 15
    return codes.permute(0, 2, 3, 1, 5, 4, 6, 7).reshape(blocks * OUTPUTS, -1).to(torch.uint8)


def _places(device: torch.device) -> Tensor:
    """Bits by which the codes of a word are shifted: [pair, one of the pair]."""
    return torch.arange(0, 32, 4, device=device).view(2, 4).t()


def scale_words(scale: Tensor, zero: Tensor) -> Tensor:
    """Scales [N, G] of 16 bits and zero points below 256 [N, G] -> int32 [N / 16, G, 16]."""
    both = (scale.float().view(torch.int32) & -256) | zero.to(torch.int32)
    return both.view(-1, OUTPUTS, scale.shape[1]).transpose(1, 2).contiguous()


def _scales_of(words: Tensor) -> tuple[Tensor, Tensor]:
    """The other way: scales in float32 and zero points, [N, G] each."""
    both = words.transpose(1, 2).flatten(0, 1)
    return (both & -256).view(torch.float32), both & 255


def paired(first: Tensor, second: Tensor) -> Tensor:
    """Blocks whose upper eight outputs are of `first` and whose lower ones are of `second`: words, or scale words."""
    if first.ndim == 5:
        both = torch.stack([first, second], 3)  # [blocks, chunks, half, of which, lane, word]
        return both.transpose(1, 2).flatten(0, 1).contiguous()
    both = torch.stack([t.unflatten(2, (2, 8)) for t in (first, second)], 3)  # [blocks, groups, half, of which, 8]
    return both.transpose(1, 2).flatten(0, 1).flatten(2).contiguous()


@triton.jit
def _four(pointer, at, mask):
    """Four neighbours of every element of `at`, a tensor each."""
    found = tl.load(pointer + at[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)
    even, odd = tl.split(found.reshape([at.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _pair(word, place: tl.constexpr, mask, offset):
    """Two codes of a word as 16-bit numbers, the offset among them: (word >> 4 place) & mask | offset."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;",
        "=r,r,r,r",
        [word >> (4 * place), mask, offset],
        tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, HALF: tl.constexpr):
    """One m16n8k16 product added to c, every tensor an element a thread."""
    KIND: tl.constexpr = "f16" if HALF else "bf16"
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32." + KIND + "." + KIND + ".f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _asked_for(
    words,
    scales,
    block,
    start,
    first,
    end,
    CHUNKS,
    GROUP_CHUNKS: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Of COUNT chunks of every warp from `first` + start on: words of both halves, and what scales them."""
    lane = tl.arange(0, THREADS) % 32
    found = ()
    for i in tl.static_range(COUNT):
        own = first + start + i
        inside = own < end
        at = (block * CHUNKS + own) * 256 + lane * 4
        found = found + _four(words, at, inside) + _four(words, at + 128, inside)
        at = (block * (CHUNKS // GROUP_CHUNKS) + own // GROUP_CHUNKS) * (16 * CHUNK_GROUPS) + lane // 4
        for _ in tl.static_range(CHUNK_GROUPS):
            found = found + (tl.load(scales + at, mask=inside, other=0), tl.load(scales + at + 8, mask=inside, other=0))
            at += 16
    return found


@triton.jit
def _inputs(x, at, inside):
    """The 16 pairs of inputs that a thread multiplies in a chunk."""
    return _four(x, at, inside) + _four(x, at + 16, inside) + _four(x, at + 32, inside) + _four(x, at + 48, inside)


@triton.jit
def _in_order(value):
    """The value, once everything asked for before is under way: the compiler moves no load beyond this."""
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [value], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _scale(word):
    return (word & -256).to(tl.float32, bitcast=True)


@triton.jit
def _zero(word):
    return (word & 255).to(tl.float32)


@triton.jit
def _multiply_rows(
    x,  # [M, K / 2] int32: pairs of 16-bit inputs
    squares,  # [M, K / 16]
    added,  # [M, N]
    gain,  # [N]
    words,
    scales,
    y,
    scaled,  # [M, N]
    made,  # [M, N / 16]
    rows,
    outputs,
    epsilon,
    CHUNKS: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    CHUNK_GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    SPAN: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    HALF: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    ADDED: tl.constexpr,
    CHAIN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] (code[n, k] - zero[n, g]) scale[n, g] for 16 n and TILES * 8 m.

    A warp takes SPAN chunks of the columns, COUNT at a time. A group is GROUP_CHUNKS chunks, or a chunk CHUNK_GROUPS
    groups.
    GATED: upper outputs of a block are gates of the lower ones, and y[m, n] is silu(gate) up for 8 n.
    NORM: what is multiplied is divided by the root of a mean square (and epsilon): of K numbers, whose squares are
    summed up to squares[m] by 16; PARTS is the power of two that has room for them.
    ADDED: added[m, n] is added.
    CHAIN: y[m, n] gain[n] and the sums of squares of y[m] by 16 are written, too: what the next norm needs.
    EARLY: the kernel before may still run; its results, the inputs, are waited for after the words were asked for.
    """
    THREADS: tl.constexpr = WARPS * 32
    SHIFT: tl.constexpr = 1024.0 if HALF else 128.0
    FIELDS: tl.constexpr = 8 + 2 * CHUNK_GROUPS  # of a chunk: eight words, and two of scales for each group
    GROUP_WORDS: tl.constexpr = 4 // CHUNK_GROUPS
    SIDES: tl.constexpr = 1 if ONE_ROW else 2  # of a thread's two rows
    block = tl.program_id(0)
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    first = thread // 32 * SPAN
    end = tl.minimum(first + SPAN, CHUNKS)
    row = tl.program_id(1) * (TILES * 8)
    one = tl.arange(0, 32)
    upper_gain = tl.zeros([32], dtype=tl.float32)
    lower_gain = tl.zeros([32], dtype=tl.float32)
    if CHAIN:
        upper_gain = tl.load(gain + block * 16 + one // 4).to(tl.float32)
        lower_gain = tl.load(gain + block * 16 + one // 4 + 8).to(tl.float32)
    wanted = _asked_for(words, scales, block, 0, first, end, CHUNKS, GROUP_CHUNKS, CHUNK_GROUPS, COUNT, THREADS)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    mask = tl.full([THREADS], 0x000F000F, dtype=tl.int32)
    offset = tl.full([THREADS], 0x64006400 if HALF else 0x43004300, dtype=tl.int32)
    ones = tl.full([THREADS], 0x3C003C00 if HALF else 0x3F803F80, dtype=tl.int32)
    none = tl.zeros([THREADS], dtype=tl.float32)
    sums = ()
    inputs = ()
    residual = ()
    part = tl.arange(0, PARTS)
    parts = tl.zeros([PARTS], dtype=tl.float32)
    if NORM and ONE_ROW:
        parts = tl.load(squares + part, mask=part < CHUNKS * 8, other=0)
    for t in tl.static_range(TILES):
        m = tl.minimum(row + t * 8 + lane // 4, rows - 1)  # what exceeds the rows does the last one again
        inputs = inputs + (m * (CHUNKS * 64) + lane % 4 * 4,)
        sums = sums + (none, none, none, none)
        if ADDED:
            for right in tl.static_range(SIDES):
                own = row + t * 8 + one % 4 * 2 + right
                place = added + own * outputs + block * 16 + one // 4
                residual = residual + (
                    tl.load(place, mask=own < rows, other=0),
                    tl.load(place + 8, mask=own < rows, other=0),
                )
    for start in range(0, SPAN, COUNT):
        held = wanted
        ready = ()
        if TILES == 1:
            for i in tl.static_range(COUNT):
                ready = ready + _inputs(x, inputs[0] + (first + start + i) * 64, first + start + i < end)
        if COUNT < SPAN:
            wanted = _asked_for(
                words, scales, block, start + COUNT, first, end, CHUNKS, GROUP_CHUNKS, CHUNK_GROUPS, COUNT, THREADS
            )
        mask = _in_order(mask)
        for i in tl.static_range(COUNT):
            inside = first + start + i < end
            more = ()
            for t in tl.static_range(TILES):
                if TILES > 1:
                    ready = _inputs(x, inputs[t] + (first + start + i) * 64, inside)
                r0, r1, r2, r3 = sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3]
                for g in tl.static_range(CHUNK_GROUPS):
                    c0, c1, c2, c3 = none, none, none, none
                    s0, s1, s2, s3 = none, none, none, none
                    for j in tl.static_range(g * GROUP_WORDS, (g + 1) * GROUP_WORDS):
                        upper, lower = held[i * FIELDS + j], held[i * FIELDS + 4 + j]
                        for k in tl.static_range(0, 4, 2):
                            b0 = ready[(i if TILES == 1 else 0) * 16 + 4 * j + k]
                            b1 = ready[(i if TILES == 1 else 0) * 16 + 4 * j + k + 1]
                            a0, a1 = _pair(upper, k, mask, offset), _pair(lower, k, mask, offset)
                            a2, a3 = _pair(upper, k + 1, mask, offset), _pair(lower, k + 1, mask, offset)
                            c0, c1, c2, c3 = _multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, HALF)
                            s0, s1, s2, s3 = _multiply(ones, ones, ones, ones, b0, b1, s0, s1, s2, s3, HALF)
                    upper, lower = held[i * FIELDS + 8 + 2 * g], held[i * FIELDS + 9 + 2 * g]
                    upper_scale, lower_scale = _scale(upper), _scale(lower)
                    upper_shift, lower_shift = _zero(upper) + SHIFT, _zero(lower) + SHIFT
                    r0 += upper_scale * (c0 - upper_shift * s0)
                    r1 += upper_scale * (c1 - upper_shift * s1)
                    r2 += lower_scale * (c2 - lower_shift * s0)
                    r3 += lower_scale * (c3 - lower_shift * s1)
                more = more + (r0, r1, r2, r3)
            sums = more
    for t in tl.static_range(TILES):
        for right in tl.static_range(SIDES):
            m = row + t * 8 + one % 4 * 2 + right
            upper = tl.sum(sums[4 * t + right].reshape([WARPS, 32]), 0)
            lower = tl.sum(sums[4 * t + 2 + right].reshape([WARPS, 32]), 0)
            if NORM:
                if ONE_ROW:
                    factor = tl.rsqrt(tl.sum(parts, 0) / (CHUNKS * 128) + epsilon)
                else:
                    own = row + t * 8 + tl.arange(0, 4) * 2 + right
                    inside = (own < rows)[:, None] & (part < CHUNKS * 8)[None, :]
                    places = squares + own[:, None] * (CHUNKS * 8) + part[None, :]
                    square = tl.sum(tl.load(places, mask=inside, other=0), 1)
                    square = tl.broadcast_to(square[None, :], [8, 4]).reshape([32])
                    factor = tl.rsqrt(square / (CHUNKS * 128) + epsilon)
                upper, lower = upper * factor, lower * factor
            if GATED:
                n = block * 8 + one // 4
                value = upper / (1 + tl.exp(-upper)) * lower
                tl.store(y + m * (outputs // 2) + n, value.to(y.dtype.element_ty), mask=m < rows)
            else:
                if ADDED:
                    upper += residual[2 * (SIDES * t + right)].to(tl.float32)
                    lower += residual[2 * (SIDES * t + right) + 1].to(tl.float32)
                place = m * outputs + block * 16 + one // 4
                upper, lower = upper.to(y.dtype.element_ty), lower.to(y.dtype.element_ty)
                tl.store(y + place, upper, mask=m < rows)
                tl.store(y + place + 8, lower, mask=m < rows)
                if CHAIN:
                    upper, lower = upper.to(tl.float32), lower.to(tl.float32)
                    tl.store(scaled + place, (upper * upper_gain).to(y.dtype.element_ty), mask=m < rows)
                    tl.store(scaled + place + 8, (lower * lower_gain).to(y.dtype.element_ty), mask=m < rows)
                    square = tl.sum((upper * upper + lower * lower).reshape([8, 4]), 0)
                    own = row + t * 8 + tl.arange(0, 4) * 2 + right
                    tl.store(made + own * (outputs // 16) + block, square, mask=own < rows)


@triton.jit
def _decode(words, scales, out, CHUNKS: tl.constexpr, GROUP_CHUNKS: tl.constexpr, CHUNK_GROUPS: tl.constexpr):
    """out[n, k] = (code[n, k] - zero[n, g]) scale[n, g], for 16 outputs and a chunk."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    at, column = tl.arange(0, 256), tl.arange(0, 8)
    word = tl.load(words + (block.to(tl.int64) * CHUNKS + chunk) * 256 + at)
    row, number = at // 128 * 8 + at % 128 // 16, at % 4
    group = (block * (CHUNKS // GROUP_CHUNKS) + chunk // GROUP_CHUNKS) * CHUNK_GROUPS + number * CHUNK_GROUPS // 4
    both = tl.load(scales + group * 16 + row)
    code = ((word[:, None] >> (column // 2 + column % 2 * 4)[None, :] * 4) & 15).to(tl.float32)
    value = (code - _zero(both)[:, None]) * _scale(both)[:, None]
    place = (block * 16 + row).to(tl.int64) * (CHUNKS * 128) + chunk * 128 + number * 32 + at // 4 % 4 * 8
    tl.store(out + place[:, None] + column[None, :], value.to(out.dtype.element_ty))


def _grouping(chunks: int, groups: int) -> tuple[int, int]:
    """Chunks of a group, and groups of a chunk: one of them is 1."""
    return max(1, chunks // groups), max(1, groups // chunks)


@torch.library.custom_op("harness::fragment_product", mutates_args=())
def fragment_product(
    x: Tensor, words: Tensor, scales: Tensor, gated: bool, squares: Tensor | None, epsilon: float, added: Tensor | None
) -> Tensor:
    """x [M, K] times the weights [N, K] of words and scale words, in x's 16-bit dtype: [M, N].

    gated: blocks are `paired`, gates first; silu(gate) up, [M, N / 2].
    squares: [M, K / 16] float32; what is multiplied is divided by the root of their mean over K, epsilon added.
    added: [M, N], what is added (not to a gated product).
    """
    if not x.is_cuda:
        return _reference(x, words, scales, gated, squares, epsilon, added)
    y = torch.empty(len(x), len(words) * OUTPUTS // (2 if gated else 1), dtype=x.dtype, device=x.device)
    _launch(x, words, scales, y, gated, squares, epsilon, added)
    return y


@fragment_product.register_fake
def _(
    x: Tensor, words: Tensor, scales: Tensor, gated: bool, squares: Tensor | None, epsilon: float, added: Tensor | None
) -> Tensor:
    return torch.empty(len(x), len(words) * OUTPUTS // (2 if gated else 1), dtype=x.dtype, device=x.device)


@torch.library.custom_op("harness::fragment_product_before_norm", mutates_args=())
def fragment_product_before_norm(
    x: Tensor, words: Tensor, scales: Tensor, added: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with something added, and what the norm that follows needs: y, y gain [M, N], squares [M, N / 16].

    squares: sums of 16 squares of y each, float32.
    """
    if not x.is_cuda:
        y = _reference(x, words, scales, False, None, 0.0, added)
        return y, *before_norm(y, gain)
    y, scaled, made = _empty(x, words)
    _launch(x, words, scales, y, False, None, 0.0, added, gain, scaled, made)
    return y, scaled, made


@fragment_product_before_norm.register_fake
def _(x: Tensor, words: Tensor, scales: Tensor, added: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, words)


def _empty(x: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(len(x), len(words) * OUTPUTS, dtype=x.dtype, device=x.device)
    return y, torch.empty_like(y), torch.empty(len(x), len(words), dtype=torch.float32, device=x.device)


def _launch(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    y: Tensor,
    gated: bool,
    squares: Tensor | None,
    epsilon: float,
    added: Tensor | None,
    gain: Tensor | None = None,
    scaled: Tensor | None = None,
    made: Tensor | None = None,
) -> None:
    rows, outputs, chunks = len(x), len(words) * OUTPUTS, words.shape[1]
    warps, count = _shares(len(words), chunks, rows, x.device)
    span = triton.cdiv(chunks, warps)
    tiles = min(MOST_TILES, triton.next_power_of_2(triton.cdiv(rows, TILE)))
    early = starts_early(x.device)
    half, normed, chained = x.dtype == torch.float16, squares is not None, gain is not None
    parts = triton.next_power_of_2(chunks * 8) if normed else 1
    shape = (chunks, *_grouping(chunks, scales.shape[1]), min(count, span), span, tiles, warps, rows == 1, half, gated)
    options = {"launch_pdl": True} if early else {}
    _multiply_rows[(len(words), triton.cdiv(rows, tiles * TILE))](
        x.contiguous().view(torch.int32), squares if normed else y, y if added is None else added.contiguous(),
        gain if chained else y, words, scales, y, scaled if chained else y, made if chained else y, rows, outputs,
        epsilon, *shape, normed, parts, added is not None, chained, early, num_warps=warps, **options,
    )  # fmt: skip


def _shares(blocks: int, chunks: int, rows: int, device: torch.device) -> tuple[int, int]:
    """Warps that share the columns of a block, and chunks of a warp that are asked for before the first is used.

    Measured on an H100. Where blocks are many, smaller programs keep more of them under way; where they are few and
    rows short, everything is asked for at once.
    """
    if rows > 1:
        return 8, 2 if rows <= TILE else 1
    if blocks >= 4 * processors(device):
        return 4, 2
    return 8, 4 if chunks <= 32 else 2


def _reference(
    x: Tensor, words: Tensor, scales: Tensor, gated: bool, squares: Tensor | None, epsilon: float, added: Tensor | None
) -> Tensor:
    """What the kernel computes, in float32 up to the last rounding."""
    y = functional.linear(x.float(), decoded_fragments(words, scales, torch.float32))
    if squares is not None:
        y = y * torch.rsqrt(squares.sum(-1, keepdim=True) / x.shape[1] + epsilon)
    if gated:
        gate, up = y.view(len(x), -1, 2, 8).unbind(2)
        y = (functional.silu(gate) * up).flatten(1)
    return (y if added is None else y + added.float()).to(x.dtype)


def before_norm(y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """y [M, N] times gain [N], and sums of 16 squares of y each, float32 [M, N / 16]."""
    return y * gain, y.float().view(len(y), -1, OUTPUTS).square().sum(-1)


@torch.library.custom_op("harness::decoded_fragments", mutates_args=())
def decoded_fragments(words: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] that words and scale words stand for."""
    if not words.is_cuda:
        codes = codes_of(words)
        scale, zero = (part.repeat_interleave(codes.shape[1] // scales.shape[1], 1) for part in _scales_of(scales))
        return ((codes - zero) * scale).to(dtype)
    blocks, chunks = words.shape[:2]
    out = torch.empty(blocks * OUTPUTS, chunks * COLUMNS, dtype=dtype, device=words.device)
    _decode[(blocks, chunks)](words, scales, out, chunks, *_grouping(chunks, scales.shape[1]))
    return out


@decoded_fragments.register_fake
def _(words: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    blocks, chunks = words.shape[:2]
    return torch.empty(blocks * OUTPUTS, chunks * COLUMNS, dtype=dtype, device=words.device)


def multiplied(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] times the weights [N, K] -> [M, N] in x's dtype; many rows by one dense product."""
    if len(x) < DENSE_ROWS:
        return fragment_product(x, words, scales, False, None, 0.0, None)
    return functional.linear(x, decoded_fragments(words, scales, x.dtype))


def gated(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """silu(gate) up of x [M, K] -> [M, N / 2]; words and scale words are `paired`."""
    if len(x) < DENSE_ROWS:
        return fragment_product(x, words, scales, True, None, 0.0, None)
    both = functional.linear(x, decoded_fragments(words, scales, x.dtype)).view(len(x), -1, 2, 8)
    return (functional.silu(both[:, :, 0]) * both[:, :, 1]).flatten(1)
