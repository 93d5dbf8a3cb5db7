"""Eight-bit weights that meet eight-bit inputs: int8 × int8 and FP8 × FP8, by real products where there are any.

Integers use the restricted range ±127 (SmoothQuant, LLM.int8()); floats are E4M3 (Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433), scaled so that the largest magnitude is 448. A layer holds what compressed-tensors'
`int-quantized` and `float-quantized` formats hold, so vLLM and transformers read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError
from methods.quantization.activations import E4M3_LARGEST
from methods.quantization.grids import Grid, IntegerGrid, Scales
from methods.quantization.linear import PackedLinear

if TYPE_CHECKING:
    from methods.quantization.activations import InputGrid

Kind = Literal["int", "e4m3"]
Scope = Literal["channel", "tensor"]
INT8_PRODUCT = "int8 × int8 (torch)"
FP8_PRODUCT = "FP8 × FP8 (torch)"
CUDA_INT8_ROWS = 32  # CUDA's integer product takes more than 16 rows
INT8_SIDES, FP8_SIDES = 8, 16  # matrix sides must be multiples of these on CUDA


@dataclass(frozen=True)
class EightBitGrid:
    """Symmetric 8-bit values, ±127 integers or E4M3 floats, with one scale a row or one for the matrix.

    kind: "int" or "e4m3".
    scope: what shares a scale: the "channel" (a row) or the "tensor".
    bits: 8.
    """

    kind: Kind = "int"
    scope: Scope = "channel"
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ConfigError(f"bits={self.bits}: this grid has 8 bits; grid=int_channel_symmetric has 2 to 8")
        for name, allowed in (("kind", ("int", "e4m3")), ("scope", ("channel", "tensor"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"grid.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")

    @property
    def top(self) -> float:
        """The largest magnitude in units of the scale."""
        return 127.0 if self.kind == "int" else E4M3_LARGEST

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn

    @property
    def group_size(self) -> Literal["tensor"] | None:
        """None: a row is one group."""
        return "tensor" if self.scope == "tensor" else None

    def width(self, columns: int) -> int:
        """Input channels per group."""
        return columns

    def groups(self, columns: int) -> int:
        """Groups per row."""
        return 1

    def check(self, name: str, columns: int) -> None:
        """Any matrix will do."""

    def group_maximum(self, weight: Tensor) -> Tensor:
        """Largest |w| of every row of `weight` [R, C], [R, 1], or of the matrix, [1, 1]."""
        absolute = weight.abs()
        return absolute.amax().view(1, 1) if self.scope == "tensor" else absolute.amax(1, keepdim=True)

    def fit(self, weight: Tensor, dtype: torch.dtype, limit: Tensor | None = None) -> Scales:
        """The scales of `weight` [R, C], always in float32: there are few, and kernels take them so."""
        largest = self.group_maximum(weight).float()
        if limit is not None:
            largest = torch.minimum(largest, limit)
        return Scales((largest / self.top).clamp(min=torch.finfo(torch.float32).tiny), None)

    def encode(self, weight: Tensor, scales: Scales) -> Tensor:
        """Nearest codes of `weight` [R, C], int8 or float8_e4m3fn."""
        scaled = (weight / scales.scale.to(weight.dtype)).clamp(-self.top, self.top)
        return (scaled.round() if self.kind == "int" else scaled).to(self.dtype)

    def decode(self, codes: Tensor, scales: Scales, dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes [R, C] mean, in `dtype`."""
        return codes.to(dtype) * scales.scale.to(dtype)

    def round(self, weight: Tensor, scales: Scales) -> Tensor:
        """`weight` [R, C] moved to the nearest values."""
        return self.decode(self.encode(weight, scales), scales, weight.dtype)

    def round_scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """Values of any shape moved to the nearest, times `scale`, which broadcasts."""
        return self.round(values, Scales(scale, None))

    def layer(self) -> type[EightBitLinear]:
        """The class of layers that store weights on this grid."""
        return EightBitLinear


def symmetric_channel_grid(bits: int) -> Grid:
    """Symmetric integers with one scale a row: ±127 at 8 bits, where kernels multiply them; full range below."""
    return EightBitGrid("int", "channel") if bits == 8 else IntegerGrid(bits, symmetric=True, group_size=None)


class EightBitLinear(PackedLinear):
    """A PackedLinear with 8-bit codes and, where inputs have 8 bits of the same kind, a matrix product of codes.

    Buffers: `weight` int8 or float8_e4m3fn [out, in]; `weight_scale` float32 [out, 1] or [1]; `input_scale` float32 [1]
    of static inputs; `bias`.
    """

    stored_names = ("weight", "weight_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: Kind = "int",
        scope: Scope = "channel",
        bias: bool = False,
        scale_dtype: str = "float32",
        inputs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.grid = EightBitGrid(kind, scope)
        shape = (1,) if scope == "tensor" else (out_features, 1)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=self.grid.dtype))
        self.register_buffer("weight_scale", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("operand", None, persistent=False)
        self.register_buffer("operand_scale", None, persistent=False)
        self.product_dtype = torch.float32

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Scales,
        grid: EightBitGrid,
        inputs: InputGrid | None = None,
        input_scale: Tensor | None = None,
    ) -> EightBitLinear:
        """See `pack_linear`."""
        rows, columns = codes.shape
        arguments = None if inputs is None else inputs.as_dict()
        made = cls(columns, rows, grid.kind, grid.scope, linear.bias is not None, inputs=arguments)
        made.weight = codes.clone()
        made.weight_scale = scales.scale.float().reshape(made.weight_scale.shape).clone()
        made.take_over(linear, input_scale)
        return made

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        return {**self.common_spec(), "kind": self.grid.kind, "scope": self.grid.scope}

    def compressed_tensors_scheme(self) -> dict[str, Any]:
        """An int-quantized or float-quantized scheme."""
        word = "int" if self.grid.kind == "int" else "float"
        weights = {"num_bits": 8, "type": word, "symmetric": True, "strategy": self.grid.scope, "dynamic": False}
        inputs = None if self.inputs is None else self.inputs.compressed_tensors()
        return {"format": f"{word}-quantized", "weights": weights, "input_activations": inputs}

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        self.require_packed()
        return (self.weight.float() * self.weight_scale).to(dtype)

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """The codes themselves, where this platform multiplies them."""
        if self.inputs is None or self.inputs.kind != self.grid.kind or not self.inputs.symmetric:
            return False
        if self.inputs.bits != 8 or not _multiplies(self.grid.kind, self.weight.device, *self.weight.shape):
            return False
        self.kernel = INT8_PRODUCT if self.grid.kind == "int" else FP8_PRODUCT
        self.operand = self.weight.t()
        self.operand_scale = self.weight_scale.reshape(1, -1)
        self.product_dtype = dtype
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias: inputs are encoded, codes multiplied exactly, scales applied in float32."""
        wide = x.float()
        scale = self.inputs.dynamic_scale(wide) if self.input_scale is None else self.input_scale.float()
        codes = self.inputs.encode(wide, scale)
        if self.kernel == FP8_PRODUCT:
            rows = scale.expand(len(x), 1).contiguous()
            columns = self.operand_scale.expand(1, self.out_features).contiguous()
            product = torch._scaled_mm(codes, self.operand, rows, columns, out_dtype=torch.bfloat16)
            return product.to(x.dtype)
        product = integer_product(codes, self.operand)
        return (product.float() * scale * self.operand_scale).to(x.dtype)

    def drop_operand(self) -> None:
        """Forget the operand."""
        self.operand = self.operand_scale = None


def integer_product(codes: Tensor, operand: Tensor) -> Tensor:
    """int8 [N, K] × int8 [K, M] -> int32 [N, M], exact."""
    rows = len(codes)
    if codes.device.type == "cuda" and rows < CUDA_INT8_ROWS:
        return torch._int_mm(functional.pad(codes, (0, 0, 0, CUDA_INT8_ROWS - rows)), operand)[:rows]
    return torch._int_mm(codes, operand)


@cache
def _multiplies(kind: Kind, device: torch.device, rows: int, columns: int) -> bool:
    """Whether codes of this kind are multiplied by the platform, faster than numbers, for W [rows, columns].

    torch emulates FP8 products on CPUs, an order of magnitude slower than bfloat16 (measured: 14 ms against 0.6 ms), so
    only GPUs with FP8 units (compute capability 8.9 and up) count.
    """
    if kind == "int":
        sides = INT8_SIDES if device.type == "cuda" else 1
        return device.type in ("cpu", "cuda") and rows % sides == 0 and columns % sides == 0
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
        and rows % FP8_SIDES == 0
        and columns % FP8_SIDES == 0
    )
