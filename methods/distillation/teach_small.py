"""Teaching small language models to reason: fine-tuning on reasoning towards a known answer (Magister et al. 2023).

https://arxiv.org/abs/2212.08410. The teacher is shown worked examples and, with every question, its right
answer, so that it explains instead of guessing; explanations that end elsewhere all the same are left out. At the
end a calculator may redo the arithmetic of what the student writes (after Cobbe et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.answers import without_conclusion
from methods.distillation.lessons import Lesson, View, keep_right, learn, write
from methods.distillation.text_teachers import Ask, Request

if TYPE_CHECKING:
    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel
    from harness.problems import Problems
    from methods.distillation.lessons import Prompt
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Sampling, TextTeacher
    from methods.training import TrainingSettings


@dataclass(frozen=True)
class TeachSmall:
    """Asks for reasoning towards the right answer, keeps what ends in it, teaches it.

    asking: its question holds the right answer. prompt, response: what the student reads and learns; the right answer
    is in the response's end alone.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Decoding
    asking: Prompt
    sampling: Sampling
    prompt: str
    response: str

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Ask, keep, write, learn."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        return learn(self.student, base, lessons, {"reasoning": 1.0}, self.training, bench, "Teaching small LMs")

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every explanation that ends in the right answer."""
        shown, seed = self.asking.shown(self.problems), bench.generator.initial_seed()
        asked = ask(
            Request(self.asking.write(problem, shown), problem, self.sampling, seed)
            for problem in self.problems.read("train")
        )
        for problem, answer in keep_right(asked, self.problems.rule, bench):
            fields = problem.fields() | {"reasoning": without_conclusion(answer.text)}
            if fields["reasoning"]:
                yield Lesson({"reasoning": View(self.prompt, self.response).filled(fields)}, problem=problem.id)
