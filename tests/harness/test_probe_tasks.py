from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import context, language_model

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.probes import tasks as module
from harness.probes.tasks import Tasks

PARAGRAPH = (
    "The old harbour of the town was rebuilt after the great storm, and the people who had lost their boats were "
    "given new ones by the council. For many years nobody spoke about that night. "
    "Only the keeper of the lighthouse still wrote letters in which he described the storm."
)


def cloze_utils():
    path = Path(module.BUILT_IN) / "wikipedia_cloze" / "utils.py"
    spec = importlib.util.spec_from_file_location("cloze_utils", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def folder(tmp_path):
    """Sixty made-up questions in the form of two packaged tasks."""
    arc = [
        {
            "question": f"What comes after {n}?",
            "choices": {"text": [str(n + 1), str(n + 2), f"{n} again"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[n % 3],
        }
        for n in range(60)
    ]
    gsm = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(60)]
    hellaswag = [
        {"query": f"Day {n}: he", "choices": ["sat.", "ran on.", "x", "yy"], "label": n % 4} for n in range(60)
    ]
    for name, rows in {"arc_easy": arc, "gsm8k": gsm, "hellaswag": hellaswag}.items():
        path = tmp_path / "data" / name / ("validation.jsonl" if name == "hellaswag" else "test.jsonl")
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "data")


def test_local_questions_are_asked_and_kept_and_compared(folder, tmp_path):
    probe = Tasks(["arc_easy", "hellaswag"], limit=24, data=folder)
    dense, other = language_model(0), language_model(1)
    ctx = context(tmp_path / "dense")
    found = {(m.metric, m.on[:8]): m for m in probe.measure(dense, ctx)}
    table = pd.read_parquet(ctx.samples / "tasks-arc_easy-hellaswag.parquet")
    assert set(table["metric"]) == {"accuracy", "accuracy_norm"}
    own = table[(table["task"] == "arc_easy") & (table["metric"] == "accuracy")]
    assert len(own) == 24
    assert own["doc_id"].tolist() != list(range(24))  # a sample, not the first
    accuracy = found["accuracy", "arc_easy"]
    assert accuracy.value == own["correct"].mean()
    assert accuracy.interval == statistics.wilson_interval(own["correct"].sum(), 24)
    assert "24 of 60 questions" in accuracy.on
    assert "v1.0" in accuracy.on

    compared = context(tmp_path / "other", dense=ctx.samples)
    against = {(m.metric, m.on[:8]): m for m in probe.measure(other, compared)}
    mine = pd.read_parquet(compared.samples / "tasks-arc_easy-hellaswag.parquet")
    mine = mine[(mine["task"] == "arc_easy") & (mine["metric"] == "accuracy")]
    assert mine["doc_id"].tolist() == own["doc_id"].tolist()
    assert against["flips", "arc_easy"].value == (mine["correct"].to_numpy() != own["correct"].to_numpy()).mean()
    difference = against["accuracy_difference", "arc_easy"]
    assert difference.value == pytest.approx(mine["correct"].mean() - own["correct"].mean())
    assert "McNemar p" in difference.note
    same = {m.metric: m for m in probe.measure(dense, context(tmp_path / "same", dense=ctx.samples))}
    assert same["flips"].value == 0
    assert same["flips_norm"].value == 0


def test_outcomes_are_right_when_the_right_choice_is_the_likeliest(folder, tmp_path):
    lm, ctx = language_model(), context(tmp_path)
    list(Tasks(["arc_easy"], limit=None, data=folder).measure(lm, ctx))
    table = pd.read_parquet(ctx.samples / "tasks-arc_easy.parquet").query("metric == 'accuracy'")
    rows = [json.loads(line) for line in (Path(folder) / "arc_easy/test.jsonl").read_text().splitlines()]
    for row, correct in zip(rows, table["correct"], strict=True):
        scores = []
        for choice in row["choices"]["text"]:
            ids = lm.tokenizer(f"Question: {row['question']}\nAnswer: {choice}", return_tensors="pt")["input_ids"]
            scores.append(-float(lm.engine.score(ids)[0, -len(choice) - 1 :].sum()))
        assert correct == (int(np.argmax(scores)) == "ABC".index(row["answerKey"]))


def test_generation_runs_under_a_chat_template(folder, tmp_path):
    lm = language_model()
    probe = Tasks(["gsm8k"], limit=2, data=folder, few_shot=0, chat_template=True)
    with pytest.raises(RunError, match="no chat template"):
        list(probe.measure(lm, context(tmp_path)))
    lm.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    found = list(probe.measure(lm, context(tmp_path)))
    assert [m.metric for m in found] == ["accuracy", "accuracy"]
    assert "flexible-extract" in found[0].on
    assert "chat template" in found[0].on


def test_one_task_asked_in_two_ways_is_paired_with_itself_in_each(folder, tmp_path):
    train = Path(folder) / "arc_easy/train.jsonl"
    train.write_text((Path(folder) / "arc_easy/test.jsonl").read_text())
    probes = [Tasks(["arc_easy"], limit=30, data=folder, few_shot=shots) for shots in (None, 3)]
    lm, dense = language_model(0), context(tmp_path / "dense")
    for probe in probes:
        list(probe.measure(lm, dense))
    for probe, shots in zip(probes, ("0-shot", "3-shot"), strict=True):
        found = list(probe.measure(lm, context(tmp_path / shots, dense=dense.samples)))
        assert {m.value for m in found if m.metric.startswith("flips")} == {0}
        assert all(shots in m.on for m in found)
    other = Tasks(["arc_easy"], limit=20, data=folder)  # of fewer questions, whose outcomes lie in the same file
    with pytest.raises(RunError, match="or in another way"):
        list(other.measure(lm, context(tmp_path / "limit", dense=dense.samples)))


def test_a_share_under_the_name_of_accuracy_is_refused_and_never_rounded_down():
    """lm-eval's truthfulqa_mc2 gives every question the probability of its true answers as `acc`."""
    assert [module._right_or_wrong(outcome, "any", "acc") for outcome in (0, 1.0, True)] == [0, 1, 1]
    with pytest.raises(RunError, match=r"truthfulqa_mc2 gives a question acc=0\.73"):
        module._right_or_wrong(0.73, "truthfulqa_mc2", "acc")


def test_worked_examples_reach_the_tasks_of_a_group(folder, tmp_path, monkeypatch):
    local = {task.config.task: task for task, _ in Tasks(["arc_easy"], data=folder)._load("arc_easy", None)}
    monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", lambda self: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", lambda self, names: {"tasks": local})
    local["arc_easy"].set_config("num_fewshot", None)  # as packaged
    ((task, _),) = Tasks(["mmlu"], few_shot=5)._load("mmlu", context(tmp_path))
    assert task.config.num_fewshot == 5


@pytest.mark.parametrize(
    ("right", "dense_right", "note"),
    [
        (60, None, ""),
        (29, None, "not told from guessing (25 %)"),
        (29, 60, "collapsed (25 %)"),
        (29, 29, "not told from guessing (25 %)"),
        (60, 29, ""),
        (0, 60, "collapsed (25 %)"),
    ],
)
def test_an_arm_that_may_have_guessed_is_said_to(right, dense_right, note):
    ours, dense = (None if n is None else pd.Series([1] * n + [0] * (100 - n)) for n in (right, dense_right))
    assert module._guessed(0.25, ours, dense) == note
    assert module._guessed(float("nan"), ours, dense) == ""  # answers that are written


def test_chance_is_one_of_the_choices_of_each_question(folder, tmp_path):
    ctx = context(tmp_path)
    found = {m.metric: m for m in Tasks(["arc_easy"], limit=None, data=folder).measure(language_model(), ctx)}
    table = pd.read_parquet(ctx.samples / "tasks-arc_easy.parquet")
    assert table["chance"].tolist() == [1 / 3] * len(table)
    likely = found["accuracy"].interval[0] <= 1 / 3
    assert found["accuracy"].note == ("not told from guessing (33 %)" if likely else "")
    written = Tasks(["gsm8k"], limit=None, data=folder, few_shot=0)
    list(written.measure(language_model(), ctx))
    assert pd.read_parquet(ctx.samples / "tasks-gsm8k-0shot.parquet")["chance"].isna().all()


def test_templates_are_compiled_once_a_task_and_not_once_a_question(folder, tmp_path, monkeypatch):
    from lm_eval.utils import env

    compiled = []
    plain = type(env).compile
    monkeypatch.setattr(
        type(env),
        "compile",
        lambda self, source, *more, **a: compiled.append(source) or plain(self, source, *more, **a),
    )
    list(Tasks(tasks=["arc_easy"], limit=None, data=str(folder)).measure(language_model(), context(tmp_path)))
    assert compiled
    assert len(compiled) == len(set(compiled))
    assert "from_string" not in vars(env)


def test_nothing_moves_the_global_generators(folder, tmp_path):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(Tasks(["arc_easy"], limit=5, data=folder).measure(language_model(), context(tmp_path)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_a_separator_of_lines_inside_a_question_ends_no_row(folder, tmp_path):
    """U+2028 may stand in JSON as it is; it does in GSM8K."""
    path = Path(folder) / "arc_easy/test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["question"] = "a\u2028b\x85c"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    ctx = context(tmp_path)
    list(Tasks(["arc_easy"], limit=None, data=folder).measure(language_model(), ctx))
    asked = pd.read_parquet(ctx.samples / "tasks-arc_easy.parquet").query("metric == 'accuracy'")
    assert len(asked) == len(rows)
    path.write_text(path.read_text()[:-3])
    with pytest.raises(RunError, match=f"line {len(rows)}: "):
        list(Tasks(["arc_easy"], data=folder).measure(language_model(), ctx))


def test_wrong_names_folders_and_splits_say_the_way_out(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean.*wikipedia_cloze"):
        Tasks(["wikipedia_close"])
    with pytest.raises(ConfigError, match=r"piqa/<split>\.jsonl"):
        Tasks(["piqa"], data=folder)
    with pytest.raises(ConfigError, match="limit=0"):
        Tasks(["arc_easy"], limit=0)
    with pytest.raises(RunError, match="few_shot=0"):
        list(Tasks(["gsm8k"], data=folder).measure(language_model(), context(tmp_path)))


def test_cloze_questions_name_a_word_of_their_passage():
    made = cloze_utils().questions(
        [PARAGRAPH, "Too short to be a storm.", PARAGRAPH.replace("described the storm", "slept")]
    )
    assert [q["document"] for q in made] == [0]
    assert made[0]["word"] == "storm"
    assert made[0]["context"].endswith("he described the")
    assert "storm" in made[0]["context"]


def test_the_built_in_task_asks_what_its_text_says(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.corpus.WikipediaSample.documents", lambda self, split: [PARAGRAPH] * 3)
    ctx = context(tmp_path)
    found = list(Tasks(["wikipedia_cloze"], limit=None).measure(language_model(), ctx))
    assert [m.metric for m in found] == ["accuracy"]
    assert "wikipedia_cloze v1.0, 0-shot, 3 questions" in found[0].on
    rows = [json.loads(x) for x in (ctx.cache / "tasks/wikipedia_cloze/test.jsonl").read_text().splitlines()]
    assert rows[0]["word"] == "storm"


def test_a_model_that_knows_the_word_is_right(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.corpus.WikipediaSample.documents", lambda self, split: [PARAGRAPH])
    lm, ctx = language_model(), context(tmp_path)
    seen = []

    def rigged(rows, head=None):  # always prefers the next byte of " storm"
        logits = torch.zeros(len(rows), 300)
        wanted = lm.tokenizer(" storm")["input_ids"]
        seen.append(len(rows))
        logits[range(len(wanted)), wanted] = 9.0
        return logits

    monkeypatch.setattr(lm.engine, "logits", rigged)
    assert [m.value for m in Tasks(["wikipedia_cloze"]).measure(lm, ctx)] == [1.0]
    assert seen == [len(" storm")]
