"""In-context learning distillation: episodes, objectives in their limits, votes, and reading examples as a skill."""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from harness.answers import rule_named
from harness.errors import ConfigError, RunError
from harness.problems import ArithmeticProblems, made
from harness.progress import NoProgress
from harness.task_pools import LabelTasks, TemplateTasks
from methods.distillation.in_context import (
    InContext,
    InContextDistillation,
    drawn,
    first_answer_positions,
    label_mask,
    objective,
    restricted_divergence,
    vote,
    with_labels,
)
from methods.distillation.students import Fresh, Truncated
from methods.distillation.teachers import InMemory, OnDisk
from methods.examples import Batch, Example, tokenized
from methods.training import TrainingSettings, language_modeling_loss, logits_of, token_losses
from tests.harness.tiny_models import language_model

TASKS = LabelTasks(train=24, test=12, tasks=(3, 2), few=6)
TRAINING = TrainingSettings(steps=2, learning_rate=1e-3, batch_size=2)
DATA = Path(os.environ.get("HARNESS_TEACHER_DATA", "missing")) / "p3_templates/p3_sample.jsonl"


def system(problems=TASKS, **changes) -> InContextDistillation:
    settings = {
        "problems": problems,
        "teacher": InMemory(),
        "student": Truncated(1.0),
        "training": TRAINING,
        "decoding": InContext(problems, shots=2, sets=3),
        "scope": "meta",
        "episodes": 8,
        "shots": 2,
    }
    return InContextDistillation(**settings | changes)


# ---- tasks


def test_taught_and_asked_tasks_are_different_ones():
    taught, asked = (set(TASKS.examples(split)) for split in ("train", "test"))
    assert len(taught) == 3
    assert len(asked) == 2
    assert not taught & asked
    for split, names in (("train", taught), ("test", asked)):
        assert {TASKS.task_of(problem) for problem in TASKS.read(split)} == names


def test_no_question_is_an_example_of_its_task():
    examples = {p.id for split in ("train", "test") for own in TASKS.examples(split).values() for p in own}
    assert not examples & {p.id for split in ("train", "test") for p in TASKS.read(split)}
    assert len(list(TASKS.read("test"))) == 12


def test_labels_of_a_task_are_balanced_and_mean_the_same_in_it():
    for own in TASKS.examples("test").values():
        golds = [problem.gold for problem in own]
        assert {golds.count(gold) for gold in set(golds)} == {3}
        for problem in own:
            kind = problem.question[0] <= "m"
            assert all((other.gold == problem.gold) == ((other.question[0] <= "m") == kind) for other in own)


def template_file(folder, rows=20):
    path = folder / "templates.jsonl"
    lines = []
    for family in ("one_set", "two_set", "three_set", "four_set"):
        for template in ("a", "b"):
            for i in range(rows):
                row = {
                    "prompt": f"{family} {template} {i}?",
                    "completion": "yes<|endoftext|>" if i % 2 else "no",
                    "template": f"{family}_{template}",
                }
                lines.append(json.dumps(row))
    lines += [
        json.dumps({"prompt": f"long {i}", "completion": "x" * 40 + str(i % 2), "template": "long_set_a"})
        for i in range(20)
    ]
    lines += [json.dumps({"prompt": f"same {i}", "completion": "yes", "template": "same_set_a"}) for i in range(20)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_templates_of_one_data_set_stay_together(tmp_path):
    """Only classification is kept, and no data set is both taught and asked."""
    tasks = TemplateTasks(str(template_file(tmp_path)), few=8)
    names = {split: set(tasks.examples(split)) for split in ("train", "test")}
    assert len(names["train"]) == 6
    assert len(names["test"]) == 2
    families = [{"_".join(name.split("_")[:2]) for name in names[split]} for split in ("train", "test")]
    assert not families[0] & families[1]
    asked = list(tasks.read("test"))
    assert len(asked) == 2 * (20 - 8)
    assert {p.gold for p in asked} == {"yes", "no"}
    assert not {p.id for p in asked} & {p.id for own in tasks.examples("test").values() for p in own}
    assert all(tasks.task_of(p) in names["test"] for p in asked)


def test_a_broken_line_is_said_with_its_number(tmp_path, capsys):
    path = template_file(tmp_path)
    with path.open("a", encoding="utf-8") as file:
        file.write('\n{"prompt": "no label"}\n')
    count = len(path.read_text(encoding="utf-8").splitlines())
    with pytest.raises(RunError, match=f"line {count}"):
        TemplateTasks(str(path)).examples("test")
    assert TemplateTasks(str(path), broken="skip").examples("test")
    assert f"line {count}" in capsys.readouterr().out


@pytest.mark.skipif(not DATA.exists(), reason="HARNESS_TEACHER_DATA names no folder with P3 templates")
def test_real_templates_make_tasks():
    tasks = TemplateTasks(str(DATA), few=8)
    taught, asked = (tasks.examples(split) for split in ("train", "test"))
    assert len(taught) > 10
    assert len(asked) > 2


# ---- episodes and prompts


@pytest.mark.parametrize("scope", ["meta", "multitask"])
def test_examples_never_hold_the_question(scope):
    method = system(scope=scope, episodes=200)
    split = "train" if scope == "meta" else "test"
    examples = {task: {p.id for p in own} for task, own in TASKS.examples(split).items()}
    asked = {p.id for p in TASKS.read("test")}
    for episode in method.drawn_episodes(0):
        task = TASKS.task_of(episode.question)
        assert len(episode.examples) == 2
        assert episode.question.id not in {p.id for p in episode.examples}
        assert {p.id for p in episode.examples} <= examples[task]
        assert episode.question.id not in asked  # what is measured is never trained on
        if scope == "multitask":
            assert episode.question.id in examples[task]


def test_a_text_is_examples_and_question_and_the_answer_is_learned():
    lm, method = language_model(), system()
    episode = method.drawn_episodes(0)[0]
    a, b = episode.examples
    text = f"{a.question}\nLabel: {a.gold}\n\n{b.question}\nLabel: {b.gold}\n\n{episode.question.question}\nLabel:"
    assert method.decoding.prompt(episode) == text
    example = tokenized(lm.tokenizer, text, f" {episode.question.gold}")
    assert lm.tokenizer.decode(example.response) == f" {episode.question.gold}<end>"


def test_examples_that_do_not_fit_are_left_out_first(bench):
    lm = language_model(max_position_embeddings=40)
    texts, _ = system(shots=4).texts(lm, bench)
    assert all(len(example) <= 40 for example in texts)
    assert bench.log.counts["examples that did not fit"] > 0


# ---- objectives


def logits(seed, rows=3, length=7, vocabulary=11):
    return torch.randn(rows, length, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(rows=3, length=7):
    return Batch.of_examples([Example(range(1, 4 + row), range(4 + row, length + 1)) for row in range(rows)])


def test_restricted_to_the_labels_it_is_a_divergence_of_them_alone():
    student, teacher = logits(0)[:, 0], logits(1)[:, 0]
    allowed = label_mask([[1, 4], [2, 3, 5], [0, 10]], 11)
    found = restricted_divergence(student, teacher, allowed)
    for row in range(3):
        p, q = (each[row][allowed[row]].float().softmax(-1) for each in (teacher, student))
        assert float(p.sum()) == pytest.approx(1)
        assert float(found[row]) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    shifted = student + torch.where(allowed, 0.0, 5.0)  # what is not allowed does not matter
    assert torch.allclose(restricted_divergence(shifted, teacher, allowed), found)
    assert torch.allclose(restricted_divergence(student, student, allowed), torch.zeros(3))


def test_gradients_of_the_restricted_divergence_are_finite():
    student = logits(0)[:, 0].float().requires_grad_(True)
    allowed = label_mask([[1, 4], [2, 3], [0, 10]], 11)
    restricted_divergence(student, logits(1)[:, 0].float(), allowed).sum().backward()
    assert student.grad.isfinite().all()
    assert (student.grad[~allowed] == 0).all()


def test_labels_stand_in_at_the_first_token_of_an_answer_only():
    batch = batch_of()
    soft = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    allowed = label_mask([[1, 4], [], [0, 10]], 11)
    found = with_labels(soft, logits(0), logits(1), batch, allowed)
    places = first_answer_positions(batch).tolist()
    assert places == [2, 3, 4]
    changed = (found != soft).nonzero().tolist()
    assert changed == [[0, 2], [2, 4]]  # the row without labels stays as it is


@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("language", [0.0, 0.7])
def test_the_objective_against_its_definition(hard, language):
    batch = batch_of()
    nll, soft, answers = torch.rand(3, 3, 6, generator=torch.Generator().manual_seed(4))
    expected = total = 0.0
    whole = total_whole = 0.0
    for row in range(3):
        for place in range(6):
            if batch.weights[row, place]:
                expected += float(hard * nll[row, place] + (1 - hard) * answers[row, place])
                total += 1
            if batch.attention[row, place + 1]:
                whole += float(hard * nll[row, place] + (1 - hard) * soft[row, place])
                total_whole += 1
    found = objective(nll, soft, answers, batch, hard, language)
    assert float(found) == pytest.approx(expected / total + language * whole / total_whole, rel=1e-5)


def test_without_examples_teacher_and_language_it_is_fine_tuning_to_the_bit():
    lm = language_model()
    texts = [tokenized(lm.tokenizer, "Label:", " red"), tokenized(lm.tokenizer, "What label:", " blue")]
    batch = Batch.of_examples(texts)
    own = token_losses(logits_of(lm.module, batch), batch)
    assert torch.equal(objective(own, None, None, batch, 1.0, 0.0), language_modeling_loss(lm.module, batch))


def test_a_student_equal_to_its_teacher_has_no_soft_loss(bench):
    """With the teacher's distribution alone nothing is left to learn: the first loss is 0."""
    method = system(hard=0.0, training=replace(TRAINING, steps=1))
    method.compress(language_model(), bench)
    assert bench.log.curves["training loss"][1] == pytest.approx(0, abs=1e-5)


def test_the_language_objective_fades_linearly():
    method = system(language=(1.0, 0.2), training=replace(TRAINING, steps=5))
    found = [method.language_weight(torch.tensor(step)) for step in range(6)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("teacher", [InMemory(), OnDisk(top=8)])
def test_both_kinds_of_teacher_teach(teacher, bench):
    method = system(teacher=teacher, labels_only=isinstance(teacher, InMemory), scope="multitask")
    method.compress(language_model(), bench)
    assert all(math.isfinite(value) for value in bench.log.curves["training loss"].values())


# ---- votes


def test_votes():
    assert vote([("a", -1.0), ("b", -0.1), ("a", -3.0)]) == "a"
    assert vote([("a", -1.0), ("b", -0.5)]) == "b"  # equal votes: the surer one


def test_a_vote_does_not_depend_on_the_order_of_the_sets():
    answers = [("a", -1.0), ("b", -0.25), ("a", -2.0), ("b", -4.0), ("c", -0.5)]
    assert len({vote(order) for order in permutations(answers)}) == 1


def test_the_likeliest_label_by_its_mean_log_probability():
    lm = language_model()
    decoding = InContext(TASKS)
    prompts, labels = ["x\nLabel:", "a longer one\nLabel:"], [("red", "green", "no"), ("yes", "no")]
    for prompt, own, (label, score) in zip(
        prompts, labels, decoding._likeliest(lm, prompts, labels, NoProgress()), strict=True
    ):
        by_hand = {}
        for each in own:
            ids = lm.tokenizer(f"{prompt} {each}")["input_ids"]
            losses = lm.engine.score(torch.tensor([ids]))[0, len(lm.tokenizer(prompt)["input_ids"]) - 1 :]
            by_hand[each] = -float(losses.mean())
        assert label == max(by_hand, key=by_hand.get)
        assert score == pytest.approx(by_hand[label], rel=1e-4)


def test_every_question_gets_one_of_its_labels():
    problems = list(TASKS.read("test"))
    texts = InContext(TASKS, shots=2, sets=2).decode(language_model(), problems, NoProgress())
    assert all(text in problem.choices for text, problem in zip(texts, problems, strict=True))


# ---- the skill


@dataclass(frozen=True)
class Mappings:
    """Two symbols mean two letters, drawn anew for every task: a memory of tasks is of no use."""

    tasks: int = 400
    name = "mappings"

    @property
    def rule(self):
        return rule_named("choice")

    def examples(self, split):
        return {
            f"{split}{n}": self._rows(f"{split}{n}", "xy" * 3) for n in range(self.tasks if split == "train" else 40)
        }

    def read(self, split):
        for task in self.examples(split):
            yield from self._rows(task, "xy", start=6)

    def task_of(self, problem):
        return problem.context.partition(" ")[0]

    def _rows(self, task, symbols, start=0):
        letters = random.Random(task).sample("abcdefgh", 2)
        return [
            made(symbol, letters["xy".index(symbol)], choices=tuple(sorted(letters)), context=f"{task} {start + n}")
            for n, symbol in enumerate(symbols)
        ]


def test_reading_examples_is_learned_and_works_on_new_tasks(bench):
    """Meta-ICT on random mappings: a student that only remembers is right half of the time on new ones."""
    problems = Mappings()
    decoding = InContext(problems, example="{question}{answer}", question="{question}", space="", shots=6, sets=1)
    method = system(
        problems,
        student=Fresh(),
        decoding=decoding,
        hard=1.0,
        language=(1.0, 1.0),
        episodes=4000,
        shots=6,
        training=TrainingSettings(steps=450, learning_rate=3e-3, batch_size=32, checkpoint_steps=1000),
    )
    asked = list(problems.read("test"))
    shape = {"initializer_range": 0.05, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    student = method.compress(language_model(**shape), bench)
    answers = decoding.decode(student, asked, NoProgress())
    right = sum(text == problem.gold for text, problem in zip(answers, asked, strict=True)) / len(asked)
    assert right > 0.8  # 1.0 here


# ---- what cannot be


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"scope": "none"}, "scope"),
        ({"hard": 2.0}, "hard"),
        ({"language": (1.0,)}, "language"),
        ({"episodes": 0}, "episodes"),
        ({"problems": ArithmeticProblems()}, "label_tasks"),
        ({"teacher": OnDisk()}, "labels_only"),
    ],
)
def test_what_cannot_be_is_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        system(**changes)


def test_prompts_and_tasks_have_bounds(tmp_path):
    with pytest.raises(ConfigError, match="question"):
        InContext(TASKS, question="Label:")
    with pytest.raises(ConfigError, match="few"):
        LabelTasks(few=1)
    with pytest.raises(ConfigError, match="path"):
        TemplateTasks("")
    with pytest.raises(RunError, match="fewer than two data sets"):
        TemplateTasks(str(template_file(tmp_path)), longest=1).examples("test")


def test_drawing_is_the_same_for_a_seed():
    pool = TASKS.examples("test")["new task 0"]
    question = pool[0]
    first, second = (drawn(pool, question, 3, random.Random(1)) for _ in range(2))
    assert first == second
    assert len(drawn(pool, question, 50, random.Random(1)).examples) == len(pool) - 1
