"""Magnitude pruning: the weights nearest to zero are taken out, no data needed. The baseline of pruning.

Han et al. 2015, https://arxiv.org/abs/1506.02626; the comparison group is the layer, as in the baselines of Wanda and
SparseGPT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from harness.errors import ConfigError
from methods.blocks import plain_linears, replace_module
from methods.pruning.masks import SCOPES, Pattern, Scope, lowest
from methods.pruning.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class Magnitude:
    """Removes the weights of least magnitude from every linear of the decoder blocks.

    sparsity: share that is removed, or N:M.
    scope: weights compete within their "layer" or within their "row" (output channel).
    """

    sparsity: float | str
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        Pattern.parse(self.sparsity)
        if self.scope not in SCOPES:
            raise ConfigError(f"method.scope={self.scope}: choose one of {', '.join(SCOPES)}")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Replace every linear by its pruned form."""
        pattern = Pattern.parse(self.sparsity)
        linears = plain_linears(base.module)
        for name, linear in linears.items():
            pattern.check(name, linear.in_features)
        for name, linear in bench.progress.track(linears.items(), "magnitude", len(linears)):
            weight = linear.weight.float()
            removed = lowest(weight.abs(), pattern, self.scope)
            pruned = SparseLinear.from_mask(linear, weight, removed, str(pattern), base.storage_dtype)
            replace_module(base.module, name, pruned)
        return base
