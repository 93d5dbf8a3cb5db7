"""LaMini-LM: small models learn from very many instructions, most of them made up by the teacher (Wu et al. 2023).

https://arxiv.org/abs/2304.14402, Section 3. The teacher is shown three instructions and asked for twenty like them,
or for twenty about given topics; then it responds to each. A student learns the responses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import ConfigError
from methods.distillation.instructions import Creation, Instructed, Pool, created, parse_list, wrapped
from methods.distillation.lessons import Lesson, View, learn, write
from methods.distillation.text_teachers import Request, Sampling

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from harness.problems import Problem, Problems
    from methods.distillation.students import Student
    from methods.distillation.text_teachers import Ask, TextTeacher
    from methods.training import TrainingSettings

SOURCES = ("without_topic", "with_topic", "original")
TOPICS = Path(__file__).with_name("topics.txt")
REFUSAL = re.compile(r"^(I'm sorry|I am sorry|Sorry|As an AI|I cannot|I can't|I apologi[sz]e)", re.IGNORECASE)


@dataclass(frozen=True)
class LaMini:
    """Asks for instructions, then for responses; teaches the responses.

    mixture: how many instructions from where: "without_topic" and "with_topic" are made up, "original" are the
        training questions themselves.
    example_prompt, topic_prompt: name {examples}, and {topics}; {count} is how many are asked for at once.
    example_line: how an example is shown, names {instruction}.
    examples, topics: how many are shown. count: new instructions asked for at once.
    topics_file: a topic a line; empty: those that come with this project.
    """

    problems: Problems
    teacher: TextTeacher
    student: Student
    training: TrainingSettings
    decoding: Instructed
    mixture: Mapping[str, int]
    example_prompt: str
    topic_prompt: str
    example_line: str
    sampling: Sampling
    creation: Sampling
    examples: int = 3
    topics: int = 3
    count: int = 20
    topics_file: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.mixture) - set(SOURCES)
        if unknown or not sum(self.mixture.values()) or min(self.mixture.values()) < 0:
            raise ConfigError(
                f"method.mixture={dict(self.mixture)}: numbers of {', '.join(SOURCES)}, at least one above 0"
            )
        for name in ("examples", "topics", "count"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        needed = {
            "example_prompt": ("examples", "count"),
            "topic_prompt": ("examples", "topics", "count"),
            "example_line": ("instruction",),
        }
        for name, fields in needed.items():
            for key in fields:
                if "{" + key + "}" not in getattr(self, name):
                    raise ConfigError(f"method.{name}: must hold {{{key}}}")
        if self.topics_file and not Path(self.topics_file).is_file():
            raise ConfigError(f"method.topics_file={self.topics_file}: there is no such file")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Make up, respond, learn."""
        with self.teacher.opened(base, bench) as ask:
            lessons = write(self.lessons(ask, bench), base, bench)
        return learn(self.student, base, lessons, {"response": 1.0}, self.training, bench, "LaMini-LM")

    def lessons(self, ask: Ask, bench: Bench) -> Iterator[Lesson]:
        """A lesson for every whole response that is no refusal, one by one."""
        counts, seed = bench.log.counts, bench.generator.initial_seed()
        requests = (
            Request(wrapped(problem), problem, self.sampling, seed) for _, problem in self.instructions(ask, bench)
        )
        for request, answers in ask(requests):
            for answer in answers:
                text = answer.text.strip()
                counts["answers"] += 1
                if text and answer.finish == "stop" and not REFUSAL.match(text):
                    counts["kept answers"] += 1
                    yield Lesson({"response": View(wrapped(request.problem), f" {text}")}, problem=request.problem.id)

    def instructions(self, ask: Ask, bench: Bench) -> Iterator[tuple[str, Problem]]:
        """(where it is from, instruction) of the whole mixture, one by one; no made-up one is a copy of another."""
        originals = islice(self.problems.read("train"), self.mixture.get("original", 0))
        for problem in originals:
            bench.log.counts["instructions: original"] += 1
            yield "original", problem
        if not any(self.mixture.get(source, 0) for source in SOURCES[:2]):
            return
        seeds = list(self.problems.read("train"))
        pool = Pool((problem.question for problem in seeds), most_alike=1.0)
        for source in SOURCES[:2]:
            new = self._made_up(source, seeds, pool, ask, bench)
            for problem in islice(new, self.mixture.get(source, 0)):
                bench.log.counts[f"instructions: {source}"] += 1
                yield source, problem

    def _made_up(self, source: str, seeds: Sequence[Problem], pool: Pool, ask: Ask, bench: Bench) -> Iterator[Problem]:
        """New instructions without end, until a hundred lists in turn bring nothing new."""
        draw = random.Random(f"{bench.generator.initial_seed()} {source}")
        topics = self._topics() if source == "with_topic" else []

        def requests() -> Iterator[Creation]:
            number = 0
            while True:
                number += 1
                shown = tuple(draw.sample(seeds, min(self.examples, len(seeds))))
                about = draw.sample(topics, min(self.topics, len(topics)))
                yield Creation(self.prompt(shown, about), None, self.creation, number, shown, "any", self.count)

        fruitless = 0
        for request in requests():
            before = len(pool)
            for _, answers in ask([request]):
                for answer in answers:
                    for text in parse_list(answer.text, self.count, answer.finish == "length"):
                        if pool.admit(text):
                            yield created(text)
            fruitless = 0 if len(pool) > before else fruitless + 1
            if fruitless == 100:
                return

    def prompt(self, shown: Sequence[Problem], topics: Sequence[str]) -> str:
        """What the teacher is asked: exactly these examples, and topics if there are any."""
        examples = "\n".join(self.example_line.format(instruction=problem.question) for problem in shown)
        template = self.topic_prompt if topics else self.example_prompt
        return template.format(examples=examples, topics=", ".join(topics), count=self.count)

    def _topics(self) -> list[str]:
        lines = Path(self.topics_file or TOPICS).read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
