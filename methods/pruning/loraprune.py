"""LoRAPrune: prune heads and channels while adapters train, by what the adapters' gradients say of the weights.

Zhang et al. 2023, https://arxiv.org/abs/2305.18403, Section 3.2: the gradient of a frozen weight is estimated from
those of the two factors beside it (Equation 8), so that nothing of its size is ever differentiated; Section 3.3:
importance is averaged over steps, and units are masked little by little. At the end adapters are merged and what is
masked is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.blocks import block_linears
from methods.low_rank import LowRankLinear, add_adapters, merge_adapters
from methods.pruning.structured import (
    Extent,
    Kind,
    Layer,
    Units,
    find_layers,
    lowest_units,
    masking,
    matrix_scores,
    report_removed,
)
from methods.pruning.uneven import rebuilt
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

Importance = Literal["adapter_gradient", "magnitude", "random"]


@dataclass(frozen=True)
class LoRAPrune:
    """Structured pruning during the training of adapters.

    sparsity, keep_first, keep_last, heads, fill, round_to: how much is removed and where, see `Extent`.
    importance: "adapter_gradient" (|Ĝ W|)^power, "magnitude" |W|, both of the weights with what adapters add, or
        "random".
    power: 2 as in the paper, 1 as in its code.
    smoothing: λ, weight of the past in the moving average of importance; 0 keeps the last step alone.
    prune_every: optimizer steps between two prunings.
    warmup_share, cooldown_share: of the steps, before the first unit goes and after the last.
    rank, alpha: of the adapters.
    """

    sparsity: float
    training: TrainingSettings
    keep_first: float = 0.1
    keep_last: float = 0.03125
    heads: bool = True
    fill: bool = True
    round_to: int = 1
    importance: Importance = "adapter_gradient"
    power: int = 2
    smoothing: float = 0.9
    prune_every: int = 10
    warmup_share: float = 0.1
    cooldown_share: float = 0.1
    rank: int = 8
    alpha: float = 16.0

    def __post_init__(self) -> None:
        self.extent  # noqa: B018 checks what is removed
        if self.importance not in ("adapter_gradient", "magnitude", "random"):
            raise ConfigError(f"method.importance={self.importance}: choose one of adapter_gradient, magnitude, random")
        if self.power not in (1, 2):
            raise ConfigError(f"method.power={self.power}: choose 2 (paper) or 1 (authors' code)")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"method.smoothing={self.smoothing}: must be at least 0 and less than 1")
        for name in ("prune_every", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"method.alpha={self.alpha}: must be greater than 0")
        for name in ("warmup_share", "cooldown_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 0 and less than 1")
        if self.warmup_share + self.cooldown_share >= 1:
            raise ConfigError(
                f"method.warmup_share={self.warmup_share} and cooldown_share={self.cooldown_share}: must leave steps "
                "between them"
            )
        if self.training.steps < 1:
            raise ConfigError(
                f"method.training.steps={self.training.steps}: importance comes from training; for pruning without it "
                "choose method=llm_pruner"
            )

    @property
    def extent(self) -> Extent:
        """How much is removed, and where."""
        return Extent(self.sparsity, self.keep_first, self.keep_last, self.heads, self.fill, self.round_to)

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Train adapters, mask more and more, merge, remove, rebuild."""
        text = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        layers = find_layers(base.module, text[:1], self.heads)
        chosen = self.extent.chosen(layers)
        counts = self.extent.counts(layers)
        seed = bench.generator.initial_seed()
        linears = block_linears(base.module)
        adapters = add_adapters(base.module, linears, self.rank, self.alpha, base.storage_dtype, seed)
        parameters = [factor for adapter in adapters.values() for factor in adapter.train_factors()]
        pruning = GradualPruning(self, chosen, counts, base.module.device, bench.generator)
        with masking([(slot.layer.module, slot.units, slot.mask) for slot in pruning.slots]):
            train(
                base.module,
                parameters,
                text,
                language_modeling_loss,
                self.training,
                bench,
                "LoRAPrune",
                state=pruning.state(),
                before_step=pruning.before_step,
            )
        pruning.prune(1.0)  # the last step of the schedule need not have been one that prunes
        merge_adapters(base.module, adapters)
        for slot in pruning.slots:
            slot.layer.remove(slot.units.kind, slot.mask.bool())
        report_removed(layers, self.sparsity, bench)
        return rebuilt(base, layers)


@dataclass
class Slot:
    """The units of one kind in one block while they are pruned.

    removed: how many go in the end. importance: moving average [units]. mask: 1 where a unit is still there [units].
    """

    layer: Layer
    units: Units
    removed: int
    importance: Tensor
    mask: Tensor


class GradualPruning:
    """Importance and masks of all units, from step to step; all that changes lies in `state`, for checkpoints."""

    def __init__(
        self,
        method: LoRAPrune,
        layers: Sequence[Layer],
        counts: Sequence[dict[Kind, int]],
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.method = method
        self.steps = method.training.steps
        self.step = torch.zeros((), dtype=torch.long, device=device)
        self.slots = []
        for layer, count in zip(layers, counts, strict=True):
            for kind, units in layer.units.items():
                start = torch.zeros(units.count)
                if method.importance == "random":
                    start = torch.rand(units.count, generator=generator)
                self.slots.append(
                    Slot(layer, units, count[kind], start.to(device), torch.ones(units.count, device=device))
                )

    def state(self) -> list[Tensor]:
        """Tensors that change in place."""
        return [self.step, *(tensor for slot in self.slots for tensor in (slot.importance, slot.mask))]

    def before_step(self) -> None:
        """Take the gradients of this step into the average, and prune where the schedule says so."""
        self.observe()
        self.step += 1
        step = int(self.step)
        if step % self.method.prune_every == 0:
            self.prune(self.progress(step))

    def observe(self) -> None:
        """One step of the moving average; a step whose gradients are no numbers is left out."""
        if self.method.importance == "random":
            return
        found = [unit_importance(slot.layer.module, slot.units, self.of_weights) for slot in self.slots]
        if all(bool(scores.isfinite().all()) for scores in found):
            for slot, scores in zip(self.slots, found, strict=True):
                slot.importance.lerp_(scores, 1 - self.method.smoothing)

    def of_weights(self, layer: LowRankLinear) -> Tensor:
        """What each weight beside an adapter counts, [out, in]."""
        weight = layer.inner.weight.float() + layer.correction()
        if self.method.importance == "magnitude":
            return weight.abs()
        return (estimated_gradient(layer) * weight).abs() ** self.method.power

    def progress(self, step: int) -> float:
        """Share of the units to be removed that are gone after `step` steps: cubic, 0 before and 1 after."""
        return cubic_progress(
            step, self.steps, self.method.warmup_share * self.steps, self.method.cooldown_share * self.steps
        )

    def prune(self, share: float) -> None:
        """Mask the least important units, as many as `share` of those that go in the end; what is gone stays."""
        for slot in self.slots:
            standing = slot.importance.masked_fill(slot.mask == 0, -1)  # importance is never negative
            slot.mask.copy_(lowest_units(standing, int(slot.removed * share + 1e-6)))


def cubic_progress(step: int, steps: int, warmup: float, cooldown: float) -> float:
    """1 - (1 - t)³ with t from 0 at the end of the warm-up to 1 at the start of the cool-down (Zhu and Gupta 2017)."""
    t = (step - warmup) / (steps - warmup - cooldown)
    return 1 - (1 - min(max(t, 0.0), 1.0)) ** 3


def estimated_gradient(layer: LowRankLinear) -> Tensor:
    """Ĝ [out, in] ∝ ∂L/∂W from the gradients of both factors (Equation 8).

    ∂L/∂B · A + B · ∂L/∂A - ∂L/∂B · ∂L/∂A, with the paper's B [out, r] our `left` and its A [r, in] our `right`: how a
    step of size one would change B · A, with its sign turned.
    """
    left, right = layer.left.grad, layer.right.grad
    return left @ layer.right + layer.left @ right - left @ right


def unit_importance(block: nn.Module, units: Units, of_weights: Callable[[LowRankLinear], Tensor]) -> Tensor:
    """Sum over the matrices of a group, each matrix's scores divided by their norm (authors' code), [units]."""
    scores = matrix_scores(units, lambda name: of_weights(block.get_submodule(name)), signed=False)
    return (scores / scores.norm(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)).sum(0)
