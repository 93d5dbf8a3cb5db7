"""A low-rank correction beside a linear: y = inner(x) + scaling · (x Bᵀ) Aᵀ, with A [out, r] and B [r, in].

It serves two families: adapters that are trained (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685; QLoRA) and
compensation of a quantization error by its largest singular vectors (ZeroQuant-V2). The inner linear may be packed.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError, RunError
from methods.blocks import replace_module

FACTOR_TOP = 127  # of 8-bit factors: symmetric, restricted range


class LowRankLinear(nn.Module):
    """A linear with a low-rank path beside it.

    inner: the linear that is corrected, packed or plain.
    rank: r, at least 1.
    factors: "16bit" keeps A and B in the storage type; "int8" keeps 8-bit codes and one scale for each of the r
        components of either factor.
    scaling: α / r of LoRA; 1 for a correction.
    """

    def __init__(
        self,
        inner: nn.Module,
        rank: int,
        factors: Literal["16bit", "int8"] = "16bit",
        scaling: float = 1.0,
        factor_dtype: str = "float16",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        largest = min(self.in_features, self.out_features)
        if not 1 <= rank <= largest:
            raise ConfigError(f"rank={rank}: must be between 1 and {largest}, the smaller side of the matrix")
        self.inner, self.rank, self.factors, self.scaling = inner, rank, factors, scaling
        self.factor_dtype = getattr(torch, factor_dtype)
        kind = self.factor_dtype if factors == "16bit" else torch.int8
        for name, shape in (("left", (self.out_features, rank)), ("right", (rank, self.in_features))):
            if factors == "16bit":
                setattr(self, name, nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False))
            else:
                self.register_buffer(name, torch.empty(shape, dtype=kind))
                self.register_buffer(f"{name}_scale", torch.empty(rank, dtype=self.factor_dtype))
        self._ready: tuple[Tensor, Tensor] | None = None  # the factors in the dtype that was prepared

    @classmethod
    def from_factors(
        cls,
        inner: nn.Module,
        left: Tensor,
        right: Tensor,
        factors: Literal["16bit", "int8"] = "16bit",
        scaling: float = 1.0,
        dtype: torch.dtype = torch.float16,
    ) -> LowRankLinear:
        """The layer with A = `left` [out, r] and B = `right` [r, in], stored in `dtype` or in 8 bits."""
        made = cls(inner, left.shape[1], factors, scaling, str(dtype).removeprefix("torch."))
        if factors == "16bit":
            made.left.data, made.right.data = left.to(dtype), right.to(dtype)
        else:
            made.left, made.left_scale = _eight_bits(left, 0, dtype)
            made.right, made.right_scale = _eight_bits(right, 1, dtype)
        return made.train(inner.training)

    @property
    def kernel(self) -> str:
        """What multiplies: the inner kernel and the two thin products."""
        return f"{getattr(self.inner, 'kernel', 'dense matmul')} + rank {self.rank}"

    @property
    def weight_count(self) -> int:
        """Weights that this layer stands for: those of the linear it corrects."""
        return self.in_features * self.out_features

    @property
    def bias(self) -> Tensor | None:
        """The inner linear's."""
        return self.inner.bias

    def dense_factors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """A [out, r] and B [r, in] as numbers."""
        if self.factors == "16bit":
            return self.left.to(dtype), self.right.to(dtype)
        return (
            (self.left.float() * self.left_scale.float()).to(dtype),
            (self.right.float() * self.right_scale.float()[:, None]).to(dtype),
        )

    def correction(self) -> Tensor:
        """What is added to the inner weight [out, in], float32."""
        left, right = self.dense_factors()
        return self.scaling * (left @ right)

    def train_factors(self) -> list[nn.Parameter]:
        """Make A and B trainable float32 parameters and return them; `settle` ends that."""
        if self.factors != "16bit":
            raise RunError("8-bit factors are not trained; build the layer with factors=16bit")
        for parameter in (self.left, self.right):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return [self.left, self.right]

    @torch.no_grad()
    def settle(self) -> None:
        """Round trained factors to the type that they are stored in."""
        for parameter in (self.left, self.right):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self.factor_dtype)

    def spec(self) -> dict[str, Any]:
        """Arguments that rebuild this layer with empty buffers."""
        if not hasattr(self.inner, "spec"):
            raise RunError(
                "adapters around a plain linear have no stored form; merge them before the model is saved (merge)"
            )
        kind = type(self.inner)
        return {
            "inner": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **self.inner.spec()},
            "rank": self.rank,
            "factors": self.factors,
            "scaling": self.scaling,
            "factor_dtype": str(self.factor_dtype).removeprefix("torch."),
        }

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The inner plain linear with the correction added to its weight."""
        if not isinstance(self.inner, nn.Linear):
            raise RunError("a correction cannot be merged into packed weights without rounding them again")
        self.inner.weight += self.correction().to(self.inner.weight.dtype)
        return self.inner

    def compressed_tensors_scheme(self) -> None:
        """No compressed-tensors format holds the factors."""

    @torch.no_grad()
    def prepare(self, mode: str, dtype: torch.dtype) -> None:
        """Get the inner linear and the factors ready; see PackedLinear.prepare."""
        self.inner.prepare(mode, dtype)
        self._ready = None if mode == "stored" else self.dense_factors(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        left, right = self._ready or self.dense_factors(x.dtype)
        beside = functional.linear(functional.linear(x, right), left)
        return self.inner(x) + self.scaling * beside

    def _apply(self, fn: Any, recurse: bool = True) -> LowRankLinear:
        """Moves with the model, but keeps the types of its factors: they are data of the format."""
        kept = {name: tensor for name, tensor in self._own().items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            moved = getattr(self, name)
            if moved.dtype != original.dtype:
                moved.data = original.data.to(moved.device)
        return self

    def _own(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}


def add_adapters(
    root: nn.Module, linears: dict[str, nn.Module], rank: int, alpha: float, dtype: torch.dtype, seed: int
) -> dict[str, LowRankLinear]:
    """Put an adapter beside each of the `linears` (dotted name below `root` -> linear), and return them by name.

    The path starts at zero: A = 0, and B uniform as PEFT draws it. α / rank scales it. A matrix whose smaller side is
    less than `rank` gets that as its rank; one without rows or columns gets none.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, linear in linears.items():
        width = min(rank, linear.in_features, linear.out_features)
        if width == 0:
            continue
        device = next(itertools.chain(linear.parameters(), linear.buffers())).device
        left = torch.zeros(linear.out_features, width, device=device)
        bound = 1 / math.sqrt(linear.in_features)
        right = torch.empty(width, linear.in_features).uniform_(-bound, bound, generator=generator).to(device)
        adapters[name] = LowRankLinear.from_factors(linear, left, right, scaling=alpha / rank, dtype=dtype)
        replace_module(root, name, adapters[name])
    return adapters


def merge_adapters(root: nn.Module, adapters: dict[str, LowRankLinear]) -> None:
    """Put the plain linears back, each with what its adapter adds."""
    for name, adapter in adapters.items():
        replace_module(root, name, adapter.merge())


def _eight_bits(factor: Tensor, long: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 codes of a factor and one scale for each component; `long` is the side that is not the rank."""
    kind = torch.finfo(dtype)
    scale = (factor.abs().amax(long) / FACTOR_TOP).to(dtype).clamp(min=kind.smallest_normal * kind.eps)
    wide = scale.to(factor.dtype)
    codes = (factor / (wide if long == 0 else wide[:, None])).round().clamp(-FACTOR_TOP, FACTOR_TOP)
    return codes.to(torch.int8), scale
