"""Which of a student's questions a teacher with a budget should explain.

Saha, Hase, Bansal 2023 (https://arxiv.org/abs/2306.09299, Section 4): the teacher simulates the student with and
without an explanation and explains where the expected gain is greatest. Pure functions of numbers per question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RANKINGS = (
    *("utility", "misaligned", "random", "student_confidence", "teacher_confidence"),
    *("before", "after", "true_utility", "oracle"),
)


def expected_utility(before: Tensor, after: Tensor) -> Tensor:
    """Probability of the right answer [N] with the teacher's explanation, minus without it (Section 4.1)."""
    return after - before


def explained(priority: Tensor, budget: float) -> Tensor:
    """The ⌊budget · N⌋ questions of greatest priority [N]: a mask [N]; earlier ones first among equals.

    Sets of greater budgets contain those of smaller ones.
    """
    count = math.floor(budget * len(priority) + 1e-9)  # 0.6 · 5 is 3, not 2.999…
    mask = torch.zeros(len(priority), dtype=torch.bool)
    mask[priority.argsort(descending=True, stable=True)[:count]] = True
    return mask


def accuracy(mask: Tensor, before: Tensor, after: Tensor) -> float:
    """Share of right answers when the questions of a mask [N] are explained; before, after: right or not [N]."""
    return torch.where(mask, after, before).float().mean().item()


def priority(
    ranking: str,
    *,
    before: Tensor,
    after: Tensor,
    confidence: Tensor,
    teacher: Tensor,
    right_before: Tensor,
    right_after: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """What a ranking explains first: numbers [N], greatest first (Section 4.2 and its baselines).

    before, after: the teacher's simulation of the student, probability of the right answer. confidence: the student's
    own, in its own answer. teacher: the teacher's, in its answer. right_before, right_after: what really happens, 0/1;
    only the two rankings that bound the others may look at them, "true_utility" and "oracle".
    """
    return {
        "utility": lambda: expected_utility(before, after),
        "misaligned": lambda: -expected_utility(before, after),  # a teacher that wants the student to fail
        "random": lambda: torch.rand(len(before), generator=generator),
        "student_confidence": lambda: -confidence,  # least sure first
        "teacher_confidence": lambda: teacher,
        "before": lambda: -before,
        "after": lambda: after,
        "true_utility": lambda: right_after.float() - right_before.float(),
        "oracle": lambda: 1 - right_before.float(),  # all that is wrong
    }[ranking]()


def balanced(labels: Sequence[str], count: int) -> list[int]:
    """Positions of `count` demonstrations, taken from each label in turn: as equal as there are any (Section 4.1)."""
    queues: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        queues.setdefault(label, []).append(index)
    taken: list[int] = []
    while len(taken) < count and any(queues.values()):
        for queue in queues.values():
            if queue and len(taken) < count:
                taken.append(queue.pop(0))
    return taken
