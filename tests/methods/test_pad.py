"""PaD: what is kept, what is corrupted, how a program becomes an answer; search against greedy decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.decoding import complete
from harness.errors import ConfigError
from harness.problems import ArithmeticProblems, made
from harness.progress import NoProgress
from methods.distillation.lessons import write
from methods.distillation.pad import PaD, Programs, closed, is_right, written
from methods.distillation.programs import read_program, same_number
from methods.distillation.sandbox import Outcome, Sandbox, kernel_layers
from methods.distillation.students import Truncated
from methods.distillation.text_teachers import Answer, Sampling, WorkedTeacher
from methods.training import TrainingSettings
from tests.harness.tiny_models import language_model

pytestmark = pytest.mark.skipif(not kernel_layers(), reason="this kernel isolates no process")
PROMPT, REPAIR = "Q: {question}\n", "Q: {question}\nWrong:\n{program}\nError: {error}\n"
DECODING = Programs(PROMPT, REPAIR, new_tokens=24)
TRAINING = TrainingSettings(steps=2, learning_rate=1e-3, batch_size=2)


def pad(train: int = 12, error_rate: float = 0.0, **changes) -> PaD:
    return PaD(
        problems=ArithmeticProblems(train=train, test=4),
        teacher=WorkedTeacher(("{program}",), error_rate),
        student=Truncated(1.0),
        training=TRAINING,
        decoding=DECODING,
        teacher_prompt="{question}",
        sampling=Sampling(),
        **changes,
    )


@pytest.mark.parametrize("error_rate", [0.0, 0.4, 1.0])
def test_exactly_the_right_programs_are_kept(error_rate, bench):
    method = pad(40, error_rate, corruptions=0)
    with method.teacher.opened(language_model(), bench) as ask:
        kept = [lesson.problem for lesson in method.lessons(ask, bench)]
    assert kept == [p.id for p in method.problems.read("train") if not method.teacher.errs(p)]


def test_failing_programs_are_counted_by_what_became_of_them(bench):
    problem = made("One and one?", "2")
    said = [
        "answer = 1 + 1",
        "answer=1+1  # the same",
        "answer = 3",
        "answer = open('x')",
        "answer = (",
        "def solution():\n    return 2.0",
    ]

    def ask(requests):
        for request in [replace(next(iter(requests)), problem=problem)]:
            yield request, [Answer(text) for text in said]

    lessons = list(pad(1, corruptions=0).lessons(ask, bench))
    assert [lesson.views["program"].response for lesson in lessons] == [said[0], said[-1]]
    counts = bench.log.counts
    assert (counts["programs: value"], counts["programs: error"], counts["programs: syntax"]) == (4, 1, 1)
    assert (counts["answers"], counts["right programs"], counts["kept answers"]) == (6, 3, 2)


def test_mending_always_ends_in_a_right_program_and_starts_from_a_wrong_one(bench):
    method = pad(8, corruptions=2)
    problems = {problem.id: problem for problem in method.problems.read("train")}
    with method.teacher.opened(language_model(), bench) as ask:
        lessons = list(method.lessons(ask, bench))
    box = Sandbox()
    for lesson in lessons:
        gold = problems[lesson.problem].gold
        program, repair = lesson.views["program"], lesson.views["repair"]
        assert repair.response == program.response
        assert same_number(box.run(program.response).value, gold)
        wrong = repair.prompt.partition("Wrong:\n")[2].partition("\nError:")[0]
        outcome = box.run(wrong)
        assert outcome.kind != "value" or not same_number(outcome.value, gold)
        assert repair.prompt.endswith(f"Error: {outcome.error or 'the result is wrong'}\n")
    weights: dict[str, float] = {}
    for lesson in lessons:
        weights[lesson.problem] = weights.get(lesson.problem, 0) + lesson.weight
    assert all(weight == pytest.approx(1) for weight in weights.values())  # each program counts once
    assert len(lessons) > len(weights)


def test_a_program_becomes_the_sentence_that_answers(monkeypatch):
    programs = ["answer = 7 / 2", "answer = 18.0", "answer = 'yes'", "answer = 1 / 0", "while True: pass"]
    decoding = replace(DECODING, sandbox=Sandbox(cpu_seconds=1))
    monkeypatch.setattr(Programs, "_write", lambda *_: programs)
    found = decoding.decode(None, [made(f"{i}?", "0") for i in range(5)], NoProgress())
    assert found == ["The answer is 3.5.", "The answer is 18.", "The answer is yes.", "", ""]


def test_only_what_failed_is_mended_and_only_so_often(monkeypatch):
    asked: list[list[str]] = []
    replies = iter([["answer = 1", "answer = (", "answer = 1 / 0"], ["answer = 2", "answer = x"], ["answer = 3"]])

    def write_programs(_self, _lm, prompts, _progress):
        asked.append(prompts)
        return next(replies)

    monkeypatch.setattr(Programs, "_write", write_programs)
    problems = [made(f"Question {i}", "0") for i in range(3)]
    found = replace(DECODING, repairs=2).decode(None, problems, NoProgress())
    assert found == [f"The answer is {i}." for i in (1, 2, 3)]
    assert [len(prompts) for prompts in asked] == [3, 2, 1]
    assert "ZeroDivisionError" in asked[1][1]
    assert "Wrong:\nanswer = x\nError: NameError" in asked[2][0]


@pytest.mark.parametrize(
    ("lines", "program"),
    [
        (["def f():"], "def f():\n    pass"),
        (["def f():", "    if 1:"], "def f():\n    if 1:\n        pass"),
        (["x = 1", ""], "x = 1"),
        ([], ""),
    ],
)
def test_beginnings_are_closed(lines, program):
    assert closed(lines) == program


def test_numbers_are_written_as_people_do():
    assert [written(Outcome("value", v)) for v in (18.0, 0.1 + 0.2, 7, "no")] == ["18", "0.3", "7", "no"]
    assert [written(Outcome("value", v)) for v in (True, False)] == ["yes", "no"]
    large = [2e10, 123456789012.5, -3e11, 1e-5, float("inf")]  # "2e+10" reads as 2 and 10
    assert [written(Outcome("value", v)) for v in large] == [
        "20000000000",
        "123456789012.5",
        "-300000000000",
        "0.00001",
        "inf",
    ]
    assert is_right(Outcome("value", True), made("Is it?", "yes"))
    assert not is_right(Outcome("error", None), made("Is it?", "None"))


def test_one_beam_of_one_line_at_a_time_is_greedy():
    """Lines found one by one join to what greedy decoding writes at once (byte tokens: no token spans two lines)."""
    lm = language_model(seed=3)
    problems = [made(f"Add {i} and {i}", "0") for i in range(4)]
    prompts = [PROMPT.format(question=problem.question) for problem in problems]
    whole = complete(lm, prompts, 12, (), 4, NoProgress())
    searching = replace(DECODING, new_tokens=12, beams=2, temperature=0.0, most_lines=1)
    for prompt, text in zip(prompts, whole, strict=True):
        assert searching._search(lm, prompt, None) == read_program(text.partition("\n")[0])


def test_verified_search_prefers_what_runs(monkeypatch):
    """Two drawn lines of like probability, one of them no Python: with a verifier the other one wins."""
    from methods.distillation.programs import Step

    lines = [[Step("answer = (", -0.1, last=True), Step("answer = 4", -0.5, last=True)]]
    monkeypatch.setattr(Programs, "_lines", lambda *_: lines)
    found = {
        weight: replace(DECODING, beams=2, verifier=weight)._search(None, "", Sandbox().run) for weight in (0.0, 1.0)
    }
    assert found == {0.0: "answer = (", 1.0: "answer = 4"}


def test_own_mistakes_are_learned_from_where_a_right_program_is_known(bench):
    method = pad(6, corruptions=0, rounds=1, own_problems=3)
    lm = language_model()
    with method.teacher.opened(lm, bench) as ask:
        lessons = write(method.lessons(ask, bench), lm, bench)
    mistakes = list(method.mistakes(lm, lessons, bench))
    assert len(mistakes) == bench.log.counts["own mistakes found"] == 3  # a random model writes no right program
    assert {mistake.problem for mistake in mistakes} == {lesson.problem for lesson in lessons[:3]}
    assert all(mistake.views["repair"].response == mistake.views["program"].response for mistake in mistakes)


def test_rounds_train_on(bench):
    """Another round is more steps on the same curve."""
    method = pad(4, corruptions=1, rounds=1, own_problems=2)
    method.compress(language_model(), bench)
    assert sorted(bench.log.curves["training loss"]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"corruptions": -1}, "corruptions"), ({"rounds": -1}, "rounds"), ({"repair_weight": -1.0}, "repair_weight")],
)
def test_values_out_of_bounds_are_refused(changes, names):
    with pytest.raises(ConfigError, match=names):
        pad(**changes)


def test_prompts_name_what_they_must():
    with pytest.raises(ConfigError, match="repair_prompt"):
        Programs(PROMPT, "{question}")
    with pytest.raises(ConfigError, match="beams"):
        Programs(PROMPT, REPAIR, beams=0)
