"""Questions that a student is asked before and after it is taught, in the same way, and marked right or wrong."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from harness import statistics
from harness.answers import recalculated
from harness.decoding import Plain
from harness.errors import ConfigError, RunError
from harness.probes.tasks import accuracy, against
from harness.records import Measurement

if TYPE_CHECKING:
    import pandas as pd

    from harness.decoding import Decoding
    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel
    from harness.problems import Problem, Problems


@dataclass(frozen=True)
class Answers:
    """Share of right answers to the test questions, every question's outcome kept.

    decoding: how a student is asked; the method's own, and then the model before it is taught is asked so, too.
    limit: a seeded sample of so many questions, the same for every model; None asks all.
    """

    problems: Problems
    decoding: Decoding | None = None
    limit: int | None = 200

    stage: ClassVar[Stage] = "evaluate"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"answers limit={self.limit}: must be at least 1, or null for all")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Accuracy; against the model before it was taught, its accuracy, and the paired difference."""
        import pandas as pd

        decoding = self.decoding or Plain()
        asked, total = self._asked(context.seed)
        texts = decoding.decode(lm, asked, context.progress)
        rule = self.problems.rule
        outcomes = pd.DataFrame(
            {
                "id": [problem.id for problem in asked],
                "answer": texts,
                "given": [rule.extract(text, problem.choices) for text, problem in zip(texts, asked, strict=True)],
                "gold": [problem.gold for problem in asked],
                "correct": [int(rule.correct(text, problem)) for text, problem in zip(texts, asked, strict=True)],
            }
        )
        if rule.likeness is not None:
            outcomes["likeness"] = [rule.likeness(text, p.gold) for text, p in zip(texts, asked, strict=True)]
        context.samples.mkdir(parents=True, exist_ok=True)
        outcomes.to_parquet(context.samples / self._file, index=False)
        questions = f"{total} questions" if len(asked) == total else f"{len(asked)} of {total} questions"
        sample = "" if len(asked) == total else f" (sample {context.seed})"
        source = f", file {_digest(asked)}" if getattr(self.problems, "path", "") else ""
        on = f"{self.problems.name}, {questions}{sample}{source}, exact match ({rule.name}), asked as it is taught"
        given = f"{outcomes['given'].notna().mean():.0%} of the replies hold an answer; {decoding.describe()}"
        yield accuracy("accuracy", outcomes["correct"].to_numpy(), on, given)
        if decoding.calculator:
            redone = [rule.correct(recalculated(text), problem) for text, problem in zip(texts, asked, strict=True)]
            yield accuracy("accuracy_with_calculator", np.array(redone, dtype=int), on)
        if context.reference is not None:
            before = self._before(context.reference / self._file, outcomes)
            yield accuracy("accuracy_before", before["correct_dense"].to_numpy(), on)
            yield from against("accuracy", before, on, np.random.default_rng(context.seed))
            if rule.likeness is not None:
                yield from _likenesses(before, on, np.random.default_rng(context.seed))

    @property
    def _file(self) -> str:
        return f"answers-{self.problems.name}.parquet"

    def _asked(self, seed: int) -> tuple[list[Problem], int]:
        """The questions that are asked and how many there are: the first of an order that the seed draws by question.

        No more than those are kept in memory.
        """

        def place(problem: Problem) -> str:
            return hashlib.sha256(f"{seed}|{problem.id}".encode()).hexdigest()

        total = 0

        def counted() -> Iterable[Problem]:
            nonlocal total
            for problem in self.problems.read("test"):
                total += 1
                yield problem

        asked = list(counted()) if self.limit is None else heapq.nsmallest(self.limit, counted(), key=place)
        if not asked:
            raise RunError(f"problems={self.problems.name}: there is no test question; give problems.test_path=FILE")
        return asked, total

    def _before(self, path: Path, outcomes: pd.DataFrame) -> pd.DataFrame:
        """Outcomes of the same questions before the student was taught: columns correct, correct_dense."""
        import pandas as pd

        if not path.is_file():
            raise RunError(f"{path.name}: the dense run kept no answers; run it again (method=dense force=true)")
        both = outcomes.merge(pd.read_parquet(path), on="id", how="left", suffixes=("", "_dense"))
        if both["correct_dense"].isna().any():
            raise RunError("the dense run was asked other questions; run it again (method=dense force=true)")
        return both


def _digest(asked: Iterable[Problem]) -> str:
    """What tells questions of a user's file from those of another of the same name and number."""
    known = "\x00".join(f"{problem.id} {problem.gold}" for problem in asked)
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def _likenesses(both: pd.DataFrame, on: str, generator: np.random.Generator) -> Iterable[Measurement]:
    """ROUGE-L with known responses, before and after, and the paired difference, with bootstrap intervals."""
    ours, dense = both["likeness"].to_numpy(), both["likeness_dense"].to_numpy()
    for metric, values in (("rouge_l_before", dense), ("rouge_l", ours)):
        interval = statistics.mean_interval(values, 1, generator)
        yield Measurement(metric, float(values.mean()), "share", on, "higher", interval)
    interval = statistics.paired_difference_interval(ours, dense, 1, generator)
    yield Measurement("rouge_l_difference", float((ours - dense).mean()), "share", on, "higher", interval)
