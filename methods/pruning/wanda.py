"""Wanda: take out the weights whose magnitude times the norm of what they multiply is least (Sun et al. 2023).

https://arxiv.org/abs/2306.11695, Section 3: score |W_ij| · ‖x_j‖₂, compared within each output row; no weight changes.
A block is scored on what the pruned blocks before it hand on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from harness.errors import ConfigError
from methods.blocks import one_at_a_time, plain_linears
from methods.curvature import Moments, blocks_to_calibrate, calibrate_block, require_finite
from methods.pruning.masks import SCOPES, Pattern, Scope, lowest
from methods.pruning.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class Wanda:
    """Pruning by weights and activations.

    sparsity: share that is removed, or N:M.
    scope: weights compete within their "row" (the paper's finding), or within their "layer".
    working_memory_gib: activations alive at once; a larger calibration set goes through in chunks.
    """

    computes_block_by_block: ClassVar[bool] = True
    sparsity: float | str
    scope: Scope = "row"
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        Pattern.parse(self.sparsity)
        if self.scope not in SCOPES:
            raise ConfigError(f"method.scope={self.scope}: choose one of {', '.join(SCOPES)}")
        if self.working_memory_gib <= 0:
            raise ConfigError(f"method.working_memory_gib={self.working_memory_gib}: must be greater than 0")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Score and prune one block after the other."""
        pattern = Pattern.parse(self.sparsity)
        for name, linear in plain_linears(base.module).items():
            pattern.check(name, linear.in_features)
        blocks, hidden = blocks_to_calibrate(base, bench, self.working_memory_gib, "block")
        for index, block in enumerate(bench.progress.track(one_at_a_time(blocks), "Wanda", len(blocks))):
            pruned = {}
            linears = block.linears()

            def change(names: list[str], moments: Moments, linears: dict = linears, pruned: dict = pruned) -> None:
                squares = moments.squares()
                require_finite(squares, "calibration inputs")
                for name in names:
                    linear = linears[name]
                    removed = lowest(scores(linear.weight, squares), pattern, self.scope)
                    linear.weight.masked_fill_(removed, 0)
                    pruned[name] = SparseLinear.from_mask(
                        linear, linear.weight, removed, str(pattern), base.storage_dtype
                    )

            hidden = calibrate_block(block, hidden, change, "block", index == len(blocks) - 1, matrix=False)
            for name, layer in pruned.items():
                block.replace(name, layer)
        return base


def scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W| · ‖x‖ for W [R, C], from the mean of x² per channel [C]; the number of tokens is one factor for all."""
    return weight.float().abs() * squares.sqrt()
