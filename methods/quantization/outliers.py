"""Packed linears that keep some of their weights in 16 bits: whole columns (OWQ), or single entries (SpQR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.quantization.linear import Mode, PackedLinear
from methods.quantization.packing import pack, unpack, words

WIDEST = 2**16  # columns that a 16-bit index reaches


class ColumnOutlierLinear(PackedLinear):
    """A packed matrix and a few columns [out, n] in 16 bits that take the place of its own.

    The packed matrix keeps its full width and holds zeros in those columns, so that its kernel stays as it is and the
    columns are a thin product beside it. `outlier_columns` int32 [n] says where they belong.

    packed: the matrix, a PackedLinear without bias.
    """

    def __init__(
        self,
        packed: PackedLinear,
        count: int,
        in_features: int,
        out_features: int,
        bias: bool,
        scale_dtype: str,
        inputs: None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.packed = packed
        self.register_buffer("outlier_columns", torch.empty(count, dtype=torch.int32))
        self.register_buffer("outlier_weight", torch.empty(out_features, count, dtype=self.scale_dtype))
        self.register_buffer("operand", None, persistent=False)

    @classmethod
    def from_columns(
        cls, linear: nn.Linear, packed: PackedLinear, columns: Tensor, weight: Tensor
    ) -> ColumnOutlierLinear:
        """The layer that stands for `linear`: `packed` everywhere but in `columns` [n], where it is `weight` [out, n].

        packed: made of `linear` without its bias, zero in those columns.
        """
        dtype = str(packed.scale_dtype).removeprefix("torch.")
        made = cls(packed, len(columns), linear.in_features, linear.out_features, linear.bias is not None, dtype)
        made.outlier_columns = columns.to(torch.int32)
        made.outlier_weight = weight.to(made.scale_dtype).contiguous()
        made.take_over(linear)
        return made

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        kind = type(self.packed)
        return {
            **self.common_spec(),
            "packed": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **self.packed.spec()},
            "count": len(self.outlier_columns),
        }

    def compressed_tensors_scheme(self) -> None:
        """No compressed-tensors format keeps columns apart."""

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        weight = self.packed.dequantise()
        weight[:, self.outlier_columns.long()] = self.outlier_weight.float()
        return weight.to(dtype)

    def prepare(self, mode: Mode, dtype: torch.dtype) -> None:
        """See PackedLinear; the packed matrix never multiplies on its own, so it only gives up its memory."""
        super().prepare(mode, dtype)
        if mode == "decoding":
            for name in self.packed.stored_names:
                setattr(self.packed, name, None)

    def require_packed(self) -> None:
        """Raise RunError when the packed weights are no longer in memory."""
        self.packed.require_packed()

    def decode_operand(self, dtype: torch.dtype) -> bool:
        """The packed matrix's operand, and the columns in `dtype`."""
        if not self.packed.decode_operand(dtype):
            return False
        self.operand = self.outlier_weight.to(dtype)
        self.kernel = self.packed.kernel = f"{self.packed.kernel} + 16-bit columns"
        return True

    def multiply(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] without bias."""
        return self.packed.multiply(x) + x[:, self.outlier_columns.long()] @ self.operand.T

    def drop_operand(self) -> None:
        """Forget the operands of both parts."""
        self.operand = None
        self.packed.drop_operand()


@dataclass(frozen=True)
class Statistics:
    """Scales or zero points of G groups and R rows, quantized themselves: low + step · code.

    Rows in blocks of a fixed number share `step` and `low`; the last block may be shorter.
    """

    codes: Tensor  # [G, R], uint8
    step: Tensor  # [G, B], storage dtype
    low: Tensor  # [G, B], storage dtype

    def decode(self, rows: int) -> Tensor:
        """What the codes mean [G, R], float32; `rows` is the height of a block."""
        count = self.codes.shape[1]
        low, step = (part.float().repeat_interleave(rows, 1)[:, :count] for part in (self.low, self.step))
        return self.codes.float().mul_(step).add_(low)


def quantise_statistics(values: Tensor, bits: int, rows: int, dtype: torch.dtype) -> Statistics:
    """`values` [G, R] on one min-max grid of 2^bits points for every block of `rows` of them."""
    count = values.shape[1]
    blocks = -(-count // rows)
    filled = torch.arange(blocks * rows, device=values.device).clamp(max=count - 1)  # repeats add nothing to a range
    blocked = values[:, filled].view(len(values), blocks, rows)
    top, kind = 2**bits - 1, torch.finfo(dtype)
    low = blocked.amin(-1).to(dtype)
    reach = blocked.amax(-1) - low.to(values.dtype)
    step = (reach / top).to(dtype).clamp(min=kind.smallest_normal * kind.eps)
    wide_low, wide_step = low.to(values.dtype)[..., None], step.to(values.dtype)[..., None]
    codes = ((blocked - wide_low) / wide_step).round().clamp(0, top).to(torch.uint8)
    return Statistics(codes.flatten(1)[:, :count].contiguous(), step, low)


@dataclass(frozen=True)
class SparseSolution:
    """A matrix [R, C] in the format of SparseOutlierLinear, not packed yet; columns in the order they are stored in."""

    codes: Tensor  # [R, C], uint8
    scale: Statistics
    zero: Statistics
    outliers: Tensor  # [R, C], bool
    values: Tensor  # [R, C], what outliers are, in any float type
    order: Tensor | None  # [C], original index of each stored column; None where that is the same


class SparseOutlierLinear(PackedLinear):
    """Codes in small groups whose scales and zero points are quantized too, and single entries in 16 bits (SpQR).

    A weight is scale · (code - zero), zero not an integer, unless it is an outlier. Buffers: `weight_packed` int32
    [out, words]; of scale and zero each `_codes` int32 [G, words(out)], `_step` and `_low` [G, blocks of rows];
    outliers by rows as `outlier_pointers` int32 [out + 1], `outlier_columns` 16 bits [n], `outlier_values` [n];
    `column_order` int32 [in] where columns are stored in another order than they are read.

    bits: of a code; group_size: columns, in stored order, that share scale and zero; statistics_bits: of a scale's
    and a zero's code; statistics_rows: rows whose scales share a grid; outliers: n; reordered: whether columns are.
    """

    stored_names = (
        *("weight_packed", "outlier_pointers", "outlier_columns", "outlier_values"),
        *(f"{which}_{part}" for which in ("scale", "zero") for part in ("codes", "step", "low")),
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        statistics_bits: int,
        statistics_rows: int,
        outliers: int,
        reordered: bool,
        bias: bool = False,
        scale_dtype: str = "float16",
        inputs: None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_dtype, inputs)
        self.bits, self.group_size = bits, group_size
        self.statistics_bits, self.statistics_rows = statistics_bits, statistics_rows
        groups, blocks = in_features // group_size, -(-out_features // statistics_rows)
        shapes = {
            "weight_packed": ((out_features, words(in_features, bits)), torch.int32),
            "outlier_pointers": ((out_features + 1,), torch.int32),
            "outlier_columns": ((outliers,), torch.int16),
            "outlier_values": ((outliers,), self.scale_dtype),
        }
        for which in ("scale", "zero"):
            shapes[f"{which}_codes"] = (groups, words(out_features, statistics_bits)), torch.int32
            shapes[f"{which}_step"] = shapes[f"{which}_low"] = (groups, blocks), self.scale_dtype
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.register_buffer("column_order", torch.empty(in_features, dtype=torch.int32) if reordered else None)

    @classmethod
    def from_solution(
        cls, linear: nn.Linear, solution: SparseSolution, bits: int, statistics_bits: int, statistics_rows: int
    ) -> SparseOutlierLinear:
        """The layer that stands for `linear` with the weights of `solution`."""
        rows, columns = solution.codes.shape
        dtype = solution.scale.low.dtype
        order = solution.order
        made = cls(
            columns,
            rows,
            bits,
            columns // len(solution.scale.codes),
            statistics_bits,
            statistics_rows,
            int(solution.outliers.sum()),
            order is not None,
            linear.bias is not None,
            str(dtype).removeprefix("torch."),
        )
        made.weight_packed = pack(solution.codes, bits)
        for which, statistics in (("scale", solution.scale), ("zero", solution.zero)):
            setattr(made, f"{which}_codes", pack(statistics.codes, statistics_bits))
            setattr(made, f"{which}_step", statistics.step)
            setattr(made, f"{which}_low", statistics.low)
        in_place, values = solution.outliers, solution.values
        if order is not None:
            made.column_order = order.to(torch.int32)
            back = order.argsort()
            in_place, values = in_place[:, back], values[:, back]
        made.outlier_pointers = torch.cat([in_place.new_zeros(1, dtype=torch.int32), in_place.sum(1).cumsum(0).int()])
        made.outlier_columns = in_place.nonzero()[:, 1].to(torch.int16)  # the upper half of 16 bits counts as negative
        made.outlier_values = values[in_place].to(dtype)
        made.take_over(linear)
        return made

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        return {
            **self.common_spec(),
            "bits": self.bits,
            "group_size": self.group_size,
            "statistics_bits": self.statistics_bits,
            "statistics_rows": self.statistics_rows,
            "outliers": len(self.outlier_values),
            "reordered": self.column_order is not None,
        }

    def compressed_tensors_scheme(self) -> None:
        """No compressed-tensors format holds quantized scales or sparse entries."""

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in] as numbers: computed in float32, rounded once to `dtype`."""
        codes = unpack(self.weight_packed, self.bits, self.in_features).float()
        scale, zero = (
            self._statistics(which).decode(self.statistics_rows).T.repeat_interleave(self.group_size, 1)
            for which in ("scale", "zero")
        )
        weight = codes.sub_(zero).mul_(scale)
        if self.column_order is not None:
            weight = weight[:, self.column_order.long().argsort()]
        counts = self.outlier_pointers.diff().long()
        rows = torch.arange(self.out_features, device=weight.device).repeat_interleave(counts)
        weight[rows, self.outlier_columns.long() & (WIDEST - 1)] = self.outlier_values.float()
        return weight.to(dtype)

    def extra_repr(self) -> str:
        """Shape, bits and outliers."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, outliers={self.outlier_columns.numel()}"

    def _statistics(self, which: str) -> Statistics:
        packed, step, low = (getattr(self, f"{which}_{part}") for part in ("codes", "step", "low"))
        return Statistics(unpack(packed, self.statistics_bits, self.out_features), step, low)
