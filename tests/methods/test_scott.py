"""SCOTT: both directions of a question, what of them is learned, and that a fair student follows its rationale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.decoding import Plain
from harness.errors import ConfigError
from harness.problems import ArithmeticProblems, made
from methods.distillation.lessons import Lesson, encoded, learn, paired, write
from methods.distillation.scott import BETWEEN, ContrastiveTeacher, Scott, against, wrong_answer
from methods.distillation.students import Truncated
from methods.distillation.text_teachers import Answer
from methods.examples import Batch
from methods.training import TrainingSettings, language_modeling_loss, logits_of
from tests.harness.tiny_models import language_model

TRAINING = TrainingSettings(steps=3, learning_rate=1e-2, batch_size=2)


def scott(train: int = 6, **changes) -> Scott:
    settings = {
        "problems": ArithmeticProblems(train=train, test=4),
        "teacher": ContrastiveTeacher(),
        "student": Truncated(1.0),
        "training": TRAINING,
        "decoding": Plain("[factual] {question}\n[factual]"),
        "teacher_prompt": "Q: {question}\nA: {answer}, why?",
        "factual_prompt": "[factual] {question}\n[factual]",
        "counterfactual_prompt": "[counterfactual] {question}\n[counterfactual]",
        "new_tokens": 12,
    }
    return Scott(**settings | changes)


@pytest.mark.parametrize(
    ("problem", "possible"),
    [
        (made("?", "red", choices=("red", "blue", "green")), {"blue", "green"}),
        (made("?", "B", choices=("1", "2", "3")), {"A", "C"}),
        (made("?", "yes"), {"no"}),
        (made("?", "10"), {str(n) for n in range(5, 16) if n != 10}),
        (made("?", "abc"), {"cba"}),
        (made("?", "abba"), {"not abba"}),
    ],
)
def test_a_wrong_answer_is_wrong_and_always_the_same(problem, possible):
    found = {wrong_answer(problem, seed) for seed in range(60)}
    assert found == possible
    assert wrong_answer(problem, 3) == wrong_answer(problem, 3)


@pytest.mark.parametrize("contrast", ["wrong", "empty"])
def test_each_answer_is_explained_against_the_other(contrast, bench):
    """The two prompts of a request differ in the answer alone; the second request has the roles exchanged."""
    method = scott(contrast=contrast)
    for problem in method.problems.read("train"):
        other = wrong_answer(problem, 0)
        prompt = {answer: f"Q: {problem.question}\nA: {answer}, why?" for answer in (problem.gold, other, "")}
        contraries = (other, problem.gold) if contrast == "wrong" else ("", "")
        first, second = method._requests(problem, bench)
        assert first.prompt == against(prompt[problem.gold], prompt[contraries[0]])
        assert second.prompt == against(prompt[other], prompt[contraries[1]])


def test_lessons_pair_the_two_explanations_and_leave_out_empty_ones(bench):
    method = scott(train=4)

    def ask(requests):
        for number, request in enumerate(requests):
            right = request.prompt.split(BETWEEN)[0].rpartition("A: ")[2]
            yield request, [Answer("" if number == 5 else f" because {right}")]

    lessons = list(method.lessons(ask, bench))
    problems = list(method.problems.read("train"))
    assert [lesson.problem for lesson in lessons] == [p.id for p in problems if p is not problems[2]]
    for lesson in lessons:
        problem = next(p for p in problems if p.id == lesson.problem)
        other = wrong_answer(problem, 0)
        assert lesson.views["factual"].response == f" because {problem.gold}, why? So the answer is {problem.gold}."
        assert lesson.views["counterfactual"].prompt.endswith(f" because {other}, why? So the answer is")
        assert lesson.views["counterfactual"].response == f" {other}."
        assert lesson.views["factual"].prompt.startswith("[factual]")
        assert lesson.views["counterfactual"].prompt.startswith("[counterfactual]")


def test_of_a_counterfactual_lesson_the_answer_alone_is_learned():
    """The gradient of the loss by the logits is 0 at all positions of the rationale, which still matters as input."""
    lm = language_model()
    lesson = scott().lesson(made("One and one?", "2"), "1 + 1 is 2.", "1 + 1 is 3.", "3")
    batch = Batch.of_examples([encoded(lesson, "counterfactual", lm.tokenizer)])
    logits = logits_of(lm.module, batch).detach().requires_grad_(True)

    class Fixed(torch.nn.Module):
        def forward(self, **_):
            return type("Output", (), {"logits": logits})

    language_modeling_loss(Fixed(), batch).backward()
    learned = logits.grad.abs().sum(-1)[0] > 0
    answer = len(lm.tokenizer(" 3.")["input_ids"]) + 1  # and the end mark
    assert learned.tolist() == [False] * (len(learned) - answer - 1) + [True] * answer + [False]

    other = scott().lesson(made("One and one?", "2"), "1 + 1 is 2.", "1 + 1 is 4.", "3")
    changed = Batch.of_examples([encoded(other, "counterfactual", lm.tokenizer)])
    assert language_modeling_loss(lm.module, batch) != language_modeling_loss(lm.module, changed)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum_of_both_directions(alpha, bench):
    lm = language_model()
    method = scott()
    lesson = method.lesson(made("One and one?", "2"), "1 + 1 is 2.", "1 + 1 is 3.", "3")
    lessons = write([lesson], lm, bench)
    weights = {"factual": 1 - alpha, "counterfactual": alpha}
    read = paired(lessons, weights, lm.tokenizer)
    batch = read(lm.module, Batch.of_examples([encoded(lesson, "factual", lm.tokenizer)]), None)
    parts = {
        name: language_modeling_loss(lm.module, Batch.of_examples([encoded(lesson, name, lm.tokenizer)]))
        for name in weights
    }
    expected = sum(weights[name] * parts[name] for name in weights)
    assert language_modeling_loss(lm.module, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_counterfactuals_it_is_fine_tuning_on_rationales_to_the_bit(bench, tmp_path):
    lm = language_model()
    method = scott(train=4, alpha=0.0)
    lessons = [method.lesson(p, p.rationale, "no", "0") for p in method.problems.read("train")]
    benches = [replace(bench, scratch=tmp_path / name) for name in ("both", "plain")]
    for each in benches:
        each.scratch.mkdir()
    both = learn(
        method.student,
        lm,
        write(lessons, lm, benches[0]),
        {"factual": 1.0, "counterfactual": 0.0},
        TRAINING,
        benches[0],
        "a",
    )
    only = [Lesson({"factual": lesson.views["factual"]}) for lesson in lessons]
    plain = learn(method.student, lm, write(only, lm, benches[1]), {"factual": 1.0}, TRAINING, benches[1], "b")
    for a, b in zip(both.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_answers_are_kept_by_both_prompts(bench):
    """Asked again, nothing is decoded; with another strength everything is."""
    lm = language_model()
    for strength, new in ((0.5, 8), (0.5, 0), (0.1, 8)):
        before = bench.log.counts["asked of the teacher"]
        method = scott(train=4, teacher=ContrastiveTeacher(strength=strength, batch=3))
        with method.teacher.opened(lm, bench) as ask:
            list(method.lessons(ask, bench))
        assert bench.log.counts["asked of the teacher"] - before == new


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"contrast": "none"}, "contrast"),
        ({"teacher_prompt": "{question}"}, "teacher_prompt"),
    ],
)
def test_values_out_of_bounds_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        scott(**changes)
    with pytest.raises(ConfigError, match="strength"):
        ContrastiveTeacher(strength=-1)
