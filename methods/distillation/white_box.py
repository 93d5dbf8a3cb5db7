"""What every method that compares a student with its teacher's predictions does the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from methods.distillation.students import Student, settled
from methods.distillation.teachers import Reference, Teacher, release
from methods.examples import Texts
from methods.training import Loss, TrainingSettings, compiled_blocks, held_out_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


def distil(
    base: LanguageModel,
    student: Student,
    teacher: Teacher,
    texts: Texts,
    loss: Callable[[Reference], Loss],
    training: TrainingSettings,
    bench: Bench,
    what: str,
) -> LanguageModel:
    """A student of `base`, all of its weights trained by `loss` of the teacher's reference.

    Its language-modelling loss on held-out texts goes into the log, from before the first step on.
    """
    reference = teacher.opened(base, texts.train, bench)
    made = student.make(base, bench)
    if not teacher.stays:
        release(base)
    with compiled_blocks(base.module, training.compile_blocks and teacher.stays):
        fit(made, texts, loss(reference), training, bench, what)
    return settled(made)


def fit(
    student: LanguageModel,
    texts: Texts,
    loss: Loss,
    training: TrainingSettings,
    bench: Bench,
    what: str,
    first_step: int = 0,
    extra: list[nn.Parameter] | None = None,
    **more: Any,
) -> None:
    """Train all weights of a student, in place, and look at the held-out texts meanwhile.

    extra: parameters beside the student's that the loss brings along. more: further arguments of `train`.
    """
    parameters = [*student.module.parameters(), *(extra or [])]

    def validate(module: nn.Module) -> float:
        with torch.compiler.set_stance("force_eager"):  # other shapes would be compiled for a few texts
            return held_out_loss(module, texts.held_out)

    with compiled_blocks(student.module, training.compile_blocks):
        train(
            student.module,
            parameters,
            texts.train,
            loss,
            training,
            bench,
            what,
            first_step=first_step,
            validate=validate,
            **more,
        )
