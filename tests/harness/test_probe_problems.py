"""Right answers before and after teaching: the same questions, the same decoding, paired."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import pytest
from tiny_models import context, language_model

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.probes.problems import Answers
from harness.problems import ArithmeticProblems, TaskProblems

PROBLEMS = ArithmeticProblems(train=20, test=60)


@dataclass
class Scripted:
    """Answers rightly where a function of the problem says so; remembers what it was asked."""

    right: object
    calculator: bool = False

    def decode(self, lm, problems, progress) -> list[str]:
        self.asked = [problem.id for problem in problems]
        return [f"The answer is {p.gold if self.right(p) else int(p.gold) + 1}." for p in problems]

    def describe(self) -> str:
        return "by script"


def measured(probe: Answers, where) -> dict:
    return {m.metric: m for m in probe.measure(language_model(), where)}


def test_accuracy_is_the_share_of_right_answers_of_a_seeded_sample(tmp_path):
    script = Scripted(lambda problem: problem.id < "6")
    where = context(tmp_path)
    found = measured(Answers(PROBLEMS, script, limit=40), where)["accuracy"]
    assert found.value == pytest.approx(sum(i < "6" for i in script.asked) / 40)
    assert found.interval == statistics.wilson_interval(round(found.value * 40), 40)
    assert "40 of 60 questions (sample 0)" in found.on
    assert "by script" in found.note
    kept = pd.read_parquet(where.samples / "answers-arithmetic.parquet")
    assert kept["id"].tolist() == script.asked
    assert kept["correct"].mean() == found.value
    everything = Scripted(lambda problem: True)
    assert measured(Answers(PROBLEMS, everything, limit=None), context(tmp_path / "all"))["accuracy"].value == 1
    assert everything.asked == [problem.id for problem in PROBLEMS.read("test")]


def test_two_files_of_as_many_questions_are_two_protocols(tmp_path):
    found = []
    for name, gold in (("a", "1"), ("b", "2"), ("c", "1")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"question": "What?", "answer": "' + gold + '", "split": "test"}')
        problems = TaskProblems("file", "question_answer", "number", path=str(path))
        found.append(measured(Answers(problems, Scripted(lambda p: True)), context(tmp_path / name))["accuracy"].on)
    assert found[0] == found[2] != found[1]
    assert found[0].startswith("file, 1 questions, file ")


def test_before_and_after_are_paired_by_question(tmp_path):
    before, after = Scripted(lambda p: p.id < "5"), Scripted(lambda p: p.id > "3")
    first = context(tmp_path / "dense")
    measured(Answers(PROBLEMS, before, limit=50), first)
    found = measured(Answers(PROBLEMS, after, limit=50), context(tmp_path / "student", dense=first.samples))
    assert after.asked == before.asked
    gained = sum(i > "3" and not i < "5" for i in after.asked)
    lost = sum(i < "5" and not i > "3" for i in after.asked)
    assert found["accuracy_before"].value == pytest.approx(sum(i < "5" for i in after.asked) / 50)
    assert found["accuracy_difference"].value == pytest.approx((gained - lost) / 50)
    assert f"McNemar p = {statistics.mcnemar(gained, lost):.3g}" in found["accuracy_difference"].note
    assert {m.on for m in found.values()} == {found["accuracy"].on}


def test_another_sample_before_cannot_be_compared(tmp_path):
    first = context(tmp_path / "dense")
    script = Scripted(lambda problem: True)
    with pytest.raises(RunError, match="kept no answers"):
        measured(Answers(PROBLEMS, script), context(tmp_path / "student", dense=first.samples))
    measured(Answers(PROBLEMS, script, limit=10), first)
    with pytest.raises(RunError, match="asked other questions"):
        measured(Answers(PROBLEMS, script, limit=50), context(tmp_path / "student", dense=first.samples))


def test_a_calculator_is_a_second_reading_of_the_same_answers(tmp_path):
    class Slips(Scripted):
        def decode(self, lm, problems, progress) -> list[str]:
            return [p.rationale.rpartition(" = ")[0] + " = 9999. The answer is 9999." for p in problems]

    found = measured(Answers(PROBLEMS, Slips(None, calculator=True), limit=20), context(tmp_path))
    assert found["accuracy"].value == 0
    assert found["accuracy_with_calculator"].value == 1


def test_a_model_is_asked_plainly_where_no_method_says_how(tmp_path):
    found = measured(Answers(PROBLEMS, None, limit=2), context(tmp_path))
    assert "at most 128 tokens" in found["accuracy"].note
    with pytest.raises(ConfigError, match="limit=0"):
        Answers(PROBLEMS, None, limit=0)


def test_responses_are_also_compared_by_likeness(tmp_path):
    """ROUGE-L with the known response before and after, by hand; a response said word for word is right, too."""
    from harness.answers import rouge_l, rule_named, words
    from harness.problems import made

    class Responses:
        name, rule = "responses", rule_named("response")

        def read(self, split):
            yield from (made(f"Question {i}?", f"the answer number {i} is long") for i in range(6))

    class Says(Scripted):
        def decode(self, lm, problems, progress) -> list[str]:
            return [p.gold if self.right(p) else "the number" for p in problems]

    share = rouge_l(words("the number"), words("the answer number 0 is long"))
    first = context(tmp_path / "dense")
    measured(Answers(Responses(), Says(lambda p: False)), first)
    found = measured(
        Answers(Responses(), Says(lambda p: int(p.question[9]) < 2)), context(tmp_path / "student", dense=first.samples)
    )
    assert found["rouge_l_before"].value == pytest.approx(share)
    assert found["rouge_l"].value == pytest.approx((2 + 4 * share) / 6)
    assert found["rouge_l_difference"].value == pytest.approx(2 * (1 - share) / 6)
    low, high = found["rouge_l_difference"].interval
    assert low <= found["rouge_l_difference"].value <= high
    assert found["accuracy"].value == pytest.approx(2 / 6)
