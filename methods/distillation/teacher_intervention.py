"""Can language models teach weaker agents? A teacher explains the questions where it helps most (Saha et al. 2023).

https://arxiv.org/abs/2306.09299. Nothing is trained: a student answers questions from a few examples, and a teacher
with a budget puts its explanation in place of the student's on some of them (Section 3). Which ones is a matter of the
teacher's mental model of the student: it simulates the student's answer without and with an explanation, from examples
of both, and explains where the right answer gains most (Section 4). The budget is stored with the model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from harness.decoding import batches, complete, encode, padded
from harness.errors import ConfigError, RunError
from methods.distillation.interventions import RANKINGS, balanced, explained, priority

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel, Progress
    from harness.models import ModelSource
    from harness.problems import Problem, Problems

BUDGET = "explained_share"  # field of the model's configuration
CONCLUSION = " So the answer is"
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Intervention:
    """A student answers with its own explanations, or with the teacher's where the budget goes.

    problems: whose training questions are examples; they need explanations of their own ({rationale} or `explanation`).
    explanation: template of a problem's fields, from which a human teacher's explanations are read ("{facts}"); empty:
        the teacher writes them after `teacher_prompt`, which names {question}.
    teacher: a model that explains, and simulates the student. None: explanations are known, and the student's own
        weights simulate it.
    sentences: of an explanation, only the first ones are told (Section 5: one in mathematics, where more would hold
        the answer); None: all.
    ranking: which questions are explained first, one of `interventions.RANKINGS`; "true_utility" and "oracle" look at
        right answers and bound the others.
    examples: demonstrations of a student's prompt. simulated: of the mental model's two prompts.
    """

    problems: Problems
    explanation: str = "{rationale}"
    teacher: ModelSource | None = None
    teacher_prompt: str = ""
    sentences: int | None = None
    ranking: str = "utility"
    examples: int = 4
    simulated: int = 4
    simulation_prompt: str = "Simulate an AI model's answer for the given question.\n\n"
    new_tokens: int = 100
    batch: int = 16
    seed: int = 0
    cache: str | None = None

    calculator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise ConfigError(f"decoding.ranking={self.ranking}: choose one of {', '.join(RANKINGS)}")
        if not self.explanation and (self.teacher is None or "{question}" not in self.teacher_prompt):
            raise ConfigError(
                "decoding.explanation is empty: give decoding.teacher a model and decoding.teacher_prompt a {question} "
                'or read explanations from the problems, as decoding.explanation="{rationale}"'
            )
        for name in ("examples", "simulated", "new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding.{name}={getattr(self, name)}: must be at least 1")
        if self.sentences is not None and self.sentences < 1:
            raise ConfigError(f"decoding.sentences={self.sentences}: must be at least 1, or null for all")

    def describe(self) -> str:
        """See Decoding."""
        return f"greedy from {self.examples} examples, explained by {self.ranking} within the model's budget"

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """See Decoding. A model without a budget answers by itself."""
        budget = getattr(lm.module.config, BUDGET, 0.0)
        shown, simulated = self._demonstrations()
        prefix = "".join(f"{_asked(p)} {self._known(p)}{CONCLUSION} {p.gold}.\n\n" for p in shown)
        own = self._own(lm, prefix, problems, progress)
        if not budget:
            return own
        teacher = self._teacher(lm)
        told, sure = self._explanations(teacher, problems, progress)
        if self.ranking in ("utility", "misaligned", "before", "after"):
            before, after = self._mental_model(lm, teacher, prefix, simulated, problems, told, progress)
        else:
            before = after = torch.zeros(len(problems))
        needs_outcomes = self.ranking in ("true_utility", "oracle")
        answers = self._explained(lm, prefix, problems, told, progress) if needs_outcomes else own
        rule = self.problems.rule
        mask = explained(
            priority(
                self.ranking,
                before=before,
                after=after,
                confidence=self._confidence(lm, prefix, problems, own),
                teacher=sure(),
                right_before=torch.tensor([rule.correct(text, p) for text, p in zip(own, problems, strict=True)]),
                right_after=torch.tensor([rule.correct(text, p) for text, p in zip(answers, problems, strict=True)]),
                generator=torch.Generator().manual_seed(self.seed),
            ),
            budget,
        )
        chosen = mask.nonzero()[:, 0].tolist()
        replies = self._explained(lm, prefix, [problems[i] for i in chosen], [told[i] for i in chosen], progress)
        return [replies[chosen.index(i)] if mask[i] else text for i, text in enumerate(own)]

    # ---- the student

    def _own(self, lm: LanguageModel, prefix: str, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """What it says by itself: an explanation, then an answer."""
        prompts = [prefix + _asked(problem) for problem in problems]
        return complete(lm, prompts, self.new_tokens, ("\n",), self.batch, progress, "student")

    def _explained(
        self, lm: LanguageModel, prefix: str, problems: Sequence[Problem], told: Sequence[str], progress: Progress
    ) -> list[str]:
        """Its answers after the teacher's explanations, which stand in place of its own."""
        prompts = [f"{prefix}{_asked(p)} {text}{CONCLUSION}" for p, text in zip(problems, told, strict=True)]
        answers = complete(lm, prompts, ANSWER_TOKENS, ("\n",), self.batch, progress, "student, explained")
        return [f"{CONCLUSION.strip()}{answer}" for answer in answers]

    def _confidence(self, lm: LanguageModel, prefix: str, problems: Sequence[Problem], own: Sequence[str]) -> Tensor:
        """The probability of its own answers [N]; asked for only where the ranking needs it."""
        if self.ranking != "student_confidence":
            return torch.zeros(len(problems))
        return self._certainty(lm, [prefix + _asked(p) for p in problems], own)

    # ---- the teacher

    def _teacher(self, lm: LanguageModel) -> LanguageModel:
        if self.teacher is None:
            return lm
        from pathlib import Path

        from harness.wheels import default_cache

        reference = next(lm.module.parameters())
        folder = Path(self.cache) if self.cache else default_cache()
        return self.teacher.load(folder, str(reference.device), reference.dtype)[0]

    def _known(self, problem: Problem) -> str:
        """The explanation that comes with a problem, or its rationale where the teacher writes its own."""
        text = " ".join((self.explanation or "{rationale}").format(**problem.fields()).split())
        if not text:
            raise RunError(
                f"{problem.question[:60]!r} comes without an explanation; choose a template of what these problems "
                "have, for instance 'method.decoding.explanation=\"{facts}\"', or other problems"
            )
        return text

    def _explanations(
        self, teacher: LanguageModel, problems: Sequence[Problem], progress: Progress
    ) -> tuple[list[str], Callable[[], Tensor]]:
        """What it tells of each question, and how sure it is of its own answer [N]; the known answers are certain."""
        if self.explanation:
            told = [first_sentences(self._known(problem), self.sentences) for problem in problems]
            return told, lambda: torch.ones(len(problems))
        prompts = [self.teacher_prompt.format(**problem.fields()) for problem in problems]
        texts = complete(teacher, prompts, self.new_tokens, ("\n",), self.batch, progress, "teacher")
        told = [first_sentences(" ".join(text.partition(CONCLUSION)[0].split()), self.sentences) for text in texts]
        return told, lambda: self._certainty(teacher, prompts, texts)

    def _mental_model(
        self,
        lm: LanguageModel,
        teacher: LanguageModel,
        prefix: str,
        simulated: Sequence[Problem],
        problems: Sequence[Problem],
        told: Sequence[str],
        progress: Progress,
    ) -> tuple[Tensor, Tensor]:
        """Probabilities [N] that the student is right without and with the explanation, as the teacher sees it."""
        rule = self.problems.rule
        shown, _ = self._explanations(teacher, simulated, progress)
        said = [self._own(lm, prefix, simulated, progress), self._explained(lm, prefix, simulated, shown, progress)]
        before, after = (
            [rule.extract(text, p.choices) or "unknown" for text, p in zip(texts, simulated, strict=True)]
            for texts in said
        )
        taken = balanced(before, self.simulated)  # as many of each answer, so that none is expected for itself
        without = "".join(f"{_question(simulated[i])}\nAI answer: {before[i]}\n\n" for i in taken)
        with_it = "".join(
            f"{_question(simulated[i])}\nExplanation: {shown[i]}\nAI answer: {after[i]}\n\n" for i in taken
        )
        gold = [f" {problem.gold}" for problem in problems]
        plain = [f"{self.simulation_prompt}{without}{_question(p)}\nAI answer:" for p in problems]
        helped = [
            f"{self.simulation_prompt}{with_it}{_question(p)}\nExplanation: {text}\nAI answer:"
            for p, text in zip(problems, told, strict=True)
        ]
        first = self.problems.rule.name != "number"  # of a label the first token, of a number all digits
        return self._probabilities(teacher, plain, gold, first), self._probabilities(teacher, helped, gold, first)

    def _certainty(self, lm: LanguageModel, prompts: Sequence[str], texts: Sequence[str]) -> Tensor:
        """The probability of the answer that a text concludes with, after its own explanation [N]."""
        parts = [text.partition(CONCLUSION) for text in texts]
        read = [f"{prompt}{text}{CONCLUSION}" for prompt, (text, _, _) in zip(prompts, parts, strict=True)]
        return self._probabilities(lm, read, [answer or " " for _, _, answer in parts])

    def _probabilities(
        self, lm: LanguageModel, prompts: Sequence[str], texts: Sequence[str], first: bool = False
    ) -> Tensor:
        """Mean probability of a text's tokens after its prompt [N] (Section 4.1: of a number's digits).

        first: that of its first token alone.
        """
        from harness.progress import NoProgress

        found = torch.zeros(len(prompts))
        pairs = [
            (encode(lm, a, 1), lm.tokenizer(b, add_special_tokens=False)["input_ids"])
            for a, b in zip(prompts, texts, strict=True)
        ]
        lengths = [len(a) + len(b) for a, b in pairs]
        for some in batches(lengths, self.batch, NoProgress(), "mental model"):
            losses = lm.engine.score(padded([[*pairs[i][0], *pairs[i][1]] for i in some], left=False)[0])
            for row, index in enumerate(some):
                start, end = len(pairs[index][0]) - 1, lengths[index] - 1
                if first:  # of a byte's tokenizer, not the space before it
                    start += next(
                        (n for n, token in enumerate(pairs[index][1]) if lm.tokenizer.decode(token).strip()), 0
                    )
                    end = start + 1
                found[index] = losses[row, start:end].neg().exp().mean()
        return found

    def _demonstrations(self) -> tuple[list[Problem], list[Problem]]:
        """Training questions that a student's prompt shows, and others that the mental model learns from."""
        pool = list(self.problems.read("train"))
        wanted = self.examples + 2 * self.simulated
        if len(pool) < self.examples + self.simulated:
            raise RunError(
                f"{len(pool)} training questions are too few for {self.examples} examples and {self.simulated} of the "
                "mental model; lower method.decoding.examples and method.decoding.simulated"
            )
        drawn = random.Random(self.seed).sample(pool, min(wanted, len(pool)))
        return drawn[: self.examples], drawn[self.examples :]


def _question(problem: Problem) -> str:
    return f"Q: {problem.fields()['question']}"


def _asked(problem: Problem) -> str:
    return f"{_question(problem)}\nA:"


def first_sentences(text: str, count: int | None) -> str:
    """The beginning of a text up to its `count`-th end of a sentence; decimal points are none."""
    return text if count is None else " ".join(re.split(r"(?<=[.!?])\s+", text)[:count])


@dataclass(frozen=True)
class TeacherIntervention:
    """Gives a student a budget of explanations; its weights stay as they are.

    budget: share of the questions that are explained, 0 to 1. decoding: how; see Intervention.
    """

    decoding: Intervention
    budget: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise ConfigError(f"method.budget={self.budget}: must lie between 0 and 1, a share of the questions")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Note the budget in the model's configuration."""
        setattr(base.module.config, BUDGET, float(self.budget))
        return base
