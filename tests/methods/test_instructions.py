"""Instructions: lists as teachers write them, ROUGE-L against the textbook, and pools that stay diverse."""

from __future__ import annotations

import pytest
import torch

from harness.answers import common_subsequence, rouge_l, rule_named, words
from harness.problems import made
from harness.progress import NoProgress
from methods.distillation import instructions
from methods.distillation.instructions import (
    Creation,
    Instructed,
    Pool,
    ReserveTeacher,
    parse_list,
    wrapped,
)
from methods.distillation.text_teachers import Request
from tests.harness.tiny_models import language_model


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1. Name a tree.\n2. Sort these.", ["Name a tree.", "Sort these."]),
        ("1) Name a tree.\n2) Sort these.", ["Name a tree.", "Sort these."]),
        ("(1) Name a tree.\n\n(2) Sort these.", ["Name a tree.", "Sort these."]),
        ("- Name a tree.\n* Sort these.", ["Name a tree.", "Sort these."]),
        ("Name a tree.\nSort these.", ["Name a tree.", "Sort these."]),
        (
            "Here are two:\n1. Name a tree\nthat bears nuts.\n2. Sort these.",
            ["Name a tree that bears nuts.", "Sort these."],
        ),
        ("1. Twice\n2. Twice\n3. Once", ["Twice", "Once"]),
        ("1.\n2. Real", ["Real"]),
        ("", []),
    ],
)
def test_lists_are_read_as_they_are_written(text, items):
    assert parse_list(text, 20) == items


def test_a_list_has_no_more_than_was_asked_for_and_no_torn_end():
    text = "\n".join(f"{i}. Instruction {i}" for i in range(1, 31))
    assert len(parse_list(text, 20)) == 20
    assert parse_list("1. Whole\n2. Tor", 20, truncated=True) == ["Whole"]


def textbook(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_common_subsequence_is_the_textbooks(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 80, (2,), generator=generator).tolist()
    first, second = (
        [str(w) for w in torch.randint(0, 6, (length,), generator=generator).tolist()] for length in lengths
    )
    assert common_subsequence(first, second) == textbook(first, second) == common_subsequence(second, first)


def test_rouge_l():
    """Lin 2004's example: "police killed the gunman" shares three of four words with "police kill the gunman"."""
    assert rouge_l(words("police killed the gunman"), words("Police kill the gunman.")) == pytest.approx(0.75)
    assert rouge_l(words("a b c"), words("a b c")) == 1
    assert rouge_l([], words("a")) == 0


def test_a_pool_admits_what_is_unlike_all_before():
    """Against the brute force: every pair of admitted instructions is at most as alike as the bound."""
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{w}" for w in torch.randint(0, 7, (6,), generator=generator).tolist()) for _ in range(120)]
    pool = Pool(most_alike=0.7)
    kept: list[str] = []
    for text in texts:
        alike = max((rouge_l(words(text), words(other)) for other in kept), default=0.0)
        assert pool.alike(text) == pytest.approx(alike) or alike == 0
        admitted = pool.admit(text)
        assert admitted == (alike <= 0.7 and text not in kept)
        kept += [text] * admitted
    assert len(pool) == len(kept) < len(texts)


def test_copies_without_words_are_refused_too():
    pool = Pool(["?!"])
    assert not pool.admit("?!")


def test_the_wrapper_ends_where_the_response_begins():
    plain, with_input = wrapped(made("Name a tree.", "Oak.")), wrapped(made("Sort.", "a, b", context="b, a"))
    assert plain.endswith("Name a tree.\n\n### Response:")
    assert "### Input" not in plain
    assert with_input.endswith("### Instruction:\nSort.\n\n### Input:\nb, a\n\n### Response:")


def test_students_are_asked_in_the_wrapper_that_they_were_taught_in(monkeypatch):
    asked = []
    monkeypatch.setattr(instructions, "complete", lambda _lm, prompts, *_: asked.extend(prompts) or [" Oak. "])
    problem = made("Name a tree.", "Oak.", choices=("Oak.", "Rose."))
    assert Instructed().decode(None, [problem], NoProgress()) == ["Oak."]
    assert asked == [wrapped(problem)]
    assert "(b) Rose." in asked[0]


def test_a_reserve_gives_each_instruction_once_the_alike_and_the_unlike(bench):
    class Trees:
        def read(self, split):
            for what in ("Name a tree.", "Name a big tree.", "Name a small tree.", "Sort numbers.", "Add numbers."):
                yield made(what, f"Response to {what}")

    teacher, lm = ReserveTeacher(Trees()), language_model()
    seed = made("Name a tree.", "")
    with teacher.opened(lm, bench) as ask:

        def new(kind, count=1):
            return [
                a.text for _, answers in ask([Creation("", seeds=(seed,), kind=kind, count=count)]) for a in answers
            ]

        assert new("hard")[0] in ("Name a big tree.", "Name a small tree.")
        assert new("easy")[0] in ("Sort numbers.", "Add numbers.")
        assert len(parse_list(new("any", 20)[0], 20)) == 2  # all that is left but the seed
        assert new("hard") == []
        ((_, (answer,)),) = ask([Request("", seed)])
        assert answer.text == "Response to Name a tree."
        assert next(iter(ask([Request("", made("Unknown?", ""))])))[1] == []


def test_instructions_of_both_kinds_of_files(tmp_path):
    import json

    from harness.problems import TaskProblems

    rows = [
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"instruction": "Sort.", "instances": [{"input": "d c", "output": "c d"}]},
        {"instruction": "Name a tree.", "instances": [{"input": "", "output": "Oak."}]},
        {"prompt": "Yes or no?\n", "completion": "no<|endoftext|>", "template": "ask"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row | {"split": "train"}) for row in rows), encoding="utf-8")
    found = list(TaskProblems("instructions", "instruction", "text", str(path)).read("train"))
    assert [(p.question, p.context, p.gold) for p in found] == [
        ("Sort.", "b a", "a b"),
        ("Sort.", "d c", "c d"),
        ("Name a tree.", "", "Oak."),
        ("Yes or no?", "", "no"),
    ]


def test_responses_are_like_their_references_by_degrees():
    """Exact match is right; everything else is as like as ROUGE-L says."""
    rule, problem = rule_named("response"), made("Say it.", "police killed the gunman")
    assert rule.correct("Police killed the gunman.", problem)
    assert not rule.correct("Police kill the gunman.", problem)
    assert rule.likeness("Police kill the gunman.", problem.gold) == pytest.approx(0.75)
    assert rule.likeness("", problem.gold) == 0
    assert all(rule_named(name).likeness is None for name in ("number", "choice", "text"))
