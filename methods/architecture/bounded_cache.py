"""A cache that forgets: the newest tokens and a few kept ones, whatever the length of the text.

Windowed attention and attention sinks let token i read the same keys,

    j <= i  and  ( i - j < window  or  j is kept  or  i is kept ),

and differ in where those keys stand: at their places in the text, or at their places in the cache. Layers of
transformers' cache protocol do both, so that a model's own code runs unchanged; the mask for several tokens at a time
is handed to the model.

What a token reads does not depend on how many tokens are read at once: a text scored in chunks meets the same keys
at the same positions as one decoded token by token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from harness.engines.attention import attention_of
from harness.errors import ConfigError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from harness.engines.transformers import TransformersEngine

UNCHUNKED_MASKS = ("bloom",)  # their attention biases are made from a two-dimensional mask
MASKLESS = ("flash_attention", "flex_attention")  # what their names begin with; they take masks of other kinds


@dataclass(frozen=True)
class Rule:
    """What one layer remembers: the newest `window` tokens, the current one included, and those at places `kept`."""

    window: int
    kept: tuple[int, ...] = ()
    own_window: bool = False  # whether the model has a window here itself, ours or longer

    @property
    def settled(self) -> int:
        """Tokens after which the cache no longer grows: a kept token reads all before it, so nothing leaves earlier."""
        return max(self.kept, default=-1) + 1

    def allowed(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether the token at each place [Q] may read the one at each place [K]: bool [Q, K]."""
        i, j = queries[:, None], keys[None]
        kept = torch.tensor(self.kept, dtype=torch.long)
        return (j <= i) & ((i - j < self.window) | torch.isin(j, kept) | torch.isin(i, kept))

    def oldest(self, seen: int) -> int:
        """First place outside `kept` that the token at place `seen` may read."""
        return 0 if seen < self.settled else max(0, seen - self.window + 1)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of one layer, as the model's own code computes it.

    cosine, sine: [positions, rotated width], float32, as the model's own table gives them.
    turn: the model's function of (queries, keys, cosine, sine).
    """

    cosine: Tensor
    sine: Tensor
    turn: Callable[..., tuple[Tensor, Tensor]]

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate [B, H, T, D] to positions [T]: the arithmetic is float32, the result in the dtype of x."""
        return self._turned(x, self.cosine[positions], self.sine[positions])

    def undone(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `at`."""
        cosine, sine = self.cosine[positions], self.sine[positions]
        scale = cosine.square() + sine.square()  # not 1 where a model scales its rotary table (YaRN)
        return self._turned(x, cosine / scale, -sine / scale)

    def _turned(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        width = cosine.shape[-1]
        rotated = x[..., :width].float()
        rotated = self.turn(rotated, rotated, cosine[None], sine[None])[0].to(x.dtype)
        return torch.cat([rotated, x[..., width:]], dim=-1) if width < x.shape[-1] else rotated


def rotary_of(module: PreTrainedModel, positions: int) -> list[Rotary]:
    """The rotary embedding of every layer, for places 0 to positions - 1.

    Raises ConfigError for a model that says where a token stands in another way.
    """
    body = module.base_model
    table = getattr(body, "rotary_emb", None)
    sources = [sys.modules[kind.__module__] for kind in type(body).__mro__]
    turn = next((s.apply_rotary_pos_emb for s in sources if hasattr(s, "apply_rotary_pos_emb")), None)
    if table is None or turn is None or getattr(module.config, "alibi", False):
        raise ConfigError(
            f"{type(module).__name__} has no rotary position embedding, so keys cannot be moved to their places in "
            "the cache; choose a model with one, or method=windowed_attention"
        )
    config = module.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    by_kind = "layer_type" in inspect.signature(table.forward).parameters
    like = torch.zeros(1, 1, 1, device=module.device)
    places = torch.arange(positions, device=module.device)[None]
    tables = {k: table(like, places, **({"layer_type": k} if by_kind else {})) for k in dict.fromkeys(kinds)}
    return [Rotary(*(part[0] for part in tables[kind]), turn) for kind in kinds]


def rules_of(config: PreTrainedConfig, window: int, kept: tuple[int, ...]) -> list[Rule]:
    """The rule of every layer: a layer whose own window is no longer than ours stays as it is.

    Raises ConfigError for a model whose cache holds other things than keys and values.
    """
    layers = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if others or not layers:
        raise ConfigError(
            f"the cache of this model holds other things than keys and values ({', '.join(others) or 'nothing'}) "
            "and cannot be bounded; choose another model"
        )
    if config.model_type in UNCHUNKED_MASKS or getattr(config, "alibi", False):
        raise ConfigError(f"{config.model_type} with ALiBi takes no mask of another shape; choose another model")
    own = [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers]
    return [
        Rule(window, kept, size is not None) if size is None or size > window else Rule(size, own_window=True)
        for size in own
    ]


class BoundedLayer(DynamicLayer):
    """Keys and values of one layer: kept tokens apart, the newest in a row.

    Tokens leave when the next ones arrive, not before, so that the newest can be taken back (`crop`).

    rotary: None leaves keys where the text has them. Otherwise keys are stored unrotated, and rotated to their places
        in the cache when they are read: rotating stored keys again and again would add up rounding.
    capacity: tokens that one token reads at most, itself included; counts places where rotary is given.
    """

    is_croppable = True

    def __init__(self, rule: Rule, rotary: Rotary | None = None, capacity: int = 0) -> None:
        super().__init__()
        self.rule, self.rotary, self.capacity = rule, rotary, capacity
        self.is_sliding = rule.own_window  # which of the model's masks belongs here
        self.seen = 0  # tokens of the text so far
        self.oldest = 0  # the window holds the places from here on that are not kept
        self.kept_keys: Tensor | None = None
        self.kept_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """No tokens of this shape yet."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.kept_keys, self.kept_values = self.keys, self.values

    def held(self) -> list[Tensor]:
        """What is stored of tokens."""
        return [t for t in (self.keys, self.values, self.kept_keys, self.kept_values) if t is not None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, H, T, D]; return all that these T tokens may read, kept ones first."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = key_states.shape[-2]
        self._forget()
        base = self.base
        places = torch.arange(base, base + length, device=key_states.device)
        stored = key_states if self.rotary is None else self.rotary.undone(key_states, places)
        arriving = [place - self.seen for place in self.rule.kept if self.seen <= place < self.seen + length]
        if arriving:
            passing = [t for t in range(length) if t not in set(arriving)]
            self.kept_keys = torch.cat([self.kept_keys, stored[:, :, arriving]], dim=2)
            self.kept_values = torch.cat([self.kept_values, value_states[:, :, arriving]], dim=2)
            stored, value_states = stored[:, :, passing], value_states[:, :, passing]
        self.keys = torch.cat([self.keys, stored], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.seen += length
        if self.rotary is None:
            return torch.cat([self.kept_keys, self.keys], 2), torch.cat([self.kept_values, self.values], 2)
        return self._placed(base, length)

    def _forget(self) -> None:
        """Drop what the next token cannot read."""
        oldest = self.rule.oldest(self.seen)
        if oldest > self.oldest:
            leaving = oldest - self.oldest - sum(self.oldest <= place < oldest for place in self.rule.kept)
            self.keys, self.values = self.keys[:, :, leaving:], self.values[:, :, leaving:]
            self.oldest = oldest

    @property
    def base(self) -> int:
        """Position of the next token: its place in the text, or in the cache."""
        return self.seen if self.rotary is None else min(self.seen, self.capacity - 1)

    @property
    def holds_more(self) -> bool:
        """Whether there are tokens that the next one may not read."""
        return self.seen < self.rule.settled and not bool(self.allowed(1).all())

    def shifts(self, base: int, length: int) -> Tensor:
        """By how much kept tokens stand nearer to each of the next tokens than the text has them: [length].

        All tokens are read at positions base, base + 1, …, but none may stand past the end of the cache: instead of
        the token moving back, the kept tokens move up.
        """
        return (torch.arange(base, base + length) - (self.capacity - 1)).clamp(min=0)

    def _placed(self, base: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys rotated to their places. Kept ones are there once for every distance that a new token has to them."""
        device, kept, end = self.keys.device, self.kept_keys.shape[2], base + length
        shifts = self.shifts(base, length).unique() if length > 1 else torch.zeros(1, dtype=torch.long)
        places = torch.arange(kept, device=device)
        if len(shifts) > 1 or shifts[0]:
            places = (shifts.to(device)[:, None] + places).flatten()
        copies = self.rotary.at(self.kept_keys.repeat(1, 1, len(shifts), 1), places)
        window = self.rotary.at(self.keys, self._window_places(end, device))
        keys = torch.cat([copies, window], dim=2)
        return keys, torch.cat([self.kept_values.repeat(1, 1, len(shifts), 1), self.values], dim=2)

    def _window_places(self, end: int, device: torch.device) -> Tensor:
        """Positions of the window when the newest token stands at end - 1: [tokens of the window]."""
        if not self.rule.kept or self.rule.kept[-1] < self.oldest:  # nothing is missing in the row
            return torch.arange(end - self.keys.shape[2], end, device=device)
        return (end - self.seen + self._window()).to(device)

    def _window(self) -> Tensor:
        """Places in the text of the tokens in the window."""
        places = torch.arange(self.oldest, self.seen)
        return places[~torch.isin(places, torch.tensor(self.rule.kept, dtype=torch.long))]

    def allowed(self, length: int) -> Tensor:
        """Which of the keys that `update` will return each of the next tokens may read: bool [length, keys]."""
        oldest = max(self.oldest, self.rule.oldest(self.seen))
        end = self.seen + length
        queries, places = torch.arange(self.seen, end), torch.arange(oldest, end)
        kept = torch.tensor([place for place in self.rule.kept if place < end], dtype=torch.long)
        window = self.rule.allowed(queries, places[~torch.isin(places, kept)])
        first = self.rule.allowed(queries, kept)
        if self.rotary is not None:
            shifts, copy = self.shifts(self.base, length).unique(return_inverse=True)
            own = torch.arange(len(shifts))[None] == copy[:, None]  # [length, copies]: each token reads one copy
            first = (own[:, :, None] & first[:, None]).flatten(1)
        return torch.cat([first, window], dim=1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next tokens get; aligned so that the newest stands at the newest position."""
        length = self.allowed(query_length).shape[1] if query_length > 1 else self._readable() + 1
        return length, self.base + query_length - length

    def _readable(self) -> int:
        """How many of the tokens so far the next one can read."""
        oldest = max(self.oldest, self.rule.oldest(self.seen))
        kept = sum(place < self.seen for place in self.rule.kept)
        return kept + self.seen - oldest - sum(oldest <= place < self.seen for place in self.rule.kept)

    def get_seq_length(self) -> int:
        """Position of the next token; models take it for the number of tokens so far."""
        return self.base

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens (a negative number of them), which must have arrived at once.

        Kept ones among them lie apart from the others.
        """
        self.seen += tokens_to_remove
        kept = sum(place < self.seen for place in self.rule.kept)
        window = self.keys.shape[2] + tokens_to_remove + self.kept_keys.shape[2] - kept
        self.keys, self.values = self.keys[:, :, :window], self.values[:, :, :window]
        self.kept_keys, self.kept_values = self.kept_keys[:, :, :kept], self.kept_values[:, :, :kept]


def bounded_cache(
    module: PreTrainedModel, window: int, kept: tuple[int, ...], capacity: int = 0, chunk: int = 0
) -> Cache:
    """An empty cache for a model. capacity: above 0 keys stand at their places in the cache, which has so many."""
    rules = rules_of(module.config, window, kept)
    tables = rotary_of(module, capacity + 2 * chunk) if capacity else [None] * len(rules)
    cache = Cache(layers=[BoundedLayer(rule, table, capacity) for rule, table in zip(rules, tables, strict=True)])
    cache.on, cache.attention, cache.dtype = module.device, attention_of(module), module.dtype
    return cache


def reading(cache: Cache, length: int, kinds: list[str] | None) -> dict[str, Any]:
    """Mask and positions for the next `length` tokens. A single token reads all that is there, once nothing is there
    for the sake of a kept token to come, which reads more than others do.

    kinds: the kind of every layer, where a model has several and takes a mask for each.
    """
    base = cache.layers[0].base
    told: dict[str, Any] = {"position_ids": torch.arange(base, base + length, device=cache.on)[None]}
    if length > 1 or any(cache.is_sliding) or any(layer.holds_more for layer in cache.layers):
        firsts = dict(reversed(list(zip(kinds or [""] * len(cache.layers), cache.layers, strict=False))))
        masks = {kind: layer.allowed(length)[None, None].to(cache.on) for kind, layer in firsts.items()}
        masks = {kind: as_taken(mask, cache.attention, cache.dtype) for kind, mask in masks.items()}
        told["attention_mask"] = masks if len(masks) > 1 else masks.popitem()[1]
    return told


def as_taken(allowed: Tensor, attention: str, dtype: torch.dtype) -> Tensor:
    """A mask, True where a token may read, in the form that an implementation of attention takes.

    Raises RunError for one that takes no such mask.
    """
    if attention.startswith(MASKLESS):
        raise RunError(f"{attention} attention takes no mask of a cache that forgets; choose sdpa or eager")
    if attention != "eager":
        return allowed
    # added to the scores as it is: True and False would be 1 and 0
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def kinds_of(config: PreTrainedConfig) -> list[str] | None:
    """The kind of every layer, by which models of several kinds look up their masks."""
    return getattr(config.get_text_config(), "layer_types", None)


def check_forgetting(module: PreTrainedModel, cached: TransformersEngine) -> None:
    """Raise ConfigError unless a model that forgets nothing yet answers as it does without the cache.

    A model that makes its masks or positions in its own way is found here, before anything is measured.
    """
    from harness.engines.transformers import TransformersEngine

    tokens = torch.arange(8, device=module.device)[None] % module.get_input_embeddings().num_embeddings
    expected, cache = TransformersEngine(module).hidden(tokens), cached.new_cache()
    got = torch.cat([cached.read_body(part, cache) for part in tokens.split(3, dim=1)], dim=1)
    bound = max(1e-3, 16 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    if float((got - expected).abs().max()) > bound:
        raise ConfigError(
            f"{type(module).__name__} answers differently with a cache that has forgotten nothing; choose another model"
        )
