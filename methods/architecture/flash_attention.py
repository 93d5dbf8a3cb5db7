"""FlashAttention: exact attention in tiles, never the whole matrix of scores (Dao et al. 2022).

https://arxiv.org/abs/2205.14135, Algorithm 1; with one pass over the keys for each tile of queries, as in its
successor (https://arxiv.org/abs/2307.08691, Algorithm 1). `tiled_attention` is the reference, readable and testable;
it saves memory and no time. Speed is the platform's fused kernel, `sdpa_flash`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.engines.attention import check_call, check_name
from harness.errors import RunError

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

TILE = 128  # queries and keys of a tile of the reference


@dataclass
class Running:
    """Softmax over the keys seen so far, unfinished: one row for each query, in float32 (float64 stays).

    top: largest score, [..., Q]; total: sum of exp(score - top), [..., Q]; out: values with these weights, [..., Q, D].
    """

    top: Tensor
    total: Tensor
    out: Tensor

    @classmethod
    def start(cls, query: Tensor, width: int) -> Running:
        """No keys yet. query: [..., Q, D]."""
        kind = torch.promote_types(query.dtype, torch.float32)
        shape = query.shape[:-1]
        nothing = torch.zeros(shape, dtype=kind, device=query.device)
        return cls(torch.full_like(nothing, -torch.inf), nothing, nothing[..., None].expand(*shape, width).clone())

    def add(self, scores: Tensor, value: Tensor) -> None:
        """Take in scores [..., Q, K], -inf where a query may not read, and values [..., K, D]."""
        top = torch.maximum(self.top, scores.amax(-1))
        safe = top.masked_fill(top == -torch.inf, 0)  # a row that reads nothing yet
        shrunk = (self.top - safe).exp()
        weights = (scores - safe[..., None]).exp()
        self.total = self.total * shrunk + weights.sum(-1)
        self.out = self.out * shrunk[..., None] + weights @ value.to(weights.dtype)
        self.top = top

    def finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Attention's output [..., Q, D], 0 for a query that read nothing, and its log-sum-exp [..., Q]."""
        out = self.out / self.total.masked_fill(self.total == 0, 1)[..., None]
        return out.to(dtype), self.top + self.total.log()


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ) v, tile by tile: [B, H, Q, D], [B, H_kv, K, D], [B, H_kv, K, D] -> [B, H, Q, D], [B, H, Q].

    H is a multiple of H_kv. causal: the last query stands at the last key. mask: bool, True where a query may read,
    broadcastable to [B, H, Q, K]; or numbers that are added. Needs memory for one tile of scores, not for Q × K.
    """
    rows, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    if mask is not None:
        mask = mask.expand(rows, heads, queries, keys)
    out, log_sum = [], []
    for first in range(0, queries, tile):
        places = torch.arange(first, min(first + tile, queries), device=query.device)
        grouped = query[:, :, places].reshape(rows, kv_heads, -1, width)  # heads of a group read the same keys
        running = Running.start(grouped, value.shape[-1])
        most = min(keys, int(places[-1]) + keys - queries + 1) if causal else keys  # later keys are all in the future
        for start in range(0, max(most, 0), tile):
            some = torch.arange(start, min(start + tile, most), device=query.device)
            scores = (grouped.to(running.out.dtype) @ key[:, :, some].to(running.out.dtype).mT) * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            scores = scores.view(rows, heads, len(places), len(some))
            if causal:
                scores = scores.masked_fill(some > places[:, None] + keys - queries, -torch.inf)
            if mask is not None:
                shown = mask[:, :, places][..., some]
                scores = scores.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else scores + shown
            running.add(scores.view(*grouped.shape[:-1], len(some)), value[:, :, some])
        done, total = running.finish(query.dtype)
        out.append(done.view(rows, heads, len(places), -1))
        log_sum.append(total.view(rows, heads, len(places)))
    return torch.cat(out, 2), torch.cat(log_sum, 2)


def attend_tiled(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`tiled_attention` behind transformers' attention interface: -> [B, Q, H, D]."""
    check_call("tiled", attention_mask, key, rest)
    out, _ = tiled_attention(
        query, key, value, attention_mask, attention_mask is None, scaling, softcap=rest.get("softcap")
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class FlashAttention:
    """Leaves the weights alone and runs attention by one implementation, named in the row.

    implementation: "sdpa_flash" is torch's fused kernel, "tiled" the reference, "flash_attention_2" and later the
        authors' packages where installed.
    """

    implementation: str

    def __post_init__(self) -> None:
        check_name(self.implementation, "method.implementation")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The same model with another implementation of attention.

        Raises RunError where the model or the machine cannot run it, or where it gives other answers than before.
        """
        tokens = torch.arange(12, device=base.module.device)[None] % base.module.get_input_embeddings().num_embeddings
        expected = base.engine.hidden(tokens)
        base.engine = base.engine.changed(attention=self.implementation)
        if self.implementation.startswith("flash_attention") and expected.dtype == torch.float32:
            return (
                base  # these packages compute in 16 bits only, as decoding does; scoring in 32 bits fails and says so
            )
        got = base.engine.hidden(tokens)
        bound = max(1e-3, 16 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
        if float((got - expected).abs().max()) > bound:
            raise RunError(
                f"{type(base.module).__name__} answers differently with {self.implementation} attention; choose another"
            )
        return base
