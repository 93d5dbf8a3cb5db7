"""Distilling step by step: labels and rationales as two tasks of one student (Hsieh et al. 2023).

https://arxiv.org/abs/2305.02301, Section 3. A few-shot prompt makes the teacher write a rationale and a label; the
student learns the label after one prefix and the rationale after another, so that nothing but the label need be
written when it is used. Rationales are not filtered: what cannot be read is taught as an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.answers import without_conclusion
from harness.errors import ConfigError
from methods.distillation.lessons import Lesson, View, learn, write
from methods.distillation.text_teachers import Ask, Request

if TYPE_CHECKING:
    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem, Problems
    from methods.distillation.lessons import Prompt
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Sampling, TextTeacher
    from methods.training import TrainingSettings


@dataclass(frozen=True)
class StepByStep:
    """Two views of every question: what it is labelled, and why.

    labels: "right" teaches the known labels, "teacher" what the teacher says (no labels needed).
    label_weight: α of α · L_label + (1 - α) · L_rationale; 1 is ordinary fine-tuning. The paper writes
        L_label + λ · L_rationale with λ = 1, the same but for a factor of 2 in the learning rate.
    label_prompt, rationale_prompt, response: what the student reads, and learns with {target} for either.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Decoding
    asking: Prompt
    sampling: Sampling
    label_prompt: str
    rationale_prompt: str
    response: str = " {target}"
    labels: Literal["right", "teacher"] = "right"
    label_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.labels not in ("right", "teacher"):
            raise ConfigError(f"method.labels={self.labels}: choose right or teacher")
        if not 0 <= self.label_weight <= 1:
            raise ConfigError(f"method.label_weight={self.label_weight}: must lie between 0 and 1")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Ask, write, learn both."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        weights = {"label": self.label_weight, "rationale": 1 - self.label_weight}
        return learn(self.student, base, lessons, weights, self.training, bench, "Step by step")

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every question, whatever the teacher said to it."""
        shown, seed = self.asking.shown(self.problems), bench.generator.initial_seed()
        asked = ask(
            Request(self.asking.write(problem, shown), problem, self.sampling, seed)
            for problem in self.problems.read("train")
        )
        for request, answers in asked:
            problem, said = request.problem, answers[0].text if answers else ""
            found = self.problems.rule.extract(said, problem.choices) if said else None
            bench.log.counts["answers"] += 1
            bench.log.counts["unreadable answers"] += found is None
            label = self.label(problem) if self.labels == "right" else found or ""
            rationale = "" if found is None else without_conclusion(said)
            targets = {"label": (self.label_prompt, label), "rationale": (self.rationale_prompt, rationale)}
            views = {
                name: View(prompt, self.response).filled(problem.fields() | {"target": target})
                for name, (prompt, target) in targets.items()
            }
            yield Lesson(views, problem=problem.id)

    def label(self, problem: Problem) -> str:
        """The known label: an equation where equations are what is read (SVAMP in the paper), else the answer."""
        return problem.equation or problem.gold if self.problems.rule.name == "equation" else problem.gold
