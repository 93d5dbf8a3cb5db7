"""Many small tasks of the same form: label this, given some that are labelled.

Every question belongs to a task; every task has labelled examples that no question is among. Tasks that are taught and
tasks that are asked are different ones, so that what is measured is learning from examples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.answers import rule_named
from harness.errors import ConfigError, RunError
from harness.json_lines import Broken, numbered_rows, pass_over
from harness.problems import made

if TYPE_CHECKING:
    from harness.answers import AnswerRule
    from harness.problems import Problem, Split

END_MARKS = ("<|endoftext|>", "</s>")
LONGEST_LABEL = 24  # characters
ENOUGH_OF_EACH = 3  # rows of a label that make it one


class TaskPools(Protocol):
    """Questions (see harness.problems.Problems) that belong to tasks."""

    name: str

    @property
    def rule(self) -> AnswerRule:
        """How answers are read."""

    def read(self, split: Split) -> Iterator[Problem]:
        """Questions of the tasks that are taught, or of those that are asked."""

    def examples(self, split: Split) -> dict[str, list[Problem]]:
        """Labelled examples of each task of a split, none of which is a question of the test split."""

    def task_of(self, problem: Problem) -> str:
        """The task that a question belongs to."""


@dataclass(frozen=True)
class LabelTasks:
    """Two kinds of words, and two labels that mean them, drawn anew for every task: only examples tell which is which.

    train: questions of the taught tasks in all. test: of the asked ones. tasks: (taught, asked). few: examples a task.
    """

    train: int = 256
    test: int = 128
    tasks: tuple[int, int] = (16, 8)
    few: int = 16
    seed: int = 0
    name: str = "label_tasks"

    def __post_init__(self) -> None:
        for name, value in (("train", self.train), ("test", self.test), ("few", self.few)):
            if value < 2:
                raise ConfigError(f"problems.{name}={value}: must be at least 2")
        if min(self.tasks) < 1:
            raise ConfigError(f"problems.tasks={list(self.tasks)}: at least one is taught and one asked")

    @property
    def rule(self) -> AnswerRule:
        """One of the task's two labels."""
        return rule_named("choice")

    def read(self, split: Split) -> Iterator[Problem]:
        """See TaskPools."""
        count, names = (self.train, self._names("train")) if split == "train" else (self.test, self._names("test"))
        for number in range(count):
            yield self._made(names[number % len(names)], self.few + number // len(names))

    def examples(self, split: Split) -> dict[str, list[Problem]]:
        """See TaskPools."""
        return {task: [self._made(task, number) for number in range(self.few)] for task in self._names(split)}

    def task_of(self, problem: Problem) -> str:
        """See TaskPools."""
        return problem.context.removesuffix(":")

    def _names(self, split: Split) -> list[str]:
        return [
            f"{'task' if split == 'train' else 'new task'} {number}" for number in range(self.tasks[split == "test"])
        ]

    def _made(self, task: str, number: int) -> Problem:
        """Question `number` of a task; its kind alternates, so that labels are balanced."""
        labels = random.Random(f"{self.seed} {task}").sample(LABELS, 2)
        kind = number % 2
        draw = random.Random(f"{self.seed} {task} {number}")
        word = "".join(draw.choice(LETTERS[kind]) for _ in range(3))
        return made(f"{word} ({number})", labels[kind], choices=tuple(sorted(labels)), context=f"{task}:")


LETTERS = ("abcdefghijklm", "nopqrstuvwxyz")
LABELS = ["red", "blue", "green", "gold", "grey", "pink", "black", "white"]


@dataclass(frozen=True)
class TemplateTasks:
    """Classification tasks from a file of prompts and completions by template (P3 and others of that form).

    path: JSON Lines with `prompt`, `completion` and `template`. Templates with two to `labels` short completions are
        tasks; others are left out. few: rows of each task that are examples; the others are questions.
    held_out: share of the data sets that are asked and not taught; the templates of a data set (a name's words before
        `families`) stay together.
    longest: characters; longer prompts are left out.
    """

    path: str
    few: int = 16
    labels: int = 5
    held_out: float = 0.25
    longest: int = 800
    seed: int = 0
    families: int = 2
    broken: Broken = "refuse"
    name: str = "template_tasks"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("problems=template_tasks needs a file: problems.path=FILE")
        if not Path(self.path).is_file():
            raise ConfigError(f"problems.path={self.path}: there is no such file")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"problems.held_out={self.held_out}: must lie between 0 and 1")
        for name, least in (("few", 2), ("labels", 2), ("longest", 1), ("families", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"problems.{name}={getattr(self, name)}: must be at least {least}")

    @property
    def rule(self) -> AnswerRule:
        """One of the task's labels."""
        return rule_named("choice")

    def read(self, split: Split) -> Iterator[Problem]:
        """See TaskPools."""
        for task in self._split[split]:
            yield from self._tasks[task][self.few :]

    def examples(self, split: Split) -> dict[str, list[Problem]]:
        """See TaskPools."""
        return {task: self._tasks[task][: self.few] for task in self._split[split]}

    def task_of(self, problem: Problem) -> str:
        """See TaskPools."""
        return self._task_by_id[problem.id]

    @cached_property
    def _tasks(self) -> dict[str, list[Problem]]:
        """Task -> its rows as problems, shuffled; the file is read once, and only classification is kept."""
        found: dict[str, list[tuple[str, str]]] = {}
        for number, row in numbered_rows(Path(self.path), self.broken):
            try:
                prompt, label, task = (row[key].strip() for key in ("prompt", "completion", "template"))
            except (KeyError, AttributeError) as error:
                pass_over(self.path, number, f"no prompt, completion and template ({error!r})", self.broken)
                continue
            for mark in END_MARKS:
                label = label.removesuffix(mark).strip()
            if len(prompt) <= self.longest:
                found.setdefault(task, []).append((prompt, label))
        tasks = {}
        for task, rows in sorted(found.items()):
            counts: dict[str, int] = {}
            for _, label in rows:
                counts[label] = counts.get(label, 0) + 1
            labels = tuple(sorted(counts))
            short = all(0 < len(label) <= LONGEST_LABEL for label in labels)
            if (
                2 <= len(labels) <= self.labels
                and short
                and min(counts.values()) >= ENOUGH_OF_EACH
                and len(rows) > self.few
            ):
                own = list({p.id: p for p in (made(q, gold, choices=labels, context="") for q, gold in rows)}.values())
                random.Random(f"{self.seed} {task}").shuffle(own)
                tasks[task] = own
        if len({self._family(task) for task in tasks}) < 2:
            raise RunError(
                f"{self.path}: fewer than two data sets with classification tasks of more than {self.few} rows; lower "
                "problems.few, or raise problems.longest or problems.labels"
            )
        return tasks

    @cached_property
    def _split(self) -> dict[str, list[str]]:
        families = sorted({self._family(task) for task in self._tasks})
        asked = set(random.Random(self.seed).sample(families, max(1, round(self.held_out * len(families)))))
        return {
            "train": [task for task in self._tasks if self._family(task) not in asked],
            "test": [task for task in self._tasks if self._family(task) in asked],
        }

    @cached_property
    def _task_by_id(self) -> dict[str, str]:
        return {problem.id: task for task, own in self._tasks.items() for problem in own}

    def _family(self, task: str) -> str:
        return "_".join(task.split("_")[: self.families])
