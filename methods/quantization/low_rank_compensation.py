"""Low-rank compensation: the largest part of a quantization error is added back by two thin matrices (Yao et al. 2023).

ZeroQuant-V2, https://arxiv.org/abs/2303.08302, Section 5: E = W - Ŵ = U Σ Vᵀ, of which rank r is kept as A = U √Σ and
B = √Σ Vᵀ, each in 8 bits. It goes around any method that rounds the weights of a linear and leaves the rest alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError, RunError
from methods.blocks import block_linears, plain_linears, replace_module
from methods.low_rank import LowRankLinear

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel, Method


@dataclass(frozen=True)
class LowRankCompensation:
    """Another method's result with a low-rank correction of every linear.

    inner: the method that rounds.
    rank: r; 0 leaves the inner method's result as it is.
    factors: "int8" (the paper) or "16bit".
    """

    inner: Method
    rank: int = 8
    factors: Literal["int8", "16bit"] = "int8"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ConfigError(f"method.rank={self.rank}: must be 0 (no compensation) or greater")
        if self.factors not in ("int8", "16bit"):
            raise ConfigError(f"method.factors={self.factors}: choose one of int8, 16bit")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Let the inner method round, then factor what it changed."""
        linears = plain_linears(base.module)
        for name, linear in linears.items():
            if self.rank > min(linear.in_features, linear.out_features):
                raise ConfigError(f"method.rank={self.rank}: {name} has {min(linear.weight.shape)} at its smaller side")
        original = {name: linear.weight.clone() for name, linear in linears.items()}
        norms = {name: p.clone() for name, p in base.module.named_parameters() if p.ndim == 1}
        rounded = self.inner.compress(base, bench)
        if self.rank == 0:
            return rounded
        for name, before in norms.items():
            if name in dict(rounded.module.named_parameters()) and not torch.equal(
                rounded.module.get_parameter(name), before
            ):
                raise RunError(
                    f"{name} was changed by {type(self.inner).__name__}, so its weights no longer stand for the "
                    "original ones; compensate a method that moves no scales (rtn, gptq)"
                )
        layers = block_linears(rounded.module)
        for name, layer in bench.progress.track(layers.items(), "low-rank compensation", len(layers)):
            error = original.pop(name).float() - layer.dequantise()
            left, right = factors_of(error, self.rank)
            corrected = LowRankLinear.from_factors(layer, left, right, self.factors, dtype=base.storage_dtype)
            replace_module(rounded.module, name, corrected)
        return rounded


def factors_of(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R, r] and B [r, C] with A B the best approximation of `error` [R, C] of that rank; √Σ goes to either side.

    Singular vectors come from the Gram matrix of the smaller side in float64: exact enough for the largest ones, and
    several times faster than a full decomposition.
    """
    wide = error.double()
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    vectors = vectors[:, -rank:].flip(1)  # the largest first
    kind = torch.finfo(torch.float64)
    least = (squares[-1] * kind.eps).clamp(min=kind.tiny)  # below is noise, that of an error of lower rank
    root = squares[-rank:].flip(0).clamp(min=least).pow(0.25)  # √σ
    long, short = tall @ vectors / root, (vectors * root).T
    left, right = (long, short) if tall is wide else (short.T, long.T)
    return left.to(error.dtype), right.to(error.dtype)
