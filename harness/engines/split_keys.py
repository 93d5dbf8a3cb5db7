"""Attention of one query a row over a cache of keys and values: what a decoding step does, as kernels in Triton.

Flash-Decoding (Dao et al. 2023): keys are shared out among programs, each of which makes a softmax of its own, and the
parts are weighted by what their softmaxes summed to. Query heads that share a key head are rows of one product, so
keys and values are read once for all of them and nothing is copied; torch's attention with a mask, as a static cache
needs it, wants one key head for each query head, and copies the whole cache at every step to have it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from harness.engines.attention import UNUSUAL
from harness.engines.placement import starts_early

if TYPE_CHECKING:
    from torch import nn

BLOCK_KEYS = 32
WARPS = 4
PROGRAMS = 4  # of a multiprocessor, as many parts are made where there are keys enough
UNROLLED_PARTS = 8  # so many parts a compiler adds up inside another kernel
WIDEST_HEAD = 256


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: one query a row through `attend_one`, all else through torch's.

    query [B, H, Q, D], key and value [B, H_kv, K, D] -> [B, Q, H, D].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    unusual = dropout or any(rest.get(name) is not None for name in UNUSUAL)
    if unusual or not fits(query, key, value, attention_mask):
        if attention_mask is None and key.dtype == torch.float32 and not unusual:
            module, key, value = _with_own_keys(module, query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend_one(query[:, :, 0], key, value, attention_mask, scale)[:, None], None


def _with_own_keys(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The call with one key head for each query head.

    Torch's fused kernels read shared heads in 16 bits only. In 32 it writes all scores to memory, keys times queries,
    where a copied head is keys times its width.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    group = query.shape[1] // key.shape[1]
    causal = getattr(module, "is_causal", True)
    return SimpleNamespace(is_causal=causal), repeat_kv(key, group), repeat_kv(value, group)


def mask_once(*args: Any, **options: Any) -> Tensor | None:
    """A mask function of transformers: torch's mask, made once for all layers of a compiled step.

    A compiler takes an operation this cheap into whatever reads it, and every kernel of attention is handed its own.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, **options)
    return kept(mask) if mask is not None and torch.compiler.is_compiling() else mask


@torch.library.custom_op("harness::kept", mutates_args=())
def kept(mask: Tensor) -> Tensor:
    """A copy in memory."""
    return mask.clone(memory_format=torch.contiguous_format)


@kept.register_fake
def _(mask: Tensor) -> Tensor:
    return torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend_one` computes this call: one query a row, and a mask, if any, that is the same for all heads."""
    one = query.shape[2] == 1 and query.shape[-1] == key.shape[-1] == value.shape[-1] <= WIDEST_HEAD
    if mask is None:
        return one
    return one and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1)


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q Kᵀ) V for one query a row.

    query [B, H, D]; key, value [B, H_kv, K, D], H a multiple of H_kv; mask [B or 1, 1, 1, K], False where a key is not
    seen -> [B, H, D] in the dtype of query. A row that sees no key is 0.
    """
    parts, logs = split_keys(query, key, value, mask, scale)
    if len(parts) == 1:
        return parts[0]
    if torch.compiler.is_compiling() and len(parts) <= UNROLLED_PARTS:  # part of what reads the result
        weights = (logs - logs.amax(0).clamp(min=torch.finfo(torch.float32).min)).exp()
        found = (parts * weights[..., None]).sum(0) / weights.sum(0)[..., None].clamp(min=1e-30)
        return found.to(query.dtype)
    return merged_parts(parts, logs, query.dtype)


@torch.library.custom_op("harness::split_keys", mutates_args=())
def split_keys(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to parts of the keys: [parts, B, H, D], and the logarithm of what each softmax summed to [parts, B, H].

    One part is in the dtype of query, more are float32. Arguments as of `attend_one`.
    """
    rows, heads, width = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    span, count = _shares(query, key)
    group = heads // key_heads
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    made = torch.empty(
        count, rows, heads, width, dtype=query.dtype if count == 1 else torch.float32, device=query.device
    )
    logs = torch.empty(count, rows, heads, dtype=torch.float32, device=query.device)
    seen = query if mask is None else (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    strides = (
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        0 if mask is None or len(mask) == 1 else seen.stride(0),
    )
    early = starts_early(query.device)
    options = {"launch_pdl": True} if early else {}
    shape = (key_heads, group, triton.next_power_of_2(max(16, group)), width, max(16, triton.next_power_of_2(width)))
    _attend_part[(rows * key_heads, count)](
        query, key, value, seen, made, logs, scale * math.log2(math.e), keys, span, rows, *strides,
        *shape, BLOCK_KEYS, mask is not None, early, num_warps=WARPS, num_stages=2, **options,
    )  # fmt: skip
    return made, logs


@split_keys.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    count = _shares(query, key)[1]
    dtype = query.dtype if count == 1 else torch.float32
    made = torch.empty(count, *query.shape, dtype=dtype, device=query.device)
    return made, torch.empty(count, *query.shape[:2], dtype=torch.float32, device=query.device)


def _shares(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Keys of a part, a multiple of a block, and how many parts that makes."""
    blocks = triton.cdiv(key.shape[2], BLOCK_KEYS)
    device = query.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = triton.cdiv(PROGRAMS * processors, len(query) * key.shape[1])
    span = triton.cdiv(blocks, min(wanted, blocks))
    return span * BLOCK_KEYS, triton.cdiv(blocks, span)


@triton.jit
def _attend_part(
    query,
    key,
    value,
    mask,
    made,
    logs,
    scale,
    keys,
    span,
    rows,
    query_row,
    query_head,
    key_row,
    key_head,
    key_place,
    value_row,
    value_head,
    value_place,
    mask_row,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The query heads of one row that share a key head, and `span` keys; scale is for powers of two.

    EARLY: the kernel before may still run, its results are waited for; the one after may ask for its weights.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(0) // KEY_HEADS, tl.program_id(0) % KEY_HEADS
    part = tl.program_id(1)
    d = tl.arange(0, BLOCK_WIDTH)
    wide = d < WIDTH
    g = tl.arange(0, BLOCK_GROUP)
    own = head * GROUP + g
    k_base = key + row.to(tl.int64) * key_row + head.to(tl.int64) * key_head + d[None, :]
    v_base = value + row.to(tl.int64) * value_row + head.to(tl.int64) * value_head + d[None, :]
    here = (g < GROUP)[:, None] & wide[None, :]
    q = tl.load(query + row * query_row + own[:, None] * query_head + d[None, :], mask=here, other=0)
    top = tl.full([BLOCK_GROUP], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_GROUP], dtype=tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_WIDTH], dtype=tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, keys), BLOCK_KEYS):
        n = start + tl.arange(0, BLOCK_KEYS)
        seen = n < keys
        both = seen[:, None] & wide[None, :]
        k = tl.load(k_base + n.to(tl.int64)[:, None] * key_place, mask=both, other=0)
        v = tl.load(v_base + n.to(tl.int64)[:, None] * value_place, mask=both, other=0)
        if MASKED:
            seen = seen & (tl.load(mask + row * mask_row + n, mask=seen, other=0) != 0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        faded = tl.exp2(top - base)
        total = total * faded + tl.sum(weight, 1)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * faded[:, None], input_precision="ieee")
        top = higher
    known = tl.where(total > 0, total, 1.0)
    log = tl.where(total > 0, (top + tl.log2(known)) * 0.6931471805599453, -float("inf"))
    place = (part * rows + row).to(tl.int64) * (KEY_HEADS * GROUP)
    out = (mixed / known[:, None]).to(made.dtype.element_ty)
    tl.store(made + (place + own)[:, None] * WIDTH + d[None, :], out, mask=here)
    tl.store(logs + place + own, log, mask=g < GROUP)


def merged_parts(parts: Tensor, logs: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention to all keys from attention to parts of them, by one kernel: [P, B, H, D] and [P, B, H] -> [B, H, D]."""
    count, rows, heads, width = parts.shape
    found = torch.empty(rows, heads, width, dtype=dtype, device=parts.device)
    shape = (count, triton.next_power_of_2(count), width, triton.next_power_of_2(width))
    _merge[(rows * heads,)](parts, logs, found, rows * heads, *shape, num_warps=4 if count > 4 else 1)
    return found


@triton.jit
def _merge(
    parts,
    logs,
    found,
    pairs,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """found[pair] = sum over parts of exp(log - highest) part, over the sum of these weights."""
    pair = tl.program_id(0)
    p, d = tl.arange(0, BLOCK_PARTS), tl.arange(0, BLOCK_WIDTH)
    log = tl.load(logs + p * pairs + pair, mask=p < PARTS, other=-float("inf"))
    top = tl.max(log, 0)
    weight = tl.exp(log - tl.where(top == -float("inf"), 0.0, top))
    both = (p < PARTS)[:, None] & (d < WIDTH)[None, :]
    part = tl.load(parts + (p * pairs + pair).to(tl.int64)[:, None] * WIDTH + d[None, :], mask=both, other=0)
    total = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(found + pair * WIDTH + d, out.to(found.dtype.element_ty), mask=d < WIDTH)
