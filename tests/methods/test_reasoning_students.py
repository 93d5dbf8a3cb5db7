"""Fine-tune-CoT, teaching small LMs, step by step, MT-CoT, specializing: what each asks, keeps and teaches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch

from harness.answers import RULES
from harness.errors import ConfigError
from harness.method import TrainingLog
from harness.problems import ArithmeticProblems, TaskProblems, made
from harness.run import make
from methods.distillation.alignment import student_tokens
from methods.distillation.lessons import Lesson, View, write
from methods.distillation.specializing import FORMATS, matched, matching_loss, shortened
from methods.distillation.text_teachers import Answer, EngineTeacher, RecordedTeacher, Sampling, WorkedTeacher
from methods.examples import Batch
from methods.training import language_modeling_loss, logits_of
from tests.test_conf import resolved

PROBLEMS = ArithmeticProblems(train=60, test=10)
NUMBER = RULES["number"]
SYSTEMS = ("fine_tune_cot", "teach_small", "step_by_step", "mt_cot", "specializing")


@dataclass
class Scripted:
    """A live teacher that says what a function of the request says, and remembers what it was asked."""

    say: Callable
    asked: list = field(default_factory=list)
    recorded: bool = False

    @contextmanager
    def opened(self, base, bench):
        def ask(requests):
            for request in requests:
                self.asked.append(request)
                said = self.say(request)
                yield request, [Answer(text) for text in ([said] if isinstance(said, str) else said)]

        yield ask


@cache
def configured(name: str):
    return make(resolved(f"method={name}")["method"], "method")


def system(name: str, **changes):
    return replace(configured(name), **{"problems": PROBLEMS, **changes})


def lessons_of(method, lm, bench) -> list[Lesson]:
    more = [lm.tokenizer] if hasattr(method, "aligner") else []
    with method.teacher.opened(lm, bench) as ask:
        return list(method.lessons(ask, *more, bench))


@pytest.fixture
def train():
    return list(PROBLEMS.read("train"))


ERRING = WorkedTeacher(error_rate=0.3)


@pytest.mark.parametrize("name", ["fine_tune_cot", "teach_small", "specializing"])
def test_only_questions_with_a_right_answer_are_taught(name, trained, bench, train):
    lessons = lessons_of(system(name, teacher=ERRING), trained, bench)
    right = {problem.id for problem in train if not ERRING.errs(problem)}
    assert 0 < len(right) < len(train)
    assert {lesson.problem for lesson in lessons} == right


@pytest.mark.parametrize("name", ["step_by_step", "mt_cot"])
def test_every_question_is_taught_with_the_known_label(name, trained, bench, train):
    lessons = lessons_of(system(name, teacher=ERRING), trained, bench)
    assert [lesson.problem for lesson in lessons] == [problem.id for problem in train]
    first = [next(iter(lesson.views.values())).response for lesson in lessons]
    assert first == [f" {problem.gold}" for problem in train]


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_test_question_is_taught_or_shown(name, trained, bench):
    held_out = [problem.question for problem in PROBLEMS.read("test")]
    text = json.dumps([list(map(vars, lesson.views.values())) for lesson in lessons_of(system(name), trained, bench)])
    assert not any(question in text for question in held_out)


# ---- Fine-tune-CoT


def test_fine_tune_cot_teaches_question_reasoning_and_answer(trained, bench, train):
    (lesson, *_) = lessons_of(system("fine_tune_cot"), trained, bench)
    view = View(f"{train[0].question} ###", f" {train[0].rationale} --> {train[0].gold}")
    assert lesson == Lesson({"reasoning": view}, problem=train[0].id)
    assert NUMBER.extract(view.response) == train[0].gold


def test_a_live_teacher_is_asked_twice_and_its_right_answers_are_kept(trained, bench, train):
    def say(request):
        if not request.prompt.endswith("the answer is"):
            return " Let me see. 1 + 1 = 2."
        return f" {request.problem.gold}." if request.problem.id < "8" else " 100000."

    teacher = Scripted(say)
    method = system("fine_tune_cot", teacher=teacher)
    lessons = lessons_of(method, trained, bench)
    assert len(teacher.asked) == 2 * len(train)
    first = f"Q: {train[0].question}\nA: Let's think step by step."
    prompts = {request.prompt for request in teacher.asked}
    assert {first, f"{first} Let me see. 1 + 1 = 2.\nTherefore, the answer is"} <= prompts
    right = [problem for problem in train if problem.id < "8"]
    assert [lesson.problem for lesson in lessons] == [problem.id for problem in right]
    responses = [lesson.views["reasoning"].response for lesson in lessons]
    assert responses == [f" Let me see. 1 + 1 = 2. --> {problem.gold}" for problem in right]


def test_diverse_reasoning_keeps_every_right_sample(trained, bench, train, tmp_path):
    """The size of the data set is the number of right samples, and grows with the number of samples."""
    path = tmp_path / "said.jsonl"
    rows = []
    for number, problem in enumerate(train):
        for sample in range(4):
            answer = problem.gold if (number + sample) % 3 else "77777"
            rows.append({"question": problem.question, "rationale": f"Way {sample}.", "answer": answer})
    path.write_text("\n".join(map(json.dumps, rows)))
    teacher = RecordedTeacher(str(path), answers=("{rationale} The answer is {answer}.",))
    sizes = []
    for samples in (1, 2, 4):
        sampling = Sampling(samples=samples, temperature=0.7)
        sizes.append(len(lessons_of(system("fine_tune_cot", teacher=teacher, sampling=sampling), trained, bench)))
        wanted = sum((number + sample) % 3 > 0 for number in range(len(train)) for sample in range(samples))
        assert sizes[-1] == wanted
    assert sizes == sorted(sizes)


def test_what_is_taught_can_be_read_again_in_every_kind_of_answer(trained, bench, tmp_path):
    rows = {
        "number": {"question": "How much?", "answer": "-1250.5"},
        "letter": {"question": "Which?", "answer": "B", "choices": ["one", "two"]},
        "choice": {"question": "Where?", "answer": "new york", "choices": ["mall", "new york"]},
        "yes_no": {"question": "Is it?", "answer": "no"},
        "text": {"question": "Last letters?", "answer": "fnel"},
    }
    none = tmp_path / "none.jsonl"
    none.write_text("")
    for rule, row in rows.items():
        path = tmp_path / f"{rule}.jsonl"
        path.write_text(json.dumps(row))
        problems = TaskProblems("mine", "question_answer", rule, str(path), str(none))
        teacher = Scripted(lambda request: f"Because 3 of 4. The answer is {request.problem.gold}.", recorded=True)
        (lesson,) = lessons_of(system("fine_tune_cot", problems=problems, teacher=teacher), trained, bench)
        (problem,) = problems.read("train")
        assert problems.rule.correct(lesson.views["reasoning"].response, problem), rule


# ---- teaching small language models


def test_the_teacher_is_told_the_answer_once_and_the_student_is_not(trained, bench, tmp_path):
    path, none = tmp_path / "rows.jsonl", tmp_path / "none.jsonl"
    path.write_text(json.dumps({"question": "How many legs has a spider?", "answer": "8081"}))
    none.write_text("")
    problems = TaskProblems("mine", "question_answer", "number", str(path), str(none))
    teacher = Scripted(lambda request: " It is written. The answer is 8081.")
    (lesson,) = lessons_of(system("teach_small", problems=problems, teacher=teacher), trained, bench)
    assert teacher.asked[0].prompt == "Q: How many legs has a spider? (The answer is 8081.)\nA:"
    view = lesson.views["reasoning"]
    assert view == View("Q: How many legs has a spider?\nA:", " It is written. The answer is 8081.")


def test_demonstrations_tell_their_answers_too(trained, bench, train):
    teacher = Scripted(lambda request: f" So. The answer is {request.problem.gold}.")
    lessons_of(system("teach_small", teacher=teacher), trained, bench)
    prompt, first = teacher.asked[-1].prompt, train[0]
    assert prompt.count("(The answer is") == 9
    shown = f"Q: {first.question} (The answer is {first.gold}.)\nA: {first.rationale} The answer is {first.gold}.\n\n"
    assert prompt.startswith(shown)


# ---- distilling step by step


def test_unreadable_answers_are_taught_as_empty_rationales(trained, bench, train):
    teacher = Scripted(lambda r: "I do not know" if r.problem == train[1] else "3 + 4. So the answer is 7.")
    lessons = lessons_of(system("step_by_step", teacher=teacher), trained, bench)
    assert len(lessons) == len(train)
    assert lessons[0].views == {
        "label": View(f"predict: {train[0].question}", f" {train[0].gold}"),
        "rationale": View(f"explain: {train[0].question}", " 3 + 4."),
    }
    assert lessons[1].views["rationale"].response == " "
    assert bench.log.counts["unreadable answers"] == 1
    by_teacher = lessons_of(system("step_by_step", teacher=teacher, labels="teacher"), trained, bench)
    assert [by_teacher[n].views["label"].response for n in (0, 1)] == [" 7", " "]


def test_labels_are_equations_where_equations_are_read(trained, bench, tmp_path):
    path, none = tmp_path / "rows.jsonl", tmp_path / "none.jsonl"
    path.write_text(json.dumps({"input": "How many?", "label": "( 10.0 * 45.0 )"}))
    none.write_text("")
    for rule, wanted in (("equation", "( 10.0 * 45.0 )"), ("number", "450")):
        problems = TaskProblems("svamp", "svamp", rule, str(path), str(none))
        teacher = Scripted(lambda request: "Ten each. The answer is (10 * 45).")
        (lesson,) = lessons_of(system("step_by_step", problems=problems, teacher=teacher), trained, bench)
        assert lesson.views["label"].response == f" {wanted}"


def test_labels_do_not_depend_on_rationales(trained, bench):
    one, other = (
        lessons_of(system("step_by_step", teacher=Scripted(lambda _, say=say: say)), trained, bench)
        for say in ("One. So the answer is 1.", "Two. So the answer is 2.")
    )
    assert [lesson.views["label"] for lesson in one] == [lesson.views["label"] for lesson in other]
    assert one[0].views["rationale"] != other[0].views["rationale"]


def test_a_label_weight_of_1_is_ordinary_fine_tuning_bit_for_bit(trained, bench, tmp_path):
    def taught(say: str):
        scratch = tmp_path / say[:3]
        scratch.mkdir()
        own = replace(bench, scratch=scratch, log=TrainingLog(), generator=torch.Generator().manual_seed(0))
        method = system("step_by_step", teacher=Scripted(lambda _: say), label_weight=1.0)
        method = replace(method, training=replace(method.training, steps=3))
        base = replace(trained, module=copy.deepcopy(trained.module))
        return list(method.compress(base, own).module.parameters())

    one, other = taught("One. So the answer is 1."), taught("Two. So the answer is 2.")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- MT-CoT


def halfway(request) -> str:
    """Right by itself for half of the questions; for the others where it is told."""
    if request.prompt.rstrip().endswith("because"):
        return " that is how it is."
    gold = request.problem.gold if request.problem.id < "8" else "99999"
    return f" Think. So the answer is {gold}."


def test_explanations_come_from_where_they_should(trained, bench, train):
    right = {problem.id for problem in train if problem.id < "8"}
    explained = {}
    for way in ("cote", "rp", "crop"):
        lessons = lessons_of(system("mt_cot", teacher=Scripted(halfway), explanations=way), trained, bench)
        explained[way] = {lesson.problem: lesson.origin for lesson in lessons if "explanation" in lesson.views}
        assert len(lessons) == len(train)
    assert explained["cote"] == dict.fromkeys(right, "cote")
    assert explained["rp"] == {problem.id: "rp" for problem in train}
    assert explained["cote"].items() <= explained["crop"].items()
    assert explained["crop"] == {problem.id: "cote" if problem.id in right else "rp" for problem in train}


def test_only_a_rationalizing_teacher_is_told_the_answer(trained, bench, train):
    teacher = Scripted(halfway)
    lessons_of(system("mt_cot", teacher=teacher), trained, bench)
    left = [problem.id for problem in train if problem.id >= "8"]
    told = [request for request in teacher.asked if request.prompt.endswith("because")]
    assert [request.problem.id for request in told] == left
    assert all(f"The answer is {request.problem.gold}, because" in request.prompt for request in told)
    for request in teacher.asked[: len(train)]:
        own = request.prompt.rpartition("\n\n")[2]
        assert own == f"Q: {request.problem.question}\nA:"


def test_the_explanation_stands_before_the_answer(trained, bench, train):
    (lesson, *_) = lessons_of(system("mt_cot"), trained, bench)
    view = View(f"explain: {train[0].question}", f" {train[0].rationale} So the answer is {train[0].gold}.")
    assert lesson.views["explanation"] == view


def test_a_recorded_teacher_is_replaced_by_the_question_s_own_explanation(trained, bench, train):
    lessons = lessons_of(system("mt_cot", teacher=ERRING), trained, bench)
    assert [lesson.origin for lesson in lessons] == ["rp" if ERRING.errs(problem) else "cote" for problem in train]


# ---- specializing


def test_four_formats_of_every_right_sample(trained, bench, train):
    lessons = lessons_of(system("specializing", teacher=WorkedTeacher()), trained, bench)
    formats = [next(iter(lesson.views)) for lesson in lessons]
    assert {name: formats.count(name) for name in FORMATS} == dict.fromkeys(FORMATS, len(train))
    by_id = {problem.id: problem for problem in train}
    for lesson in lessons:
        name, view = next(iter(lesson.views.items()))
        question = by_id[lesson.problem].question
        assert view.prompt.count("Q:") == (5 if name.startswith("in_context") else 1)
        assert view.prompt.count(question) == 1  # never among its own demonstrations
        assert view.prompt.rpartition("Q: ")[2].startswith(question)
        assert ("step by step" in view.prompt) == name.endswith("reasoning")
        assert NUMBER.correct(view.response, by_id[lesson.problem])


def test_several_samples_are_several_lessons_of_reasoning_and_one_of_the_answer(trained, bench, train):
    teacher = Scripted(lambda request: [f" Way {n}. The answer is {request.problem.gold}." for n in range(3)])
    written = write(lessons_of(system("specializing", teacher=teacher), trained, bench), trained, bench)
    count = len(train)
    assert written.counts["zero_shot_reasoning"] == 3 * count
    assert written.counts["zero_shot_answer"] == count


def test_a_sample_that_cannot_be_aligned_takes_no_answer_with_it(trained, bench, train, monkeypatch):
    teacher = Scripted(lambda request: [f" Way {n}. The answer is {request.problem.gold}." for n in range(2)])
    made = iter([None, []] * len(train))  # of two samples the second can be aligned
    monkeypatch.setattr("methods.distillation.specializing.soft_targets", lambda *_: next(made))
    monkeypatch.setattr(
        "methods.distillation.specializing.shortened", lambda answer: replace(answer, top=((answer.text, {}),))
    )
    lessons = lessons_of(system("specializing", teacher=teacher), trained, bench)
    formats = [next(iter(lesson.views)) for lesson in lessons]
    assert formats.count("zero_shot_reasoning") == formats.count("zero_shot_answer") == len(train)


def test_formats_weigh_as_their_micro_batches_would(trained, bench):
    """A micro-batch holds one format: there are (lessons / rows) of each, and all count alike."""
    method = system("specializing", shots=1)  # four do not fit into a tiny model's context
    written = write(lessons_of(method, trained, bench), trained, bench)
    weights = method.weights(written)
    batches = {name: written.counts[name] / method.rows[name] for name in FORMATS}
    assert sum(weights.values()) == pytest.approx(1)
    for name in FORMATS:
        assert weights[name] == pytest.approx(batches[name] / sum(batches.values()))
    assert weights["in_context_reasoning"] / weights["zero_shot_answer"] == pytest.approx(60 / 25)


def test_answers_end_with_the_line_that_gives_the_answer():
    answer = Answer("One.\nThe answer is 4. Yes.\nQ: another", top=(("One.", {}),))
    assert shortened(answer).text == "One.\nThe answer is 4. Yes."
    assert shortened(answer).top == answer.top
    assert shortened(Answer("no conclusion\nat all")).text == "no conclusion\nat all"


def soft_batch(lm, bench, soft, text=" 7 birds"):
    ids, _ = student_tokens(lm.tokenizer, text)
    lesson = Lesson({"zero_shot_reasoning": View("How many?", text)}, soft=soft(ids) if soft else ())
    written = write([lesson], lm, bench)
    prepare = matched(written, {"zero_shot_reasoning": 1.0}, lm.tokenizer)
    return prepare(lm.module, Batch.of_windows(torch.zeros(1, 2, dtype=torch.long)), bench.generator), ids


def test_one_hot_targets_are_the_negative_log_likelihood(trained, bench):
    def one_hot(ids):
        return [([token], [1.0]) for token in [*ids, trained.tokenizer.eos_token_id]]

    soft, _ = soft_batch(trained, bench, one_hot)
    hard, _ = soft_batch(trained, bench, None)
    wanted = language_modeling_loss(trained.module, hard)
    assert torch.allclose(matching_loss(trained.module, soft), wanted, rtol=1e-6)
    assert torch.allclose(matching_loss(trained.module, hard), wanted, rtol=1e-6)


def test_a_student_that_predicts_as_its_teacher_has_nothing_to_learn(trained, bench):
    plain, ids = soft_batch(trained, bench, None)
    chances = logits_of(trained.module, plain)[0, :-1].softmax(-1)
    rows = chances[-len(ids) - 1 :]
    everything = list(range(rows.shape[-1]))
    batch, _ = soft_batch(trained, bench, lambda ids: [(everything, row.tolist()) for row in rows])
    trained.module.requires_grad_(True)
    loss = matching_loss(trained.module, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert max(float(parameter.grad.abs().max()) for parameter in trained.module.parameters()) < 1e-4


def test_the_gradient_of_truncated_targets_is_their_mass_times_softmax_minus_targets(monkeypatch):
    """∂L/∂z = s · softmax(z) - p with s = Σ p < 1: nothing is renormalised."""
    logits = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr("methods.distillation.specializing.logits_of", lambda module, batch: logits)
    batch = Batch.of_windows(torch.tensor([[1, 2]]))
    batch = replace(batch, more={"ids": torch.tensor([[[4, 0, 2]]]), "chances": torch.tensor([[[0.5, 0.2, 0.1]]])})
    matching_loss(None, batch).backward()
    wanted = 0.8 * logits[0, 0].detach().softmax(-1)
    wanted[[4, 0, 2]] -= torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    assert torch.allclose(logits.grad[0, 0], wanted, atol=1e-6)


def test_a_model_teaches_itself_by_its_distributions(trained, bench, monkeypatch):
    """With one tokenizer every alternative survives: five of every token of the response, one of its end mark."""
    monkeypatch.setattr(
        "methods.distillation.specializing.keep_right",
        lambda asked, rule, bench: ((request.problem, answer) for request, answers in asked for answer in answers),
    )
    problems = ArithmeticProblems(train=3, test=1)
    sampling = Sampling(new_tokens=12, top_logprobs=5)
    method = system("specializing", problems=problems, teacher=EngineTeacher(), sampling=sampling, shots=2)
    method = replace(method, asking=replace(method.asking, shots=0))
    lessons = [lesson for lesson in lessons_of(method, trained, bench) if lesson.soft]
    assert len(lessons) == 6  # both formats of reasoning
    for lesson in lessons:
        response = next(iter(lesson.views.values())).response
        ids, _ = student_tokens(trained.tokenizer, response)
        assert [some[0] for some, _ in lesson.soft[:-1]] == ids  # greedy: the likeliest is what it wrote
        assert all(len(some) == 5 for some, _ in lesson.soft[:-1])
        assert lesson.soft[-1] == ([trained.tokenizer.eos_token_id], [1.0])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("step_by_step", {"labels": "gold"}, "labels=gold"),
        ("step_by_step", {"label_weight": 1.5}, "label_weight=1.5"),
        ("mt_cot", {"explanations": "both"}, "explanations=both"),
        ("mt_cot", {"answer_weight": 0.0}, "answer_weight=0.0"),
        ("specializing", {"rows": {"zero_shot_answer": 1}}, "method.rows"),
        ("specializing", {"aligner": "none"}, "aligner=none"),
        ("specializing", {"shots": 0}, "shots=0"),
    ],
)
def test_wrong_values_are_named(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        system(name, **changes)


def test_problems_know_what_they_are():
    assert made("a", "1").id != made("a", "1", context="b").id
    assert made("a", "1").id == made("a", "2").id  # by what is asked, not by the answer
