from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from harness.answers import RULES, evaluate_equation, recalculated, rule_named, without_conclusion
from harness.errors import ConfigError
from harness.json_lines import json_rows
from harness.problems import INFERENCES, ArithmeticProblems, made

CHOICES = ("bank", "library", "department store", "mall", "new york")


@pytest.mark.parametrize(
    ("rule", "text", "found"),
    [
        ("number", "It costs $1,234 and 5 more.", "5"),
        ("number", "The answer is $1,234.50.", "1234.50"),
        ("number", "The answer is -3.", "-3"),
        ("number", "so 10-3 is 7", "7"),
        ("number", "10-3", "3"),  # a minus between numbers is no sign
        ("number", "He has 3 left --> 18. Then 7 --> 9", "18"),  # what follows a first answer is another text
        ("number", "The answer is 4. But wait: the answer is 5 of 6.", "5"),
        ("number", "1 and 2, no conclusion", "2"),
        ("number", "reasoning\n#### 72", "72"),
        ("number", "The answer is unknown", None),
        ("number", "", None),
        ("letter", "A dog. The answer is (C).", "C"),
        ("letter", "The answer is B", "B"),
        ("letter", "I think (A) or, better, (D)", "D"),
        ("letter", "The answer is F.", None),
        ("choice", "department store", "department store"),
        ("choice", "The answer is (d) mall.", "mall"),
        ("choice", "So the answer is New York.", "new york"),
        ("choice", "So the answer is (b).", "library"),
        ("choice", "The mall or the bank? So the answer is the bank.", "bank"),
        ("choice", "So the answer is a river.", None),
        ("choice", "So the answer is mall or (b) library.", None),  # has not decided
        ("choice", "So the answer is the mall. The bank is closed.", "mall"),
        ("choice", "So the answer is a large department store.", "department store"),
        ("letter", "The answer is (A) or (B).", None),
        ("yes_no", "No, yes. So the answer is no.", "no"),
        ("yes_no", "Yes", "yes"),
        ("yes_no", "Noah knows", None),
        ("text", 'The answer is "fnel".', "fnel"),
        ("text", "fnel", "fnel"),
        ("equation", "The answer is (10 * 45).", "(10 * 45)"),
        ("equation", "( 10.0 * 45.0 )", "( 10.0 * 45.0 )"),
        ("equation", "The answer is (some bags + 4 bags).", None),
        ("equation", "The answer is 7.", "7"),
    ],
)
def test_answers_are_found(rule, text, found):
    choices = CHOICES if rule in ("choice", "letter") else ()
    assert RULES[rule].extract(text, choices) == found


@pytest.mark.parametrize(
    ("rule", "text", "gold", "right"),
    [
        ("number", "The answer is 5.0", "5", True),
        ("number", "The answer is 5.1", "5", False),
        ("equation", "(10 * 45)", "450", True),
        ("equation", "(10 * 45)", "( 45.0 * 10.0 )", True),
        ("equation", "(10 + 45)", "450", False),
        ("text", "The answer is 'fnel'.", "fnel", True),
        ("yes_no", "The answer is yes", "no", False),
    ],
)
def test_answers_are_compared_by_their_meaning(rule, text, gold, right):
    assert RULES[rule].correct(text, made("?", gold)) is right


def test_an_unknown_rule_is_named():
    with pytest.raises(ConfigError, match="choose one of number"):
        rule_named("numbers")


def test_the_reasoning_is_what_stands_before_the_conclusion():
    assert without_conclusion("3 + 4 = 7. It is odd. So the answer is 7.") == "3 + 4 = 7. It is odd."
    assert without_conclusion("3 + 4 = 7.\nTherefore, the answer is 7.") == "3 + 4 = 7."
    assert without_conclusion("3 + 4 = 7 --> 7") == "3 + 4 = 7"
    assert without_conclusion("The answer is 7.") == ""
    assert without_conclusion("no conclusion ") == "no conclusion"


def test_equations_have_the_value_that_python_gives_them():
    draw = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0 or draw.random() < 0.2:
            return str(draw.choice([draw.randint(0, 99), round(draw.random() * 10, 2)]))
        return f"({expression(depth - 1)} {draw.choice('+-*/')} {expression(depth - 1)})"

    for _ in range(1000):
        text = expression(3)
        try:
            wanted = float(eval(text))
        except ZeroDivisionError:
            wanted = None
        assert evaluate_equation(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "x + 1",
        "abs(3)",
        "(1).real",
        "[1]",
        "1 if 2 else 3",
        "9 ** 9999",
        "9**9**9",
        "'a' * 3",
        "1 == 1",
        "",
        "True",
        "1,2",
    ],
)
def test_nothing_but_arithmetic_has_a_value(text):
    assert evaluate_equation(text) is None


def test_a_calculator_changes_nothing_where_nothing_is_wrong():
    for problem in ArithmeticProblems(train=40, test=1).read("train"):
        assert recalculated(problem.rationale) == problem.rationale


def test_a_calculator_mends_every_planted_slip_and_is_done_after_one_pass():
    rule = RULES["number"]
    for problem in ArithmeticProblems(train=40, test=1).read("train"):
        steps = [solution for _, solution in problem.steps]
        first, _, result = steps[0].rpartition(" = ")
        slip = str(
            int(result[:-1]) + 1000
        )  # carried on into the next step, whose result was right for the right number
        slipped = " ".join([f"{first} = {slip}.", *steps[1:]]).replace(f". {result[:-1]} ", f". {slip} ", 1)
        text = f"{slipped} The answer is 0."
        mended = recalculated(text)
        assert mended == f"{problem.rationale} The answer is 0."
        assert recalculated(mended) == mended
        assert rule.correct(recalculated(slipped), problem)


def test_a_calculator_reads_thousands_money_and_division():
    assert recalculated("1,200 / 7 = 100") == "1200 / 7 = 171.4285714"
    assert recalculated("2 * 9 = $17 and $17 more") == "2 * 9 = $18 and $18 more"
    assert recalculated("5 / 0 = 5") == "5 / 0 = 5"


# ---- real outputs of teachers: where the environment names a folder with them

DATA = Path(os.environ.get("HARNESS_TEACHER_DATA", "missing"))
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="HARNESS_TEACHER_DATA names no folder with recorded outputs of teachers"
)


def share_right(path: str, rule: str, text, gold, choices=lambda row: ()) -> tuple[int, int]:
    outcomes = []
    for row in json_rows(DATA / path):
        found = RULES[rule].extract(text(row), choices(row))
        outcomes.append(found is not None and RULES[rule].same(found, gold(row)))
    return sum(outcomes), len(outcomes)


@needs_data
@pytest.mark.parametrize(("split", "right"), [("valid", 668), ("test", 656)])
def test_palm_on_anli_is_as_good_as_its_authors_code_says(split, right):
    found = share_right(
        f"distill_step_by_step/anli1_{split}.jsonl",
        "choice",
        lambda row: f"{row['palm_rationale']} So the answer is {row['palm_label']}.",
        lambda row: INFERENCES[row["label"]],
        lambda row: INFERENCES,
    )
    assert found == (right, 1000)


@needs_data
def test_palm_on_commonsense_qa_is_right_where_it_decides_for_the_right_choice():
    found = share_right(
        "distill_step_by_step/cqa_test.jsonl",
        "choice",
        lambda row: f"{row['palm_rationale']} So the answer is {row['palm_label']}.",
        lambda row: row["answer"],
        lambda row: row["choices"],
    )
    assert found == (955, 1221)


@needs_data
@pytest.mark.parametrize(
    ("teacher", "right"),
    [("6b_finetuning", 286), ("6b_verification", 515), ("175b_finetuning", 458), ("175b_verification", 742)],
)
def test_gpt_3_on_gsm8k_is_as_good_as_its_flags_say(teacher, right):
    path = "gsm8k_teacher/example_model_solutions.jsonl"
    assert sum(row[teacher]["is_correct"] for row in json_rows(DATA / path)) == right
    found = share_right(
        path,
        "number",
        lambda row: row[teacher]["solution"],
        lambda row: row["ground_truth"].rpartition("A:")[2].strip().replace(",", ""),
    )
    assert found == (right, 1319)


@needs_data
@pytest.mark.parametrize(
    ("task", "rule"),
    [("multiarith", "number"), ("svamp", "number"), ("coin_flip", "yes_no"), ("last_letter", "text")],
)
def test_davinci_is_marked_as_its_authors_marked_it(task, rule):
    for row in json_rows(DATA / f"fine_tune_cot/{task}.jsonl"):
        text = f"{row['teacher_rationale']}\nTherefore, the answer is {row['teacher_answer']}."
        assert RULES[rule].correct(text, made(row["question"], str(row["answer"]))) == row["teacher_correct"]
