"""Lion: fair verdicts, what is hard, what is accepted as new, and pools that grow as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.answers import rouge_l, rule_named, words
from harness.errors import ConfigError
from harness.method import TrainingLog
from harness.problems import made
from methods.distillation.instructions import Instructed, Pool, ReserveTeacher
from methods.distillation.lion import (
    Lion,
    difference,
    read_instruction,
    read_scores,
    reference_score,
    told_apart,
)
from methods.distillation.students import Truncated
from methods.distillation.text_teachers import Answer, Sampling
from methods.training import TrainingSettings
from tests.harness.tiny_models import language_model

TRAINING = TrainingSettings(steps=2, learning_rate=1e-3, batch_size=2)
NAMES = ["oak", "elm", "ash", "fir", "yew", "box", "bay", "fig", "nut", "pea", "rye", "oat"]


class Trees:
    """Instructions that differ enough from each other, with known responses."""

    name, rule = "trees", rule_named("text")

    def read(self, split):
        for i, name in enumerate(NAMES):
            other = NAMES[(i + 5) % len(NAMES)]
            yield made(f"Compare {name} wood number {i} with {other}{i} please", f"{name} is harder than {other}")


def lion(**changes) -> Lion:
    settings = {
        "problems": Trees(),
        "teacher": ReserveTeacher(Trees()),
        "student": Truncated(1.0),
        "training": TRAINING,
        "decoding": Instructed(new_tokens=4),
        "hard_prompt": "{instruction}",
        "easy_prompt": "{instruction}",
        "referee_prompt": "{instruction}|{first}|{second}",
        "sampling": Sampling(),
        "creation": Sampling(),
        "judging": Sampling(),
        "initial": 4,
        "hard": 2,
        "easy": 2,
        "most_alike": 0.9,
    }
    return Lion(**settings | changes)


# ---- verdicts


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Both are fine.\n8 7", (8.0, 7.0)),
        ("First 10, then:\nScores: 9.5, 3", (9.5, 3.0)),
        ("7 6\nThat is my verdict.", (7.0, 6.0)),
        ("8/10", (8.0, 10.0)),
        ("0 11", None),
        ("8 7 6", None),
        ("Response 1 is better.", None),
        ("", None),
    ],
)
def test_scores_are_read_or_there_are_none(text, scores):
    assert read_scores(text) == scores


def test_exchanging_the_two_changes_the_sign():
    for a, b in [((8.0, 3.0), (4.0, 9.0)), ((5.0, 5.0), (1.0, 10.0))]:
        teacher_first, student_first = a, b
        exchanged = difference(student_first, teacher_first)
        assert difference(teacher_first, student_first) == -exchanged


def test_a_referee_that_likes_a_place_likes_nobody():
    """Whatever it gives to the first and the second response: twice, exchanged, that is 0."""
    for bias in [(10.0, 1.0), (1.0, 10.0), (7.0, 7.0)]:
        assert difference(bias, bias) == 0


def test_without_both_verdicts_an_instruction_is_neither_hard_nor_easy():
    assert difference(None, (1.0, 2.0)) is difference((1.0, 2.0), None) is None
    problems = [made(str(i), "") for i in range(5)]
    hard, easy = told_apart(problems, [1.0, 0.99, None, -3.0, 5.0], 1.0)
    assert hard == [problems[0], problems[4]]  # exactly the threshold is hard
    assert easy == [problems[1], problems[3]]


def test_the_teacher_as_a_referee_is_asked_in_both_orders(bench):
    pairs = [(made("Why?", "x"), "teacher's", "student's"), (made("How?", "x"), "a", "b")]
    asked = []

    def ask(requests):
        for request, text in zip(requests, ["9 3", "4 8", "5 5", "no verdict"], strict=True):
            asked.append(request.prompt)
            yield request, [Answer(text)]

    assert list(lion()._judged(pairs, ask, bench)) == [5.0, None]
    assert asked[:2] == ["Why?|teacher's|student's", "Why?|student's|teacher's"]


def test_the_reference_referee():
    rule = rule_named("number")
    assert reference_score(made("?", "12"), "3 + 9 = 12", "whatever", rule) == 10
    assert reference_score(made("?", "12"), "3 + 9 = 13", "whatever", rule) < 10
    unknown = made("?", "")
    assert reference_score(unknown, "police killed the gunman", "police kill the gunman", rule) == pytest.approx(7.75)
    assert reference_score(unknown, "", "police", rule) == 1


def test_a_student_equal_to_its_teacher_leaves_nothing_hard(bench, monkeypatch):
    method = lion()
    known = list(Trees().read("train"))
    monkeypatch.setattr(Instructed, "decode", lambda _self, _lm, problems, _progress: [p.gold for p in problems])
    with method.teacher.opened(language_model(), bench) as ask:
        hard, easy = method.discriminate(None, known, ask, bench)
    assert (hard, easy) == ([], known)
    monkeypatch.setattr(Instructed, "decode", lambda _self, _lm, problems, _progress: ["?" for _ in problems])
    with method.teacher.opened(language_model(), bench) as ask:
        assert method.discriminate(None, known, ask, bench) == (known, [])


# ---- what is new


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("Name four trees that bear nuts.", True),
        ("Name four\ntrees.", False),
        ("Name trees.", False),
        ("Write an instruction about four trees.", False),
        ("- Name four trees please.", False),
        ("Éa four trees please now.", False),
        ("word " * 40, False),
        ("", False),
    ],
)
def test_what_is_accepted_as_an_instruction(text, usable):
    assert (read_instruction(Answer(text), "Name six flowers that smell.") is not None) == usable


def test_what_was_cut_off_is_not_accepted():
    assert read_instruction(Answer("Name four trees that", finish="length"), "Name six flowers.") is None


def test_as_many_new_ones_from_hard_as_from_easy_and_all_unlike(bench):
    method = lion(hard=3, easy=2, most_alike=0.7)
    known = list(Trees().read("train"))[:4]
    cache = Pool((p.question for p in known), 0.7)
    with method.teacher.opened(language_model(), bench) as ask:
        new = method.generate(known[:2], known[2:], cache, ask, bench, 0)
    assert len(new) == 4
    texts = [p.question for p in (*known, *new)]
    for i, text in enumerate(texts[4:], start=4):
        assert max(rouge_l(words(text), words(other)) for other in texts[:i]) <= 0.7
    with method.teacher.opened(language_model(), bench) as ask:
        only = method.generate([], known, Pool(most_alike=0.9), ask, bench, 1)
    assert len(only) == 2


# ---- the loop


def test_pools_after_each_turn(bench, monkeypatch):
    """Turn t trains on new instructions alone; what the referee sees grows by them: 4, then 4 + 4."""
    trained, judged = [], []
    method = lion(iterations=3, hard=2, easy=2)
    write = Lion.lessons

    def lessons(self, pool, ask, bench):
        trained.append([problem.question for problem in pool])
        yield from write(self, pool, ask, bench)

    def discriminate(self, _student, known, _ask, _bench):
        judged.append(len(known))
        return list(known[:2]), list(known[2:])

    monkeypatch.setattr(Lion, "lessons", lessons)
    monkeypatch.setattr(Lion, "discriminate", discriminate)
    method.compress(language_model(), bench)
    assert [len(pool) for pool in trained] == [4, 4, 4]
    assert judged == [4, 8]
    assert len({question for pool in trained for question in pool}) == 12
    assert sorted(bench.log.curves["training loss"]) == list(range(1, 7))


def test_a_killed_run_ends_as_it_would_have(bench, tmp_path, monkeypatch):
    """Stopped after the second turn's training, started again in the same folder: the same student."""
    method = lion(iterations=3)
    whole = method.compress(language_model(), bench)
    again = replace(bench, scratch=tmp_path / "again", log=TrainingLog())
    again.scratch.mkdir()
    generate = Lion.generate

    def killed(self, *arguments):
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return generate(self, *arguments)

    monkeypatch.setattr(Lion, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        method.compress(language_model(), again)
    monkeypatch.setattr(Lion, "generate", generate)
    resumed = method.compress(language_model(), again)
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_responses_that_were_cut_off_are_not_learned(bench):
    pool = list(Trees().read("train"))[:3]

    def ask(requests):
        for request, answer in zip(
            requests, [Answer("Whole."), Answer("Cu", finish="length"), Answer(" ")], strict=True
        ):
            yield request, [answer]

    lessons = list(lion().lessons(pool, ask, bench))
    assert [lesson.views["response"].response for lesson in lessons] == [" Whole."]
    assert lessons[0].views["response"].prompt.endswith("### Response:")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"referee": "none"}, "referee"),
        ({"iterations": 0}, "iterations"),
        ({"most_alike": 2.0}, "most_alike"),
        ({"referee_prompt": "{first}"}, "referee_prompt"),
    ],
)
def test_values_out_of_bounds_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        replace(lion(), **changes)
