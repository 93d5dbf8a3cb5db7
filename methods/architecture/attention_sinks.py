"""Attention sinks: the first tokens stay, the newest tokens stay, positions are those in the cache (Xiao et al. 2023).

https://arxiv.org/abs/2309.17453, Section 3.2. Token i reads the first S tokens and the newest R, itself included.
What stands at the k-th place of the cache has position k, whatever its place in the text, so no distance exceeds what
the model was made for and a text may go on for ever. Keys are stored without rotary embedding and rotated to their
places when they are read (the paper, Section 3.2, "caching keys prior to introducing the rotary transformation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from harness.errors import ConfigError
from methods.architecture.bounded_cache import bounded_cache, check_forgetting, kinds_of, reading

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from harness.engines.transformers import TransformersEngine
    from harness.method import Bench, LanguageModel

MOVED_BY = 5  # positions, in the check of a model's rotary embedding


@dataclass(frozen=True)
class SinkCache:
    """What is kept of a text.

    sinks: S, tokens from its start. window: R, newest tokens, the current one included.
    chunk: tokens of a prompt that are read at a time; changes no result.
    kinds: the model's kinds of layers, noted when the method is applied.
    """

    sinks: int
    window: int
    chunk: int = 128
    kinds: Sequence[str] | None = None

    endless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("chunk", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be a number of tokens, at least {least}")

    @property
    def capacity(self) -> int:
        """Tokens that are kept at most."""
        return self.sinks + self.window

    @property
    def name(self) -> str:
        """For the row."""
        return f"{self.sinks} sinks and window of {self.window}"

    def new_cache(self, module: PreTrainedModel) -> Cache:
        """An empty cache."""
        return bounded_cache(module, self.window, tuple(range(self.sinks)), self.capacity, self.chunk)

    def reading(self, cache: Cache, length: int) -> dict[str, Any]:
        """Which of the tokens that are kept each of the next ones reads, and at which places they stand."""
        return reading(cache, length, self.kinds)

    def slots(self, tokens: int, longest: int) -> int:
        """No more than the cache has, whatever the length; reserved in one piece."""
        return min(longest, self.capacity)

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this kind again."""
        kinds = None if self.kinds is None else list(self.kinds)
        return {"sinks": self.sinks, "window": self.window, "chunk": self.chunk, "kinds": kinds}


@dataclass(frozen=True)
class AttentionSinks:
    """Leaves the weights alone and bounds the engine's cache. Arguments are those of `SinkCache`.

    window: None takes what the model was made for, less the sinks.
    """

    sinks: int
    window: int | None
    chunk: int

    def __post_init__(self) -> None:
        SinkCache(self.sinks, 1 if self.window is None else self.window, self.chunk)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The same model with a cache that forgets.

        Raises ConfigError for a model without rotary embedding, or a cache longer than what the model was made for.
        """
        trained = base.engine.trained_tokens
        if self.window is None and trained is None:
            raise ConfigError("method.window=null: this model does not say how long its texts may be; give a number")
        window = trained - self.sinks if self.window is None else self.window
        if trained is not None and self.sinks + window > trained:
            raise ConfigError(
                f"method.sinks={self.sinks} and method.window={window}: a cache of {self.sinks + window} tokens "
                f"exceeds the {trained} positions of this model; choose a window of at most {trained - self.sinks}"
            )
        kinds = kinds_of(base.module.config)
        engine = base.engine.changed(cache=SinkCache(self.sinks, window, self.chunk, kinds))
        for sinks in (0, self.sinks):
            check_forgetting(
                base.module, base.engine.changed(cache=SinkCache(sinks, max(window, 16), self.chunk, kinds))
            )
        check_rotation(base.engine.changed(cache=SinkCache(0, max(window, 16), self.chunk, kinds)))
        base.engine = engine
        return base


@torch.no_grad()
def check_rotation(engine: TransformersEngine) -> None:
    """Raise ConfigError unless the same tokens read at other positions leave the same keys once these are unrotated.

    So it is in every model in which positions are known by rotation alone, and in the way that is undone here.
    """
    module = engine.module
    tokens = torch.arange(6, device=module.device)[None] % module.get_input_embeddings().num_embeddings
    kept = []
    for start in (0, MOVED_BY):
        cache = engine.new_cache()
        for layer in cache.layers:
            layer.seen = layer.oldest = start  # as if so many had been read and forgotten
        engine.read_body(tokens, cache)
        kept.append([torch.cat([layer.kept_keys, layer.keys], dim=2) for layer in cache.layers])
    for one, other in zip(*kept, strict=True):
        bound = max(1e-3, 16 * torch.finfo(one.dtype).eps) * float(one.abs().max())
        if float((one - other).abs().max()) > bound:
            raise ConfigError(
                f"{type(module).__name__} does not know positions by rotating queries and keys alone, so keys cannot "
                "be moved to their places in the cache; choose another model, or method=windowed_attention"
            )
