"""Programs as reasoning steps: read, compared, corrupted, and found line by line against all programs of a grammar."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch

from methods.distillation.programs import (
    CORRUPTIONS,
    Step,
    annotated_program,
    corrupted,
    normalised,
    read_program,
    same_number,
    search_lines,
)
from methods.distillation.sandbox import Sandbox, kernel_layers

pytestmark = pytest.mark.skipif(not kernel_layers(), reason="this kernel isolates no process")
GSM8K = Path(
    os.environ.get("HARNESS_TEACHER_DATA", "missing")
).parent  # its questions stand beside the teachers' outputs
SOLUTION = (
    "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18 a day, 05 hours.\n"
    "A tenth is 18/10 = <<18/10=1.8>>1.8.\n#### 1.8"
)
PROGRAM = "def solution():\n    eggs = 16 - 3 - 4\n    price = 2\n    return eggs * price"


def test_annotations_become_steps_that_build_on_each_other():
    program = annotated_program(SOLUTION)
    assert program.splitlines()[1:] == [
        "    step_1 = 16-3-4",
        "    step_2 = step_1*2",
        "    step_3 = step_2/10",
        "    return step_3",
    ]
    assert Sandbox().run(program).value == pytest.approx(1.8)
    assert annotated_program("No sums here.\n#### 3") is None


def test_odd_numbers_of_annotations_are_numbers_of_python():
    assert Sandbox().run(annotated_program("<<05*2=10>>10 <<10*20%=2>>2 <<$1,000/2=500>>500")).value == 500
    assert "step_1*20/100" in annotated_program("<<05*2=10>>10 <<10*20%=2>>2")


@pytest.mark.skipif(not (GSM8K / "train/gsm8k/train.jsonl").exists(), reason="HARNESS_TEACHER_DATA is not beside GSM8K")
@pytest.mark.parametrize(
    ("file", "without", "right"), [("train/gsm8k/train.jsonl", 95, 6999), ("eval/gsm8k/test.jsonl", 18, 1208)]
)
def test_how_many_solutions_of_gsm8k_are_programs(file, without, right):
    """Evaluated here, not in the sandbox: these are sums of people, checked to be sums first."""
    from harness.answers import evaluate_equation

    rows = [json.loads(line)["answer"] for line in (GSM8K / file).open(encoding="utf-8")]
    programs = [annotated_program(row) for row in rows]
    found = 0
    for row, program in zip(rows, programs, strict=True):
        values: dict[str, str] = {}
        for line in (program or "").splitlines()[1:-1]:
            name, _, body = line.strip().partition(" = ")
            for known, value in reversed(values.items()):
                body = body.replace(known, f"({value})")
            values[name] = repr(evaluate_equation(body))
        found += bool(program) and same_number(values[name], row.rpartition("####")[2].strip())
    assert (programs.count(None), found) == (without, right)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (PROGRAM, PROGRAM),
        (f"Here it is:\n```python\n{PROGRAM}\n```\nDone.", PROGRAM),
        (f"```\n{PROGRAM}", PROGRAM),
        (f"\n\n{PROGRAM}   \n\n", PROGRAM),
    ],
)
def test_programs_are_found_in_what_a_model_writes(text, program):
    assert read_program(text) == program


@pytest.mark.parametrize(
    ("found", "gold", "same"),
    [
        (18, "18", True),
        (18.0004, 18, True),
        (18.1, 18, False),
        (10_000_001, 10_000_000, True),
        ("1,000", "1000", True),
        (0, 0.002, False),
        ("Yes", "yes", True),
        ("yes", "no", False),
        (True, 1, False),
        ("inf", "5", False),
        ("nan", "nan", False),
    ],
)
def test_when_two_answers_are_one(found, gold, same):
    assert same_number(found, gold) is same


def test_layout_and_comments_make_no_other_program():
    other = 'def solution():\n    """How much?"""\n    eggs=16-3-4  # a day\n\n    price = (2)\n    return eggs*price'
    assert normalised(other) == normalised(PROGRAM)
    assert normalised(PROGRAM.replace("16", "17")) != normalised(PROGRAM)
    assert normalised('def f():\n    """Nothing else."""') == "def f():\n    pass"
    with pytest.raises(SyntaxError):
        normalised("def solution(:")


@pytest.mark.parametrize("seed", range(6))
def test_corruptions_are_one_mistake_each(seed):
    """Each differs from the program, in one line only; together they make every kind."""
    found = dict(corrupted(PROGRAM, torch.Generator().manual_seed(seed)))
    assert sorted(found) == sorted(CORRUPTIONS)
    lines = PROGRAM.splitlines()
    for kind, source in found.items():
        assert source != PROGRAM
        changed = source.splitlines()
        if kind == "line":
            assert len(changed) == len(lines) - 1
            assert set(changed) < set(lines)
        else:
            assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1
    assert Sandbox().run(found["indentation"]).kind == "syntax"
    assert Sandbox().run(found["name"]).error.startswith("NameError")


def test_operators_are_swapped_in_place_whatever_the_letters():
    program = "def solution():\n    größe = 2 * 3\n    return größe + (1 - 0)"
    swaps = {source for seed in range(20) for kind, source in corrupted(program, seeded(seed)) if kind == "operator"}
    assert swaps == {program.replace("2 * 3", "2 / 3"), program.replace("+", "-"), program.replace("1 - 0", "1 + 0")}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


LINES, DEPTH = "abc", 3


def grammar(seed):
    """Random scores of every line after every beginning; a program has DEPTH lines."""
    scores = torch.rand(*([len(LINES) + 1] * DEPTH), generator=seeded(seed)).log()

    def score(lines):
        return float(scores[tuple([LINES.index(x) + 1 for x in lines] + [0] * (DEPTH - len(lines)))])

    def propose(beginnings):
        return [[Step(x, score([*lines, x]), len(lines) + 1 == DEPTH) for x in LINES] for lines in beginnings]

    return score, propose


def never(beginnings):
    raise AssertionError("a weight of 0 asks no verifier")


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_of_all_programs(seed):
    score, propose = grammar(seed)
    best = max(product(LINES, repeat=DEPTH), key=lambda p: sum(score(p[: i + 1]) for i in range(DEPTH)))
    assert search_lines(propose, never, len(LINES) ** DEPTH, 0.0, DEPTH) == list(best)


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_without_a_verifier_is_greedy(seed):
    score, propose = grammar(seed)
    lines: list[str] = []
    for _ in range(DEPTH):
        lines.append(max(LINES, key=lambda x: score([*lines, x])))
    assert search_lines(propose, never, 1, 0.0, DEPTH) == lines


def test_a_verifier_with_weight_keeps_what_it_likes():
    """Lines of equal probability: the verifier alone decides; a beginning that it refuses never comes back."""

    def propose(beginnings):
        return [[Step(x, -1.0, len(lines) == 2) for x in LINES] for lines in beginnings]

    def verify(beginnings):
        return [float("b" not in lines and lines[0] == "c") for lines in beginnings]

    found = search_lines(propose, verify, 2, 1.0, 3)
    assert found[0] == "c"
    assert "b" not in found


def test_a_program_that_does_not_end_is_cut():
    assert search_lines(lambda live: [[Step("x", -1.0)] for _ in live], never, 2, 0.0, 4) == ["x"] * 4
    assert search_lines(lambda live: [[] for _ in live], never, 2, 0.0, 4) == []


def test_problems_of_known_forms_carry_programs(tmp_path):
    """GSM8K's annotations and SVAMP's equations run to their answers."""
    from harness.problems import TaskProblems

    rows = {
        "gsm8k": {"question": "How much?", "answer": SOLUTION},
        "svamp": {"Body": "8 birds", "Question": "Less 2?", "Equation": "( 8.0 - 2.0 )", "Answer": 6.0},
    }
    for form, row in rows.items():
        path = tmp_path / f"{form}.jsonl"
        path.write_text(json.dumps(row | {"split": "train"}) + "\n", encoding="utf-8")
        (problem,) = TaskProblems(form, form, "number", str(path)).read("train")
        assert same_number(Sandbox().run(problem.program).value, problem.gold)
