"""Sequence-level distillation: a student learns to write what its teacher writes (Kim and Rush 2016).

https://arxiv.org/abs/1606.07947, Section 3.2: the teacher's distribution over whole responses is replaced by one of its
responses to each prompt. The teacher writes once, before the training; what it wrote survives a kill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.block_training import BlockTensors
from methods.distillation.divergences import cross_entropy, token_log_probabilities
from methods.distillation.on_policy import (
    WarmStart,
    first_learned,
    logits_from,
    read_examples,
    response_mean,
    targets_from,
    trained_student,
)
from methods.distillation.sampling import Sampling, end_marks, sample, uniform_numbers
from methods.examples import Batch, Example
from methods.training import Loss, TrainingSettings, language_modeling_loss

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.distillation.students import Student
    from methods.examples import TextSource

LOSSES = ("nll", "kd", "both")


@dataclass(frozen=True)
class SequenceKD:
    """Training on responses that the teacher wrote.

    student: what learns. examples: where prompts are from; their responses are for the warm start alone.
    loss: "nll", negative log-likelihood of what the teacher wrote; "kd", cross-entropy from the teacher's distribution
        at each of these tokens; "both", kd_share of the second and the rest of the first.
    """

    student: Student
    examples: TextSource
    sampling: Sampling
    training: TrainingSettings
    warm_start: WarmStart
    loss: Literal["nll", "kd", "both"] = "nll"
    kd_share: float = 0.5

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"method.loss={self.loss}: choose one of {', '.join(LOSSES)}")
        if not 0 <= self.kd_share <= 1:
            raise ConfigError(f"method.kd_share={self.kd_share}: must lie between 0 (nll alone) and 1 (kd alone)")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Let `base` write, make a student, train it on what was written."""
        texts = read_examples(self.examples, base, bench, self.sampling)
        written = teacher_responses(base, texts.train, self.sampling, bench)
        return trained_student(
            self.student.make(base, bench),
            texts,
            self.warm_start,
            written,
            self.training_loss(base.module),
            self.training,
            bench,
            "sequence-level KD",
        )

    def training_loss(self, teacher: nn.Module) -> Loss:
        """The chosen loss against this teacher."""
        if self.loss == "nll":
            return language_modeling_loss
        share = 1.0 if self.loss == "kd" else self.kd_share

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            first = first_learned(batch)
            with torch.no_grad():
                theirs = logits_from(teacher, batch, first)
            own = logits_from(module, batch, first)
            values = share * cross_entropy(own, theirs)
            if share < 1:
                values = values - (1 - share) * token_log_probabilities(own, targets_from(batch, first))
            return response_mean(values, batch)

        return loss


def teacher_responses(
    teacher: LanguageModel, examples: Sequence[Example], sampling: Sampling, bench: Bench
) -> list[Example]:
    """The same prompts with responses that the teacher wrote; batches that a killed run had written are read again."""
    kept = BlockTensors(bench.scratch / "responses")
    ends = end_marks(teacher)
    numbers = uniform_numbers(len(examples), sampling, bench.generator)
    written = []
    starts = range(0, len(examples), sampling.batch_size)
    for start in bench.progress.track(starts, "teacher writes", len(starts)):
        some = examples[start : start + sampling.batch_size]
        found = kept.get(str(start))
        if found is None:
            prompts = [example.prompt for example in some]
            responses = sample(teacher.module, prompts, sampling, ends, numbers[start : start + sampling.batch_size])
            found = {"tokens": responses.tokens, "mask": responses.mask}
            kept.put(str(start), found)
        written += [
            replace(example, response=tokens[mask].tolist())
            for example, tokens, mask in zip(some, found["tokens"], found["mask"], strict=True)
        ]
    return written
