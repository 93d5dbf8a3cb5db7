from __future__ import annotations

import json
import tracemalloc

import pytest

from harness.answers import RULES
from harness.errors import ConfigError, RunError
from harness.json_lines import json_rows, numbered_rows
from harness.problems import ArithmeticProblems, TaskProblems


def written(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- made on the spot


def test_worked_solutions_are_right_in_every_form():
    for problem in ArithmeticProblems(train=60, test=20).read("train"):
        assert RULES["number"].correct(problem.rationale, problem)
        names: dict = {}
        exec(problem.program, {"__builtins__": {}}, names)
        assert str(names["answer"]) == problem.gold
        assert " ".join(solution for _, solution in problem.steps) == problem.rationale


def test_splits_share_no_question_and_come_again_the_same():
    problems = ArithmeticProblems(train=100, test=50)
    train, test = list(problems.read("train")), list(problems.read("test"))
    assert (len(train), len(test)) == (100, 50)
    assert len({problem.id for problem in train + test}) == 150
    assert list(problems.read("train")) == train
    assert list(ArithmeticProblems(train=100, test=50, seed=1).read("train")) != train


def test_more_questions_than_there_are_is_an_error():
    with pytest.raises(RunError, match="different questions"):
        list(ArithmeticProblems(train=20_000, test=1, operations=(1, 1)).read("train"))


# ---- forms of rows

ROWS = [
    (
        "gsm8k",
        {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 clips.\n24+1 = <<24+1=25>>25.\n#### 1,025"},
        {"gold": "1025", "rationale": "48/2 = 24 clips.\n24+1 = 25.", "steps": ()},
    ),
    (
        "gsm8k",
        {"question": "How many?", "answer": "How many first? ** 1 + 1 = <<1+1=2>>2.\nAnd then? ** 2.\n#### 2"},
        {"gold": "2", "rationale": "1 + 1 = 2.\n2.", "steps": (("How many first?", "1 + 1 = 2."), ("And then?", "2."))},
    ),
    (
        "svamp",
        {"question": "?", "equation": "( 7.0 - 2.0 )", "answer": 5.0},
        {"gold": "5", "equation": "( 7.0 - 2.0 )"},
    ),
    ("svamp", {"input": "?", "label": "( 7.0 / 2.0 )"}, {"gold": "3.5", "equation": "( 7.0 / 2.0 )"}),
    ("svamp", {"input": "?", "label": "1234567 + 1"}, {"gold": "1234568"}),
    (
        "svamp",
        {"Body": "Two and two", "Question": "How many?", "Equation": "2+2", "Answer": "4"},
        {"question": "Two and two. How many?", "gold": "4"},
    ),
    (
        "aqua",
        {"question": "?", "options": ["A)1", "B) 2", "C)None"], "rationale": "so", "correct": "B"},
        {"gold": "B", "choices": ("1", "2", "None")},
    ),
    (
        "commonsense_qa",
        {"question": "?", "choices": {"label": ["A", "B"], "text": ["bank", "mall"]}, "answerKey": "B"},
        {"gold": "mall", "choices": ("bank", "mall")},
    ),
    ("commonsense_qa", {"question": "?", "choices": ["bank", "mall"], "answer": "bank"}, {"gold": "bank"}),
    (
        "inference",
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        {"gold": "entailment", "context": "It rains.", "question": "It is wet."},
    ),
    (
        "strategyqa",
        {"question": "?", "answer": False, "facts": ["a.", "b."], "decomposition": ["c?", "d?"]},
        {"gold": "no", "facts": ("a.", "b."), "steps": (("c?", ""), ("d?", "")), "rationale": "a. b."},
    ),
    ("strategyqa", {"question": "?", "answer": True, "explanation": "Yes. Because."}, {"rationale": "Because."}),
    ("question_answer", {"question": "?", "answer": 12, "split": "train"}, {"gold": "12"}),
]


@pytest.mark.parametrize(("form", "row", "wanted"), ROWS)
def test_rows_become_problems(form, row, wanted, tmp_path):
    path = written(tmp_path / "rows.jsonl", [row])
    other = written(tmp_path / "other.jsonl", [])
    (problem,) = TaskProblems("mine", form, "number", path, other).read("train")
    assert {key: getattr(problem, key) for key in wanted} == wanted


def test_a_prompt_reads_context_question_and_lettered_choices(tmp_path):
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}
    path, other = written(tmp_path / "rows.jsonl", [row]), written(tmp_path / "none.jsonl", [])
    (problem,) = TaskProblems("mine", "inference", "choice", path, other).read("train")
    asked = "It rains.\nIt is wet.\nAnswer Choices: (a) entailment (b) neutral (c) contradiction"
    assert problem.fields()["question"] == asked


# ---- splits


def test_a_question_that_is_asked_is_never_taught(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": n} for n in range(50)]
    train, test = written(tmp_path / "train.jsonl", rows), written(tmp_path / "test.jsonl", rows[::5])
    problems = TaskProblems("mine", "question_answer", "number", train, test)
    asked = {problem.id for problem in problems.read("test")}
    assert len(asked) == 10
    assert [problem.gold for problem in problems.read("train")] == [str(n) for n in range(50) if n % 5]


def test_a_question_that_stands_twice_is_asked_once(tmp_path):
    rows = [{"question": f"What is {n % 4}?", "answer": n % 4} for n in range(10)]
    path = written(tmp_path / "rows.jsonl", rows)
    problems = TaskProblems("mine", "question_answer", "number", path, path)
    assert [problem.gold for problem in problems.read("test")] == ["0", "1", "2", "3"]
    assert list(problems.read("train")) == []


def test_one_file_is_split_as_it_says_or_by_its_questions(tmp_path):
    rows = [{"question": f"What is {n}?", "answer": n} for n in range(200)]
    path = written(tmp_path / "rows.jsonl", rows)
    problems = TaskProblems("mine", "question_answer", "number", path)
    train, test = ([problem.id for problem in problems.read(split)] for split in ("train", "test"))
    assert len(train) + len(test) == 200
    assert 20 < len(test) < 60
    shuffled = written(tmp_path / "shuffled.jsonl", rows[::-1])
    assert set(test) == {
        problem.id for problem in TaskProblems("m", "question_answer", "number", shuffled).read("test")
    }
    said = written(
        tmp_path / "said.jsonl", [{**row, "split": "test" if row["answer"] < 3 else "train"} for row in rows]
    )
    assert [p.gold for p in TaskProblems("m", "question_answer", "number", said).read("test")] == ["0", "1", "2"]


def test_only_so_many_are_taught(tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"question": f"{n}?", "answer": n} for n in range(30)])
    other = written(tmp_path / "none.jsonl", [])
    problems = TaskProblems("mine", "question_answer", "number", path, other, limit=7)
    assert [problem.gold for problem in problems.read("train")] == list(map(str, range(7)))


# ---- broken rows


@pytest.mark.parametrize("bad", ["{not json\n", "[1, 2]\n", '{"question": "no answer"}\n'])
def test_a_broken_line_is_refused_or_said_with_its_number(bad, tmp_path, capsys):
    good = {"question": "What?", "answer": 1}
    path, other = written(tmp_path / "rows.jsonl", [good, "\n", bad, good]), written(tmp_path / "none.jsonl", [])
    with pytest.raises(RunError, match=r"rows\.jsonl, line 3: .*broken=skip"):
        list(TaskProblems("mine", "question_answer", "number", path, other).read("train"))
    assert len(list(TaskProblems("mine", "question_answer", "number", path, other, broken="skip").read("train"))) == 2
    assert "rows.jsonl, line 3 passed over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "gsm9k"}, "problems.form=gsm9k"),
        ({"answers": "numbers"}, "problems.rule=numbers"),
        ({"broken": "ignore"}, "problems.broken=ignore"),
        ({"path": "/nowhere"}, "problems.path=/nowhere"),
        ({"limit": 0}, "problems.limit=0"),
        ({}, "problems.path=FILE"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        TaskProblems(**({"name": "mine", "form": "gsm8k", "answers": "number"} | changes))


# ---- files are read as they go


def test_an_array_is_read_like_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.json_lines.CHUNK", 7)  # every object lies across several reads
    rows = [{"question": f'[{n}], {{}} "quoted"', "answer": [n, {"x": "]"}]} for n in range(20)]
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert list(json_rows(array)) == rows
    lines = array.read_text().splitlines()
    assert [number for number, _ in numbered_rows(array)] == [i for i, line in enumerate(lines, 1) if line == " {"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "must hold one array"),
        ('[{"a": 1}, {"a": ', "line 1"),
        ('[{"a": 1},\n 3]', "line 2"),
        ('[{"a": 1}', "cut off"),
        ('[{"a": 1},\n {"a" 1}]', "line 2"),
    ],
)
def test_a_broken_array_is_refused_with_the_line(text, message, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(RunError, match=message):
        list(json_rows(path))


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_memory_does_not_grow_with_the_number_of_rows(ending, tmp_path):
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.{ending}"
        rows = [json.dumps({"question": f"{n} " + "word " * 100, "answer": n}) for n in range(count)]
        path.write_text("\n".join(rows) if ending == "jsonl" else "[" + ",\n".join(rows) + "]")
        del rows
        other = written(tmp_path / "none.jsonl", [])
        problems = TaskProblems("mine", "question_answer", "number", str(path), other)
        tracemalloc.start()
        found = sum(1 for _ in problems.read("train"))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == count
        return used

    assert peak(4000) < peak(1000) + 50_000
