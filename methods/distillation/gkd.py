"""GKD: a student learns from its teacher's distribution over what the student itself writes (Agarwal et al. 2023).

https://arxiv.org/abs/2306.13649, "On-policy Distillation of Language Models: Learning from Self-Generated Mistakes",
Section 3 and Algorithm 1: each step throws a coin, and trains either on responses of the data or on responses that the
student has just written; nothing is propagated through the writing. The divergence is free to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.distillation.divergences import Divergence
from methods.distillation.on_policy import (
    WarmStart,
    first_learned,
    logits_from,
    read_examples,
    require_whole_model,
    response_mean,
    trained_student,
    with_responses,
)
from methods.distillation.sampling import Sampling, end_marks, sample, uniform_numbers
from methods.examples import Batch, Example
from methods.training import Loss, Prepare, TrainingSettings

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.distillation.students import Student
    from methods.examples import TextSource


@dataclass(frozen=True)
class GKD:
    """Distillation on a mixture of the data's responses and the student's own.

    student: what learns. examples: prompts and responses. warm_start: language modelling first, in the same steps.
    on_policy: λ, share of the batches whose responses the student writes.
    reduction: "sequence", the mean over responses of the mean over their tokens, as in the paper, or "token".
    """

    student: Student
    examples: TextSource
    divergence: Divergence
    sampling: Sampling
    training: TrainingSettings
    warm_start: WarmStart
    on_policy: float = 0.5
    reduction: Literal["sequence", "token"] = "sequence"

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(
                f"method.on_policy={self.on_policy}: must lie between 0 (data alone) and 1 (student alone)"
            )
        if self.reduction not in ("sequence", "token"):
            raise ConfigError(f"method.reduction={self.reduction}: choose sequence (paper) or token")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Make a student, warm it up, train it against `base`."""
        if self.on_policy:
            require_whole_model("GKD", bench)
        texts = read_examples(self.examples, base, bench, self.sampling)
        return trained_student(
            self.student.make(base, bench),
            texts,
            self.warm_start,
            texts.train,
            distillation_loss(base.module, self.divergence),
            self.training,
            bench,
            "GKD",
            prepare=self.prepare(texts.train, end_marks(base)),
        )

    def prepare(self, examples: Sequence[Example], ends: Sequence[int]) -> Prepare:
        """Throws the coin of a batch: its own responses stay, or the student writes others."""

        def rewrite(module: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
            if float(torch.rand((), generator=generator)) < self.on_policy:
                prompts = [examples[row].prompt for row in batch.rows.tolist()]
                numbers = uniform_numbers(len(prompts), self.sampling, generator)
                batch = with_responses(examples, batch, sample(module, prompts, self.sampling, ends, numbers))
            return batch.with_sequence_means() if self.reduction == "sequence" else batch

        return rewrite


def distillation_loss(teacher: nn.Module, divergence: Divergence) -> Loss:
    """Mean divergence from the teacher over the tokens that are learned, by the weights of the batch."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        first = first_learned(batch)
        with torch.no_grad():
            theirs = logits_from(teacher, batch, first)
        return response_mean(divergence(logits_from(module, batch, first), theirs), batch)

    return loss
