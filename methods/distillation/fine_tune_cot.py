"""Fine-tune-CoT: students learn the reasoning that a large model writes step by step (Ho, Schmid, Yun 2023).

https://arxiv.org/abs/2212.10071. The teacher is asked twice without any example: for its reasoning, and
after it for its answer. Reasoning that ends in the right answer is kept; a student learns question → reasoning →
answer. Diverse reasoning keeps several right ones of each question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.answers import without_conclusion
from methods.distillation.lessons import Lesson, View, keep_right, learn, write
from methods.distillation.text_teachers import Answer, Ask, Request, Sampling

if TYPE_CHECKING:
    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel
    from harness.problems import Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import TextTeacher
    from methods.training import TrainingSettings


@dataclass(frozen=True)
class FineTuneCoT:
    """Asks for reasoning, keeps the right one, teaches it.

    reasoning_prompt, answer_prompt: the two questions; the second stands after the first and the reasoning. A recorded
        teacher gave both at once.
    prompt, response: what the student reads and learns.
    sampling: of the reasoning; samples above 1 is diverse reasoning. answer_tokens: the most in an answer.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Decoding
    reasoning_prompt: str
    answer_prompt: str
    prompt: str
    response: str
    sampling: Sampling
    answer_tokens: int = 16

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Ask, keep, write, learn."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        return learn(self.student, base, lessons, {"reasoning": 1.0}, self.training, bench, "Fine-tune-CoT")

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every right answer, one by one. The answer that it ends in is the right one as it is known."""
        for problem, answer in keep_right(self._answered(ask, bench), self.problems.rule, bench):
            fields = problem.fields() | {"reasoning": without_conclusion(answer.text)}
            if fields["reasoning"]:
                yield Lesson({"reasoning": View(self.prompt, self.response).filled(fields)}, problem=problem.id)

    def _answered(self, ask: Ask, bench: Bench) -> Iterator[tuple[Request, list[Answer]]]:
        """Requests with answers that hold reasoning and conclusion."""
        seed = bench.generator.initial_seed()
        reasoned = ask(
            Request(self.reasoning_prompt.format(**problem.fields()), problem, self.sampling, seed)
            for problem in self.problems.read("train")
        )
        if self.teacher.recorded:
            yield from reasoned
            return
        sampling = Sampling(new_tokens=self.answer_tokens)
        concluding = (
            Concluding(
                f"{request.prompt}{answer.text}{self.answer_prompt}", request.problem, sampling, seed, answer.text
            )
            for request, answers in reasoned
            for answer in answers
        )
        for request, answers in ask(concluding):
            whole = f"{request.reasoning}{self.answer_prompt}"
            yield request, [replace(answer, text=whole + answer.text) for answer in answers]


@dataclass(frozen=True)
class Concluding(Request):
    """Asks for the answer after the reasoning."""

    reasoning: str = ""
