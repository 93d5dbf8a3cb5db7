"""SCOTT: a student that answers by its reasoning and not around it (Wang et al. 2023).

https://arxiv.org/abs/2305.01879. Section 3.1: the teacher explains a given answer, decoded against what it would say
for another one, so that the rationale belongs to that answer alone. Section 3.2: the student learns rationale and
answer, and, from a rationale for a wrong answer, that wrong answer: the answer has to follow from the rationale. It
knows from a mark which of the two is wanted, and is asked with the mark of facts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Literal

from harness.errors import ConfigError
from methods.distillation.contrastive import contrastive_completions
from methods.distillation.lessons import Lesson, View, learn, write
from methods.distillation.text_teachers import (
    Answer,
    KeptAnswers,
    Request,
    Sample,
    Sampling,
    answers_file,
    asking,
    weights_digest,
)

if TYPE_CHECKING:
    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel
    from harness.models import ModelSource
    from harness.problems import Problem, Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Ask
    from methods.training import TrainingSettings

BETWEEN = "\x00"  # of the two prompts of a request; no prompt holds it


@dataclass(frozen=True)
class ContrastiveTeacher:
    """A model run by this harness that continues one prompt against another (methods.distillation.contrastive).

    model: where it comes from; None is the model that is taught, before it is. strength: λ of the other prompt.
    plausible: least share of the likeliest token's probability; None: no bound, as in the paper.
    """

    model: ModelSource | None = None
    strength: float = 0.5
    plausible: float | None = None
    batch: int = 32

    recorded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"method.teacher.strength={self.strength}: must lie between 0 and 1")
        if self.plausible is not None and not 0 < self.plausible <= 1:
            raise ConfigError(f"method.teacher.plausible={self.plausible}: above 0 and at most 1, or null")
        if self.batch < 1:
            raise ConfigError(f"method.teacher.batch={self.batch}: must be at least 1")

    @contextmanager
    def opened(self, base: LanguageModel, bench: Bench) -> Iterator[Ask]:
        """See TextTeacher; a request's prompt is made by `against`. Kept answers are found by both prompts."""
        lm = base
        if self.model is not None:
            parameter = next(base.module.parameters())
            lm, _ = self.model.load(bench.cache or bench.scratch, str(parameter.device), parameter.dtype)
        identity = {"weights": weights_digest(lm), "strength": self.strength, "plausible": self.plausible}
        with closing(KeptAnswers(answers_file(bench))) as kept:
            yield asking(identity, lambda samples: self._answer(lm, samples), kept, bench, 4 * self.batch)

    def _answer(self, lm: LanguageModel, samples: list[Sample]) -> Iterator[tuple[int, Answer]]:
        order = iter(sorted(range(len(samples)), key=lambda place: -len(samples[place][0].prompt)))
        while places := list(islice(order, self.batch)):
            requests = [samples[place][0] for place in places]
            right, wrong = zip(*(request.prompt.split(BETWEEN) for request in requests), strict=True)
            sampling = requests[0].sampling
            written = contrastive_completions(
                lm, right, wrong, sampling.new_tokens, sampling.stop, self.strength, self.plausible
            )
            for place, prompt, completion in zip(places, right, written, strict=True):
                read = len(lm.tokenizer(prompt, verbose=False)["input_ids"])
                finish = "stop" if completion.ended else "length"
                yield place, Answer(completion.text, finish, read, len(completion.ids))


def against(right: str, wrong: str) -> str:
    """The prompt of a request: continue the first, away from the second."""
    return f"{right}{BETWEEN}{wrong}"


@dataclass(frozen=True)
class Scott:
    """Explains right and wrong answers, teaches both directions.

    teacher_prompt: names {question} and {answer}; ends where an explanation of that answer begins.
    contrast: the other answer that a rationale is decoded against: a "wrong" one, or "empty" (Section 3.1's variants).
    factual_prompt, counterfactual_prompt: name {question}; what a student reads. response: names {rationale} and
        {answer}, with `conclusion` between them; everything up to `conclusion` is read, not learned, where the answer
        is counterfactual.
    alpha: share of counterfactual lessons in the loss; 0 is fine-tuning on rationales.
    """

    problems: Problems
    teacher: ContrastiveTeacher
    student: Student
    training: TrainingSettings
    decoding: Decoding
    teacher_prompt: str
    factual_prompt: str
    counterfactual_prompt: str
    conclusion: str = " So the answer is"
    contrast: Literal["wrong", "empty"] = "wrong"
    new_tokens: int = 128
    stop: tuple[str, ...] = ("\n",)
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"method.alpha={self.alpha}: must lie between 0 and 1")
        if self.contrast not in ("wrong", "empty"):
            raise ConfigError(f"method.contrast={self.contrast}: choose wrong or empty")
        for key in ("{question}", "{answer}"):
            if key not in self.teacher_prompt:
                raise ConfigError(f"method.teacher_prompt={self.teacher_prompt!r}: must hold {key}")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Explain, write, learn."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        weights = {"factual": 1 - self.alpha, "counterfactual": self.alpha}
        return learn(self.student, base, lessons, weights, self.training, bench, "SCOTT")

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every question that both answers were explained for, one by one."""
        counts = bench.log.counts
        asked = ask(request for problem in self.problems.read("train") for request in self._requests(problem, bench))
        for (request, (factual,)), (_, (counterfactual,)) in zip(asked, asked, strict=True):
            counts["answers"] += 2
            right, wrong = factual.text.strip(), counterfactual.text.strip()
            if right and wrong:
                counts["kept answers"] += 2
                problem = request.problem
                yield self.lesson(problem, right, wrong, wrong_answer(problem, bench.generator.initial_seed()))

    def lesson(self, problem: Problem, rationale: str, other_rationale: str, other: str) -> Lesson:
        """Both directions of one question; of the counterfactual one, the answer alone is learned."""
        fields = problem.fields()
        factual = View(self.factual_prompt.format(**fields), f" {rationale}{self.conclusion} {problem.gold}.")
        counterfactual = View(
            f"{self.counterfactual_prompt.format(**fields)} {other_rationale}{self.conclusion}", f" {other}."
        )
        return Lesson({"factual": factual, "counterfactual": counterfactual}, problem=problem.id)

    def _requests(self, problem: Problem, bench: Bench) -> Iterator[Request]:
        """For the right answer, then for the wrong one: each against the other, or against none."""
        seed = bench.generator.initial_seed()
        sampling = Sampling(new_tokens=self.new_tokens, stop=tuple(self.stop))
        other = wrong_answer(problem, seed)
        prompts = {
            answer: self.teacher_prompt.format(**problem.fields() | {"answer": answer})
            for answer in (problem.gold, other, "")
        }
        for answer, contrary in ((problem.gold, other), (other, problem.gold)):
            pair = against(prompts[answer], prompts[contrary if self.contrast == "wrong" else ""])
            yield Request(pair, problem, sampling, seed)


def wrong_answer(problem: Problem, seed: int) -> str:
    """An answer that is not the right one, the same whenever it is asked for.

    Another choice (its letter, where letters answer); no for yes; a number up to five away; else the text backwards.
    """
    draw = random.Random(f"{seed} {problem.id}")
    if problem.choices and problem.gold in problem.choices:
        return draw.choice([choice for choice in problem.choices if choice != problem.gold])
    if problem.choices and len(problem.gold) == 1:
        return draw.choice([letter for letter in "ABCDEFGHIJ"[: len(problem.choices)] if letter != problem.gold])
    if problem.gold in ("yes", "no"):
        return "no" if problem.gold == "yes" else "yes"
    try:
        return f"{float(problem.gold) + draw.choice([-1, 1]) * draw.randint(1, 5):g}"
    except ValueError:
        return problem.gold[::-1] if problem.gold != problem.gold[::-1] else f"not {problem.gold}"
