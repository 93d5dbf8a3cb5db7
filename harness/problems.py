"""Questions with right answers that students are taught on and asked: made on the spot, from files, or from the hub.

Teaching reads the training split and a probe asks the test split; a question that stands in both is left out of the
training split. Rows are read one by one, and a row that cannot be read is reported with its line.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from harness.answers import AnswerRule, evaluate_equation, rule_named
from harness.errors import ConfigError, RunError
from harness.json_lines import Broken, numbered_rows, pass_over

Split = Literal["train", "test"]
MISSES = 200  # questions in a row that were there before, after which there are no more
TEST_EVERY = 5  # one question in five is asked where a file has no splits of its own


@dataclass(frozen=True)
class Problem:
    """One question.

    gold: the right answer, as the rule of its problems reads it. context: what is read before the question.
    rationale: a worked solution without the final answer. equation: arithmetic whose value is the answer.
    program: Python that leaves the answer in the variable `answer`, or returns it from `solution()`.
    steps: (sub-question, its solution) in order.
    facts: what has to be known.
    """

    id: str
    question: str
    gold: str
    choices: tuple[str, ...] = ()
    context: str = ""
    rationale: str = ""
    equation: str = ""
    program: str = ""
    steps: tuple[tuple[str, str], ...] = ()
    facts: tuple[str, ...] = ()

    def fields(self) -> dict[str, str]:
        """What a prompt may name: {question} with context and choices as they are read, {gold}, {rationale}, …"""
        lettered = " ".join(f"({letter}) {choice}" for letter, choice in zip("abcdefghij", self.choices, strict=False))
        text = "\n".join(filter(None, [self.context, self.question]))
        return {
            "id": self.id,
            "question": f"{text}\nAnswer Choices: {lettered}" if lettered else text,
            "choices": lettered,
            "gold": self.gold,
            "rationale": self.rationale,
            "equation": self.equation,
            "program": self.program,
            "facts": " ".join(self.facts),
            "steps": "\n".join(f"{question} {solution}".strip() for question, solution in self.steps),
        }


class Problems(Protocol):
    """Questions in two splits that share none."""

    name: str

    @property
    def rule(self) -> AnswerRule:
        """How their answers are read."""

    def read(self, split: Split) -> Iterator[Problem]:
        """The questions of one split, one by one, in the same order every time."""


def made(question: str, gold: str, **more: Any) -> Problem:
    """A problem that is named by a digest of what it asks."""
    asked = "\x00".join([more.get("context", ""), question, *more.get("choices", ())])
    return Problem(hashlib.sha256(asked.encode()).hexdigest()[:16], question, gold, **more)


# ---- made on the spot


@dataclass(frozen=True)
class ArithmeticProblems:
    """Sentences about adding, taking away and multiplying small numbers, with worked solutions, from a seed.

    train, test: how many questions. operations: (fewest, most) of each.
    """

    train: int = 256
    test: int = 128
    operations: tuple[int, int] = (2, 3)
    seed: int = 0
    name: str = "arithmetic"

    def __post_init__(self) -> None:
        if self.train < 1 or self.test < 1:
            raise ConfigError(f"problems.train={self.train}, problems.test={self.test}: both must be at least 1")
        fewest, most = self.operations
        if not 1 <= fewest <= most <= 8:
            raise ConfigError(f"problems.operations={list(self.operations)}: two numbers from 1 to 8, in order")

    @property
    def rule(self) -> AnswerRule:
        """Numbers."""
        return rule_named("number")

    def read(self, split: Split) -> Iterator[Problem]:
        """See Problems. All questions differ; the first ones train."""
        draw, seen, misses = random.Random(self.seed), set(), 0
        wanted = self.train + self.test
        while len(seen) < wanted:
            problem = _arithmetic(draw, draw.randint(*self.operations))
            misses = misses + 1 if problem.id in seen else 0
            if misses == MISSES:
                raise RunError(
                    f"there are about {len(seen)} different questions of {list(self.operations)} operations, "
                    f"not {wanted}; ask for fewer, or for more operations"
                )
            if problem.id in seen:
                continue
            seen.add(problem.id)
            if (len(seen) <= self.train) == (split == "train"):
                yield problem


def _arithmetic(draw: random.Random, operations: int) -> Problem:
    name = draw.choice(["Ann", "Ben", "Eva", "Tom", "Zoe"])
    thing = draw.choice(["apples", "books", "coins", "pens"])
    have = draw.randint(2, 9)
    told, reasoned, program, steps = [f"{name} has {have} {thing}."], [], [f"answer = {have}"], []
    for _ in range(operations):
        kind = draw.choice(["finds", "loses", "doubles"])
        if kind == "loses" and have < 2:
            kind = "finds"
        number = 2 if kind == "doubles" else draw.randint(1, min(9, have - 1) if kind == "loses" else 9)
        sign = {"finds": "+", "loses": "-", "doubles": "*"}[kind]
        result = {"+": have + number, "-": have - number, "*": have * number}[sign]
        told.append(f"{name} doubles them." if kind == "doubles" else f"{name} {kind} {number}.")
        reasoned.append(f"{have} {sign} {number} = {result}.")
        program.append(f"answer = answer {sign} {number}")
        steps.append((f"How many after {told[-1][len(name) + 1 : -1]}?", reasoned[-1]))
        have = result
    told.append(f"How many {thing} now?")
    more = {"rationale": " ".join(reasoned), "program": "\n".join(program), "steps": tuple(steps)}
    return made(" ".join(told), str(have), **more)


# ---- from files and from the hub


@dataclass(frozen=True)
class TaskProblems:
    """Questions of a known data set, from files of the user's or from the hub.

    form: how a row is read, one of FORMS. answers: the name of the rule that reads its answers.
    path: rows to teach on, .jsonl, .jsonl.xz or a .json array. test_path: rows to ask; without one, rows of `path` with
        "split": "test", else every fifth question, chosen by its text.
    repository, configuration, train, test: where the hub has it, with the names of its splits.
    limit: only so many training questions, the first ones.
    broken: what happens to a row that cannot be read: "refuse" ends the run, "skip" reports it and goes on.
    """

    name: str
    form: str
    answers: str
    path: str = ""
    test_path: str = ""
    repository: str = ""
    configuration: str | None = None
    train: str = "train"
    test: str = "test"
    limit: int | None = None
    broken: Broken = "refuse"

    def __post_init__(self) -> None:
        rule_named(self.answers)
        if self.form not in FORMS:
            raise ConfigError(f"problems.form={self.form}: choose one of {', '.join(FORMS)}")
        if self.broken not in ("refuse", "skip"):
            raise ConfigError(f"problems.broken={self.broken}: choose refuse or skip")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"problems.limit={self.limit}: must be at least 1, or null for all")
        for key in ("path", "test_path"):
            value = getattr(self, key)
            if value and not Path(value).is_file():
                raise ConfigError(f"problems.{key}={value}: there is no such file")
        if not self.path and not self.repository:
            raise ConfigError(f"problems={self.name} is on no hub: give a file with problems.path=FILE")

    @property
    def rule(self) -> AnswerRule:
        """How answers are read."""
        return rule_named(self.answers)

    def read(self, split: Split) -> Iterator[Problem]:
        """See Problems."""
        if split == "test":
            return self._asked()
        asked = {problem.id for problem in self._asked()}
        return islice((problem for problem in self._of("train") if problem.id not in asked), self.limit)

    def _asked(self) -> Iterator[Problem]:
        """Test questions; one that stands there twice is asked once."""
        seen = set()
        for problem in self._of("test"):
            if problem.id not in seen:
                seen.add(problem.id)
                yield problem

    def _of(self, split: Split) -> Iterator[Problem]:
        if not self.path:
            yield from (problem for _, problem in self._formed(self._hub_rows(split), self.repository))
            return
        own = self.test_path if split == "test" and self.test_path else self.path
        for row, problem in self._formed(numbered_rows(Path(own), self.broken), own):
            if self.test_path or _split_of(row, problem) == split:
                yield problem

    def _formed(self, numbered: Iterable[tuple[int, Any]], place: str) -> Iterator[tuple[Any, Problem]]:
        for number, row in numbered:
            try:
                problem = FORMS[self.form](row)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                pass_over(place, number, f"no row of {self.form} ({type(error).__name__}: {error})", self.broken)
                continue
            yield row, problem

    def _hub_rows(self, split: Split) -> Iterator[tuple[int, Any]]:
        import datasets

        wanted = self.train if split == "train" else self.test
        try:
            found = datasets.load_dataset(self.repository, self.configuration, split=wanted)
        except (OSError, ValueError, ConnectionError) as error:
            raise RunError(
                f"could not read {self.repository} from the hub ({type(error).__name__}: {error}); give files instead: "
                "problems.path=FILE problems.test_path=FILE"
            ) from error
        yield from enumerate(found, 1)


def _split_of(row: dict[str, Any], problem: Problem) -> Split:
    if row.get("split") in ("train", "test"):
        return row["split"]
    return "test" if int(problem.id, 16) % TEST_EVERY == 0 else "train"


def _gsm8k(row: dict[str, Any]) -> Problem:
    """Solutions end in "#### answer"; in the Socratic form every line is "sub-question ** solution".

    What its calculator annotations say is a program.
    """
    from methods.distillation.programs import annotated_program

    reasoned, _, gold = row["answer"].rpartition("####")
    if not gold.strip():
        raise ValueError('the answer has no "####"')
    lines = re.sub(r"<<[^<>]*>>", "", reasoned).strip().split("\n")
    parts = [line.split(" ** ", 1) for line in lines]
    socratic = all(len(part) == 2 for part in parts)
    steps = tuple((question.strip(), solution.strip()) for question, solution in parts) if socratic else ()
    rationale = "\n".join(solution for _, solution in steps) if socratic else "\n".join(lines)
    program = annotated_program(reasoned) or ""
    gold = gold.strip().replace(",", "")
    return made(row["question"].strip(), gold, rationale=rationale, steps=steps, program=program)


def _svamp(row: dict[str, Any]) -> Problem:
    """The published form, one with the body and question joined, and one with only an equation as its label."""
    if "input" in row:
        question, equation = row["input"], row["label"]
    elif "Body" in row:
        question, equation = f"{row['Body'].strip().rstrip('.')}. {row['Question'].strip()}", row["Equation"]
    else:
        question, equation = row["question"], row["equation"]
    value = evaluate_equation(equation)
    stated = row.get("answer", row.get("Answer", value))
    if stated is None:
        raise ValueError(f"the equation {equation!r} has no value")
    gold = f"{float(stated):.12g}"
    equation = " ".join(equation.split())
    return made(question.strip(), gold, equation=equation, program=f"answer = {equation}")


def _aqua(row: dict[str, Any]) -> Problem:
    choices = tuple(re.sub(r"^[A-E]\s*\)\s*", "", option).strip() for option in row["options"])
    return made(row["question"].strip(), row["correct"].strip(), choices=choices, rationale=row.get("rationale", ""))


def _commonsense_qa(row: dict[str, Any]) -> Problem:
    choices = row["choices"]
    if isinstance(choices, dict):
        gold = choices["text"][choices["label"].index(row["answerKey"])]
        choices = choices["text"]
    else:
        gold = row["answer"]
    if gold not in choices:
        raise ValueError(f"the answer {gold!r} is none of its choices")
    return made(row["question"].strip(), gold, choices=tuple(choices), rationale=row.get("human_explanation", ""))


INFERENCES = ("entailment", "neutral", "contradiction")  # in the order of the published labels 0, 1, 2


def _inference(row: dict[str, Any]) -> Problem:
    label = row["label"] if isinstance(row["label"], str) else INFERENCES[row["label"]]
    premise, hypothesis = row["premise"].strip(), row["hypothesis"].strip()
    return made(
        hypothesis,
        label,
        choices=INFERENCES,
        context=premise,
        rationale=row.get("reason") or row.get("explanation_1") or "",
    )


def _strategyqa(row: dict[str, Any]) -> Problem:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"the answer {row['answer']!r} is neither true nor false")
    facts = tuple(row.get("facts") or ())
    explained = re.sub(r"^(Yes|No)\.?\s*", "", row.get("explanation") or " ".join(facts))
    steps = tuple((question, "") for question in row.get("decomposition") or ())
    return made(
        row["question"].strip(), "yes" if row["answer"] else "no", facts=facts, rationale=explained, steps=steps
    )


def _question_answer(row: dict[str, Any]) -> Problem:
    more = {key: row[key] for key in ("context", "rationale", "program") if row.get(key)}
    return made(row["question"].strip(), str(row["answer"]).strip(), choices=tuple(row.get("choices") or ()), **more)


def _instruction(row: dict[str, Any]) -> Problem:
    """An instruction and a response: Alpaca's fields, Self-Instruct's first instance, or P3's prompt and completion."""
    if "prompt" in row:
        return made(row["prompt"].strip(), row["completion"].removesuffix("<|endoftext|>").strip())
    instance = (row.get("instances") or [row])[0]
    context, response = instance.get("input") or "", instance["output"]
    return made(row["instruction"].strip(), response.strip(), context=context.strip())


FORMS: dict[str, Callable[[dict[str, Any]], Problem]] = {
    "gsm8k": _gsm8k,
    "svamp": _svamp,
    "aqua": _aqua,
    "commonsense_qa": _commonsense_qa,
    "inference": _inference,
    "strategyqa": _strategyqa,
    "question_answer": _question_answer,
    "instruction": _instruction,
}
