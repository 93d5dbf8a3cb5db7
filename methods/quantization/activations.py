"""Grids for what a linear reads: its inputs are quantized where it is called, by token or with one scale for all.

Symmetric integers use the restricted range ±(2^(bits-1) - 1) of SmoothQuant, LLM.int8() and Q8BERT, which is also what
integer kernels compute; asymmetric ones use all 2^bits codes from the smallest to the largest value, zero included.
E4M3 is the 8-bit float of current accelerators: scale = absmax / 448.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError

E4M3_LARGEST = 448.0
SMALLEST_SCALE = 1e-12  # an input of zeros decodes to zeros


@dataclass(frozen=True)
class InputGrid:
    """How the inputs of a linear are quantized.

    bits: 2 to 16; 8 for e4m3.
    kind: "int", or "e4m3" (4 exponent and 3 mantissa bits).
    scope: one scale for each "token", or one for the whole "tensor".
    static: the scale is found once, on calibration text; otherwise at every call.
    symmetric: of integers; asymmetric grids are dynamic.
    """

    bits: int = 8
    kind: Literal["int", "e4m3"] = "int"
    scope: Literal["token", "tensor"] = "token"
    static: bool = False
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("kind", ("int", "e4m3")), ("scope", ("token", "tensor"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"inputs.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 2 <= self.bits <= 16:
            raise ConfigError(f"inputs.bits={self.bits}: quantized inputs have 2 to 16 bits; inputs=null for none")
        if self.kind == "e4m3" and (self.bits != 8 or not self.symmetric):
            raise ConfigError(f"inputs.bits={self.bits}, symmetric={self.symmetric}: e4m3 is symmetric and has 8 bits")
        if self.static and (self.scope == "token" or not self.symmetric):
            raise ConfigError(
                "inputs.static=true: static scales are symmetric and for the tensor (inputs.scope=tensor)"
            )

    @property
    def top(self) -> float:
        """The largest magnitude in units of the scale (symmetric), or the largest code (asymmetric)."""
        if self.kind == "e4m3":
            return E4M3_LARGEST
        return float(2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1)

    def scale_of(self, largest: Tensor) -> Tensor:
        """The scale of a symmetric grid that reaches ±largest."""
        return (largest / self.top).clamp(min=SMALLEST_SCALE)

    def dynamic_scale(self, x: Tensor) -> Tensor:
        """The scale for inputs x [..., C] of a symmetric grid: [..., 1] by token, [] for the tensor."""
        absolute = x.detach().abs()
        return self.scale_of(absolute.amax(-1, keepdim=True) if self.scope == "token" else absolute.amax())

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """Codes of x [..., C] on a symmetric grid: int8 (int16 beyond 8 bits), or float8_e4m3fn."""
        scaled = x / scale
        if self.kind == "e4m3":
            return scaled.clamp(-self.top, self.top).to(torch.float8_e4m3fn)
        return scaled.round().clamp(-self.top, self.top).to(torch.int8 if self.bits <= 8 else torch.int16)

    def round(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [..., C] moved to the grid, in its own dtype; computed in float32.

        scale: of a static grid; None finds it from x.
        """
        wide = x.float()
        if not self.symmetric:
            return self._round_asymmetric(wide).to(x.dtype)
        scale = self.dynamic_scale(wide) if scale is None else scale.float()
        return (self.encode(wide, scale).float() * scale).to(x.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this grid again."""
        return asdict(self)

    def compressed_tensors(self) -> dict[str, Any]:
        """The `input_activations` of a compressed-tensors scheme."""
        return {
            "num_bits": self.bits,
            "type": "float" if self.kind == "e4m3" else "int",
            "symmetric": self.symmetric,
            "strategy": self.scope,
            "dynamic": not self.static,
        }

    def _round_asymmetric(self, x: Tensor) -> Tensor:
        dims = (-1,) if self.scope == "token" else tuple(range(x.ndim))
        low = x.detach().amin(dims, keepdim=True).clamp(max=0)
        high = x.detach().amax(dims, keepdim=True).clamp(min=0)
        scale = ((high - low) / self.top).clamp(min=SMALLEST_SCALE)
        zero = (-low / scale).round()
        return ((x / scale).round() + zero).clamp(0, self.top).sub(zero).mul(scale)


def unchanged() -> None:
    """No grid: what `inputs=none` means in a configuration."""


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` on the way forward, the gradient of x on the way back (Bengio et al. 2013)."""
    return x + (rounded - x).detach()
