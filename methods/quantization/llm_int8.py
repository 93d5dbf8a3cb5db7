"""LLM.int8(): 8-bit products of weights and inputs, input channels with outliers apart in 16 bits (Dettmers 2022).

https://arxiv.org/abs/2208.07339, Section 3; which numbers make a scale, and the stored tensors, are bitsandbytes'.
Outliers are looked for at run time, over all tokens of a call: what a token gets depends on its companions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError
from methods.blocks import plain_linears, replace_module
from methods.quantization.eight_bit import INT8_PRODUCT, integer_product
from methods.quantization.linear import DEQUANTISED, Mode, PackedLinear

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

TOP = 127
UNIT = 2.0**-7  # codes are multiplied as floats in this unit: float16 ends at 65,504, where sums of codes go far beyond
SMALLEST = 1e-12  # a row without anything but outliers, or of zeros, decodes to zeros


@dataclass(frozen=True)
class LLMInt8:
    """Vector-wise 8 bits with a mixed-precision decomposition.

    threshold: an input channel where any |x| of the call reaches it stays in 16 bits; null for no decomposition.
    outlier_weights: what such a channel is multiplied by: "int8", the stored 8-bit weights (bitsandbytes), or
        "float16", the original ones (paper). As any channel may turn out to be one, all weights are then kept in 16
        bits besides.
    """

    threshold: float | None = 6.0
    outlier_weights: Literal["int8", "float16"] = "int8"

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold <= 0:
            raise ConfigError(f"method.threshold={self.threshold}: must be greater than 0; null for no decomposition")
        if self.outlier_weights not in ("int8", "float16"):
            raise ConfigError(f"method.outlier_weights={self.outlier_weights}: choose one of int8, float16")
        if self.threshold is None and self.outlier_weights == "float16":
            raise ConfigError("method.outlier_weights=float16 with method.threshold=null: nothing would read them")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Replace every linear; no data is needed."""
        linears = plain_linears(base.module)
        for name, linear in bench.progress.track(linears.items(), "LLM.int8()", len(linears)):
            made = VectorwiseInt8Linear.from_linear(
                linear, self.threshold, self.outlier_weights == "float16", base.storage_dtype
            )
            replace_module(base.module, name, made)
        return base


class VectorwiseInt8Linear(PackedLinear):
    """y = (X8 W8ᵀ) · s_x s_wᵀ / 127² + X_O W_Oᵀ + b; O are the input channels with an outlier in this call.

    Buffers, named as in bitsandbytes: `weight` int8 [out, in], `SCB` float32 [out], the rows' largest |w|, and
    `weight_format` (0, row by row); `outlier_weight` [out, in] in 16 bits if the original weights are kept.

    threshold: |x| from which a number is an outlier; None: there are none. keeps_weights: see outlier_weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        threshold: float | None,
        keeps_weights: bool = False,
        bias: bool = False,
        scale_dtype: str = "float16",
        inputs: None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.threshold, self.keeps_weights = threshold, keeps_weights
        shape = (out_features, in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.int8))
        self.register_buffer("SCB", torch.empty(out_features, dtype=torch.float32))
        self.register_buffer("weight_format", torch.zeros((), dtype=torch.uint8))
        self.register_buffer("outlier_weight", torch.empty(shape, dtype=self.scale_dtype) if keeps_weights else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, threshold: float | None, keeps_weights: bool, dtype: torch.dtype
    ) -> VectorwiseInt8Linear:
        """The layer that stands for `linear`; whatever stays in 16 bits is in `dtype`."""
        weight = linear.weight.detach().float()
        made = cls(
            linear.in_features,
            linear.out_features,
            threshold,
            keeps_weights,
            linear.bias is not None,
            str(dtype).removeprefix("torch."),
        )
        made.SCB = weight.abs().amax(1)
        made.weight = (weight * TOP / made.SCB.clamp(min=SMALLEST)[:, None]).round().to(torch.int8)
        made.weight_format = made.weight_format.to(weight.device)
        if keeps_weights:
            made.outlier_weight = weight.to(dtype)
        made.take_over(linear)
        return made

    @property
    def plain_kernel(self) -> str:
        """The simulation; inputs are rounded here, not by an InputGrid."""
        return f"{DEQUANTISED}, inputs rounded"

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        return {**self.common_spec(), "threshold": self.threshold, "keeps_weights": self.keeps_weights}

    def compressed_tensors_scheme(self) -> None:
        """compressed-tensors has 8-bit products, but no decomposition."""

    def bitsandbytes(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Its configuration and tensors of the same weights in bitsandbytes; None for kept 16-bit weights."""
        if self.keeps_weights:
            return None
        tensors = {"weight": self.weight, "SCB": self.SCB, "weight_format": self.weight_format}
        if self.bias is not None:
            tensors["bias"] = self.bias
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold or 0.0}, tensors

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The 8-bit weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        return self.weight.float().mul_(self.SCB[:, None] / TOP).to(dtype)

    def encode_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int8 [..., in], scales [..., 1], and the outlier channels [in] (bool), whose codes are 0.

        A row's scale is its largest number below the threshold, wherever that is: only outliers are left out.
        """
        wide = x.float()
        outlier = torch.zeros_like(wide, dtype=torch.bool) if self.threshold is None else wide.abs() >= self.threshold
        channels = outlier.flatten(0, -2).any(0)
        scale = wide.masked_fill(outlier, 0).abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / TOP
        codes = (wide.masked_fill(channels, 0) / scale).round_().to(torch.int8)
        return codes, scale, channels

    @torch.no_grad()
    def prepare(self, mode: Mode, dtype: torch.dtype) -> None:
        """See PackedLinear; the dense copy holds codes, which every 16-bit float can say, and not what they mean."""
        super().prepare(mode, dtype)
        if self.dense is not None:
            self.dense = self.weight.to(dtype) * UNIT

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; codes are multiplied as floats unless the layer is prepared for decoding."""
        if self.mode == "decoding" and self.dense is None:
            return super().forward(x)
        codes, scale, channels = self.encode_inputs(x)
        weight = self.weight.to(x.dtype) * UNIT if self.dense is None else self.dense
        sums = functional.linear(codes.to(x.dtype) * UNIT, weight).float() / UNIT**2
        y = self._scaled(sums, scale, channels, x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """The stored weights are the operand; CUDA multiplies matrices whose sides are multiples of 8."""
        on_cuda = self.weight.is_cuda and self.in_features % 8 == self.out_features % 8 == 0
        if not on_cuda and self.weight.device.type != "cpu":
            return False
        kept = "16-bit weights" if self.keeps_weights else "8-bit weights"
        self.kernel = INT8_PRODUCT if self.threshold is None else f"{INT8_PRODUCT}, outlier inputs × {kept}"
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias: exact integer sums, and the outlier channels beside them."""
        codes, scale, channels = self.encode_inputs(x)
        return self._scaled(integer_product(codes, self.weight.T), scale, channels, x)

    def _scaled(self, sums: Tensor, scale: Tensor, channels: Tensor, x: Tensor) -> Tensor:
        """Sums of codes [..., out] in their units, plus X_O W_Oᵀ."""
        y = (sums.float() * scale).mul_(self.SCB / TOP).to(x.dtype)
        index = channels.nonzero()[:, 0]
        if not len(index):
            return y
        if self.keeps_weights:
            weight = self.outlier_weight[:, index].to(x.dtype)
        else:
            weight = (self.weight[:, index].float() * (self.SCB[:, None] / TOP)).to(x.dtype)
        return y + functional.linear(x[..., index], weight)
