"""GUM: global unique movement, pruning of feed-forward neurons while the model trains (Santacroce et al. 2023).

https://arxiv.org/abs/2302.03773, "What Matters in the Structured Pruning of Generative Language Models?": every neuron
has one score, trained through its mask; the highest scores of all layers together stay (Section 4, movement pruning
with global Top-v); a neuron that does what others do is pushed down harder (Section 5, uniqueness). Sensitivity and
uniqueness, the paper's two measures of what a pruned layer still can do, are in the run's curves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.examples import Batch
from methods.pruning.loraprune import cubic_progress
from methods.pruning.structured import Layer, Units, find_layers, lowest_units, report_removed, share_of
from methods.pruning.uneven import rebuilt
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

ALIKE = 0.8  # cosine similarity at which two neurons are no longer unique; paper, Section 3
SMALL = 1e-6  # beside norms; authors' code


@dataclass(frozen=True)
class GUM:
    """Pruning of feed-forward neurons, all layers competing, during full fine-tuning on the calibration text.

    sparsity: share of the weights of all blocks that goes; neurons alone go, so their own share is larger.
    importance: "movement", scores that are trained, or "random" scores that stay ("Gradual Random" in the paper).
    movement: λ_mvp, weight of the pull on all scores. uniqueness: λ_gum, how much more similar neurons are pulled; 0 is
        movement pruning.
    forgetting: ρ, weight of a batch in the running statistics of outputs.
    score_rate: learning rate of the scores, in those of the weights (training.learning_rate).
    warmup_share: of the steps, before the first neuron goes; none goes in the last three times as many.
    watched_windows: of the calibration text, that sensitivity and uniqueness are measured on before and after; 0: none.
    """

    sparsity: float
    training: TrainingSettings
    importance: Literal["movement", "random"] = "movement"
    movement: float = 2.0
    uniqueness: float = 1.0
    forgetting: float = 0.999
    score_rate: float = 20.0
    warmup_share: float = 0.1
    watched_windows: int = 4

    def __post_init__(self) -> None:
        share_of(self.sparsity)
        if self.importance not in ("movement", "random"):
            raise ConfigError(f"method.importance={self.importance}: choose movement or random")
        for name in ("movement", "uniqueness", "watched_windows"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must not be negative")
        if not 0 < self.forgetting <= 1:
            raise ConfigError(f"method.forgetting={self.forgetting}: must be greater than 0 and at most 1")
        if self.score_rate <= 0:
            raise ConfigError(f"method.score_rate={self.score_rate}: must be greater than 0")
        if not 0 <= self.warmup_share < 0.25:
            raise ConfigError(f"method.warmup_share={self.warmup_share}: must be at least 0 and less than a quarter")
        if self.training.steps < 1 and self.importance == "movement":
            raise ConfigError(
                f"method.training.steps={self.training.steps}: scores come from training; to prune without it choose "
                "method=llm_pruner, or method.importance=random"
            )

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Train weights and scores with fewer and fewer neurons, then remove those that are masked."""
        text = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        base.module.float()  # all of it is trained, and stored from there: through bfloat16 digits would be lost
        layers = find_layers(base.module, text[:1], heads=False)
        units = [layer.units["channels"] for layer in layers]
        gone = removed_neurons(layers, self.sparsity)
        watched = text[: self.watched_windows]
        everything = [torch.ones(unit.count) for unit in units]
        self._watch(base.module, layers, everything, watched, bench, 0)
        pruning = GlobalPruning(self, layers, gone, base.module.device, bench.generator)
        trained = [parameter for parameter in base.module.parameters() if parameter.is_floating_point()]
        scores = [pruning.scores] if self.importance == "movement" else []
        train(
            base.module,
            [*trained, *scores],
            text,
            pruning.loss,
            self.training,
            bench,
            "GUM",
            after_step=pruning.after_step,
            state=pruning.state(),
        )
        masks = pruning.masks(1.0)
        self._watch(base.module, layers, masks, watched, bench, self.training.steps)
        for layer, mask in zip(layers, masks, strict=True):
            layer.remove("channels", mask.bool())
        report_removed(layers, self.sparsity, bench)
        return rebuilt(base, layers)

    def _watch(
        self, module: nn.Module, layers: Sequence[Layer], masks: list[Tensor], windows: Tensor, bench: Bench, step: int
    ) -> None:
        """Write the paper's two measures, of the neurons that are there, into the run's curves."""
        if not len(windows):
            return
        sensitive = sensitivity(module, layers, masks, windows)
        kept = sum(float(mask.sum()) for mask in masks)
        bench.log.point("mean sensitivity of kept neurons", step, sum(float(s.sum()) for s in sensitive) / kept)
        unique = uniqueness(module, layers, masks, windows)
        bench.log.point("share of kept neurons that are unique", step, sum(float(u.sum()) for u in unique) / kept)


def removed_neurons(layers: Sequence[Layer], sparsity: float | str) -> int:
    """How many neurons hold `sparsity` of the weights of all blocks. Raises ConfigError when all would go, or none."""
    share = share_of(sparsity)
    total = sum(layer.weights for layer in layers)
    each = layers[0].units["channels"].weights_each(layers[0].module)
    neurons = sum(layer.units["channels"].count for layer in layers)
    gone = round(share * total / each)
    if not 0 < gone < neurons:
        raise ConfigError(
            f"sparsity={sparsity}: {gone} of {neurons} neurons would go; all hold {neurons * each / total:.3f} of the "
            "blocks' weights; choose a sparsity between, or method=llm_pruner, which removes heads too"
        )
    return gone


class GlobalPruning:
    """Scores, masks and statistics of the neurons of all layers; all that changes is a parameter or in `state`.

    scores: of all neurons, one layer after the other [N], in units of `score_rate`: Adam moves each entry of a
        parameter by about the learning rate, so scores move faster by that factor.
    removed: how many neurons go in the end.
    """

    def __init__(
        self, method: GUM, layers: Sequence[Layer], removed: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self.method, self.layers, self.removed = method, layers, removed
        self.units = [layer.units["channels"] for layer in layers]
        self.sizes = [units.count for units in self.units]
        start = torch.zeros(sum(self.sizes))
        if method.importance == "random":
            start = torch.rand(sum(self.sizes), generator=generator)
        self.scores = nn.Parameter(start.to(device), requires_grad=False)
        self.step = torch.zeros((), dtype=torch.long, device=device)
        wanted = method.importance == "movement" and method.uniqueness > 0
        self.products = [torch.zeros(size, size, device=device) for size in self.sizes] if wanted else []

    def state(self) -> list[Tensor]:
        """Tensors that change in place and are not trained."""
        return [self.step, *self.products]

    def after_step(self) -> None:
        """Count the step."""
        self.step += 1

    def progress(self) -> float:
        """Share of the neurons to be removed that are gone now: cubic between warm-up and the last 3 × warm-up."""
        steps, warmup = self.method.training.steps, self.method.warmup_share * self.method.training.steps
        return cubic_progress(int(self.step), steps, warmup, 3 * warmup)

    def masks(self, share: float) -> list[Tensor]:
        """1 for the neurons that stay when `share` of those to be removed are gone, of each layer [units]."""
        gone = int(self.removed * share + 1e-6)
        return list(lowest_units(self.scores.detach(), gone).float().split(self.sizes))

    def loss(self, module: nn.Module, batch: Batch | Tensor) -> Tensor:
        """Language-modelling loss through the present masks, plus the pull on scores, in nats."""
        share = self.progress()
        hard = self.masks(share)
        scores = (self.scores * self.method.score_rate).split(self.sizes)
        # straight through: the value is the mask's, the gradient goes to the score
        masks = [mask + (score - score.detach()) for mask, score in zip(hard, scores, strict=True)]
        outputs: list[Tensor] = []
        with multiplying(self.layers, masks, outputs if self.products else None):
            loss = language_modeling_loss(module, batch)
        if self.method.importance == "random" or self.method.movement == 0:
            return loss
        kept = 1 - share * self.removed / sum(self.sizes)  # v_t
        left = 1 - self.removed / sum(self.sizes)  # v_f
        pulls = []
        for index, score in enumerate(scores):
            weight = 1.0
            if self.products:
                product = self.products[index]
                product.lerp_(outputs[index].T @ outputs[index], self.method.forgetting)
                weight = 1 + self.method.uniqueness * similarity(product).sum(1) / (len(score) * kept)
            pulls.append((torch.sigmoid(score) * weight).mean())
        return loss + self.method.movement * kept / left * torch.stack(pulls).mean()


@contextmanager
def multiplying(
    layers: Sequence[Layer], factors: Sequence[Tensor], outputs: list[Tensor] | None = None
) -> Iterator[None]:
    """While active, all weights of each neuron count `factors` times: its rows and their biases, and its columns.

    factors: of the channels of each layer [units]; gradients reach them, and are ∂L/∂factor = Σ w · ∂L/∂w.
    outputs: gets what the neurons of each layer return, before their columns, [N, units] without gradients.
    """
    with ExitStack() as stack:
        for layer, factor in zip(layers, factors, strict=True):
            units = layer.units["channels"]
            for name, unit in units.rows.items():

                def scale_rows(
                    _module: nn.Module, _args: tuple, output: Tensor, unit: Tensor = unit, factor=factor
                ) -> Tensor:
                    return output * factor[unit.to(factor.device)].to(output)

                stack.callback(layer.module.get_submodule(name).register_forward_hook(scale_rows).remove)

            def scale_columns(_module: nn.Module, args: tuple, units: Units = units, factor=factor) -> tuple:
                if outputs is not None:
                    outputs.append(args[0].detach().flatten(0, -2).float())
                return (args[0] * factor[units.columns.to(factor.device)].to(args[0]), *args[1:])

            stack.callback(layer.module.get_submodule(units.reader).register_forward_pre_hook(scale_columns).remove)
        yield


def similarity(product: Tensor) -> Tensor:
    """|cosine| of every two neurons, 0 with itself, from Σ o oᵀ [n, n]."""
    norms = product.diagonal().clamp(min=0).sqrt()
    return (product.abs() / (norms[:, None] * norms + SMALL)).fill_diagonal_(0)


def sensitivity(module: nn.Module, layers: Sequence[Layer], masks: Sequence[Tensor], windows: Tensor) -> list[Tensor]:
    """Mean over windows [S, T] of |Σ w · ∂L/∂w| over all weights of a neuron, of each layer [units]."""
    factors = [mask.detach().clone().to(module.device).requires_grad_(True) for mask in masks]
    totals = [torch.zeros_like(factor) for factor in factors]
    for window in windows.to(module.device):
        with torch.enable_grad(), multiplying(layers, factors):
            gradients = torch.autograd.grad(language_modeling_loss(module, window[None]), factors)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient.abs() / len(windows)
    return [total.detach() for total in totals]


def uniqueness(module: nn.Module, layers: Sequence[Layer], masks: Sequence[Tensor], windows: Tensor) -> list[Tensor]:
    """Which kept neurons are no other's like: no cosine of 0.8 or more with another kept one of their layer [units]."""
    products = [torch.zeros(mask.numel(), mask.numel(), device=module.device) for mask in masks]
    with torch.no_grad():
        for window in windows.to(module.device):
            outputs: list[Tensor] = []
            with multiplying(layers, [mask.to(module.device) for mask in masks], outputs):
                language_modeling_loss(module, window[None])
            for product, output in zip(products, outputs, strict=True):
                product += output.T @ output
    return [
        (similarity(product).amax(1) < ALIKE) & mask.to(product.device).bool()
        for product, mask in zip(products, masks, strict=True)
    ]
