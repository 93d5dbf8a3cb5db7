"""Windowed attention: a token reads the newest tokens, and a few global ones (Beltagy, Peters and Cohan 2020).

https://arxiv.org/abs/2004.05150, Section 3.1, in a decoder: the left half of the paper's window. Token i reads token j
when j <= i and (i - j < window, or j is global, or i is global). Keys stay at their places in the text. The cache
holds the window and the global tokens and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from harness.errors import ConfigError
from methods.architecture.bounded_cache import bounded_cache, check_forgetting, kinds_of, reading

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class WindowedCache:
    """What is kept of a text.

    window: tokens that a token reads, itself included.
    global_tokens: so many from the start of the text, or their places.
    chunk: tokens of a prompt that are read at a time; changes no result.
    kinds: the model's kinds of layers, noted when the method is applied.
    """

    window: int
    global_tokens: int | Sequence[int] = 0
    chunk: int = 256
    kinds: Sequence[str] | None = None

    endless: ClassVar[bool] = False  # places in the text grow, and no model knows places it was not made for

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("chunk", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be a number of tokens, at least {least}")
        if min(self.kept, default=0) < 0 or (isinstance(self.global_tokens, int) and self.global_tokens < 0):
            raise ConfigError(f"method.global_tokens={self.global_tokens}: must not be negative")

    @property
    def kept(self) -> tuple[int, ...]:
        """Places of the global tokens."""
        if isinstance(self.global_tokens, int):
            return tuple(range(self.global_tokens))
        return tuple(sorted(set(self.global_tokens)))

    @property
    def name(self) -> str:
        """For the row."""
        return f"window of {self.window}" + (f" and {len(self.kept)} global tokens" if self.kept else "")

    def new_cache(self, module: PreTrainedModel) -> Cache:
        """An empty cache."""
        return bounded_cache(module, self.window, self.kept)

    def reading(self, cache: Cache, length: int) -> dict[str, Any]:
        """Which of the tokens that are kept each of the next ones reads."""
        return reading(cache, length, self.kinds)

    def slots(self, tokens: int, longest: int) -> int:
        """No more than window and global tokens, whatever the length; reserved in one piece.

        A global token reads all before it, so that nothing is forgotten before the last of them has come.
        """
        return min(longest, max(self.window + len(self.kept), max(self.kept, default=-1) + 1))

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this kind again."""
        places = self.global_tokens if isinstance(self.global_tokens, int) else list(self.kept)
        kinds = None if self.kinds is None else list(self.kinds)
        return {"window": self.window, "global_tokens": places, "chunk": self.chunk, "kinds": kinds}


@dataclass(frozen=True)
class WindowedAttention:
    """Leaves the weights alone and bounds the engine's cache. Arguments are those of `WindowedCache`."""

    window: int
    global_tokens: int | Sequence[int]
    chunk: int

    def __post_init__(self) -> None:
        WindowedCache(self.window, self.global_tokens, self.chunk)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The same model with a cache that forgets. Raises ConfigError for a model whose cache cannot be bounded."""
        cache = WindowedCache(self.window, self.global_tokens, self.chunk, kinds_of(base.module.config))
        engine = base.engine.changed(cache=cache)
        check_forgetting(base.module, base.engine.changed(cache=_wide(cache)))
        base.engine = engine
        return base


def _wide(cache: WindowedCache) -> WindowedCache:
    """The same with a window that a short text does not fill."""
    return WindowedCache(max(cache.window, 16), 0, cache.chunk, cache.kinds)
