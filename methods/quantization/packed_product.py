"""Products with packed weights on a GPU: codes of 2, 4 or 8 bits are read as they lie and become numbers on the chip.

At batch 1 decoding reads every weight once for two operations, so its time is that of the bytes, if enough of them are
asked for at once and there are few instructions a weight. A few rows of input take `_few_rows`: a warp asks for all
words of some outputs before it uses the first. More rows fill a tensor core's tile (`_rows`); from DENSE_ROWS on,
arithmetic costs more than bytes and one dense product of decoded weights is cheaper.

Words lie in planes: [N, planes, places]. A place stands for `planes * codes of a word` columns of one run of columns,
and so of one group: scale and zero point are read once for all of them. The k-th code of plane p at place e of a run
with S places is column (p * codes + k) * S + e of the run. Inputs are put in the same order first (`spread_columns`),
so that the threads of a warp read neighbours of both.
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

RUNS = (128, 64, 32)  # columns of a run, the longest that divides a group is taken
PLANES = 4
FEW_ROWS = 8
DENSE_ROWS = 128
FEW_OUTPUTS = 4  # outputs that a program of `_few_rows` has in hand at a time, and runs: as many as a warp has threads
FEW_RUNS = 32
FEW_PROGRAMS = 8  # of a multiprocessor, where one row of input meets more outputs than so many take at once
LIFT = 100  # inputs of `_few_rows` are scaled up by two to this power, less the place of their code in its word
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


def lifts(bits: int, run: int, device: torch.device) -> Tensor:
    """What `_few_rows` wants the inputs of every code of a place scaled by: [planes * codes of a word], powers of two.

    A code whose bits end below the 24th is used where it lies, a later one where it lies in the word shifted by 8.
    """
    places = torch.arange(0, 32, bits, device=device).repeat(planes_of(run, bits))
    return torch.exp2((LIFT - torch.where(places + bits <= 24, places, places - 8)).double()).float()


def spread_columns(x: Tensor, slots: int, run: int, lift: Tensor | None = None) -> Tensor:
    """Inputs [M, K] in the order of words -> [M, slots, places]: place e of a run beside those of all other runs.

    lift: [slots] of `lifts`. Lifted inputs are float32.

    A compiler puts these operations into what makes x; uncompiled they are a kernel of their own.
    """
    runs = x.view(len(x), -1, slots, run // slots).transpose(1, 2)
    if lift is None:
        return runs.flatten(2).contiguous()
    if x.is_cuda and not torch.compiler.is_compiling():
        return lifted_columns(x, lift, run // slots)
    return (runs.float() * lift[:, None, None]).flatten(2).contiguous()


def lifted_columns(x: Tensor, lift: Tensor, spread: int) -> Tensor:
    """`spread_columns` of inputs to lift, by one kernel; spread: places of a run."""
    slots, places = len(lift), x.shape[1] // len(lift)
    found = torch.empty(len(x), slots, places, dtype=torch.float32, device=x.device)
    grid = (len(x) * slots, triton.cdiv(places, 128))
    _spread_lifted[grid](x.contiguous(), lift, found, places, slots, spread, 128, num_warps=1)
    return found


@triton.jit
def _spread_lifted(x, lift, found, places, SLOTS: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr):
    """found[m, slot, run * SPREAD + q] = lift[slot] x[m, (run * SLOTS + slot) * SPREAD + q]."""
    m, slot = tl.program_id(0) // SLOTS, tl.program_id(0) % SLOTS
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = (e // SPREAD * SLOTS + slot) * SPREAD + e % SPREAD
    value = tl.load(x + m * (places * SLOTS) + column, mask=e < places, other=0).to(tl.float32)
    tl.store(found + (m * SLOTS + slot) * places + e, value * tl.load(lift + slot), mask=e < places)


@triton.jit
def _asked_for(
    words,
    scale,
    zero,
    outputs,
    block,
    part,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
):
    """Of BLOCK_OUT outputs and BLOCK_RUNS runs: scales, zero points, and the words, a tensor for every plane."""
    PLACES: tl.constexpr = RUNS * SPREAD
    n = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    r = part * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
    e = part * BLOCK_RUNS * SPREAD + tl.arange(0, BLOCK_RUNS * SPREAD)
    both = (n < outputs)[:, None] & (e < PLACES)[None, :]
    places = words + n.to(tl.int64)[:, None] * (PLANES * PLACES) + e[None, :]
    found = ()
    for p in tl.static_range(PLANES):
        found = found + (tl.load(places + p * PLACES, mask=both, other=0),)
    group = n[:, None] * GROUPS + (r // (RUNS // GROUPS))[None, :]
    each = (n < outputs)[:, None] & (r < RUNS)[None, :]
    return (tl.load(scale + group, mask=each, other=0), tl.load(zero + group, mask=each, other=0)) + found


@triton.jit
def _few_rows(
    x,
    words,
    scale,
    zero,
    y,
    rows,
    outputs,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """y[m, n] = sum over k of x[m, k] (code[n, k] - zero[n, g]) scale[n, g], for BLOCK_ROWS m and BLOCK_OUT n.

    A code needs no conversion: bits below the 24th of a float's pattern are the number they would be as an integer,
    times 2^-149. Masked where they lie and multiplied by an input that was scaled up by as much, codes cost two
    instructions each. It is exact for |x| < 2^27.

    Runs are shared out among programs, BLOCK_RUNS each; their sums are added afterwards: y is [parts, M, N].

    AHEAD: a program takes several blocks of outputs, and asks for the words of the next before it multiplies these.
    EARLY: the kernel before may still run; its results, the inputs, are waited for after the words were asked for.
    """
    PLACES: tl.constexpr = RUNS * SPREAD
    SLOTS: tl.constexpr = PLANES * 32 // BITS
    first = tl.program_id(0) * BLOCK_ROWS
    part = tl.program_id(1)
    e = part * BLOCK_RUNS * SPREAD + tl.arange(0, BLOCK_RUNS * SPREAD)
    here = e < PLACES
    own = tl.program_id(2)
    following = _asked_for(words, scale, zero, outputs, own, part, RUNS, GROUPS, PLANES, SPREAD, BLOCK_OUT, BLOCK_RUNS)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    inputs = ()
    sums = ()
    for i in tl.static_range(BLOCK_ROWS):
        m = tl.minimum(first + i, rows - 1)  # what exceeds the rows does the last one again
        inputs = inputs + (x + m * (SLOTS * PLACES) + e,)
        sums = sums + (tl.zeros([BLOCK_RUNS * SPREAD], dtype=tl.float32),)
    if AHEAD:
        for slot in tl.static_range(SLOTS):
            added = ()
            for i in tl.static_range(BLOCK_ROWS):
                value = tl.load(inputs[i] + slot * PLACES, mask=here, other=0).to(tl.float32)
                added = added + (sums[i] + value * _lowered(slot % (32 // BITS), BITS),)
            sums = added
        for block in range(own, tl.cdiv(outputs, BLOCK_OUT), tl.num_programs(2)):
            held = following
            wanted = block + tl.num_programs(2)
            following = _asked_for(
                words, scale, zero, outputs, wanted, part, RUNS, GROUPS, PLANES, SPREAD, BLOCK_OUT, BLOCK_RUNS
            )
            tl.debug_barrier()  # the compiler would put loads beside their uses, and few would be under way
            _multiply(
                inputs, here, held, sums, y, first, rows, outputs, block,
                PLACES, BITS, PLANES, SPREAD, BLOCK_ROWS, BLOCK_OUT, BLOCK_RUNS, True,
            )  # fmt: skip
    else:
        tl.debug_barrier()
        _multiply(
            inputs, here, following, sums, y, first, rows, outputs, own,
            PLACES, BITS, PLANES, SPREAD, BLOCK_ROWS, BLOCK_OUT, BLOCK_RUNS, False,
        )  # fmt: skip


@triton.jit
def _multiply(
    inputs,
    here,
    held,
    sums,
    y,
    first,
    rows,
    outputs,
    block,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """What `_asked_for` brought times the inputs, into y; SUMMED: the sums of inputs are there already."""
    PER_WORD: tl.constexpr = 32 // BITS
    products = ()
    for _ in tl.static_range(BLOCK_ROWS):
        products = products + (tl.zeros([BLOCK_OUT, BLOCK_RUNS * SPREAD], dtype=tl.float32),)
    for p in tl.static_range(PLANES):
        late = held[2 + p] >> 8
        for k in tl.static_range(PER_WORD):
            if (k + 1) * BITS <= 24:
                code = (held[2 + p] & (((1 << BITS) - 1) << (k * BITS))).to(tl.float32, bitcast=True)
            else:
                code = (late & (((1 << BITS) - 1) << (k * BITS - 8))).to(tl.float32, bitcast=True)
            more = ()
            added = ()
            for i in tl.static_range(BLOCK_ROWS):
                value = tl.load(inputs[i] + (p * PER_WORD + k) * PLACES, mask=here, other=0).to(tl.float32)
                more = more + (products[i] + code * value[None, :],)
                added = added + (sums[i] + value * _lowered(k, BITS),)
            products = more
            if not SUMMED:
                sums = added
    s, z = held[0].to(tl.float32), held[1].to(tl.float32)
    n = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    for i in tl.static_range(BLOCK_ROWS):
        product = tl.sum(products[i].reshape([BLOCK_OUT, BLOCK_RUNS, SPREAD]), 2) * 2.0**49
        summed = tl.sum(sums[i].reshape([BLOCK_RUNS, SPREAD]), 1)
        total = tl.sum(s * (product - z * summed[None, :]), 1)
        m = tl.program_id(1) * rows + tl.minimum(first + i, rows - 1)
        tl.store(y + m * outputs + n, total.to(y.dtype.element_ty), mask=n < outputs)


@triton.constexpr_function
def _lowered(k, bits):
    """What undoes the lift of the k-th code's input, see `lifts`."""
    place = k * bits
    return 2.0 ** ((place if place + bits <= 24 else place - 8) - LIFT)


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The same for BLOCK_ROWS rows of inputs at once, on the matrix units; weights are rounded to x's dtype.

    Columns are shared out among PARTS programs, whose sums are added afterwards: y is [PARTS, M, N], float32.
    """
    PER_WORD: tl.constexpr = 32 // BITS
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
        inputs = x + m.to(tl.int64)[:, None] * (PLACES * PLANES * PER_WORD) + e[None, :]
        for p in tl.static_range(PLANES):
            word = tl.load(words + row + (p * PLACES + e)[None, :], mask=both, other=0)
            for k in tl.static_range(PER_WORD):
                wanted = m_here[:, None] & here[None, :]
                value = tl.load(inputs + (p * PER_WORD + k) * PLACES, mask=wanted, other=0)
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


@torch.library.custom_op("harness::decoded", mutates_args=())
def decoded(words: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] that packed codes stand for; arguments as of `packed_product`."""
    outputs, groups = scale.shape
    columns = words.shape[1] * 32 // bits
    run = run_columns(columns // groups)
    planes = planes_of(run, bits)
    places = words.shape[1] // planes
    dense = torch.empty(outputs, columns, dtype=dtype, device=words.device)
    spread = run * bits // (32 * planes)
    _decode[(outputs, triton.cdiv(places, 128))](words, scale, zero, dense, places, groups, bits, planes, spread, 128)
    return dense


@decoded.register_fake
def _(words: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(words.shape[0], words.shape[1] * 32 // bits, dtype=dtype, device=words.device)


@torch.library.custom_op("harness::spread_product", mutates_args=())
def spread_product(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int, lifted: bool, dtype: torch.dtype
) -> Tensor:
    """The product of `packed_product` for x [M, slots, places] of `spread_columns`, as parts to add: [parts, M, N].

    lifted: whether x was scaled by `lifts`: what few rows take. One part is in `dtype`, more are float32.
    """
    rows, slots, places = x.shape
    outputs, groups = scale.shape
    planes = slots * bits // 32
    run = run_columns(slots * places // groups)
    spread = run // slots
    runs = places // spread
    if lifted:
        together = 1 if rows == 1 else 2
        wide = few_runs(runs)
        block = FEW_OUTPUTS if bits < 8 else FEW_OUTPUTS // 2  # as many registers of words
        parts, blocks = triton.cdiv(runs, wide), triton.cdiv(outputs, block)
        early = starts_early(x.device)
        programs = max(1, FEW_PROGRAMS * processors(x.device) // parts)
        ahead = rows == 1 and blocks > programs
        grid = (triton.cdiv(rows, together), parts, programs if ahead else blocks)
        y = torch.empty(parts, rows, outputs, dtype=dtype if parts == 1 else torch.float32, device=x.device)
        shape = (runs, groups, bits, planes, spread, together, block, wide, ahead, early)
        options = {"launch_pdl": True} if early else {}
        _few_rows[grid](x, words, scale, zero, y, rows, outputs, *shape, num_warps=1, **options)
        return y
    tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
    sums = torch.empty(PARTS, rows, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, tile), triton.cdiv(outputs, 64), PARTS)
    shape = (places, groups, bits, planes, tile, 64, 16, PARTS)
    _rows[grid](x, words, scale, zero, sums, rows, outputs, *shape, num_warps=4, num_stages=3)
    return sums


@spread_product.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, bits: int, lifted: bool, dtype: torch.dtype) -> Tensor:
    rows, slots, places = x.shape
    parts = PARTS
    if lifted:
        runs = places * slots // run_columns(slots * places // scale.shape[1])
        parts = triton.cdiv(runs, few_runs(runs))
    return torch.empty(parts, rows, len(words), dtype=dtype if parts == 1 else torch.float32, device=x.device)


def few_runs(runs: int) -> int:
    """Runs that a program of `_few_rows` takes, so that its one warp reads whole lines and waits for no other."""
    return min(FEW_RUNS, triton.next_power_of_2(runs))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def packed_product(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, lift: Tensor, bits: int) -> Tensor:
    """x [M, K] times the weights [N, K] of packed codes -> [M, N] in x's dtype.

    words: int32 of `interleave`, [N, K * bits / 32]; scale: [N, G]; zero: uint8 [N, G]; groups of K / G columns.
    lift: of `lifts`. What happens to x before the kernel is torch's, so that a compiler puts it into what made x.
    """
    if len(x) >= DENSE_ROWS:
        return functional.linear(x, decoded(words, scale, zero, bits, x.dtype))
    run = run_columns(x.shape[1] // scale.shape[1])
    few = len(x) <= FEW_ROWS
    spread = spread_columns(x, len(lift), run, lift if few else None)
    parts = spread_product(spread, words, scale, zero, bits, few, x.dtype)
    return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)
