"""PaD: a teacher writes programs instead of reasoning, and an interpreter says which of them are right.

Program-aided Distillation (Zhu et al. 2024, https://arxiv.org/abs/2305.13888). Section 3.1: a teacher is shown
questions with Python solutions; programs that do not run to the right answer are left out. Section 3.2: a student
learns to write programs, and to mend wrong ones from their error messages (errors are injected into right programs,
and come from the student itself). Section 3.3: decoding searches line by line. Programs of a model are run in
`methods.distillation.sandbox` and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from harness.decoding import complete, complete_ids, encode
from harness.errors import ConfigError
from methods.distillation.lessons import Lesson, View, teach, write
from methods.distillation.programs import Step, corrupted, normalised, read_program, same_number, search_lines
from methods.distillation.sandbox import Outcome, Run, Sandbox, kernel_layers
from methods.distillation.students import settled
from methods.distillation.text_teachers import Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from harness.method import Bench, LanguageModel, Progress
    from harness.problems import Problem, Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Ask, TextTeacher
    from methods.training import TrainingSettings

WRONG_VALUE = "the result is wrong"  # the message of a program that runs, to another answer
INDENTATION = "    "


@dataclass(frozen=True)
class Programs:
    """A student writes a program, and what it returns is the answer.

    prompt: names {question}. repair_prompt: names {question}, {program} and {error}; what a student is asked when its
        program fails, up to `repairs` times. end: where a program ends besides the end mark.
    new_tokens: the most in a program.
    beams, candidates, verifier: search line by line with so many beginnings kept, so many lines drawn after each, and
        so much weight on whether a beginning runs. 1 and 1 are one greedy program without a search.
    temperature: of the lines that are drawn.
    """

    prompt: str
    repair_prompt: str
    new_tokens: int = 128
    end: str = "\n\n"
    repairs: int = 0
    beams: int = 1
    candidates: int = 1
    verifier: float = 0.0
    temperature: float = 0.7
    most_lines: int = 24
    batch: int = 32
    sandbox: Sandbox = field(default_factory=Sandbox)

    calculator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, text, fields in (
            ("prompt", self.prompt, ("question",)),
            ("repair_prompt", self.repair_prompt, ("question", "program", "error")),
        ):
            for key in fields:
                if "{" + key + "}" not in text:
                    raise ConfigError(f"decoding.{name}={text!r}: must hold {{{key}}}")
        for name, least in (("new_tokens", 1), ("beams", 1), ("candidates", 1), ("repairs", 0), ("most_lines", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"decoding.{name}={getattr(self, name)}: must be at least {least}")
        if self.temperature < 0 or self.verifier < 0:
            raise ConfigError("decoding.temperature and decoding.verifier must not be negative")

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """See Decoding: the value of each problem's program as a sentence, or the error it ended in."""
        outcomes = [outcome for _, outcome in self.solve(lm, problems, progress)]
        return [f"The answer is {written(outcome)}." if outcome.kind == "value" else "" for outcome in outcomes]

    def describe(self) -> str:
        """See Decoding."""
        how = f"{self.beams} beams over lines, {self.candidates} drawn" if self.searches else "greedy"
        repaired = f", up to {self.repairs} repairs" if self.repairs else ""
        return f"programs, {how}, at most {self.new_tokens} tokens{repaired}"

    @property
    def searches(self) -> bool:
        """Whether programs are searched for line by line."""
        return self.beams > 1 or self.candidates > 1

    def solve(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[tuple[str, Outcome]]:
        """Each problem's program and what became of it, after repairs."""
        asked = [problem.fields() for problem in problems]
        prompts = [self.prompt.format(**fields) for fields in asked]
        with self.sandbox.opened() as run:
            if self.searches:
                tracked = progress.track(prompts, "programs", len(prompts))
                programs = [self._search(lm, prompt, run) for prompt in tracked]
            else:
                programs = self._write(lm, prompts, progress)
            solved = [(program, run(program)) for program in programs]
            for _ in range(self.repairs):
                failed = [row for row, (_, outcome) in enumerate(solved) if outcome.kind != "value"]
                if not failed:
                    break
                wrong = [self.repair(asked[row]["question"], *solved[row]) for row in failed]
                for row, program in zip(failed, self._write(lm, wrong, progress), strict=True):
                    solved[row] = program, run(program)
        return solved

    def repair(self, question: str, program: str, outcome: Outcome) -> str:
        """What a student is asked to mend."""
        return self.repair_prompt.format(question=question, program=program, error=outcome.error or WRONG_VALUE)

    def _write(self, lm: LanguageModel, prompts: list[str], progress: Progress) -> list[str]:
        texts = complete(lm, prompts, self.new_tokens, (self.end,), self.batch, progress, "programs")
        return [read_program(text) for text in texts]

    def _search(self, lm: LanguageModel, prompt: str, run: Run) -> str:
        generator = torch.Generator().manual_seed(0)  # the same for each question, in any order

        def propose(beginnings: Sequence[Sequence[str]]) -> list[list[Step]]:
            texts = [prompt + "".join(f"{line}\n" for line in lines) for lines in beginnings]
            return self._lines(lm, texts, generator)

        def verify(beginnings: Sequence[Sequence[str]]) -> list[float]:
            return [float(run(closed(lines)).kind in ("value", "nothing")) for lines in beginnings]

        return read_program("\n".join(search_lines(propose, verify, self.beams, self.verifier, self.most_lines)))

    def _lines(self, lm: LanguageModel, texts: Sequence[str], generator: torch.Generator) -> list[list[Step]]:
        """Lines that may follow each text: the likeliest, and others that are drawn; each one once."""
        found: list[dict[str, Step]] = [{} for _ in texts]
        for number in range(self.candidates):
            chosen: list[Tensor] = []

            def choose(logits: Tensor, _step: int, number: int = number, chosen: list[Tensor] = chosen) -> Tensor:
                scores = logits.float().log_softmax(-1)
                if number == 0 or self.temperature == 0:
                    tokens = scores.argmax(-1)
                else:
                    shares = (logits.double() / self.temperature).softmax(-1).cpu()
                    tokens = torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)
                chosen.append(scores.gather(-1, tokens[:, None])[:, 0])
                return tokens

            prompts = [encode(lm, text, self.new_tokens) for text in texts]
            stops = [(("\n",), self.new_tokens)] * len(prompts)
            written_lines = complete_ids(lm, prompts, stops, self.new_tokens, choose)
            steps = torch.stack(chosen, -1).cpu()  # [texts, steps]
            for row, completion in enumerate(written_lines):
                length = max(1, len(completion.ids))
                goes_on = completion.text.strip() and "\n" in lm.tokenizer.decode(completion.ids)
                step = Step(completion.text, float(steps[row, :length].mean()), last=not goes_on)
                found[row].setdefault(step.line, step)
        return [list(lines.values()) for lines in found]


def closed(lines: Sequence[str]) -> str:
    """The beginning of a program as a program: a block that has no line yet gets one."""
    written_lines = [line for line in lines if line.strip()]
    if written_lines and written_lines[-1].rstrip().endswith(":"):
        last = written_lines[-1]
        return "\n".join([*written_lines, f"{last[: len(last) - len(last.lstrip())]}{INDENTATION}pass"])
    return "\n".join(written_lines)


def without_blank_lines(program: str) -> str:
    """A program as it is learned: decoding ends at a blank line."""
    return "\n".join(line for line in program.splitlines() if line.strip())


def written(outcome: Outcome) -> str:
    """The value of a program as people write it: 18 and not 18.0 or 1.8e+01, yes and not True."""
    value = outcome.value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    text = f"{value:.10g}"
    return text if "e" not in text else f"{value:.10f}".rstrip("0").rstrip(".")  # a reader of numbers knows no "e"


def is_right(outcome: Outcome, problem: Problem) -> bool:
    """Whether a program ran to the problem's answer."""
    return outcome.kind == "value" and same_number(written(outcome), problem.gold)


@dataclass(frozen=True)
class PaD:
    """Asks for programs, keeps those that run to the right answer, teaches them and how to mend wrong ones.

    teacher_prompt: names {question}; holds examples of programs.
    sampling: of programs; every different right one is kept (Section 3.1).
    corruptions: of each kept program, how many wrong versions with their messages the student learns to mend.
    repair_weight: of mending in the loss, beside 1 for writing; 0 leaves self-refinement out.
    rounds: how often the student's own failing programs are collected and learned from, each time with `training`.
    own_problems: of so many training questions, the first ones, in each round.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Programs
    teacher_prompt: str
    sampling: Sampling
    corruptions: int = 1
    repair_weight: float = 1.0
    rounds: int = 0
    own_problems: int = 256

    def __post_init__(self) -> None:
        if "{question}" not in self.teacher_prompt:
            raise ConfigError(f"method.teacher_prompt={self.teacher_prompt!r}: must hold {{question}}")
        for name, least in (("corruptions", 0), ("rounds", 0), ("own_problems", 1), ("repair_weight", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least {least}")

    def check_available(self) -> None:
        """Raise ConfigError where programs cannot be run safely: before a model loads."""
        if self.decoding.sandbox.kernel_required and not kernel_layers():
            raise ConfigError(
                "PaD runs programs that a model wrote, and this system isolates no process; run on Linux outside of a "
                "container that forbids it, or set method.decoding.sandbox.kernel_required=false for models you trust"
            )

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Ask, run, keep, corrupt, learn; then learn from the student's own mistakes."""
        weights = {"program": 1.0, "repair": self.repair_weight}
        student = self.student.make(base, bench)
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), student, bench)
        teach(student, lessons, weights, self.training, bench, "PaD")
        for number in range(1, self.rounds + 1):
            mistakes = list(self.mistakes(student, lessons, bench))
            if not mistakes:
                break  # nothing that it gets wrong among what it was taught
            stage = replace(bench, scratch=bench.scratch / f"refinement-{number}")
            stage.scratch.mkdir(exist_ok=True)
            mended = write(mistakes, student, stage, "own mistakes")
            done = number * self.training.steps
            teach(student, mended, weights, self.training, stage, f"PaD refinement {number}", first_step=done)
        return settled(student)

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every different right program, one by one, with a wrong version of it where one was found."""
        generator = torch.Generator().manual_seed(bench.generator.initial_seed())
        with self.decoding.sandbox.opened() as run:
            for problem, program in self._kept(ask, run, bench):
                question, response = problem.fields()["question"], without_blank_lines(program)
                wrong = [] if not self.repair_weight else list(self._wrong(problem, program, generator, run))
                bench.log.counts["corrupted programs"] += len(wrong)
                view = View(self.decoding.prompt.format(**problem.fields()), response)
                repairs = [{"repair": View(self.decoding.repair(question, *each), response)} for each in wrong]
                for more in repairs or [{}]:
                    yield Lesson({"program": view} | more, 1 / max(1, len(wrong)), problem.id)

    def _kept(self, ask: Ask, run: Run, bench: Bench) -> Iterator[tuple[Problem, str]]:
        """Right programs, each one once for its problem."""
        counts = bench.log.counts
        seed = bench.generator.initial_seed()
        requests = (
            Request(self.teacher_prompt.format(**problem.fields()), problem, self.sampling, seed)
            for problem in self.problems.read("train")
        )
        for request, answers in ask(requests):
            seen: set[str] = set()
            for program in (read_program(answer.text) for answer in answers):
                outcome = run(program)
                counts["answers"] += 1
                counts[f"programs: {outcome.kind}"] += 1
                if not is_right(outcome, request.problem):
                    continue
                counts["right programs"] += 1
                same = normalised(program)
                if same not in seen:
                    seen.add(same)
                    counts["kept answers"] += 1
                    yield request.problem, program

    def _wrong(
        self, problem: Problem, program: str, generator: torch.Generator, run: Run
    ) -> Iterator[tuple[str, Outcome]]:
        """Corrupted versions that fail, or run to another answer; at most `corruptions`."""
        found = 0
        for _, source in corrupted(program, generator) if self.corruptions else ():
            outcome = run(source)
            if not is_right(outcome, problem):
                yield source, outcome
                found += 1
                if found == self.corruptions:
                    return

    def mistakes(self, student: LanguageModel, lessons: Sequence[Lesson], bench: Bench) -> Iterator[Lesson]:
        """Lessons from what the student gets wrong itself, where a right program is known."""
        wanted = {}
        for lesson in lessons:
            wanted.setdefault(lesson.problem, lesson.views["program"])
            if len(wanted) == self.own_problems:
                break
        problems = [problem for problem in self.problems.read("train") if problem.id in wanted]
        once = replace(self.decoding, repairs=0)
        for problem, (program, outcome) in zip(problems, once.solve(student, problems, bench.progress), strict=True):
            if is_right(outcome, problem):
                continue
            right = wanted[problem.id]
            prompt = self.decoding.repair(problem.fields()["question"], program, outcome)
            bench.log.counts["own mistakes found"] += 1
            yield Lesson({"program": right, "repair": View(prompt, right.response)}, problem=problem.id)
