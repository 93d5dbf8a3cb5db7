"""Explanations from LLMs make small reasoners better: answers and explanations as two tasks (Li et al. 2022).

https://arxiv.org/abs/2210.06726. The student always learns the known answers. Beside them it learns explanations,
which a teacher writes in one of three ways: by chain of thought, kept where it ends in the right answer
(COTE); by explaining the right answer, which it is told (RP); or by chain of thought and, where that fails, by
explaining (CROP). And it learns them in one of three forms: the explanation alone (MT-Re), after the
answer (MT-Ra), or before the answer (MT-CoT).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.answers import without_conclusion
from harness.errors import ConfigError
from methods.distillation.lessons import Lesson, View, learn, write
from methods.distillation.text_teachers import Answer, Ask, Request, in_batches

if TYPE_CHECKING:
    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem, Problems
    from methods.distillation.lessons import Prompt
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Sampling, TextTeacher
    from methods.training import TrainingSettings

EXPLANATIONS = ("cote", "rp", "crop")
TOGETHER = 64  # questions that are looked at before those without an explanation are asked again


@dataclass(frozen=True)
class MultiTaskCoT:
    """Two views of every question: its answer, and an explanation where there is one.

    explanations: "cote", "rp" or "crop". A recorded teacher cannot be told an answer: its place is taken by the
        explanation that the problem itself carries.
    reasoning: prompt of the chain of thought, without the right answer. rationalizing: with it.
    answer_weight: α of α · L_answer + (1 - α) · L_explanation; 1 is ordinary fine-tuning.
    answer_prompt, answer_response, explanation_prompt, explanation_response: what the student reads and learns, over
        the problem's fields and {explanation}. The last one is what makes it MT-Re, MT-Ra or MT-CoT.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Decoding
    reasoning: Prompt
    rationalizing: Prompt
    sampling: Sampling
    answer_prompt: str
    answer_response: str
    explanation_prompt: str
    explanation_response: str
    explanations: Literal["cote", "rp", "crop"] = "crop"
    answer_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.explanations not in EXPLANATIONS:
            raise ConfigError(f"method.explanations={self.explanations}: choose one of {', '.join(EXPLANATIONS)}")
        if not 0 < self.answer_weight <= 1:
            raise ConfigError(f"method.answer_weight={self.answer_weight}: must be above 0 and at most 1")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Ask, keep, write, learn both."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        weights = {"answer": self.answer_weight, "explanation": 1 - self.answer_weight}
        return learn(self.student, base, lessons, weights, self.training, bench, "MT-CoT")

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every question; its origin says who explained it ("cote", "rp", or nobody)."""
        for some in in_batches(self.problems.read("train"), TOGETHER):
            explained = dict.fromkeys((problem.id for problem in some), ("", ""))
            if self.explanations != "rp":
                explained |= self._explained("cote", some, ask, bench)
            left = [problem for problem in some if not explained[problem.id][1]]
            if self.explanations != "cote" and left:
                explained |= self._explained("rp", left, ask, bench)
            for problem in some:
                origin, explanation = explained[problem.id]
                bench.log.counts[f"explanations by {origin or 'nobody'}"] += 1
                yield self._lesson(problem, origin, explanation)

    def _explained(self, origin: str, problems: list[Problem], ask: Ask, bench: Bench) -> dict[str, tuple[str, str]]:
        """Explanations that end in the right answer, by the id of their problem: (origin, text)."""
        if origin == "rp" and self.teacher.recorded:
            return {problem.id: (origin, problem.rationale) for problem in problems if problem.rationale}
        prompt = self.reasoning if origin == "cote" else self.rationalizing
        shown, seed = prompt.shown(self.problems), bench.generator.initial_seed()
        asked = ask(Request(prompt.write(problem, shown), problem, self.sampling, seed) for problem in problems)
        found = {}
        for request, answers in asked:
            text = self._explanation(origin, request.problem, answers)
            if text:
                found[request.problem.id] = (origin, text)
        return found

    def _explanation(self, origin: str, problem: Problem, answers: list[Answer]) -> str:
        """The first one that may be used. One that was told the answer need not repeat it, nor may it end elsewhere."""
        rule = self.problems.rule
        for answer in answers:
            silent = origin == "rp" and without_conclusion(answer.text) == answer.text.strip()
            if silent or rule.correct(answer.text, problem):
                return without_conclusion(answer.text)
        return ""

    def _lesson(self, problem: Problem, origin: str, explanation: str) -> Lesson:
        fields = problem.fields() | {"explanation": explanation}
        views = {"answer": View(self.answer_prompt, self.answer_response).filled(fields)}
        if explanation:
            views["explanation"] = View(self.explanation_prompt, self.explanation_response).filled(fields)
        return Lesson(views, problem=problem.id, origin=origin)
