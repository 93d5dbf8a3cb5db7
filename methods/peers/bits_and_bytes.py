"""LLM.int8(), NF4 and FP4 of bitsandbytes, the authors' own library for these.

https://github.com/bitsandbytes-foundation/bitsandbytes. No calibration. Scales stay in its 32 bits and are counted so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from harness.errors import ConfigError
from methods.peers.exchange import Library, ask
from methods.peers.layers import put_back
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.grids import Scales
from methods.quantization.linear import pack_linear

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.method import Bench, LanguageModel
    from methods.quantization.linear import PackedLinear

LIBRARY = Library("bitsandbytes", "bitsandbytes", "bitsandbytes transformers accelerate", "run_bits_and_bytes.py")
BLOCK = 64  # weights that share a scale: its default, which transformers has no setting for


@dataclass(frozen=True)
class BitsAndBytesInt8:
    """`Linear8bitLt`. threshold: an input channel with a value of at least that stays in 16 bits."""

    interpreter: str | None = None
    threshold: float = 6.0

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise ConfigError(f"method.threshold={self.threshold}: must be greater than 0")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, quantize there, take over weights and scales."""
        settings = {"bits": 8, "threshold": self.threshold}
        answer = ask(LIBRARY, self.interpreter, base, bench, settings, calibrates=False)
        dtype = str(base.storage_dtype).removeprefix("torch.")
        return put_back(base, answer, lambda linear, parts: eight_bit_layer(linear, parts, self.threshold, dtype))


@dataclass(frozen=True)
class BitsAndBytes4Bit:
    """`Linear4bit`. quant_type: the code book. double_quantization: scales in 8 bits."""

    interpreter: str | None = None
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in ("nf4", "fp4"):
            raise ConfigError(f"method.quant_type={self.quant_type}: choose one of nf4, fp4")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, quantize there, take over codes, scales and code book."""
        settings = {"bits": 4, "quant_type": self.quant_type, "double_quantization": self.double_quantization}
        answer = ask(LIBRARY, self.interpreter, base, bench, settings, calibrates=False)
        return put_back(base, answer, four_bit_layer)


def eight_bit_layer(linear: nn.Linear, parts: dict[str, Tensor], threshold: float, dtype: str) -> PackedLinear:
    """Its `weight` int8 [out, in] and `SCB` float32 [out]."""
    from methods.quantization.llm_int8 import VectorwiseInt8Linear

    layer = VectorwiseInt8Linear(
        linear.in_features, linear.out_features, threshold, bias=linear.bias is not None, scale_dtype=dtype
    )
    layer.take_over(linear)
    layer.weight, layer.SCB = parts["weight"], parts["SCB"].float()
    return layer


def four_bit_layer(linear: nn.Linear, parts: dict[str, Tensor]) -> PackedLinear:
    """Its codes in reading order, the first of two in the high half of a byte, and a scale for every 64 of them.

    Its table of values comes along, because it differs from ours in the last bits; it is counted as in its own files.
    """
    count = linear.in_features * linear.out_features
    packed = parts["packed"]
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()[:count].view(linear.weight.shape)
    nested = "nested_absmax" in parts
    # "quantile" is the kind of book that is stored with the weights
    grid = CodebookGrid("quantile", 4, BLOCK, double_quantization=nested)
    stored, scale = {"weight_book": parts["code"].float()}, parts["absmax"]
    if nested:
        stored |= {"scale_codes": parts["absmax"], "scale_scale": parts["nested_absmax"]}
        stored["scale_mean"] = parts["nested_offset"].float()
        scale = torch.ones(1)  # not stored: its codes are
    return pack_linear(linear, codes, Scales(scale.float(), None, stored), grid)
