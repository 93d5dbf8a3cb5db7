"""A gated layer of packed linears, down(silu(gate(x)) up(x)), in two kernels for few rows of input.

A block of the first product holds outputs of gate and of up side by side, and leaves silu(gate) up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from methods.quantization.linear import QuantizedLinear


class GatedLinears(nn.Module):
    """down(silu(gate(x)) up(x)).

    both: gate and up in the order of `fragment_product.paired`; down: what reads them. Both are prepared for decoding.
    """

    def __init__(self, both: QuantizedLinear, down: QuantizedLinear) -> None:
        super().__init__()
        self.both, self.down = both, down

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        from methods.quantization.fragment_product import gated

        rows = x.reshape(-1, self.both.in_features)
        return self.down(gated(rows, self.both.operand, self.both.operand_scale)).view(*x.shape[:-1], -1)


def gated_linears(gate: QuantizedLinear, up: QuantizedLinear, down: QuantizedLinear) -> GatedLinears | None:
    """One layer for three that are prepared for decoding on a GPU; None where it cannot be."""
    from methods.quantization.linear import MATRIX_UNITS

    both = gate.joined([up])
    if both is None or not both.kernel.startswith(MATRIX_UNITS) or both.bias is not None:
        return None
    if type(down) is not type(gate) or down.in_features != gate.out_features or gate.out_features != up.out_features:
        return None
    from methods.quantization.fragment_product import paired

    for name in ("operand", "operand_scale"):
        setattr(both, name, paired(getattr(gate, name), getattr(up, name)))
    return GatedLinears(both, down)
