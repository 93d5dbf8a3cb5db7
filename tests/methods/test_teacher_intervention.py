"""Interventions at inference: the budget decides who answers what, weights stay, the mental model is two prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import artifact
from harness.errors import ConfigError, RunError
from harness.problems import ArithmeticProblems, made
from harness.progress import NoProgress
from harness.task_pools import LabelTasks
from methods.distillation.interventions import RANKINGS
from methods.distillation.teacher_intervention import BUDGET, Intervention, TeacherIntervention, first_sentences
from tests.harness.tiny_models import language_model

PROBLEMS = ArithmeticProblems(train=12, test=5, operations=(1, 1))
DECODING = Intervention(PROBLEMS, examples=1, simulated=2, new_tokens=6)


def student(budget=None, seed=0):
    lm = language_model(seed, max_position_embeddings=2048)
    if budget is not None:
        setattr(lm.module.config, BUDGET, budget)
    return lm


@pytest.fixture(scope="module")
def asked():
    return list(PROBLEMS.read("test"))


@pytest.fixture(scope="module")
def ends(asked):
    """What the student says by itself, and with everything explained."""
    return [DECODING.decode(student(budget), asked, NoProgress()) for budget in (0.0, 1.0)]


@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_budget_counts_the_explained_questions(ranking, asked, ends):
    """⌊0.4 · 5⌋ = 2 answers are those of the explained student, the others its own."""
    own, helped = ends
    assert all(a != b for a, b in zip(own, helped, strict=True))
    found = replace(DECODING, ranking=ranking).decode(student(0.4), asked, NoProgress())
    assert sum(text == b for text, b in zip(found, helped, strict=True)) == 2
    assert sum(text == a for text, a in zip(found, own, strict=True)) == 3


def test_a_student_without_a_budget_answers_by_itself(asked, ends):
    assert DECODING.decode(student(), asked, NoProgress()) == ends[0]


def test_an_explanation_stands_in_place_of_the_student_s(asked, monkeypatch):
    """The student reads examples, question and explanation up to the answer, and writes the answer alone."""
    from methods.distillation import teacher_intervention

    seen = []

    def complete(_lm, prompts, new_tokens, *_):
        seen.append((prompts, new_tokens))
        return [" 7." for _ in prompts]

    monkeypatch.setattr(teacher_intervention, "complete", complete)
    found = replace(DECODING, ranking="random", sentences=1).decode(student(1.0), asked, NoProgress())
    assert found == ["So the answer is 7."] * 5
    (own, own_tokens), (helped, answer_tokens) = seen
    assert answer_tokens < own_tokens or own_tokens == 6
    for problem, without, with_it in zip(asked, own, helped, strict=True):
        told = first_sentences(problem.rationale, 1)
        assert without.endswith(f"Q: {problem.question}\nA:")
        assert with_it == f"{without} {told} So the answer is"
        assert with_it.count("So the answer is") == 2  # one example, and this one


def test_the_mental_model_s_prompts_differ_by_the_explanations(asked, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Intervention,
        "_probabilities",
        lambda _self, _lm, prompts, texts, first=False: seen.append((prompts, texts, first)) or torch.zeros(5),
    )
    DECODING.decode(student(0.4), asked, NoProgress())
    (plain, gold, first), (helped, same_gold, _) = seen
    assert not first  # of numbers all digits
    assert gold == same_gold == [f" {problem.gold}" for problem in asked]
    for problem, a, b in zip(asked, plain, helped, strict=True):
        assert "Explanation:" not in a
        assert a.endswith(f"Q: {problem.question}\nAI answer:")
        assert b.endswith(f"Q: {problem.question}\nExplanation: {problem.rationale}\nAI answer:")
        assert a.count("AI answer:") == b.count("AI answer:") == 1 + DECODING.simulated


def test_no_test_question_is_an_example():
    shown, simulated = DECODING._demonstrations()
    tested = {problem.id for problem in PROBLEMS.read("test")}
    assert not tested & {problem.id for problem in (*shown, *simulated)}
    assert not {problem.id for problem in shown} & {problem.id for problem in simulated}


def test_probabilities_are_the_model_s_own():
    """Mean over the tokens of a text, whatever is beside it in the batch."""
    lm = student()
    prompts, texts = ["Q: 1\nA:", "Q: a longer one\nA:"], [" 12", " yes"]
    found = DECODING._probabilities(lm, prompts, texts)
    for prompt, text, probability in zip(prompts, texts, found.tolist(), strict=True):
        ids = lm.tokenizer(prompt + text)["input_ids"]
        shares = lm.engine.score(torch.tensor([ids]))[0].neg().exp()
        start = len(lm.tokenizer(prompt)["input_ids"])
        by_hand = [float(shares[place - 1]) for place in range(start, len(ids))]
        assert probability == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_of_a_label_the_first_token_is_read():
    """The rest of a word is nearly certain once it has begun: a long label would look more likely than a short one."""
    lm = student()
    ids = lm.tokenizer("Q: 1\nA: yes")["input_ids"]
    shares = lm.engine.score(torch.tensor([ids]))[0].neg().exp()
    found = DECODING._probabilities(lm, ["Q: 1\nA:"], [" yes"], first=True)
    assert found.item() == pytest.approx(float(shares[-3]), rel=1e-4)  # the "y" of a tokenizer of bytes
    labels = LabelTasks(train=12, test=5)
    seen = []
    method = replace(DECODING, problems=labels, explanation="{gold}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Intervention, "_probabilities", lambda *given, **_: seen.append(given[4:]) or torch.zeros(len(given[2]))
        )
        method.decode(student(0.4), list(labels.read("test")), NoProgress())
    assert seen == [(True,), (True,)]


def test_a_student_is_as_sure_as_of_its_answer(asked, monkeypatch):
    """What it says before the answer is read, not counted."""
    lm, seen = student(), []
    monkeypatch.setattr(Intervention, "_probabilities", lambda _self, _lm, *given: seen.append(given) or torch.zeros(1))
    replace(DECODING, ranking="student_confidence")._confidence(lm, "", asked[:1], [" One. So the answer is 7."])
    assert seen == [([f"Q: {asked[0].question}\nA: One. So the answer is"], [" 7."])]


@pytest.mark.parametrize(
    ("text", "count", "beginning"),
    [
        ("One is 1.5 long. Two.", 1, "One is 1.5 long."),
        ("One? Two! Three.", 2, "One? Two!"),
        ("One. Two.", None, "One. Two."),
        ("No end", 1, "No end"),
    ],
)
def test_first_sentences(text, count, beginning):
    assert first_sentences(text, count) == beginning


def test_weights_stay_and_the_budget_is_stored(bench, tmp_path):
    lm = student()
    before = {name: tensor.clone() for name, tensor in lm.module.state_dict().items()}
    taught = TeacherIntervention(DECODING, 0.6).compress(lm, bench)
    assert all(torch.equal(tensor, before[name]) for name, tensor in taught.module.state_dict().items())
    artifact.save(taught, tmp_path / "taught")
    assert getattr(artifact.load(tmp_path / "taught", "cpu", torch.float32).module.config, BUDGET) == 0.6


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="budget"):
        TeacherIntervention(DECODING, 1.2)
    with pytest.raises(ConfigError, match="ranking"):
        replace(DECODING, ranking="best")
    with pytest.raises(ConfigError, match="teacher"):
        replace(DECODING, explanation="")
    with pytest.raises(RunError, match="without an explanation"):
        DECODING._known(made("Why?", "42"))
    with pytest.raises(RunError, match="too few"):
        replace(DECODING, examples=20).decode(student(), [], NoProgress())
