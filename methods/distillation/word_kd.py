"""Word-level knowledge distillation: the student learns the teacher's distribution over every next token.

Hinton et al. 2015, https://arxiv.org/abs/1503.02531; as the baseline of MiniLLM (https://arxiv.org/abs/2306.08543,
Section 3.1): the loss of the text and the cross-entropy against the teacher, half and half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from harness.errors import ConfigError
from methods.distillation.divergences import Divergence
from methods.distillation.students import Student
from methods.distillation.teachers import Reference, Teacher, words
from methods.distillation.white_box import distil
from methods.examples import Batch, TextSource
from methods.training import (
    Loss,
    TrainingSettings,
    has_kernel,
    logits_of,
    mixed_token_losses,
    token_losses,
    weighted_mean,
)

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class WordKD:
    """Minimise (1 - share) · loss of the text + share · divergence from the teacher.

    share: 0 is plain fine-tuning, 1 learns from the teacher alone.
    """

    student: Student
    teacher: Teacher
    examples: TextSource
    divergence: Divergence
    training: TrainingSettings
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"method.share={self.share}: must lie between 0 (the text) and 1 (the teacher)")
        self.teacher.check(self.divergence)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Make a student and train it beside the teacher."""
        texts = self.examples.read(base.tokenizer, bench.corpus, bench.generator)
        return distil(base, self.student, self.teacher, texts, self.loss, self.training, bench, "word-level KD")

    def loss(self, reference: Reference) -> Loss:
        """The loss of a batch against a reference."""

        def of_batch(module: nn.Module, batch: Batch) -> Tensor:
            logits = logits_of(module, batch)
            if (
                self.share
                and self.divergence == Divergence()
                and has_kernel(logits)
                and reference.words == words(module)
            ):
                theirs = reference.logits(batch)
                return weighted_mean(mixed_token_losses(logits, theirs, batch, self.share), batch)
            values = (1 - self.share) * token_losses(logits, batch)
            if self.share:
                values = values + self.share * reference.divergence(logits, batch, self.divergence)
            return weighted_mean(values, batch)

        return of_batch
