"""Instructions that a teacher makes up from others: prompts, parsing, and what keeps a pool of them diverse.

Shared by Lion (one new instruction per seed, hard or easy) and LaMini-LM (twenty at a time from three examples). An
instruction is a `Problem`: its question is what is asked, its context the input it comes with, its gold a response.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from harness.answers import rouge_l, words
from harness.decoding import complete
from harness.errors import ConfigError
from harness.problems import made
from methods.distillation.text_teachers import Answer, Request

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel, Progress
    from harness.problems import Problem, Problems
    from methods.distillation.text_teachers import Ask

# The wrapper that Alpaca, Lion and LaMini-LM's decoders are trained and asked with (LaMini-LM, model card, "Use").
WRAPPER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WRAPPER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
LIST_MARK = re.compile(r"^\s*(?:\(?\d{1,3}\s*[.):]|[-*•])\s*")


def wrapped(instruction: Problem) -> str:
    """An instruction as a student is asked, in training and in evaluation alike; the response follows."""
    asked = replace(instruction, context="").fields()["question"]
    if instruction.context:
        return WRAPPER_WITH_INPUT.format(instruction=asked, input=instruction.context)
    return WRAPPER.format(instruction=asked)


@dataclass(frozen=True)
class Instructed:
    """Instructions in the wrapper that they were taught in, answered greedily."""

    new_tokens: int = 128
    batch: int = 32

    calculator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding.{name}={getattr(self, name)}: must be at least 1")

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """See Decoding."""
        prompts = [wrapped(problem) for problem in problems]
        texts = complete(lm, prompts, self.new_tokens, ("\n\n###",), self.batch, progress, "responses")
        return [text.strip() for text in texts]

    def describe(self) -> str:
        """See Decoding."""
        return f"greedy, at most {self.new_tokens} tokens"


@dataclass(frozen=True)
class Creation(Request):
    """Asks for new instructions: `count` of them, like `seeds` ("hard" is very like them, "easy" is rarer)."""

    seeds: tuple[Problem, ...] = ()
    kind: Literal["hard", "easy", "any"] = "any"
    count: int = 1


def created(instruction: str, response: str = "") -> Problem:
    """A new instruction, whose gold is what the teacher says to it."""
    return made(instruction, response)


@dataclass(frozen=True)
class ReserveTeacher:
    """A teacher without a model: it makes up instructions by taking them from a reserve, and knows their responses.

    problems: whose training questions are the reserve. responses: templates over a problem's fields, the first that
    has all it names. Asked for a "hard" instruction it gives the one most like the seed, for an "easy" one the least
    like it, each only once; in a list any, as a list is written.
    """

    problems: Problems
    responses: tuple[str, ...] = ("{rationale} The answer is {gold}.", "{gold}")

    recorded: ClassVar[bool] = True

    @contextmanager
    def opened(self, base: LanguageModel, bench: Bench) -> Iterator[Ask]:
        """See TextTeacher."""
        reserve = {problem.question: problem for problem in self.problems.read("train")}
        unused = {question: words(question) for question in reserve}
        draw = random.Random(bench.generator.initial_seed())

        def make(request: Creation) -> str:
            for seed in request.seeds:
                unused.pop(seed.question, None)
            if request.kind == "any":
                taken = draw.sample(sorted(unused), min(request.count, len(unused)))
                text = "\n".join(f"{number}. {' '.join(each.split())}" for number, each in enumerate(taken, 1))
            else:
                alike = words(request.seeds[0].question)
                best = max if request.kind == "hard" else min
                taken = [best(unused, key=lambda each: rouge_l(alike, unused[each]))] if unused else []
                text = "".join(taken)
            for each in taken:
                del unused[each]
            return text

        def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, list[Answer]]]:
            for request in requests:
                if isinstance(request, Creation):
                    text = make(request)
                else:
                    text = self._response(reserve.get(request.problem.question))
                answers = [counted(Answer(text), request, base, bench)] if text else []
                yield request, answers

        yield ask

    def _response(self, problem: Problem | None) -> str:
        fields = problem.fields() if problem else {}
        for template in self.responses:
            if all(value for name, value in fields.items() if "{" + name + "}" in template) and fields:
                return template.format(**fields)
        return ""


def counted(answer: Answer, request: Request, base: LanguageModel, bench: Bench) -> Answer:
    """An answer with what it would cost in tokens of the student's tokenizer, counted into the log."""
    prompt, said = (len(base.tokenizer(text, verbose=False)["input_ids"]) for text in (request.prompt, answer.text))
    bench.log.counts["teacher prompts"] += 1
    bench.log.counts["teacher prompt tokens"] += prompt
    bench.log.counts["teacher tokens"] += said
    return replace(answer, prompt_tokens=prompt, tokens=said)


def parse_list(text: str, most: int, truncated: bool = False) -> list[str]:
    """The instructions of a list that a teacher wrote: at most `most`, marks and empty lines removed, each one once.

    "1." "1)" "(1)" "1:" "-" and "*" are marks. Where any line has a mark, lines without one go on with the item before
    (and are a preface before the first); where none has, each line is an item. truncated: the text was cut at its
    length, so its last item may not be whole and is left out.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    marked = any(LIST_MARK.match(line) for line in lines)
    items: list[str] = []
    for line in lines:
        if not marked or LIST_MARK.match(line):
            items.append(LIST_MARK.sub("", line).strip())
        elif items:
            items[-1] += f" {line.strip()}"
    if truncated:
        items = items[:-1]
    return list(dict.fromkeys(filter(None, items)))[:most]


class Pool:
    """Instructions accepted so far, and whether another one is new enough to join them.

    most_alike: greatest ROUGE-L with any of them; 1 keeps out copies alone.
    """

    def __init__(self, instructions: Iterable[str] = (), most_alike: float = 0.7) -> None:
        self.most_alike = most_alike
        self._words: list[list[str]] = []
        self._seen: set[str] = set()
        for instruction in instructions:
            self.add(instruction)

    def __len__(self) -> int:
        return len(self._words)

    def add(self, instruction: str) -> None:
        """Let an instruction in without asking."""
        self._words.append(words(instruction))
        self._seen.add(instruction.strip())

    def alike(self, instruction: str) -> float:
        """The greatest ROUGE-L with any instruction of the pool."""
        found = words(instruction)
        most = 0.0
        for other in self._words:
            # 2 min / (n + m) bounds the measure: most pairs differ too much in length to matter
            if found and other and 2 * min(len(found), len(other)) > most * (len(found) + len(other)):
                most = max(most, rouge_l(found, other))
        return most

    def admit(self, instruction: str) -> bool:
        """Let an instruction in if it is no copy and unlike all others; whether it was."""
        if instruction.strip() in self._seen or (self.most_alike < 1 and self.alike(instruction) > self.most_alike):
            return False
        self.add(instruction)
        return True
