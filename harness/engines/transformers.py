"""Run a model with transformers: score text, decode greedily.

Logits of a whole batch are the largest tensor of an evaluation (4 windows of 512 tokens over 49,152 words are
400 MB in float32), so scoring stops the model at its final hidden states and takes the logits of a few
hundred positions at a time.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F

from harness.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

Mode = Literal["scoring", "decoding"]

LOGITS_HELD = 2**25  # float32 logits in memory at once: 134 MB, 682 positions of a vocabulary of 49,152
LARGE_LOGIT = 100.0  # a cap or a scale on logits shows at this size, whatever the weights


class CacheKind(Protocol):
    """Another cache of keys and values than one entry for each number."""

    name: str  # what a row says about it

    def new_cache(self, config: PreTrainedConfig) -> Cache:
        """An empty cache for a model of this configuration."""

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this kind again."""


class TransformersEngine:
    """A transformers causal language model behind the harness's engine interface.

    cache: what keys and values are kept in; text is scored through it too, so that quality shows what it loses. None
        keeps all of them as they are.
    """

    def __init__(self, module: PreTrainedModel, cache: CacheKind | None = None) -> None:
        self.module = module.eval()
        self.cache = cache
        self._mode: Mode | None = None

    def settings(self) -> dict[str, Any]:
        """How a saved model is run again: arguments besides the module; objects by the path of their class."""
        if self.cache is None:
            return {}
        path = f"{type(self.cache).__module__}.{type(self.cache).__qualname__}"
        return {"cache": {"_target_": path, **self.cache.as_dict()}}

    # ---- scoring

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood of each next token: ids [B, T] -> nats [B, T-1], float32.

        Padding at the end of a row changes nothing before it: attention is causal.
        """
        hidden = self.hidden(tokens)[:, :-1].flatten(0, 1)  # [B*(T-1), H]
        targets = tokens[:, 1:].flatten().to(hidden.device)
        losses = [
            F.cross_entropy(self.logits(rows), ids, reduction="none")
            for rows, ids in zip(hidden.split(self.logit_rows), targets.split(self.logit_rows), strict=True)
        ]
        return torch.cat(losses).view(len(tokens), -1)

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states, the input of the output head: ids [B, T] -> [B, T, H] in the module's dtype."""
        return self._body(tokens.to(self.module.device))

    @torch.no_grad()
    def logits(self, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
        """Logits of final hidden states: [N, H] -> [N, V] float32.

        head: another output head in the place of the module's own, e.g. the dense model's.
        """
        if self._head_is_last:
            return (head or self._head)(hidden).float()
        return self._through_module(hidden, head or self._head)

    @property
    def logit_rows(self) -> int:
        """How many positions' logits to take at a time: enough for a fast matrix product, few enough to hold."""
        return max(64, LOGITS_HELD // self.module.get_input_embeddings().num_embeddings)

    def _body(self, tokens: Tensor) -> Tensor:
        return self.module.base_model(input_ids=tokens, **self._reading()).last_hidden_state

    def _reading(self) -> dict[str, Any]:
        """How a text is read at once: past a cache only where that changes what is read."""
        if self.cache is None:
            return {"use_cache": False}
        return {"past_key_values": self._new_cache(), "use_cache": True}

    @property
    def _head(self) -> nn.Module:
        return self.module.get_output_embeddings()

    def _through_module(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """Logits through the module's own forward, which may scale or cap what the head returns.

        The forward runs on one token, and its head is made to answer for `hidden`: [N, H] -> [N, V] float32.
        """

        output = head(hidden)[None]

        def answer(_module: nn.Module, _args: tuple, _output: Tensor) -> Tensor:
            return output

        handle = self._head.register_forward_hook(answer)
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=hidden.device)
            return self.module(input_ids=token, use_cache=False).logits[0].float()
        finally:
            handle.remove()

    @cached_property
    def _head_is_last(self) -> bool:
        """Whether logits are the head's output, untouched; checked on the model itself at first use.

        False for Gemma 2 (caps them), Cohere and Granite (scale them). Raises RunError for a model whose logits
        do not come from an output head over the final hidden states at all.
        """
        head = self._head
        vocabulary = self.module.get_input_embeddings().num_embeddings
        tokens = torch.arange(8, device=self.module.device)[None] % vocabulary
        hidden = self._body(tokens)[0]
        own = self.module(input_ids=tokens, **self._reading()).logits[0].float()
        if head is None or not _same(self._through_module(hidden, head), own, hidden.dtype):
            raise RunError(
                f"{type(self.module).__name__}: logits computed from the final hidden states differ from the model's "
                "own; this model needs an engine of its own in harness/engines"
            )
        large = hidden * (LARGE_LOGIT / own.abs().max().clamp(min=1e-6)).to(hidden.dtype)
        return _same(head(large).float(), self._through_module(large, head), hidden.dtype)

    # ---- decoding

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        new_tokens: int,
        mask: Tensor | None = None,
        choose: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Decoding without early stop, greedy unless told otherwise: ids [B, P] -> ids [B] per decoding step.

        The first step reads the prompt, every later one a single token per row, with the KV cache.
        mask: [B, P], False where a row is padded at its start; None when no row is.
        choose: (logits [B, V], number of the step) -> ids [B]; None takes the likeliest.
        """
        self._check_length(prompt.shape[1] + new_tokens)
        step = prompt.to(self.module.device)
        cache = self._new_cache()
        extra = {"logits_to_keep": 1} if "logits_to_keep" in self._arguments else {}
        mask = None if mask is None else mask.to(step.device).long()
        for number in range(new_tokens):
            if mask is not None:
                extra |= self._padding(mask, step.shape[1])
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self.module(input_ids=step, past_key_values=cache, use_cache=True, **extra)
            cache = output.past_key_values
            logits = output.logits[:, -1]
            step = (logits.argmax(-1) if choose is None else choose(logits, number))[:, None]
            yield step[:, 0]

    def _padding(self, mask: Tensor, length: int) -> dict[str, Tensor]:
        """What the module must be told about rows that start with padding, for its newest `length` tokens."""
        told = {"attention_mask": mask}
        if "position_ids" in self._arguments:
            told["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return told

    def _new_cache(self) -> Cache:
        if self.cache is not None:
            return self.cache.new_cache(self.module.config)
        from transformers import DynamicCache

        return DynamicCache(config=self.module.config)

    def _check_length(self, tokens: int) -> None:
        if self.context_tokens is not None and tokens > self.context_tokens:
            raise RunError(
                f"{tokens} tokens of prompt and answer exceed the {self.context_tokens} positions of this model; "
                "shorten the prompt or ask for fewer new tokens"
            )

    @property
    def context_tokens(self) -> int | None:
        """Positions the model was made for; None where its configuration does not say."""
        return getattr(self.module.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.module.forward).parameters)

    @torch.inference_mode()
    def kv_cache_bytes_per_token(self, dtype: torch.dtype, context_tokens: int = 128) -> float:
        """Bytes that a real KV cache holds per token of one sequence, filled with `context_tokens` tokens.

        Floating-point entries count as `dtype`, so the answer does not depend on the dtype prepared for.
        """
        tokens = torch.zeros(1, context_tokens, dtype=torch.long, device=self.module.device)
        cache = self.module.base_model(input_ids=tokens, past_key_values=self._new_cache(), use_cache=True)
        kept = [
            tensor
            for layer in cache.past_key_values.layers
            for tensor in vars(layer).values()
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1
        ]
        return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in kept) / context_tokens

    # ---- preparation

    def prepare(self, mode: Mode, dtype: torch.dtype) -> None:
        """Make the module ready to be scored or timed in `dtype`.

        Layers that prepare themselves do; all other parameters are cast. Buffers stay as they are: rotary
        frequencies in bfloat16 would move every position.
        Raises ValueError for scoring after decoding: packed weights may be gone and dense ones are rounded.
        """
        if self._mode == "decoding" and mode == "scoring":
            raise ValueError(
                "this model was prepared for decoding, which rounds its weights; load it again to score it"
            )
        _prepare(self.module, mode, dtype)
        self._mode = mode

    def kernels(self) -> str:
        """What multiplies the matrices, and the activations' dtype: "int4 packed (torch), bfloat16"."""
        found = Counter(_kernels(self.module))
        names = ", ".join(kernel for kernel, _ in found.most_common()) or "dense matmul"
        cache = "" if self.cache is None else f", {self.cache.name}"
        return f"{names}{cache}, {str(self.module.dtype).removeprefix('torch.')}"

    @property
    def attention(self) -> str:
        """The attention implementation that transformers runs: "sdpa", "eager", "flash_attention_2"."""
        return self.module.config._attn_implementation


def _prepare(module: nn.Module, mode: Mode, dtype: torch.dtype) -> None:
    if hasattr(module, "prepare"):
        module.prepare(mode, dtype)
        return
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)  # in place, so that tied weights stay tied
    for child in module.children():
        _prepare(child, mode, dtype)


def _kernels(module: nn.Module) -> Iterator[str]:
    """Of every layer that prepares itself; what lies inside one is in its name already."""
    if hasattr(module, "prepare"):
        yield module.kernel
        return
    for child in module.children():
        yield from _kernels(child)


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for the rounding of their arithmetic. A ruined model's NaN tell nothing: they count as equal."""
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps)
    return float((a - b).nan_to_num(0.0).abs().max()) <= tolerance * float(b.nan_to_num(0.0).abs().max())
