"""From what a teacher says to what a student learns, the same way for every black-box system:

    ask (teacher) → keep (filter) → write (lessons) → learn (student) → decode

A system brings its prompts, its filter, the form of its lessons, the weights of its losses and its decoding. Lessons
are written to disk one by one and read from there, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, overload

from harness.errors import ConfigError, RunError
from methods.distillation.students import settled
from methods.examples import Batch, Example, padding_id, tokenized
from methods.training import language_modeling_loss, train

if TYPE_CHECKING:
    from torch import Generator, nn
    from transformers import PreTrainedTokenizerBase

    from harness.answers import AnswerRule
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem, Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Answer, Request
    from methods.training import Prepare, TrainingSettings


@dataclass(frozen=True)
class View:
    """One way in which a question is taught: the student reads the prompt and learns the response.

    The response is learned with an end mark after it.
    """

    prompt: str
    response: str

    def filled(self, fields: Mapping[str, str]) -> View:
        """The view that these templates make of some fields."""
        return View(self.prompt.format(**fields), self.response.format(**fields))


@dataclass(frozen=True)
class Lesson:
    """What is learned from one question in one step.

    views: by name; a system weighs the losses of its views. weight: of every token of it within its view.
    problem: id of the question. origin: what made it, where a system has several ways.
    soft: what is learned instead of the tokens of a response, one entry each: (ids, probabilities).
    """

    views: Mapping[str, View]
    weight: float = 1.0
    problem: str = ""
    origin: str = ""
    soft: Sequence[tuple[Sequence[int], Sequence[float]]] = ()


# ---- ask


@dataclass(frozen=True)
class Prompt:
    """How a teacher is asked.

    question: template over the problem's fields. demonstration: template of each of `shots` worked problems before it.
    """

    question: str
    demonstration: str = ""
    shots: int = 0

    def __post_init__(self) -> None:
        if self.shots < 0 or (self.shots and not self.demonstration):
            raise ConfigError(f"prompt shots={self.shots}: must be at least 0, and need a demonstration template")

    def shown(self, problems: Problems) -> list[Problem]:
        """The problems that are demonstrated: the first that carry a worked solution, one more than are shown."""
        worked = (problem for problem in problems.read("train") if problem.rationale)
        return list(islice(worked, self.shots + 1)) if self.shots else []

    def write(self, problem: Problem, shown: Sequence[Problem]) -> str:
        """The prompt for a problem, which is never among its own demonstrations."""
        others = [other for other in shown if other.id != problem.id][: self.shots]
        return "".join(self.demonstration.format(**other.fields()) for other in others) + self.question.format(
            **problem.fields()
        )


# ---- keep


def keep_right(
    asked: Iterable[tuple[Request, list[Answer]]], rule: AnswerRule, bench: Bench
) -> Iterator[tuple[Problem, Answer]]:
    """Exactly the answers that are right, each with its problem; nothing but the answer is looked at."""
    for request, answers in asked:
        for answer in answers:
            bench.log.counts["answers"] += 1
            if rule.correct(answer.text, request.problem):
                bench.log.counts["kept answers"] += 1
                yield request.problem, answer


# ---- write


class Lessons(Sequence[Lesson]):
    """Lessons in a file, read one by one; in memory are the places where they begin, eight bytes each.

    counts: how many lessons have a view. tokens: of all their responses.
    """

    def __init__(self, path: Path, places: array[int], counts: dict[str, int], tokens: dict[str, int]) -> None:
        self.path, self.counts, self.tokens = path, counts, tokens
        self._places = places
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Lesson: ...
    @overload
    def __getitem__(self, index: slice) -> list[Lesson]: ...
    def __getitem__(self, index: int | slice) -> Lesson | list[Lesson]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        self._file.seek(self._places[index])
        row = json.loads(self._file.readline())
        views = {name: View(*texts) for name, texts in row["views"].items()}
        soft = tuple((ids, chances) for ids, chances in row["soft"])
        return Lesson(views, row["weight"], row["problem"], row["origin"], soft)

    def __reduce__(self) -> tuple:
        return Lessons, (
            self.path,
            self._places,
            self.counts,
            self.tokens,
        )  # a worker process opens the file for itself

    def examples(self, tokenizer: PreTrainedTokenizerBase, view: str | None = None) -> Sequence[Example]:
        """Its lessons as token ids, made when they are read: of one view, or of each lesson's first."""
        return _Examples(self, tokenizer, view)


def encoded(lesson: Lesson, view: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A view of a lesson as token ids."""
    example = tokenized(tokenizer, lesson.views[view].prompt, lesson.views[view].response)
    return replace(example, weight=lesson.weight)


class _Examples(Sequence[Example]):
    def __init__(self, lessons: Lessons, tokenizer: PreTrainedTokenizerBase, view: str | None) -> None:
        self._lessons, self._tokenizer, self._view = lessons, tokenizer, view

    def __len__(self) -> int:
        return len(self._lessons)

    def __getitem__(self, index: int) -> Example:
        lesson = self._lessons[index]
        return encoded(lesson, self._view or next(iter(lesson.views)), self._tokenizer)


def write(lessons: Iterable[Lesson], lm: LanguageModel, bench: Bench, what: str = "lessons") -> Lessons:
    """Write lessons to disk as they come.

    lm: whoever learns them: lessons longer than its context are left out and counted.
    Raises RunError when there are none.
    """
    longest = getattr(lm.engine, "context_tokens", None) or float("inf")
    path = bench.scratch / f"{what.replace(' ', '-')}.jsonl"
    places, having, tokens, counts = array("q"), Counter(), Counter(), bench.log.counts
    with path.open("wb") as file:
        for lesson in lessons:
            examples = {name: encoded(lesson, name, lm.tokenizer) for name in lesson.views}
            if max(map(len, examples.values())) > longest:
                counts[f"{what} too long"] += 1
                continue
            having.update(examples.keys())
            tokens.update({name: len(example.response) for name, example in examples.items()})
            places.append(file.tell())
            views = {name: [view.prompt, view.response] for name, view in lesson.views.items()}
            row = {"problem": lesson.problem, "origin": lesson.origin, "weight": lesson.weight, "views": views}
            row["soft"] = lesson.soft
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    counts[what] += len(places)
    if not places:
        too_long = counts[f"{what} too long"]
        raise RunError(
            f"there are no {what} to learn from: "
            + (
                f"all {too_long} are longer than the {longest} positions of the student"
                if too_long
                else "none was kept"
            )
        )
    return Lessons(path, places, dict(having), dict(tokens))


# ---- learn


def shares_of(lessons: Lessons, weights: Mapping[str, float]) -> dict[str, float]:
    """What a response token of each view weighs, so that Σ_v w_v · mean over the response tokens of view v is learned.

    A token of view v weighs w_v / (mean number of response tokens that a lesson has in it): over the whole data set
    every view's mean counts by its weight, and a step's loss does not depend on how it is split into passes.
    """
    return {name: weight * len(lessons) / lessons.tokens[name] for name, weight in weights.items() if weight}


def paired(lessons: Lessons, weights: Mapping[str, float], tokenizer: PreTrainedTokenizerBase) -> Prepare:
    """Puts all views of a batch's lessons side by side, weighed by their shares."""
    shares = shares_of(lessons, weights)

    def prepare(module: nn.Module, batch: Batch, generator: Generator) -> Batch:
        rows, examples = [], []
        for name, share in shares.items():
            for row in batch.rows.tolist():
                lesson = lessons[row]
                if name in lesson.views:
                    example = encoded(lesson, name, tokenizer)
                    rows.append(row)
                    examples.append(replace(example, weight=example.weight * share))
        return Batch.of_examples(examples, rows, padding_id(tokenizer)).to(batch.tokens.device)

    return prepare


def learn(
    student: Student,
    base: LanguageModel,
    lessons: Lessons,
    weights: Mapping[str, float],
    training: TrainingSettings,
    bench: Bench,
    what: str,
) -> LanguageModel:
    """The student, taught by all views of each lesson at once.

    weights: of the views' losses; with one view left that weighs anything, this is ordinary fine-tuning on it.
    Raises ConfigError for weights that leave nothing to learn.
    """
    lm = student.make(base, bench)
    teach(lm, lessons, weights, training, bench, what)
    return settled(lm)


def teach(
    lm: LanguageModel,
    lessons: Lessons,
    weights: Mapping[str, float],
    training: TrainingSettings,
    bench: Bench,
    what: str,
    first_step: int = 0,
) -> None:
    """Train a model's weights on lessons, in place; see `learn`. first_step: where its learning curve goes on."""
    read = [name for name, weight in weights.items() if weight and name in lessons.tokens]
    if not read or min(weights.values()) < 0:
        raise ConfigError(f"loss weights {dict(weights)}: at least one must be above 0 and none below")
    single = len(read) == 1
    train(
        lm.module,
        list(lm.module.parameters()),
        lessons.examples(lm.tokenizer, read[0] if single else None),
        language_modeling_loss,
        training,
        bench,
        what,
        first_step=first_step,
        prepare=None if single else paired(lessons, {name: weights[name] for name in read}, lm.tokenizer),
    )
