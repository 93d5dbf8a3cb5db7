"""Keys and values of past tokens in few bits: the cache of the engine, not the weights.

Every token has a scale and a lowest value of its own in every head, found when the token is written, so that nothing
is calibrated and a token reads the same however many follow it. This is the per-token, per-head form that OmniQuant
(https://arxiv.org/abs/2308.13137, Section 4.1) and ZeroQuant use for what attention multiplies; `e4m3` is the FP8 cache
of serving engines with their default scale of 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from harness.errors import ConfigError
from methods.quantization.packing import pack, unpack, words

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from harness.method import Bench, LanguageModel

STATISTICS_BYTES = 4  # scale and lowest value, float16 each
E4M3_LARGEST = 448.0
SMALLEST_SCALE = 6e-8  # the smallest float16 above zero: a token of equal entries decodes to them


@dataclass(frozen=True)
class KeyValueGrid:
    """What a cache stores for the D entries of a token in one head.

    bits: 2 to 8 for integers; 8 for e4m3.
    kind: "int" (asymmetric, from the smallest to the largest entry), or "e4m3" without a scale.
    """

    bits: int = 8
    kind: Literal["int", "e4m3"] = "int"

    def __post_init__(self) -> None:
        if self.kind not in ("int", "e4m3"):
            raise ConfigError(f"method.kind={self.kind}: choose one of int, e4m3")
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 8:
            raise ConfigError(f"method.bits={self.bits}: cached keys and values have 2 to 8 bits")
        if self.kind == "e4m3" and self.bits != 8:
            raise ConfigError(f"method.bits={self.bits}: e4m3 has 8 bits")

    def encode(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> uint8 [B, H, T, bytes of a token]."""
        if self.kind == "e4m3":
            return x.float().clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        wide = x.float()
        low = wide.amin(-1, keepdim=True).half()
        step = (wide.amax(-1, keepdim=True) - low.float()) / (2**self.bits - 1)
        scale = step.clamp(min=SMALLEST_SCALE).half()
        codes = ((wide - low.float()) / scale.float()).round().clamp(0, 2**self.bits - 1).to(torch.uint8)
        packed = pack(codes.flatten(0, -2), self.bits).view(torch.uint8).view(*x.shape[:-1], -1)
        return torch.cat([packed, scale.view(torch.uint8), low.view(torch.uint8)], dim=-1)

    def decode(self, stored: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """The inverse of `encode` up to rounding: uint8 [B, H, T, bytes] -> [B, H, T, width] in `dtype`."""
        if self.kind == "e4m3":
            return stored.view(torch.float8_e4m3fn).to(dtype)
        packed = stored[..., :-STATISTICS_BYTES].contiguous().view(torch.int32)
        statistics = stored[..., -STATISTICS_BYTES:].contiguous().view(torch.float16).float()
        codes = unpack(packed.flatten(0, -2), self.bits, width).view(*stored.shape[:-1], width)
        return (codes * statistics[..., :1] + statistics[..., 1:]).to(dtype)

    def bytes_per_token(self, width: int) -> int:
        """Bytes of one token's keys (or values) of `width` entries in one head."""
        return width if self.kind == "e4m3" else 4 * words(width, self.bits) + STATISTICS_BYTES

    chunk: ClassVar[int | None] = None
    endless: ClassVar[bool] = False

    def new_cache(self, module: PreTrainedModel) -> Cache:
        """An empty cache for a model: transformers' own layers, which hold bytes instead of numbers."""
        cache = DynamicCache(config=module.config)
        others = {
            type(layer).__name__
            for layer in cache.layers
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
        }
        if others or not cache.layers:
            raise ConfigError(
                f"the cache of this model holds other things than keys and values ({', '.join(others) or 'nothing'}) "
                "and cannot be quantized; choose another model"
            )
        cache.layers = [_quantized(layer, self) for layer in cache.layers]
        return cache

    def reading(self, cache: Cache, length: int) -> dict[str, Any]:
        """Nothing to tell the model: all tokens are there."""
        return {}

    def slots(self, tokens: int, longest: int) -> int:
        """A contiguous cache reserves for the longest."""
        return longest

    @property
    def name(self) -> str:
        """For the row: what holds keys and values."""
        return f"{'FP8' if self.kind == 'e4m3' else f'int{self.bits}'} KV cache, decoded at every step"

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this grid again."""
        return asdict(self)


@dataclass(frozen=True)
class KeyValueCache:
    """Leaves the weights alone and quantizes the engine's cache of keys and values.

    grid: what a token's keys and values are rounded to.
    """

    grid: KeyValueGrid

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The same model with another cache."""
        self.grid.new_cache(base.module)  # refuse what cannot be cached this way before anything runs
        base.engine = base.engine.changed(cache=self.grid)
        return base


class _Quantized:
    """What makes a layer of transformers' cache hold a token's bytes along its last dimension instead of its entries.

    Everything else that such a layer does (grow, slide, crop, reorder) is along the other dimensions.
    """

    grid: KeyValueGrid

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, H, T, D]; return all of them, decoded."""
        stored = super().update(self.grid.encode(keys), self.grid.encode(values), *args, **kwargs)
        return (
            self.grid.decode(stored[0], keys.shape[-1], keys.dtype),
            self.grid.decode(stored[1], values.shape[-1], values.dtype),
        )


class _QuantizedLayer(_Quantized, DynamicLayer):
    """All tokens."""


class _QuantizedSlidingWindowLayer(_Quantized, DynamicSlidingWindowLayer):
    """The newest tokens."""


def _quantized(layer: CacheLayerMixin, grid: KeyValueGrid) -> CacheLayerMixin:
    if isinstance(layer, DynamicSlidingWindowLayer):
        made = _QuantizedSlidingWindowLayer(layer.sliding_window)
    else:
        made = _QuantizedLayer()
    made.grid = grid
    return made
