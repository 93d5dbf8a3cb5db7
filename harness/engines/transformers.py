"""Run a model with transformers: score text, decode greedily.

Logits of a whole batch are the largest tensor of an evaluation (4 windows of 512 tokens over 49,152 words are
400 MB in float32), so scoring stops the model at its final hidden states and takes the logits of a few
hundred positions at a time.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
import torch.nn.functional as F

from harness.engines.attention import (
    ONE_QUERY,
    asks_for_sdpa,
    attention_of,
    needs_plain_rows,
    runs_one_query,
    share_heads,
    shares_keys,
    use_attention,
)
from harness.engines.captured import CapturedSteps, CheckedRequest
from harness.engines.joined import join_linears
from harness.engines.placement import devices_of, is_divided
from harness.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache, PreTrainedModel

    from harness.engines.decoding import Decoding

Mode = Literal["scoring", "decoding"]
Choose = Callable[[torch.Tensor, int], torch.Tensor]
Steps = Literal["plain", "captured", "compiled", "auto"]

LOGITS_HELD = 2**25  # float32 logits in memory at once: 134 MB, 682 positions of a vocabulary of 49,152
LARGE_LOGIT = 100.0  # a cap or a scale on logits shows at this size, whatever the weights


class CacheKind(Protocol):
    """Another cache of keys and values than one entry for each number.

    Where `chunk` is a number, the kind forgets, and so a text is read that many tokens at a time.
    """

    name: str  # what a row says about it
    chunk: int | None  # how many tokens may be read at once; None: any number
    endless: bool  # whether positions stay inside the cache, so that a text may be longer than the model was made for

    def new_cache(self, module: PreTrainedModel) -> Cache:
        """An empty cache for a model."""

    def reading(self, cache: Cache, length: int) -> dict[str, Any]:
        """What the model must be told when it reads `length` more tokens: a mask, positions; mostly nothing."""

    def slots(self, tokens: int, longest: int) -> int:
        """Places that a sequence of `tokens` tokens takes, which may become `longest` tokens long."""

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this kind again."""


class TransformersEngine:
    """A transformers causal language model behind the harness's engine interface.

    cache: what keys and values are kept in; text is scored through it too, so that quality shows what it loses. None
        keeps all of them as they are.
    attention: the implementation of attention, see `harness.engines.attention`; None is transformers' choice.
    decoding: how tokens are generated; None is one after the other, each the likeliest.
    steps: "plain", or "captured": a static cache and one CUDA graph for all decoding steps (on a CPU the static cache
        alone). "compiled" compiles the step before. "auto" captures on a GPU where the cache is the plain one and
        nothing is guessed.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        cache: CacheKind | None = None,
        attention: str | None = None,
        decoding: Decoding | None = None,
        steps: Steps = "plain",
    ) -> None:
        self.module = module.eval()
        self.cache = cache
        self.decoding = decoding
        self.steps: Steps = steps
        self._chosen_attention = attention
        if attention is not None:
            use_attention(module, attention)
        self._mode: Mode | None = None
        self._captured: CapturedSteps | None = None

    def settings(self) -> dict[str, Any]:
        """How a saved model is run again: arguments besides the module; objects by the path of their class."""
        kept = {"cache": self.cache, "attention": self._chosen_attention, "decoding": self.decoding}
        return {key: _described(value) for key, value in kept.items() if value is not None}

    def changed(self, module: PreTrainedModel | None = None, **parts: Any) -> TransformersEngine:
        """The same engine with some of cache, attention, decoding; or around another module.

        Raises RunError for a part that another method has put in before: one of the two would be lost.
        """
        own = {"cache": self.cache, "attention": self._chosen_attention, "decoding": self.decoding}
        for key, value in parts.items():
            if own[key] is not None:
                before = getattr(own[key], "name", own[key])
                raise RunError(
                    f"the engine's {key} is {before} already and cannot be {getattr(value, 'name', value)} as well; "
                    "leave one of the two methods out"
                )
        return TransformersEngine(module or self.module, **(own | parts), steps=self.steps)

    def decoding_by(self, decoding: Decoding | None) -> TransformersEngine:
        """The same engine with another way to decode; None: one token after the other."""
        return TransformersEngine(self.module, self.cache, self._chosen_attention, decoding, self.steps)

    def on_hardware(self, attention: str | None, steps: Steps) -> TransformersEngine:
        """The same engine as a machine's configuration runs it; a method's own attention comes first."""
        chosen = self._chosen_attention or attention
        return TransformersEngine(self.module, self.cache, chosen, self.decoding, steps)

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
        """Final hidden states, the input of the output head, on its device: ids [B, T] -> [B, T, H], module's dtype."""
        return self._body(tokens.to(self.module.device)).to(self.head_device)

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
        """Hidden states of a whole text, read past a cache only where that changes what is read."""
        if self.cache is None:
            return self.module.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        cache = self.new_cache()
        return torch.cat([self.read_body(part, cache) for part in self._parts(tokens)], dim=1)

    @torch.no_grad()
    def read_body(self, ids: Tensor, cache: Cache) -> Tensor:
        """Final hidden states of the next tokens of what `cache` holds, at once: ids [B, T] -> [B, T, H]."""
        return self._read(self.module.base_model, ids, cache).last_hidden_state

    def _parts(self, tokens: Tensor) -> Sequence[Tensor]:
        """A text as the cache can take it: ids [B, T] -> ids [B, at most chunk] each."""
        return tokens.split((self.cache and self.cache.chunk) or tokens.shape[1], dim=1)

    def _read(self, reader: nn.Module, ids: Tensor, cache: Cache, **extra: Any) -> Any:
        """Output of the model, or its body, for the next tokens [B, T] of what `cache` holds."""
        told = {} if self.cache is None else self.cache.reading(cache, ids.shape[1])
        return reader(input_ids=ids, past_key_values=cache, use_cache=True, **told, **extra)

    @property
    def head_device(self) -> torch.device:
        """Where logits are made; another one than the input's where several devices hold the model."""
        return self.module.device if self._head is None else devices_of(self._head)[0]

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
        hidden = self.hidden(tokens)[0]
        if self.cache is None:
            own = self.module(input_ids=tokens, use_cache=False).logits[0].float()
        else:
            cache = self.new_cache()
            parts = [self._read(self.module, part, cache).logits[0] for part in self._parts(tokens)]
            own = torch.cat(parts).float()
        own = own.to(hidden.device)
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
        choose: Choose | None = None,
        ended: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Decoding without early stop, greedy unless told otherwise: ids [B, P] -> ids [B] per decoding step.

        The first step reads the prompt, every later one a single token per row, with the KV cache.
        mask: [B, P], False where a row is padded at its start; None when no row is.
        choose: (logits [B, V], number of the step) -> ids [B], decoded plainly; None takes the likeliest.
        ended: [B] on the host, which the caller sets meanwhile: rows whose tokens nobody reads any more, and which need
            not be computed.
        """
        self._check_length(prompt.shape[1] + new_tokens)
        prompt = prompt.to(self.module.device)
        mask = None if mask is None or bool(mask.all()) else mask.to(prompt.device).long()
        if mask is not None:
            share_heads()
        if mask is not None and not self._takes_padding:
            yield from self._row_by_row(prompt, new_tokens, mask, choose)
        else:
            yield from self._generate(prompt, new_tokens, mask, choose, ended)

    def checked(self, prompt: Tensor, new_tokens: int, width: int) -> CheckedRequest | None:
        """A request in captured steps whose passes read `width` tokens, ids [B, P]; None where steps are plain."""
        return self._capturing.checked(prompt, new_tokens, width) if self._captures else None

    @torch.inference_mode()
    def generate_after_noise(self, rows: int, held: int, new_tokens: int) -> Iterator[Tensor]:
        """Decoding steps of `rows` sequences of which the cache holds `held` tokens: one tensor of ids [rows] a step.

        The cache is filled with random numbers, because what a step costs does not depend on what was read; reading it
        could take minutes.
        Raises RunError where tokens are cached or decoded in another way than one entry and one step for each.
        """
        self._check_length(held + new_tokens)
        if self.cache is not None or self.decoding is not None:
            raise RunError("a cache of noise stands for the plain one alone; read the text: read_tokens=null")
        if self._captures:
            steps = self._capturing.generate_after_noise(rows, held, new_tokens)
            if steps is not None:
                yield from steps
                return
        cache = self.new_cache()
        self.fill_with_noise(cache, rows, held)
        step = torch.zeros(rows, 1, dtype=torch.long, device=self.module.device)
        for _ in range(new_tokens):
            step = self.advance(step, cache)[:, -1].argmax(-1, keepdim=True)
            yield step[:, 0]

    @torch.no_grad()
    def fill_with_noise(self, cache: Cache, rows: int, held: int) -> None:
        """Put `held` tokens of random keys and values into every layer of an empty cache of plain layers."""
        shapes = self.new_cache()
        token = torch.zeros(1, 1, dtype=torch.long, device=self.module.device)
        self._read(self.module.base_model, token, shapes)
        for index, layer in enumerate(shapes.layers):
            pair = [
                torch.randn(rows, part.shape[1], held, part.shape[-1], dtype=part.dtype, device=part.device)
                for part in (layer.keys, layer.values)
            ]
            cache.update(*pair, index)

    def forget_requests(self) -> bool:
        """Give back what is kept of the latest shape of request, a static cache, a graph; whether there was any."""
        return self._captured is not None and self._captured.forget()

    @property
    def _capturing(self) -> CapturedSteps:
        self._captured = self._captured or CapturedSteps(self, self._compiler)
        return self._captured

    @property
    def _takes_padding(self) -> bool:
        """Whether rows may start with padding; if not, they are decoded side by side, each with its own cache."""
        return (self.cache is None or self.cache.chunk is None) and not needs_plain_rows(self.attention)

    def _row_by_row(self, prompt: Tensor, new_tokens: int, mask: Tensor, choose: Choose | None) -> Iterator[Tensor]:
        unpadded = [row[None, own.bool()] for row, own in zip(prompt, mask, strict=True)]
        if choose is None:
            rows = [self._generate(row, new_tokens, None, None, None) for row in unpadded]
            yield from (torch.cat(step) for step in zip(*rows, strict=True))
            return
        caches, steps = [self.new_cache() for _ in unpadded], unpadded
        for number in range(new_tokens):
            logits = [self.advance(step, cache)[:, -1] for step, cache in zip(steps, caches, strict=True)]
            chosen = choose(torch.cat(logits), number)  # draws of all rows at once, as for rows without padding
            steps = list(chosen[:, None].split(1))
            yield chosen

    def _generate(
        self, prompt: Tensor, new_tokens: int, mask: Tensor | None, choose: Choose | None, ended: Tensor | None
    ) -> Iterator[Tensor]:
        if self.decoding is not None and choose is None:
            yield from self.decoding.generate(self, prompt, new_tokens, mask)
            return
        captures = self._captures and choose is None and (mask is None or "position_ids" in self._arguments)
        captured = self._capturing.generate(prompt, new_tokens, mask) if captures else None
        if captured is not None:
            yield from captured
        elif ended is None or choose is not None or self.cache is not None:
            cache, step = self.new_cache(), prompt
            for number in range(new_tokens):
                logits = self.advance(step, cache, mask=mask)[:, -1]
                step = (logits.argmax(-1) if choose is None else choose(logits, number))[:, None]
                mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                yield step[:, 0]
        else:
            yield from self._shrinking(prompt, new_tokens, mask, ended)

    def _shrinking(self, prompt: Tensor, new_tokens: int, mask: Tensor | None, ended: Tensor) -> Iterator[Tensor]:
        """Greedy plain steps that leave out rows which have ended, as soon as these are half of those computed."""
        cache, step = self.new_cache(), prompt
        rows = torch.arange(len(prompt))  # that are computed
        answer = prompt.new_zeros(len(prompt))
        for _ in range(new_tokens):
            step = self.advance(step, cache, mask=mask)[:, -1:].argmax(-1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            answer = answer.clone()
            answer[rows.to(answer.device)] = step[:, 0]
            yield answer
            going = (~ended[rows]).nonzero()[:, 0]
            if 0 < len(going) <= len(rows) // 2:
                rows, kept = rows[going], going.to(step.device)
                cache.batch_select_indices(kept)
                step, mask = step[kept], None if mask is None else mask[kept]

    @torch.no_grad()
    def advance(
        self,
        ids: Tensor,
        cache: Cache,
        keep: int = 1,
        mask: Tensor | None = None,
        held: Tensor | None = None,
        reader: nn.Module | None = None,
    ) -> Tensor:
        """Logits of the last `keep` of the next tokens of what `cache` holds: ids [B, T] -> [B, keep, V].

        mask: [B, tokens held and T], 0 where a row is padded at its start; of a static cache, [B, places].
        held: of a static cache, how many tokens it holds, on the device.
        reader: the module in another form, e.g. compiled.
        """
        *before, last = self._parts(ids)
        while before and last.shape[1] < keep:
            last = torch.cat([before.pop(), last], dim=1)
        for part in before:
            self._read(self.module.base_model, part, cache)
        extra: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in self._arguments else {}
        if mask is not None:
            extra |= self._padding(mask, ids.shape[1], held)
        return self._read(self.module if reader is None else reader, last, cache, **extra).logits[:, -keep:]

    def _padding(self, mask: Tensor, length: int, held: Tensor | None) -> dict[str, Tensor]:
        """What the module must be told about rows that start with padding, for its newest `length` tokens."""
        told = {"attention_mask": mask}
        if "position_ids" in self._arguments:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            newest = slice(-length, None) if held is None else torch.arange(length, device=mask.device) + held
            told["position_ids"] = places[:, newest]
        return told

    def new_cache(self) -> Cache:
        """An empty cache of this engine's kind."""
        if self.cache is not None:
            return self.cache.new_cache(self.module)
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
        """How long a text may be: the positions the model was made for; None where there is no limit or none known."""
        return None if self.cache is not None and self.cache.endless else self.trained_tokens

    @property
    def trained_tokens(self) -> int | None:
        """Positions the model was made for; None where its configuration does not say."""
        return getattr(self.module.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.module.forward).parameters)

    def kv_cache_bytes_per_token(self, dtype: torch.dtype, context_tokens: int = 128) -> float:
        """Bytes that a real KV cache holds per token of one sequence, filled with `context_tokens` tokens.

        Floating-point entries count as `dtype`, so the answer does not depend on the dtype prepared for.
        """
        return self.kv_cache_bytes(dtype, context_tokens) / context_tokens

    @torch.inference_mode()
    def kv_cache_bytes(self, dtype: torch.dtype, context_tokens: int) -> int:
        """Bytes that a real KV cache holds of one sequence of so many tokens; entries as in the function above.

        The last token comes alone, as in decoding: a cache that forgets holds what was read at once until the next one.
        """
        tokens = torch.zeros(1, context_tokens, dtype=torch.long, device=self.module.device)
        cache = self.new_cache()
        before, last = tokens.split([context_tokens - 1, 1], dim=1)
        for part in (*(self._parts(before) if context_tokens > 1 else ()), last):
            self._read(self.module.base_model, part, cache)
        return held_bytes(cache, dtype)

    # ---- places in memory

    def slots(self, tokens: int, longest: int) -> int:
        """Places that serving sets aside for a sequence of `tokens` tokens that may become `longest` tokens long.

        Without a cache of another kind: contiguous memory for the longest, which is what a serving system without
        paging must reserve.
        """
        return longest if self.cache is None else self.cache.slots(tokens, longest)

    # ---- preparation

    def prepare(self, mode: Mode, dtype: torch.dtype) -> None:
        """Make the module ready to be scored or timed in `dtype`.

        Layers that prepare themselves do; all other parameters are cast. Buffers stay as they are: rotary
        frequencies in bfloat16 would move every position. Where steps are captured on a GPU, heads that share keys are
        read by a kernel of ours unless an attention was chosen, and for decoding packed layers that read one tensor are
        joined.
        Raises ValueError for scoring after decoding: packed weights may be gone and dense ones are rounded.
        """
        if self._mode == "decoding" and mode == "scoring":
            raise ValueError(
                "this model was prepared for decoding, which rounds its weights; load it again to score it"
            )
        self.forget_requests()  # a graph reads weights where they were
        _prepare(self.module, mode, dtype)
        if self._captures and self.module.device.type == "cuda":
            if mode == "decoding":
                join_linears(self.module)
            left = self._chosen_attention is None and self.attention == "sdpa" and not asks_for_sdpa(self.module)
            if left and shares_keys(self.module) and runs_one_query(self.module):
                use_attention(self.module, ONE_QUERY)
        self._mode = mode

    def kernels(self) -> str:
        """What multiplies the matrices, and the activations' dtype: "int4 packed (torch), bfloat16"."""
        found = Counter(_kernels(self.module))
        names = ", ".join(kernel for kernel, _ in found.most_common()) or "dense matmul"
        parts = [names, *(part.name for part in (self.cache, self.decoding) if part is not None)]
        if self._captures:
            captured = CapturedSteps.name(self.module.device, self._compiler)
            parts.append(captured if self._captured is None else self._captured.state)
        parts += [f"{self.attention} attention", str(self.module.dtype).removeprefix("torch.")]
        return ", ".join(parts)

    @property
    def attention(self) -> str:
        """The attention implementation that transformers runs: "sdpa", "eager", "sdpa_flash"."""
        return attention_of(self.module)

    @property
    def _captures(self) -> bool:
        if self.steps == "auto":
            plain = self.cache is None and self.decoding is None
            return plain and self.module.device.type == "cuda" and not is_divided(self.module)  # a graph has one GPU
        return self.steps in ("captured", "compiled") and self.cache is None

    @property
    def _compiler(self) -> str | None:
        return "inductor" if self.steps == "compiled" else None


def held_bytes(cache: Cache, dtype: torch.dtype) -> int:
    """Bytes of keys, values and whatever else a cache holds of tokens; floating-point entries count as `dtype`."""
    kept = [
        tensor
        for layer in cache.layers
        for tensor in getattr(layer, "held", lambda layer=layer: list(vars(layer).values()))()
        if isinstance(tensor, torch.Tensor) and tensor.ndim > 1
    ]
    return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in kept)


def _described(value: Any) -> Any:
    """A part of the engine as a saved model names it."""
    if isinstance(value, str):
        return value
    return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **value.as_dict()}


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
