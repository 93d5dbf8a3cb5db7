"""A linear whose removed weights are not stored: one bit per weight says which are kept, and the kept ones follow.

At density d that takes 16 d + 1 bits a weight (with a grid: bits · d + 1 and the scales). No platform multiplies
unstructured sparsity faster than a dense matrix; for 2:4, accelerators do, and torch's kernel is used where it works.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.records import WITH_ZEROS
from methods.quantization.grids import IntegerGrid, Scales
from methods.quantization.linear import PackedLinear
from methods.quantization.packing import pack, unpack, words

TWO_OF_FOUR = "2:4 sparse (torch)"


class SparseLinear(PackedLinear):
    """y = x Wᵀ + b, with W [out_features, in_features] zero where its mask says so.

    Buffers: `weight_kept` uint8 [⌈out·in / 8⌉], one bit per weight in reading order, 1 for kept; `weight` [kept], the
    kept weights in reading order, or with a grid `weight_packed` int32 [words], their codes, `weight_scale` [out, G]
    and `weight_zero_point` [out, G]; `bias`.

    kept: how many weights are.
    pattern: as asked for, "0.5" or "2:4".
    bits, symmetric, group_size: of the integer grid of the kept weights; bits=None keeps them in 16 bits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        pattern: str,
        bits: int | None = None,
        symmetric: bool = False,
        group_size: int | str | None = None,
        short_group: bool = False,
        bias: bool = False,
        scale_dtype: str = "float16",
        inputs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.kept, self.pattern = kept, pattern
        self.grid = None if bits is None else IntegerGrid(bits, symmetric, group_size, short_group)
        self.register_buffer("weight_kept", torch.empty(-(-in_features * out_features // 8), dtype=torch.uint8))
        if self.grid is None:
            self.register_buffer("weight", torch.empty(kept, dtype=self.scale_dtype))
        else:
            shape = (1, 1) if group_size == "tensor" else (out_features, self.grid.groups(in_features))
            self.register_buffer("weight_packed", torch.empty(words(kept, bits), dtype=torch.int32))
            self.register_buffer("weight_scale", torch.empty(shape, dtype=self.scale_dtype))
            self.register_buffer("weight_zero_point", torch.empty(shape, dtype=torch.uint8))
        self.operand: Tensor | None = None
        self.register_buffer("operand_packed", None, persistent=False)  # what the operand holds: values and places
        self.register_buffer("operand_places", None, persistent=False)

    @classmethod
    def from_mask(
        cls,
        linear: nn.Linear,
        weight: Tensor,
        removed: Tensor,
        pattern: str,
        dtype: torch.dtype,
        grid: IntegerGrid | None = None,
        scales: Scales | None = None,
    ) -> SparseLinear:
        """The layer that stands for `linear` with `weight` [out, in] where it is not `removed` (bool [out, in]).

        dtype: what is kept in 16 bits, is kept in. grid, scales: of kept weights that lie on a grid.
        """
        rows, columns = weight.shape
        kept = ~removed
        made = cls(
            columns,
            rows,
            int(kept.sum()),
            pattern,
            **({} if grid is None else _grid_spec(grid)),
            bias=linear.bias is not None,
            scale_dtype=str(dtype).removeprefix("torch."),
        )
        made.weight_kept = _to_bits(kept)
        if grid is None:
            made.weight = weight[kept].to(dtype)
        else:
            codes = grid.encode(weight, scales)[kept]
            made.weight_packed = pack(codes[None], grid.bits)[0]
            made.weight_scale = scales.scale.to(dtype).reshape(made.weight_scale.shape).clone()
            made.weight_zero_point = scales.zero.to(torch.uint8).reshape(made.weight_zero_point.shape).clone()
        made.take_over(linear)
        return made

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The weight's buffers."""
        values = ("weight",) if self.grid is None else ("weight_packed", "weight_scale", "weight_zero_point")
        return ("weight_kept", *values)

    @property
    def plain_kernel(self) -> str:
        """Zeros are multiplied like any other number."""
        return WITH_ZEROS

    def removed(self) -> Tensor:
        """The mask, bool [out, in]: True where there is no weight."""
        self.require_packed()
        return ~_from_bits(self.weight_kept, self.weight_count).view(self.out_features, self.in_features)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in], zeros where there are none."""
        kept = ~self.removed()
        if self.grid is None:
            dense = torch.zeros(kept.shape, dtype=dtype, device=kept.device)
            dense[kept] = self.weight.to(dtype)
            return dense
        codes = torch.zeros(kept.shape, dtype=torch.uint8, device=kept.device)
        codes[kept] = unpack(self.weight_packed[None], self.grid.bits, self.kept)[0]
        return self.grid.decode(codes, self.scales()).masked_fill_(~kept, 0).to(dtype)

    def scales(self) -> Scales:
        """Scale and zero point of every group, of a layer with a grid."""
        self.require_packed()
        return Scales(self.weight_scale, self.weight_zero_point.to(torch.int32))

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        grid = {} if self.grid is None else _grid_spec(self.grid)
        return {**self.common_spec(), "kept": self.kept, "pattern": self.pattern, **grid}

    def compressed_tensors_scheme(self) -> None:
        """Its sparse formats were removed from the programs that read it."""

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """torch's semi-structured operand, for 2:4 on CUDA in 16 bits."""
        device = self.weight_kept.device
        narrow = dtype in (torch.float16, torch.bfloat16)
        divides = self.out_features % 32 == 0 and self.in_features % 64 == 0
        if self.pattern != "2:4" or device.type != "cuda" or not narrow or not divides or self.inputs is not None:
            return False
        from torch.sparse import to_sparse_semi_structured

        self.operand = to_sparse_semi_structured(self.dequantise(dtype))
        self.operand_packed, self.operand_places = self.operand.packed, self.operand.meta
        self.kernel = TWO_OF_FOUR
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias, through the 2:4 kernel."""
        return functional.linear(x, self.operand)

    def drop_operand(self) -> None:
        """Forget the 2:4 operand."""
        self.operand = self.operand_packed = self.operand_places = None


def _grid_spec(grid: IntegerGrid) -> dict[str, Any]:
    return {
        "bits": grid.bits,
        "symmetric": grid.symmetric,
        "group_size": grid.group_size,
        "short_group": grid.short_group,
    }


def _to_bits(flags: Tensor) -> Tensor:
    """bool [...] -> uint8 [⌈n / 8⌉], the first flag in the lowest bit."""
    padded = functional.pad(flags.flatten().to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1).to(torch.uint8)


def _from_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `_to_bits`: uint8 -> bool [count]."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().flatten()[:count]
