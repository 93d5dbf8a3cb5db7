"""Specializing smaller language models: all of a model's strength into reasoning of one kind (Fu et al. 2023).

https://arxiv.org/abs/2301.12726, Section 3. Of many samples of a teacher's reasoning the right ones are taught in four
formats: with demonstrations before the question or without, with reasoning before the answer or without. Reasoning is
learned from the teacher's distributions over its five likeliest tokens, brought into the student's vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, islice
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.distillation.alignment import ALIGNERS, one_token, soft_targets
from methods.distillation.lessons import Lesson, Lessons, View, encoded, keep_right, shares_of, write
from methods.distillation.students import settled
from methods.distillation.text_teachers import Ask, Request
from methods.examples import Batch, padding_id
from methods.training import logits_of, train, weighted_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem, Problems
    from methods.distillation.lessons import Prompt
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Answer, Sampling, TextTeacher
    from methods.training import Prepare, TrainingSettings

FORMATS = ("in_context_answer", "in_context_reasoning", "zero_shot_answer", "zero_shot_reasoning")
POOL = 256  # problems that demonstrations are drawn from


@dataclass(frozen=True)
class Specializing:
    """Samples reasoning, keeps the right one, teaches it in four formats, by distributions where there are some.

    sampling: many samples, with top_logprobs for distribution matching; without them tokens are what is learned.
    shots: demonstrations of the in-context formats, drawn anew for each lesson from problems that carry a solution.
    answer_prompt, reasoning_prompt, answer_response: how a question is put in either format, and an answer alone.
    demonstration_answer, demonstration_reasoning: the same of a demonstration.
    rows: of each format, how many stand in a micro-batch of the authors'; as a micro-batch holds one format and counts
        like any other, a format weighs (number of its lessons) / rows.
    aligner: "offsets" takes tokens that cover the same characters, "dtw" is the authors' dynamic time warping.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Decoding
    asking: Prompt
    sampling: Sampling
    answer_prompt: str
    reasoning_prompt: str
    answer_response: str
    demonstration_answer: str
    demonstration_reasoning: str
    rows: Mapping[str, int]
    shots: int = 4
    aligner: Literal["offsets", "dtw"] = "offsets"

    def __post_init__(self) -> None:
        if set(self.rows) != set(FORMATS) or min(self.rows.values()) < 1:
            raise ConfigError(
                f"method.rows={dict(self.rows)}: must give each of {', '.join(FORMATS)} a number from 1 on"
            )
        if self.aligner not in ALIGNERS:
            raise ConfigError(f"method.aligner={self.aligner}: choose offsets or dtw")
        if self.shots < 1:
            raise ConfigError(f"method.shots={self.shots}: must be at least 1")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Ask, keep, align, write, learn."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, base.tokenizer, bench), base, bench)
        student = self.student.make(base, bench)
        train(
            student.module,
            list(student.module.parameters()),
            lessons.examples(student.tokenizer),
            matching_loss,
            self.training,
            bench,
            "Specializing",
            prepare=matched(lessons, self.weights(lessons), student.tokenizer),
        )
        return settled(student)

    def weights(self, lessons: Lessons) -> dict[str, float]:
        """Of each format that there are lessons of; they sum to 1."""
        batches = {name: count / self.rows[name] for name, count in lessons.counts.items()}
        return {name: number / sum(batches.values()) for name, number in batches.items()}

    def lessons(self, ask: Ask, tokenizer: PreTrainedTokenizerBase, bench: Bench) -> Iterator[Lesson]:
        """Both formats of reasoning for every right sample, both formats of answers once for every question."""
        seed = bench.generator.initial_seed()
        pool = list(islice((problem for problem in self.problems.read("train") if problem.rationale), POOL))
        shown = self.asking.shown(self.problems)
        known = cache(lambda piece: one_token(tokenizer, piece))
        asked = ask(
            Request(self.asking.write(problem, shown), problem, self.sampling, seed)
            for problem in self.problems.read("train")
        )
        kept = keep_right(
            ((request, list(map(shortened, answers))) for request, answers in asked), self.problems.rule, bench
        )
        for _, samples in groupby(kept, key=lambda pair: pair[0].id):
            answered = False
            for number, (problem, answer) in enumerate(samples):
                soft = soft_targets(answer.top, answer.text, tokenizer, self.aligner, known) if answer.top else []
                if soft is None:
                    bench.log.counts["answers that could not be aligned"] += 1
                    continue
                draw = Random(f"{seed}|{problem.id}|{number}")
                reasoning = self._reasoning(problem, answer, soft)
                yield from self._formats("reasoning", self.demonstration_reasoning, reasoning, problem, pool, draw)
                if not answered:
                    answered = True
                    view = View(self.answer_prompt, self.answer_response).filled(problem.fields())
                    answer_alone = Lesson({"answer": view}, problem=problem.id)
                    yield from self._formats("answer", self.demonstration_answer, answer_alone, problem, pool, draw)

    def _reasoning(self, problem: Problem, answer: Answer, soft: list) -> Lesson:
        prompt = self.reasoning_prompt.format(**problem.fields())
        text = answer.text if answer.top or answer.text[:1].isspace() else f" {answer.text}"
        return Lesson({"reasoning": View(prompt, text)}, problem=problem.id, soft=soft)

    def _formats(
        self, kind: str, demonstration: str, lesson: Lesson, problem: Problem, pool: list[Problem], draw: Random
    ) -> Iterator[Lesson]:
        """A lesson without demonstrations, and with some, where there are enough other problems to show."""
        view = lesson.views[kind]
        yield Lesson({f"zero_shot_{kind}": view}, problem=problem.id, soft=lesson.soft)
        others = [other for other in pool if other.id != problem.id]
        if len(others) >= self.shots:
            before = "".join(demonstration.format(**other.fields()) for other in draw.sample(others, self.shots))
            shown = View(before + view.prompt, view.response)
            yield Lesson({f"in_context_{kind}": shown}, problem=problem.id, soft=lesson.soft)


def shortened(answer: Answer) -> Answer:
    """An answer up to the end of the first line that gives the answer (authors' code)."""
    before, mark, after = answer.text.partition("answer is")
    return replace(answer, text=before + mark + after.split("\n")[0]) if mark else answer


def matched(lessons: Lessons, weights: Mapping[str, float], tokenizer: PreTrainedTokenizerBase) -> Prepare:
    """Adds what is learned at every token: `ids` and `chances` [B, T-1, k], filled up with zero chances."""
    shares = shares_of(lessons, weights)

    def prepare(module: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
        examples, soft = [], []
        for row in batch.rows.tolist():
            lesson = lessons[row]
            name = next(iter(lesson.views))
            example = encoded(lesson, name, tokenizer)
            examples.append(replace(example, weight=example.weight * shares[name]))
            soft.append(lesson.soft or [([token], [1.0]) for token in example.response])
        made = Batch.of_examples(examples, batch.rows.tolist(), padding_id(tokenizer))
        width = max(len(ids) for each in soft for ids, _ in each)
        ids = torch.zeros(*made.weights.shape, width, dtype=torch.long)
        chances = torch.zeros(ids.shape)
        for row, (example, each) in enumerate(zip(examples, soft, strict=True)):
            start = len(example.prompt) - 1
            for place, (some, likely) in enumerate(each, start):
                ids[row, place, : len(some)] = torch.tensor(some)
                chances[row, place, : len(some)] = torch.tensor(likely)
        return replace(made, more={"ids": ids, "chances": chances}).to(batch.tokens.device)

    return prepare


def matching_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Σ_v p_v (log p_v - log q_v) at every token, p as reported and not renormalised, in nats; the weighted mean.

    With p = 1 on the token itself this is its negative log-likelihood.
    """
    scores = logits_of(module, batch)[:, :-1].float().log_softmax(-1)  # [B, T-1, V]
    chances = batch.more["chances"]
    differences = torch.xlogy(chances, chances) - chances * scores.gather(-1, batch.more["ids"])
    return weighted_mean(differences.sum(-1), batch)
