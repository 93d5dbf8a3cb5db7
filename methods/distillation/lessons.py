"""From what a teacher says to what a student learns, the same way for every black-box system:

    ask (teacher) → keep (filter) → write (lessons) → learn (student) → decode

A system brings its prompts, its filter, the form of its lessons, the weights of its losses and its decoding. Lessons
are written to disk one by one and read from there, so that memory does not grow with their number.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from harness.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from harness.answers import AnswerRule
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Answer, Request
    from methods.examples import Batch, Example
    from methods.training import TrainingSettings


@dataclass(frozen=True)
class View:
    """One way in which a question is taught: the student reads the prompt and learns the response.

    The response is learned with an end mark after it.
    """

    prompt: str
    response: str


@dataclass(frozen=True)
class Lesson:
    """What is learned from one question in one step.

    views: by name; a system weighs the losses of its views. weight: of every token of it within its view.
    problem: id of the question.
    """

    views: Mapping[str, View]
    weight: float = 1.0
    problem: str = ""


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

    tokens: of prompts and responses, by view.
    """

    def __init__(self, path: Path, places: array[int], tokens: dict[str, int]) -> None:
        self.path, self.tokens = path, tokens
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
        return Lesson(views, row["weight"], row["problem"])

    def __reduce__(self) -> tuple:
        return Lessons, (self.path, self._places, self.tokens)  # a worker process opens the file for itself

    def examples(self, tokenizer: PreTrainedTokenizerBase, view: str | None = None) -> Sequence[Example]:
        """Its lessons as token ids, made when they are read: of one view, or of each lesson's first."""
        return _Examples(self, tokenizer, view)


class _Examples(Sequence["Example"]):
    def __init__(self, lessons: Lessons, tokenizer: PreTrainedTokenizerBase, view: str | None) -> None:
        self._lessons, self._tokenizer, self._view = lessons, tokenizer, view

    def __len__(self) -> int:
        return len(self._lessons)

    def __getitem__(self, index: int) -> Example:
        lesson = self._lessons[index]
        return encoded(lesson.views[self._view or next(iter(lesson.views))], lesson.weight, self._tokenizer)


def encoded(view: View, weight: float, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A view as token ids: the prompt as a decoder reads it, the response with an end mark."""
    from methods.examples import Example

    prompt = tokenizer(view.prompt, verbose=False)["input_ids"]
    response = tokenizer(view.response, add_special_tokens=False, verbose=False)["input_ids"]
    return Example(prompt, [*response, tokenizer.eos_token_id], weight)


def write(lessons: Iterable[Lesson], lm: LanguageModel, bench: Bench, what: str) -> Lessons:
    """Write lessons to disk as they come.

    lm: whoever learns them: lessons longer than its context are left out and counted.
    Raises RunError when there are none.
    """
    longest = getattr(lm.engine, "context_tokens", None)
    path = bench.scratch / f"{what.replace(' ', '-')}.jsonl"
    places, tokens, seen = array("q"), {}, 0
    with path.open("wb") as file:
        for lesson in lessons:
            seen += 1
            lengths = {}
            for name, view in lesson.views.items():
                example = encoded(view, lesson.weight, lm.tokenizer)
                lengths[name] = len(example.prompt) + len(example.response)
            if longest is not None and max(lengths.values()) > longest:
                bench.log.counts["lessons too long"] += 1
                continue
            for name, length in lengths.items():
                tokens[name] = tokens.get(name, 0) + length
            places.append(file.tell())
            views = {name: [view.prompt, view.response] for name, view in lesson.views.items()}
            row = {"problem": lesson.problem, "weight": lesson.weight, "views": views}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    bench.log.counts["lessons"] += len(places)
    if not places:
        raise RunError(
            f"{what}: there is nothing to learn from; "
            + (f"all {seen} lessons are too long" if seen else "no answer was kept")
        )
    return Lessons(path, places, tokens)


# ---- learn


def views_loss(
    lessons: Lessons, weights: Mapping[str, float], tokenizer: PreTrainedTokenizerBase
) -> Callable[[nn.Module, Batch], Tensor]:
    """Σ_v w_v · mean over the response tokens of view v, all views of the same questions in each step.

    A lesson that lacks a view adds nothing to that view's mean.
    """
    from methods.examples import Batch
    from methods.losses import token_losses, weighted_mean

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        found = [lessons[row] for row in batch.rows.tolist()]
        total = None
        for name, weight in weights.items():
            examples = [encoded(each.views[name], each.weight, tokenizer) for each in found if name in each.views]
            if not weight or not examples:
                continue
            own = Batch.of(examples, tokenizer.pad_token_id or 0).to(batch.tokens.device)
            logits = module(input_ids=own.tokens, attention_mask=own.attention, use_cache=False).logits
            part = weight * weighted_mean(token_losses(logits, own), own)
            total = part if total is None else total + part
        return total

    return loss


def learn(
    student: Student,
    base: LanguageModel,
    lessons: Lessons,
    weights: Mapping[str, float],
    training: TrainingSettings,
    bench: Bench,
    what: str,
) -> LanguageModel:
    """The student, taught.

    weights: of the views' losses. Views of weight 0 are not read: with one left, this is ordinary fine-tuning on it.
    """
    raise NotImplementedError
