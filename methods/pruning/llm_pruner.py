"""LLM-Pruner: remove heads and channels whose loss would rise least, then recover with adapters (Ma et al. 2023).

https://arxiv.org/abs/2305.11627, Section 3.2, Equations 3 to 6: the importance of a weight is the change of the loss
when it is set to zero, by a Taylor expansion; that of a group is an aggregate over its matrices. Section 3.3: LoRA on
all that is left, merged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.blocks import block_linears
from methods.curvature import require_finite
from methods.low_rank import add_adapters, merge_adapters
from methods.pruning.structured import (
    Extent,
    Kind,
    Layer,
    Units,
    find_layers,
    lowest_units,
    matrix_scores,
    report_removed,
)
from methods.pruning.uneven import rebuilt
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

Importance = Literal["vector", "element_first", "element_second", "element_mixed", "l1", "l2", "random"]
AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {  # [matrices, units] -> [units]
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "product": lambda scores: scores.prod(0),
    "last": lambda scores: scores[-1],
}
NEEDS = {  # of each importance: (gradients, their squares)
    "vector": (True, False),
    "element_first": (True, False),
    "element_second": (False, True),
    "element_mixed": (True, True),
    "l1": (False, False),
    "l2": (False, False),
    "random": (False, False),
}


@dataclass(frozen=True)
class LLMPruner:
    """Structured pruning by Taylor importance, recovery by adapters.

    sparsity, keep_first, keep_last, heads, fill, round_to: how much is removed and where, see `Extent`.
    importance: "vector" |Σ w g| of a row or column (Equation 3, first order); of single weights (Equation 5, summed):
        "element_first" |w g|, "element_second" |w² F|, "element_mixed" |w g - w² F / 2| with F the mean of squared
        gradients; "l1", "l2" of weights, or "random", as baselines.
    aggregate: of the matrices of a group: "sum", "mean", "max", "product", or "last", what reads it alone.
    scope: units compete within their "block", or within the "model", those of one kind with each other.
    rounds: importance is estimated again after each; every round removes an equal part.
    windows, tokens: of the calibration text that importance is estimated on; None: all of it.
    rank, alpha: of the adapters that recover; training.steps=0 leaves recovery out.
    """

    sparsity: float
    training: TrainingSettings
    keep_first: float = 0.125
    keep_last: float = 0.0625
    heads: bool = True
    fill: bool = True
    round_to: int = 1
    importance: Importance = "element_first"
    aggregate: str = "sum"
    scope: Literal["block", "model"] = "block"
    rounds: int = 1
    windows: int | None = None
    tokens: int | None = None
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        self.extent  # noqa: B018 checks what is removed
        for name, choices in (("importance", NEEDS), ("aggregate", AGGREGATES), ("scope", ("block", "model"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"method.{name}={getattr(self, name)}: choose one of {', '.join(choices)}")
        for name in ("rounds", "windows", "rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        if self.tokens is not None and self.tokens < 2:
            raise ConfigError(f"method.tokens={self.tokens}: must be at least 2, or there is nothing to predict")
        if self.alpha <= 0:
            raise ConfigError(f"method.alpha={self.alpha}: must be greater than 0")

    @property
    def extent(self) -> Extent:
        """How much is removed, and where."""
        return Extent(self.sparsity, self.keep_first, self.keep_last, self.heads, self.fill, self.round_to)

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Estimate, remove, rebuild, recover."""
        text = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        layers = find_layers(base.module, text[:1], self.heads)
        chosen = self.extent.chosen(layers)
        wanted = self.extent.counts(layers)
        before = [{kind: units.count for kind, units in layer.units.items()} for layer in chosen]
        estimated_on = text[: self.windows, : self.tokens]
        for done in bench.progress.track(range(1, self.rounds + 1), "LLM-Pruner", self.rounds):
            scores = self.scores(base.module, chosen, estimated_on, bench.generator)
            for kind in wanted[0]:
                gone = [full[kind] - layer.units[kind].count for full, layer in zip(before, chosen, strict=True)]
                goal = [count[kind] * done // self.rounds for count in wanted]
                # below zero where scope=model has taken more of a block than its part: others must lose less
                counts = [target - already for target, already in zip(goal, gone, strict=True)]
                for layer, kept in zip(chosen, self._kept([s[kind] for s in scores], counts), strict=True):
                    layer.remove(kind, kept)
        report_removed(layers, self.sparsity, bench)
        pruned = rebuilt(base, layers)
        recover(pruned, text, self.rank, self.alpha, self.training, bench, "LLM-Pruner recovery")
        return pruned

    def _kept(self, scores: list[Tensor], counts: list[int]) -> list[Tensor]:
        """Which units of one kind stay in each block."""
        if self.scope == "block":
            return [lowest_units(score, count) for score, count in zip(scores, counts, strict=True)]
        protected = [score.clone() for score in scores]
        for score in protected:
            score[score.argmax()] = torch.inf  # no block loses all
        return list(lowest_units(torch.cat(protected), sum(counts)).split([len(score) for score in scores]))

    def scores(
        self, module: nn.Module, layers: Sequence[Layer], tokens: Tensor, generator: torch.Generator
    ) -> list[dict[Kind, Tensor]]:
        """The importance of every unit of every layer [units], estimated on ids [S, T]."""
        if self.importance == "random":
            return [
                {kind: torch.rand(units.count, generator=generator) for kind, units in layer.units.items()}
                for layer in layers
            ]
        wanted = {
            f"{layer.name}.{name}": layer.module.get_submodule(name).weight
            for layer in layers
            for units in layer.units.values()
            for name in (*units.rows, units.reader)
        }
        first, second = NEEDS[self.importance]
        gradients, squares = loss_gradients(module, wanted, tokens, squares=second) if first or second else ({}, {})

        def of_weights(name: str) -> Tensor:
            return element_importance(wanted[name], gradients.get(name), squares.get(name), self.importance)

        return [
            {kind: self._of_units(layer, units, of_weights) for kind, units in layer.units.items()} for layer in layers
        ]

    def _of_units(self, layer: Layer, units: Units, of_weights: Callable[[str], Tensor]) -> Tensor:
        matrices = matrix_scores(units, lambda name: of_weights(f"{layer.name}.{name}"), self.importance == "vector")
        require_finite(matrices, f"{layer.name}: importances")
        return AGGREGATES[self.aggregate](matrices)


def element_importance(
    weight: Tensor, gradient: Tensor | None, squares: Tensor | None, importance: Importance
) -> Tensor:
    """What each weight counts, [out, in] -> [out, in], float32; of "vector" signed, to be summed before |·|.

    gradient: of the mean loss; squares: mean over samples of squared gradients, the diagonal of the Fisher matrix.
    """
    w = weight.float()
    if importance == "vector":
        return w * gradient
    if importance == "element_first":
        return (w * gradient).abs()
    if importance == "element_second":
        return w.square() * squares
    if importance == "element_mixed":
        return (w * gradient - w.square() * squares / 2).abs()
    return w.abs() if importance == "l1" else w.square()


def loss_gradients(
    module: nn.Module, weights: dict[str, nn.Parameter], tokens: Tensor, squares: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients [out, in] of the mean loss over windows of ids [S, T], and, if asked, the mean of their squares."""
    means = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    seconds = {name: torch.zeros_like(mean) for name, mean in means.items()} if squares else {}
    for weight in weights.values():
        weight.requires_grad_(True)
    for window in tokens.to(module.device):
        with torch.enable_grad():
            loss = language_modeling_loss(module, window[None])
            found = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, found, strict=True):
            means[name] += gradient.float() / len(tokens)
            if squares:
                seconds[name] += gradient.float().square() / len(tokens)
    for weight in weights.values():
        weight.requires_grad_(False)
    return means, seconds


def recover(
    lm: LanguageModel,
    windows: Tensor,
    rank: int,
    alpha: float,
    training: TrainingSettings,
    bench: Bench,
    what: str,
) -> None:
    """Train an adapter beside every linear of the blocks on ids [S, T] and merge them, in place."""
    if training.steps == 0:
        return
    seed = bench.generator.initial_seed()
    adapters = add_adapters(lm.module, block_linears(lm.module), rank, alpha, lm.storage_dtype, seed)
    parameters = [factor for adapter in adapters.values() for factor in adapter.train_factors()]
    train(lm.module, parameters, windows, language_modeling_loss, training, bench, what)
    merge_adapters(lm.module, adapters)
