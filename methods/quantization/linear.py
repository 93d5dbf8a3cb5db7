"""Linear layers whose weights are really packed, and the one for integers.

A packed layer computes in one of three modes: from the packed state, from a dense copy (quality), or through the
platform's kernel where there is one (speed). In memory and on disk the integer layer holds what compressed-tensors'
`pack-quantized` format holds, under the same names, so its state is the checkpoint.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import RunError
from methods.quantization.activations import InputGrid
from methods.quantization.grids import Grid, IntegerGrid, Scales
from methods.quantization.packing import pack, unpack, words

DEQUANTISED = "dequantised"
INT4 = "int4 packed (torch)"
INT8 = "int8 packed (torch)"
INT4_GROUPS = (256, 128, 64, 32)  # group sizes that torch's kernel accepts
INT4_ROWS = 128  # from this many rows of input on, one dense product costs less than the packed kernel
INT4_BLOCK = 64  # output channels that torch's operand interleaves where the CPU has AVX-512
INT8_ROWS = 32
SLOTS = (2, 4, 8)  # bits that a code takes in the operand of our GPU kernels

Mode = Literal["stored", "scoring", "decoding"]


class PackedLinear(nn.Module):
    """y = q(x) Wᵀ + b for a weight [out_features, in_features] that is stored packed; q quantizes the inputs, or not.

    A subclass registers the buffers of its format (they are the checkpoint), says in `dequantise` what they mean and
    in `spec` how to rebuild it, and may bring a kernel. `bias` and a static grid's `input_scale` are kept here.

    stored_names: the weight's buffers, dropped from memory when decoding is prepared.
    inputs: arguments of the InputGrid, None for inputs that stay as they are.
    """

    stored_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scale_dtype: str, inputs: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scale_dtype = getattr(torch, scale_dtype)
        self.inputs = None if inputs is None else InputGrid(**inputs)
        self.mode: Mode = "stored"
        self.kernel = self.plain_kernel
        self.register_buffer("bias", torch.empty(out_features, dtype=self.scale_dtype) if bias else None)
        static = self.inputs is not None and self.inputs.static
        self.register_buffer("input_scale", torch.empty(1, dtype=self.scale_dtype) if static else None)
        self.register_buffer("dense", None, persistent=False)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        raise NotImplementedError

    def compressed_tensors_scheme(self) -> dict[str, Any] | None:
        """This layer as a compressed-tensors scheme with its `format`; None where no format of it can say it."""
        raise NotImplementedError

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """Build what a real kernel reads and name it in `self.kernel`; False where this platform has none."""
        return False

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias, through the operand of `decode_operand`; it quantizes inputs itself."""
        raise NotImplementedError

    def drop_operand(self) -> None:
        """Forget what `decode_operand` built."""

    @property
    def plain_kernel(self) -> str:
        """Name of the arithmetic without a kernel: a dense product, of inputs that were rounded if they have a grid."""
        return DEQUANTISED if self.inputs is None else f"{DEQUANTISED}, inputs rounded"

    @property
    def weight_count(self) -> int:
        """Weights that this layer stands for, the bias not among them."""
        return self.in_features * self.out_features

    def common_spec(self) -> dict[str, Any]:
        """The part of `spec` that every packed layer shares."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            "inputs": None if self.inputs is None else self.inputs.as_dict(),
        }

    def take_over(self, linear: nn.Linear, input_scale: Tensor | None = None) -> None:
        """The bias and mode of the linear this layer stands for, and the scale of its inputs where that is static."""
        if linear.bias is not None:
            self.bias = linear.bias.detach().to(self.scale_dtype)
        if self.input_scale is not None:
            if input_scale is None:
                raise RunError("static input scales come from calibration and were not given")
            self.input_scale = input_scale.detach().reshape(1).to(self.scale_dtype)
        self.train(linear.training)

    @torch.no_grad()
    def prepare(self, mode: Mode, dtype: torch.dtype) -> None:
        """Get ready to compute in `dtype`.

        stored: only the packed state in memory, weights are decoded at every call.
        scoring: a dense copy beside it. decoding: the packed kernel's operand, or a dense copy where there is no
        kernel, *instead* of the packed state; loading the artifact again is the way back.
        """
        if mode == "decoding" and self.mode == "decoding":
            raise RunError("this layer is already prepared for decoding; load the artifact again to change its dtype")
        self.require_packed()
        self.dense = None
        self.drop_operand()
        self.kernel, self.mode = self.plain_kernel, mode
        if mode == "stored":
            return
        if mode == "scoring" or not self.decode_operand(dtype):
            self.dense = self.dequantise(dtype)
        if mode == "decoding":
            for name in self.stored_names:
                setattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.mode == "decoding" and self.dense is None:
            y = self.multiply(x.reshape(-1, self.in_features))
            y = y if bias is None else y + bias
            return y.view(*x.shape[:-1], self.out_features)
        if self.inputs is not None:
            x = self.inputs.round(x, self.input_scale)
        return functional.linear(x, self.dequantise(x.dtype) if self.dense is None else self.dense, bias)

    def require_packed(self) -> None:
        """Raise RunError when the packed weights are no longer in memory."""
        if any(getattr(self, name) is None for name in self.stored_names):
            raise RunError("the packed weights were dropped when decoding was prepared; load the artifact again")

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Moves with the model, but keeps its types: scales are data of the format, not arithmetic."""
        dtypes = {name: buffer.dtype for name, buffer in self.named_buffers(recurse=False)}
        originals = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, originals[name].to(moved.device))
        return self


def pack_linear(
    linear: nn.Linear,
    codes: Tensor,
    scales: Scales,
    grid: Grid,
    inputs: InputGrid | None = None,
    input_scale: Tensor | None = None,
) -> PackedLinear:
    """The layer that stands for `linear` with codes [out, in] on `grid`, and inputs on theirs.

    input_scale: of a static input grid, [1].
    """
    return grid.layer().from_codes(linear, codes, scales, grid, inputs, input_scale)


class QuantizedLinear(PackedLinear):
    """A PackedLinear whose weights lie on an integer grid.

    Buffers: `weight_packed` int32 [out, words]; `weight_scale` [out, G] (or [1]); `weight_zero_point` int32
    [words(out), G], only for asymmetric grids; `weight_shape` int64 [2]; `bias`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        symmetric: bool,
        group_size: int | Literal["tensor"] | None,
        short_group: bool = False,
        bias: bool = False,
        scale_dtype: str = "float16",
        inputs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.grid = IntegerGrid(bits, symmetric, group_size, short_group)
        self.operand_is_readable = False  # whether many rows of input may take the dense product
        per_tensor = group_size == "tensor"
        shape = (1,) if per_tensor else (out_features, self.grid.groups(in_features))
        zeros = shape if per_tensor else (words(out_features, bits), shape[1])
        empty = torch.empty
        self.register_buffer("weight_packed", empty(out_features, words(in_features, bits), dtype=torch.int32))
        self.register_buffer("weight_scale", empty(shape, dtype=self.scale_dtype))
        if not symmetric:
            self.register_buffer("weight_zero_point", empty(zeros, dtype=torch.int32))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        self.register_buffer("operand", None, persistent=False)
        self.register_buffer("operand_scale", None, persistent=False)
        self.register_buffer("operand_zero", None, persistent=False)  # this and the next: of our GPU kernels
        self.register_buffer("operand_lift", None, persistent=False)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The weight's buffers."""
        return ("weight_packed", "weight_scale", *(() if self.grid.symmetric else ("weight_zero_point",)))

    @classmethod
    def from_codes(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scales: Scales,
        grid: IntegerGrid,
        inputs: InputGrid | None = None,
        input_scale: Tensor | None = None,
    ) -> QuantizedLinear:
        """See `pack_linear`."""
        rows, columns = codes.shape
        made = cls(
            columns,
            rows,
            grid.bits,
            grid.symmetric,
            grid.group_size,
            grid.short_group,
            bias=linear.bias is not None,
            scale_dtype=str(scales.scale.dtype).removeprefix("torch."),
            inputs=None if inputs is None else inputs.as_dict(),
        )
        made.weight_packed = pack(codes, grid.bits)
        made.weight_scale = scales.scale.reshape(made.weight_scale.shape).clone()
        if not grid.symmetric:
            zero = scales.zero.to(torch.uint8)
            per_tensor = grid.group_size == "tensor"
            made.weight_zero_point = (
                zero.view(1).to(torch.int32) if per_tensor else pack(zero.t().contiguous(), grid.bits).t().contiguous()
            )
        made.weight_shape = made.weight_shape.to(codes.device)
        made.take_over(linear, input_scale)
        return made

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        return {
            **self.common_spec(),
            "bits": self.grid.bits,
            "symmetric": self.grid.symmetric,
            "group_size": self.grid.group_size,
            "short_group": self.grid.short_group,
        }

    def compressed_tensors_scheme(self) -> dict[str, Any] | None:
        """A pack-quantized scheme; None for what that format cannot say."""
        size = self.grid.group_size
        if size == "tensor" or self.in_features % self.grid.width(self.in_features):
            return None
        if self.inputs is not None and (self.inputs.kind != "int" or self.inputs.bits not in (4, 8)):
            return None
        return {
            "format": "pack-quantized",
            "weights": {
                "num_bits": self.grid.bits,
                "type": "int",
                "symmetric": self.grid.symmetric,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
            },
            "input_activations": None if self.inputs is None else self.inputs.compressed_tensors(),
        }

    def codes(self) -> Tensor:
        """The integer codes, uint8 [out, in]."""
        self.require_packed()
        return unpack(self.weight_packed, self.grid.bits, self.in_features)

    def scales(self) -> Scales:
        """Scale and zero point of every group."""
        self.require_packed()
        scale = self.weight_scale.view(1, 1) if self.grid.group_size == "tensor" else self.weight_scale
        if self.grid.symmetric:
            return Scales(scale, torch.full_like(scale, 2 ** (self.grid.bits - 1), dtype=torch.int32))
        if self.grid.group_size == "tensor":
            return Scales(scale, self.weight_zero_point.view(1, 1))
        zero = unpack(self.weight_zero_point.t().contiguous(), self.grid.bits, self.out_features)
        return Scales(scale, zero.t().to(torch.int32))

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        return self.grid.decode(self.codes(), self.scales()).to(dtype)

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """The packed operand of torch's kernels on a CPU, or of ours on a GPU, where one multiplies it."""
        kernel = decoding_kernel(self.grid, self.in_features, self.out_features, self.weight_packed.device, dtype)
        if kernel == DEQUANTISED or self.inputs is not None:
            return False
        self.kernel = kernel
        if self.weight_packed.device.type == "cuda":
            self._triton_operand()
        elif kernel == INT8:
            self.operand = (self.codes().to(torch.int16) - 128).to(torch.int8)
            self.operand_scale = self.weight_scale.flatten().to(dtype)
        else:
            self.operand, self.operand_scale = self._int4_operand(dtype)
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias, through the packed kernel."""
        if self.operand_zero is not None:
            from methods.quantization.packed_product import packed_product

            bits = 32 * self.operand.shape[1] // self.in_features
            return packed_product(x, self.operand, self.operand_scale, self.operand_zero, self.operand_lift, bits)
        return self._int8(x) if self.kernel == INT8 else self._int4(x)

    def joined(self, others: list[nn.Module]) -> QuantizedLinear | None:
        """One layer with the outputs of this one and the others, made of their GPU operands; None where they differ.

        For layers that are prepared for decoding, and stay as they are.
        """
        layers = [self, *others]
        if any(type(layer) is not QuantizedLinear or layer.operand_zero is None for layer in layers):
            return None
        alike = {
            (layer.in_features, layer.operand.shape[1], layer.operand_scale.shape[1], layer.operand_scale.dtype)
            for layer in layers
        }
        if len(alike) > 1 or len({layer.bias is None for layer in layers}) > 1:
            return None
        with torch.device("meta"):
            made = QuantizedLinear(**self.spec() | {"out_features": sum(layer.out_features for layer in layers)})
        for name in made.stored_names:
            setattr(made, name, None)
        made.weight_shape = torch.tensor([made.out_features, made.in_features], device=self.operand.device)
        for name in ("operand", "operand_scale", "operand_zero", *(() if self.bias is None else ("bias",))):
            setattr(made, name, torch.cat([getattr(layer, name) for layer in layers]))
        made.operand_lift, made.kernel, made.mode = self.operand_lift, self.kernel, self.mode
        return made.train(self.training)

    def drop_operand(self) -> None:
        """Forget the packed operand."""
        self.operand = self.operand_scale = self.operand_zero = self.operand_lift = None

    def extra_repr(self) -> str:
        """Shape, grid and kernel."""
        return f"{self.in_features}, {self.out_features}, {self.grid}, kernel={self.kernel}"

    def _triton_operand(self) -> None:
        from methods.quantization.packed_product import interleave, lifts, run_columns

        run, bits = run_columns(self.grid.width(self.in_features)), slot_bits(self.grid.bits)
        self.operand = interleave(self.codes(), bits, run)
        self.operand_lift = lifts(bits, run, self.operand.device)
        scales, shape = self.scales(), (self.out_features, self.grid.groups(self.in_features))
        self.operand_scale = scales.scale.expand(shape).contiguous()
        self.operand_zero = scales.zero.expand(shape).to(torch.uint8).contiguous()

    def _int4_operand(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """torch's operand, and scale and offset [K / g, N, 2] with w = (slot - 8) * scale + offset."""
        group = _int4_group(self.grid.width(self.in_features))
        middle = 2 ** (self.grid.bits - 1)
        codes = self.codes() + (8 - middle)  # in the middle of the 4-bit slot offsets are small, bfloat16 keeps them
        operand = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        self.operand_is_readable = self.out_features % INT4_BLOCK == 0 and torch.equal(int4_codes(operand), codes.t())
        scales = self.scales()
        scale = scales.scale.float()
        pairs = torch.stack([scale, scale * (middle - scales.zero)], -1)  # [N, G, 2]
        pairs = pairs.expand(self.out_features, -1, -1).repeat_interleave(self.grid.width(self.in_features) // group, 1)
        return operand, pairs.transpose(0, 1).to(dtype).contiguous()

    def _int4(self, x: Tensor) -> Tensor:
        group = self.in_features // self.operand_scale.shape[0]
        if len(x) <= INT4_ROWS or not self.operand_is_readable:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.operand, group, self.operand_scale)
        return x @ int4_dense(self.operand, self.operand_scale)

    def _int8(self, x: Tensor) -> Tensor:
        if len(x) <= INT8_ROWS:
            return torch.ops.aten._weight_int8pack_mm(x, self.operand, self.operand_scale)
        return functional.linear(x, self.operand.to(x.dtype)) * self.operand_scale


def decoding_kernel(grid: IntegerGrid, columns: int, rows: int, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the kernel that decodes with W [rows, columns] on this platform; "dequantised" where there is none.

    torch's CPU kernels are fast in bfloat16 only: in float32 they fall back to a loop that is slower than dense.
    """
    if device.type == "cuda":
        return _triton_kernel(grid, columns, dtype)
    if device.type != "cpu" or dtype != torch.bfloat16:
        return DEQUANTISED
    if grid.bits == 8 and grid.symmetric and grid.group_size is None:
        return INT8
    divides = columns % grid.width(columns) == 0
    if grid.bits <= 4 and divides and rows % 16 == 0 and _int4_group(grid.width(columns)):
        return INT4 if grid.bits == 4 else f"{INT4}, {grid.bits}-bit codes in 4-bit slots"
    return DEQUANTISED


def slot_bits(bits: int) -> int:
    """Bits that a code takes in the operand of the GPU kernels."""
    return next(slot for slot in SLOTS if bits <= slot)


def _triton_kernel(grid: IntegerGrid, columns: int, dtype: torch.dtype) -> str:
    width = grid.width(columns)
    if dtype not in (torch.bfloat16, torch.float16) or columns % width or find_spec("triton") is None:
        return DEQUANTISED
    from methods.quantization.packed_product import run_columns

    if run_columns(width) is None:
        return DEQUANTISED
    slot = slot_bits(grid.bits)
    name = f"int{slot} packed (Triton)"
    return name if slot == grid.bits else f"{name}, {grid.bits}-bit codes in {slot}-bit slots"


def int4_codes(operand: Tensor) -> Tensor:
    """Codes [K, N] out of torch's operand [N, K / 2]: in blocks of 64 channels, byte [k, i] holds i and i + 32.

    That is the layout with AVX-512; elsewhere the answer is another permutation, so compare before relying on it.
    """
    rows = operand.shape[0]
    nibbles = operand.view(rows // INT4_BLOCK, -1, INT4_BLOCK // 2)
    return torch.cat([nibbles & 15, nibbles >> 4], -1).transpose(0, 1).reshape(-1, rows)


def int4_dense(operand: Tensor, pairs: Tensor) -> Tensor:
    """Wᵀ [K, N] out of torch's operand and its scales and offsets [K / g, N, 2]."""
    codes = int4_codes(operand).view(pairs.shape[0], -1, pairs.shape[1]).to(pairs.dtype)
    return ((codes - 8) * pairs[:, None, :, 0] + pairs[:, None, :, 1]).flatten(0, 1)


def _int4_group(width: int) -> int | None:
    """The largest group size of the kernel that divides `width`; scales are repeated to it."""
    return next((size for size in INT4_GROUPS if width % size == 0), None)
