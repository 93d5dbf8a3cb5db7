"""Prune and Tune: a ladder of SparseGPT and short fine-tuning, rung by rung (Syed et al. 2023).

https://openreview.net/forum?id=cKlgcx7nSZ. Each rung prunes the present weights, with what is gone already counted in,
and then tunes the whole model on text. A removed weight stays zero: its gradient is masked, and it is set back after
every optimizer step, because momentum and weight decay know nothing of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from harness.errors import ConfigError
from methods.pruning.masks import MaskedLinear, Pattern
from methods.pruning.sparsegpt import SparseGPT
from methods.stack import close_layers, open_layers
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class PruneAndTune:
    """SparseGPT at every rung of a ladder, each followed by training of all parameters.

    pruner: its sparsity is that of the last rung.
    ladder: shares removed on the way; those not below the last are left out. On the way to N:M the rungs are
        (M-1):M, (M-2):M, …, each of which holds the one before.
    training: of one rung.
    """

    pruner: SparseGPT
    training: TrainingSettings
    ladder: Sequence[float] = (0.1, 0.3, 0.5, 0.7)

    def __post_init__(self) -> None:
        for share in self.ladder:
            if not 0 < share < 1:
                raise ConfigError(f"method.ladder={list(self.ladder)}: every rung must lie between 0 and 1")
        if list(self.ladder) != sorted(set(self.ladder)):
            raise ConfigError(f"method.ladder={list(self.ladder)}: rungs must rise")
        if self.pruner.grid is not None:
            raise ConfigError("method.pruner.grid: tuning moves weights off a grid; use method=[prune_and_tune,gptq]")

    @property
    def rungs(self) -> list[float | str]:
        """Sparsity of every rung, the wanted one last."""
        last = Pattern.parse(self.pruner.sparsity)
        if last.of is not None:
            return [f"{keep}:{last.of}" for keep in range(last.of - 1, last.keep - 1, -1)]
        return [*(share for share in self.ladder if share < last.share), self.pruner.sparsity]

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Prune, tune, and again."""
        known = {}
        for index, sparsity in enumerate(self.rungs):
            base = replace(self.pruner, sparsity=sparsity).compress(base, bench)
            known = open_layers(base.module)
            self._tune(base, bench, index, f"tuning at {sparsity}")
        close_layers(base, known, "prune_and_tune")
        return base

    def _tune(self, base: LanguageModel, bench: Bench, index: int, what: str) -> None:
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        masked = [child for child in base.module.modules() if isinstance(child, MaskedLinear)]
        parameters = list(base.module.parameters())  # tied ones once
        for parameter in parameters:
            parameter.requires_grad_(True)  # hooks need it
        hooks = [
            layer.weight.register_hook(lambda gradient, gone=layer.removed: gradient.masked_fill(gone, 0))
            for layer in masked
        ]

        def keep_removed() -> None:
            for layer in masked:
                layer.weight.masked_fill_(layer.removed, 0)

        rung = replace(bench, scratch=bench.scratch / f"rung-{index}")
        train(
            base.module,
            parameters,
            windows,
            language_modeling_loss,
            self.training,
            rung,
            what,
            keep_removed,
            first_step=index * self.training.steps,
        )
        for hook in hooks:
            hook.remove()
        base.module.requires_grad_(False)
