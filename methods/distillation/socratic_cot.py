"""Socratic CoT: one student asks the sub-questions of a problem, another one answers them (Shridhar et al. 2023).

"Distilling Reasoning Capabilities into Smaller Language Models", https://arxiv.org/abs/2212.00193, Section 3. A
decomposer learns the sub-questions of a problem, a solver their solutions one after the other with what came before;
or one model learns both (the unified strategy). Sub-questions come with the data, or a teacher writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from harness.decoding import complete
from harness.errors import ConfigError
from methods.distillation.companions import Companion
from methods.distillation.lessons import Lesson, View, teach, write
from methods.distillation.students import settled
from methods.distillation.text_teachers import Request, Sampling

if TYPE_CHECKING:
    from harness.answers import AnswerRule
    from harness.method import Bench, LanguageModel, Progress
    from harness.problems import Problem, Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Ask, TextTeacher
    from methods.training import TrainingSettings

BETWEEN = " ** "  # a sub-question and its solution on one line, as the Socratic form of GSM8K has it
CONCLUSION = "The answer is {gold}."
Steps = tuple[tuple[str, str], ...]  # (sub-question, solution)


@dataclass(frozen=True)
class Socratic:
    """A problem is taken apart, its parts are solved in order, and the last solution holds the answer.

    decompose_prompt: names {question}; the sub-questions follow, a line each.
    solve_prompt: names {question}, {history} and {sub_question}; a solution follows.
    history_line: names {sub_question} and {solution}; what is read of each step that came before.
    most_questions: later sub-questions are not asked.
    """

    decompose_prompt: str
    solve_prompt: str
    history_line: str
    most_questions: int = 10
    question_tokens: int = 128
    solution_tokens: int = 64
    batch: int = 32

    calculator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        needed = {
            "decompose_prompt": ("question",),
            "solve_prompt": ("question", "history", "sub_question"),
            "history_line": ("sub_question", "solution"),
        }
        for name, fields in needed.items():
            for key in fields:
                if "{" + key + "}" not in getattr(self, name):
                    raise ConfigError(f"decoding.{name}={getattr(self, name)!r}: must hold {{{key}}}")
        for name in ("most_questions", "question_tokens", "solution_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding.{name}={getattr(self, name)}: must be at least 1")

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """See Decoding. A problem without a sub-question has no answer."""
        companion = getattr(lm.module, "decomposer", None)
        asking = lm if companion is None else companion.opened(lm)
        prompts = [self.decompose_prompt.format(**problem.fields()) for problem in problems]
        texts = complete(asking, prompts, self.question_tokens, (), self.batch, progress, "sub-questions")
        questions = [sub_questions(text, self.most_questions) for text in texts]
        solved: list[list[tuple[str, str]]] = [[] for _ in problems]
        for step in range(max(map(len, questions), default=0)):
            open_rows = [row for row, own in enumerate(questions) if len(own) > step]
            asked = [self.solving(problems[row], solved[row], questions[row][step]) for row in open_rows]
            solutions = complete(lm, asked, self.solution_tokens, ("\n",), self.batch, progress, f"step {step + 1}")
            for row, solution in zip(open_rows, solutions, strict=True):
                solved[row].append((questions[row][step], solution.strip()))
        return [steps[-1][1] if steps else "" for steps in solved]

    def describe(self) -> str:
        """See Decoding."""
        return f"greedy, at most {self.most_questions} sub-questions of {self.solution_tokens} tokens"

    def solving(self, problem: Problem, steps: Sequence[tuple[str, str]], question: str) -> str:
        """What a solver reads before a solution."""
        history = "".join(self.history_line.format(sub_question=q, solution=s) for q, s in steps)
        return self.solve_prompt.format(**problem.fields(), history=history, sub_question=question)


def sub_questions(text: str, most: int) -> list[str]:
    """The lines that a decomposer wrote, the first `most` of them: one that repeats itself for ever ends there."""
    return [line.strip() for line in text.splitlines() if line.strip()][:most]


@dataclass(frozen=True)
class SocraticCoT:
    """Teaches to ask and to answer sub-questions.

    models: "two" students, stored together, or "one" that learns both.
    teacher_prompt: names {question}; asks for lines "sub-question ** solution". Only problems without sub-questions
        are asked; chains that end in a wrong answer, or have another form, are left out.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Socratic
    teacher_prompt: str
    models: Literal["one", "two"] = "two"
    new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.models not in ("one", "two"):
            raise ConfigError(f"method.models={self.models}: choose one or two")
        if "{question}" not in self.teacher_prompt:
            raise ConfigError(f"method.teacher_prompt={self.teacher_prompt!r}: must hold {{question}}")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Take apart, write, teach one student or two."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        if self.models == "one":
            student = self.student.make(base, bench)
            teach(student, lessons, {"decompose": 1.0, "solve": 1.0}, self.training, bench, "Socratic CoT")
            return settled(student)
        decomposer, solver = (
            self._taught(base, lessons, view, bench, first_step)
            for view, first_step in (("decompose", 0), ("solve", self.training.steps))
        )
        solver.module.decomposer = Companion.of(decomposer)
        return solver

    def _taught(
        self, base: LanguageModel, lessons: Sequence[Lesson], view: str, bench: Bench, first_step: int
    ) -> LanguageModel:
        """A student of one of the two tasks."""
        stage = replace(bench, scratch=bench.scratch / view)
        stage.scratch.mkdir(exist_ok=True)
        student = self.student.make(base, bench)
        own = write((lesson for lesson in lessons if view in lesson.views), student, stage, f"{view} lessons")
        teach(student, own, {view: 1.0}, self.training, stage, f"Socratic CoT, {view}", first_step)
        return settled(student)

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """Of every problem a lesson in asking and one in each solution, one by one."""
        for problem, steps in self._chains(ask, bench):
            bench.log.counts["kept answers"] += 1
            questions = "".join(f"\n{question}" for question, _ in steps)
            asking = View(self.decoding.decompose_prompt.format(**problem.fields()), questions)
            yield Lesson({"decompose": asking}, problem=problem.id)
            for number, (question, solution) in enumerate(steps):
                prompt = self.decoding.solving(problem, steps[:number], question)
                yield Lesson({"solve": View(prompt, f" {solution}")}, problem=problem.id)

    def _chains(self, ask: Ask, bench: Bench) -> Iterator[tuple[Problem, Steps]]:
        counts, seed = bench.log.counts, bench.generator.initial_seed()
        for problem in self.problems.read("train"):
            if problem.steps:
                counts["answers"] += 1
                yield problem, known_steps(problem)
        sampling = Sampling(new_tokens=self.new_tokens, stop=("\n\n",))
        requests = (
            Request(self.teacher_prompt.format(**problem.fields()), problem, sampling, seed)
            for problem in self.problems.read("train")
            if not problem.steps
        )
        for request, answers in ask(requests):
            for answer in answers:
                counts["answers"] += 1
                steps = read_steps(answer.text)
                if steps and self.rule.correct(steps[-1][1], request.problem):
                    yield request.problem, steps

    @property
    def rule(self) -> AnswerRule:
        """How answers are read."""
        return self.problems.rule


def read_steps(text: str) -> Steps:
    """Steps from lines "sub-question ** solution"; none where a line has another form."""
    lines = [line.partition(BETWEEN) for line in text.strip().splitlines() if line.strip()]
    if not all(question.strip() and mark and solution.strip() for question, mark, solution in lines):
        return ()
    return tuple((question.strip(), solution.strip()) for question, _, solution in lines)


def known_steps(problem: Problem) -> Steps:
    """The steps of a problem that has sub-questions; the last solution says the answer.

    Where the data have no solutions but facts (StrategyQA), the facts stand for them in order: one for each
    sub-question but the last, all that are left for the one before it.
    """
    steps = list(problem.steps)
    if not any(solution for _, solution in steps):
        facts, before = list(problem.facts), max(1, len(steps) - 1)
        for place in range(before):
            own = facts[place:] if place == before - 1 else facts[place : place + 1]
            steps[place] = (steps[place][0], " ".join(own) or "Not known.")
    question, solution = steps[-1]
    conclusion = CONCLUSION.format(gold=problem.gold)
    if solution.endswith(conclusion):
        return tuple(steps)
    return (*steps[:-1], (question, f"{solution} {conclusion}".strip()))
