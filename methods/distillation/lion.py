"""Lion: a student is taught by instructions that it is bad at, found and made up anew in turns (Jiang et al. 2023).

https://arxiv.org/abs/2305.12870, Section 3. Imitation: the teacher answers a pool of instructions, the student learns
the answers. Discrimination: a referee scores what both say to everything so far; an instruction is hard where the
teacher is better by a point or more. Generation: from hard instructions new ones of their kind are made, from easy
ones rarer ones; they are the next pool.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal

from harness.answers import rouge_l, words
from harness.errors import ConfigError
from methods.distillation.instructions import Creation, Instructed, Pool, created, wrapped
from methods.distillation.lessons import Lesson, View, teach, write
from methods.distillation.students import settled
from methods.distillation.text_teachers import Request, Sampling

if TYPE_CHECKING:
    from harness.answers import AnswerRule
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem, Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Answer, Ask, TextTeacher
    from methods.training import TrainingSettings

Scores = tuple[float, float]
TWO_NUMBERS = re.compile(r"^\D*(\d+(?:\.\d+)?)\D+(\d+(?:\.\d+)?)\D*$")
LONGEST = 4  # times the words of its seed (authors' code)


@dataclass(frozen=True)
class Lion:
    """Imitates, discriminates, generates, `iterations` times.

    initial: instructions to begin with, the first training questions; None: all.
    hard, easy: new instructions of each kind in an iteration; as many of one as of the other are used.
    threshold: by how much the teacher's score must be greater for an instruction to be hard.
    most_alike: greatest ROUGE-L of a new instruction with any before it.
    referee: "reference" compares with what is known to be right, "teacher" asks it with `referee_prompt`, which names
        {instruction}, {first} and {second}; twice, with the two exchanged.
    hard_prompt, easy_prompt: name {instruction}.
    sampling: of responses; creation: of new instructions; judging: of verdicts.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Instructed
    hard_prompt: str
    easy_prompt: str
    referee_prompt: str
    sampling: Sampling
    creation: Sampling
    judging: Sampling
    referee: Literal["reference", "teacher"] = "reference"
    initial: int | None = None
    iterations: int = 3
    hard: int = 64
    easy: int = 64
    threshold: float = 1.0
    most_alike: float = 0.7

    def __post_init__(self) -> None:
        if self.referee not in ("reference", "teacher"):
            raise ConfigError(f"method.referee={self.referee}: choose reference or teacher")
        for name, least in (("iterations", 1), ("hard", 0), ("easy", 0), ("initial", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"method.{name}={value}: must be at least {least}")
        if not 0 <= self.most_alike <= 1:
            raise ConfigError(f"method.most_alike={self.most_alike}: must lie between 0 and 1")
        needed = {
            "hard_prompt": ("instruction",),
            "easy_prompt": ("instruction",),
            "referee_prompt": ("instruction", "first", "second"),
        }
        for name, fields in needed.items():
            for key in fields:
                if "{" + key + "}" not in getattr(self, name):
                    raise ConfigError(f"method.{name}: must hold {{{key}}}")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The adversarial loop; each stage has a folder of its own, so that a killed run goes on in it."""
        student = self.student.make(base, bench)
        pool = list(islice(self.problems.read("train"), self.initial))
        cache = Pool((problem.question for problem in pool), self.most_alike)
        known = list(pool)
        with self.teacher.opened(base, bench) as ask:
            for iteration in range(self.iterations):
                stage = replace(bench, scratch=bench.scratch / f"iteration-{iteration + 1}")
                stage.scratch.mkdir(exist_ok=True)
                lessons = write(self.lessons(pool, ask, bench), student, stage)
                first = iteration * self.training.steps
                teach(student, lessons, {"response": 1.0}, self.training, stage, f"Lion {iteration + 1}", first)
                if iteration + 1 == self.iterations:
                    break
                hard, easy = self.discriminate(student, known, ask, bench)
                pool = self.generate(hard, easy, cache, ask, bench, iteration) or pool
                known += [problem for problem in pool if problem not in known]
        return settled(student)

    # ---- imitation

    def lessons(self, pool: Iterable[Problem], ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """The teacher's responses as they are learned, one by one; those that were cut off are left out."""
        for request, answers in ask(self._responses(pool, bench)):
            for answer in answers:
                bench.log.counts["answers"] += 1
                if answer.finish == "stop" and answer.text.strip():
                    bench.log.counts["kept answers"] += 1
                    view = View(wrapped(request.problem), f" {answer.text.strip()}")
                    yield Lesson({"response": view}, problem=request.problem.id)

    def _responses(self, pool: Iterable[Problem], bench: Bench) -> Iterator[Request]:
        seed = bench.generator.initial_seed()
        for problem in pool:
            yield Request(wrapped(problem), problem, self.sampling, seed)

    # ---- discrimination

    def discriminate(
        self, student: LanguageModel, known: Sequence[Problem], ask: Ask, bench: Bench
    ) -> tuple[list[Problem], list[Problem]]:
        """Hard and easy instructions of all so far; those without a verdict are in neither."""
        said = {
            request.problem.id: answers[0].text for request, answers in ask(self._responses(known, bench)) if answers
        }
        asked = [problem for problem in known if problem.id in said]
        own = self.decoding.decode(student, asked, bench.progress)
        pairs = [(problem, said[problem.id].strip(), text) for problem, text in zip(asked, own, strict=True)]
        if self.referee == "reference":
            rule = self.problems.rule
            verdicts = [tuple(reference_score(p, text, a, rule) for text in (a, b)) for p, a, b in pairs]
            differences: list[float | None] = [a - b for a, b in verdicts]
        else:
            differences = list(self._judged(pairs, ask, bench))
        hard, easy = told_apart(asked, differences, self.threshold)
        counts = bench.log.counts
        counts["hard instructions"] += len(hard)
        counts["easy instructions"] += len(easy)
        counts["without a verdict"] += len(asked) - len(hard) - len(easy)
        return hard, easy

    def _judged(self, pairs: Sequence[tuple[Problem, str, str]], ask: Ask, bench: Bench) -> Iterator[float | None]:
        """Teacher's score minus student's, of both orders of the two."""
        seed = bench.generator.initial_seed()
        requests = (
            Request(
                self.referee_prompt.format(instruction=asked_of(problem), first=first, second=second),
                None,
                self.judging,
                seed,
            )
            for problem, teacher, student in pairs
            for first, second in ((teacher, student), (student, teacher))
        )
        verdicts = (read_scores(answers[0].text) if answers else None for _, answers in ask(requests))
        for first, second in zip(verdicts, verdicts, strict=True):
            yield difference(first, second)

    # ---- generation

    def generate(
        self,
        hard: Sequence[Problem],
        easy: Sequence[Problem],
        cache: Pool,
        ask: Ask,
        bench: Bench,
        iteration: int,
    ) -> list[Problem]:
        """New instructions, as many from hard as from easy ones where there are both; they join the cache."""
        seed = bench.generator.initial_seed() + iteration
        draw = random.Random(seed)
        new = [
            list(islice(self._accepted(kind, seeds, prompt, draw, seed, count, cache, ask, bench), count))
            for kind, seeds, prompt, count in (
                ("hard", hard, self.hard_prompt, self.hard),
                ("easy", easy, self.easy_prompt, self.easy),
            )
        ]
        fewest = min(map(len, new)) if all(new) else max(map(len, new))
        bench.log.counts["new instructions"] += sum(min(len(own), fewest) for own in new)
        return [problem for own in new for problem in own[:fewest]]

    def _accepted(
        self,
        kind: Literal["hard", "easy"],
        seeds: Sequence[Problem],
        prompt: str,
        draw: random.Random,
        seed: int,
        count: int,
        cache: Pool,
        ask: Ask,
        bench: Bench,
    ) -> Iterator[Problem]:
        """New instructions that pass the filters; no more than four tries for each that is wanted."""
        if not seeds or not count:
            return
        chosen = (draw.choice(seeds) for _ in range(4 * count))
        requests = (
            Creation(prompt.format(instruction=asked_of(each)), None, self.creation, seed + number, (each,), kind)
            for number, each in enumerate(chosen)
        )
        for request, answers in ask(requests):
            for answer in answers:
                instruction = read_instruction(answer, request.seeds[0].question)
                if instruction is None or not cache.admit(instruction):
                    bench.log.counts["refused instructions"] += 1
                    continue
                yield created(instruction)


def asked_of(problem: Problem) -> str:
    """An instruction with the input it comes with, on one page."""
    return replace(problem, context="").fields()["question"] + (f"\n{problem.context}" if problem.context else "")


def reference_score(problem: Problem, text: str, teacher: str, rule: AnswerRule) -> float:
    """A deterministic referee's score, 1 to 10: 10 for a right answer, else by ROUGE-L with what is known to be right.

    That is the problem's own response, or the teacher's where it has none.
    """
    if problem.gold and rule.correct(text, problem):
        return 10.0
    return 1 + 9 * rouge_l(words(text), words(problem.gold or teacher))


def read_scores(text: str) -> Scores | None:
    """The two scores that a referee ends with, each from 1 to 10: the last line with two numbers and no others."""
    for line in reversed(text.strip().splitlines()):
        found = TWO_NUMBERS.match(line)
        if found:
            first, second = float(found[1]), float(found[2])
            return (first, second) if 1 <= first <= 10 and 1 <= second <= 10 else None
    return None


def difference(first: Scores | None, second: Scores | None) -> float | None:
    """Teacher's mean score minus the student's, of a verdict with the teacher first and one with it second.

    None without both verdicts: it must not count as "easy".
    """
    if first is None or second is None:
        return None
    return (first[0] - first[1] + second[1] - second[0]) / 2


def told_apart(
    problems: Sequence[Problem], differences: Sequence[float | None], threshold: float
) -> tuple[list[Problem], list[Problem]]:
    """Hard ones, where the teacher is better by `threshold` or more, and easy ones; without a verdict neither."""
    hard, easy = [], []
    for problem, own in zip(problems, differences, strict=True):
        if own is not None:
            (hard if own >= threshold else easy).append(problem)
    return hard, easy


def read_instruction(answer: Answer, seed: str) -> str | None:
    """The new instruction in an answer, or None: cut off, too short or too long, odd, or about instructions."""
    text = " ".join(answer.text.split())
    count = len(text.split())
    usable = (
        answer.finish == "stop"
        and 3 < count <= LONGEST * max(len(seed.split()), 4)
        and text[0].isascii()
        and text[0].isalnum()
        and "instruction" not in text.lower()
    )
    return text if usable else None
