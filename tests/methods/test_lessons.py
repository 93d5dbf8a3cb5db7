"""What every black-box system shares: lessons on disk, weights of their views, filters, prompts."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from dataclasses import replace

import pytest
import torch

from harness.answers import RULES
from harness.decoding import complete
from harness.errors import ConfigError, RunError
from harness.method import TrainingLog
from harness.problems import ArithmeticProblems
from harness.progress import NoProgress
from methods.distillation.lessons import Lesson, Prompt, View, encoded, keep_right, paired, shares_of, teach, write
from methods.distillation.text_teachers import Request, WorkedTeacher
from methods.training import TrainingSettings, language_modeling_loss, logits_of, token_losses

LESSONS = [
    Lesson(
        {
            "label": View(f"predict: {n} + 1", f" {n + 1}"),
            "why": View(f"explain: {n} + 1", f" one more than {n} is {n + 1}"),
        },
        problem=str(n),
    )
    for n in range(8, 14)
]


def fresh(bench, folder):
    return replace(bench, scratch=folder, log=TrainingLog(), generator=torch.Generator().manual_seed(0))


def test_lessons_come_back_from_disk_one_by_one(trained, bench):
    written = write(iter(LESSONS), trained, bench)
    assert list(written) == LESSONS
    assert written[-1] == LESSONS[-1]
    assert written[1:3] == LESSONS[1:3]
    assert list(pickle.loads(pickle.dumps(written))) == LESSONS
    assert written.counts == {"label": 6, "why": 6}
    assert written.tokens["label"] == sum(
        len(lesson.views["label"].response) + 1 for lesson in LESSONS
    )  # bytes, end mark
    assert bench.log.counts["lessons"] == 6


def test_a_response_ends_with_the_end_mark_and_the_prompt_is_not_learned(trained):
    example = encoded(LESSONS[0], "label", trained.tokenizer)
    assert trained.tokenizer.decode(example.prompt) == "predict: 8 + 1"
    assert example.response[-1] == trained.tokenizer.eos_token_id
    assert trained.tokenizer.decode(example.response[:-1]) == " 9"


def test_lessons_too_long_for_the_student_are_left_out_and_counted(trained, bench):
    long = Lesson({"label": View("x" * 600, " 1")})
    assert len(write([*LESSONS, long], trained, bench)) == 6
    assert bench.log.counts["lessons too long"] == 1
    with pytest.raises(RunError, match="longer than the 512 positions"):
        write([long], trained, bench)
    with pytest.raises(RunError, match="none was kept"):
        write([], trained, replace(bench, log=TrainingLog()))


def test_memory_does_not_grow_with_the_number_of_lessons(trained, bench):
    def peak(count: int) -> int:
        lessons = (Lesson({"label": View(f"{n} " + "word " * 80, f" {n}")}) for n in range(count))
        tracemalloc.start()
        written = write(lessons, trained, bench)
        assert written[count - 1].views["label"].response == f" {count - 1}"
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(50)  # caches of the tokenizer
    assert peak(600) < peak(150) + 30_000


def gradients(module, batch) -> list[torch.Tensor]:
    module.requires_grad_(True)
    module.zero_grad()
    language_modeling_loss(module, batch).backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.requires_grad_(False)
    return found


def test_views_are_weighed_means_over_their_own_tokens(trained, bench):
    """Over all lessons: Σ_v w_v · mean over the tokens of v, against each view computed alone."""
    written, weights = write(LESSONS, trained, bench), {"label": 0.3, "why": 0.7}
    whole = paired(written, weights, trained.tokenizer)(trained.module, rows_of(range(6)), bench.generator)
    total = float((token_losses(logits_of(trained.module, whole), whole) * whole.weights).sum() / len(written))
    wanted = 0.0
    for name, weight in weights.items():
        losses = []
        for lesson in LESSONS:
            example = encoded(lesson, name, trained.tokenizer)
            ids = torch.tensor([[*example.prompt, *example.response]])
            losses.append(trained.engine.score(ids)[0, len(example.prompt) - 1 :])
        wanted += weight * float(torch.cat(losses).mean())
    assert total == pytest.approx(wanted, rel=1e-5)


def rows_of(rows):
    from methods.examples import Batch

    rows = torch.tensor(list(rows))
    return Batch.of_windows(torch.zeros(len(rows), 2, dtype=torch.long), rows)


def test_a_step_does_not_depend_on_how_it_is_split_into_passes(trained, bench):
    """Gradients weighed by the sum of weights, as training does with passes and processes."""
    trained.module.double()
    written = write(LESSONS, trained, bench)
    prepare = paired(written, {"label": 0.5, "why": 0.5}, trained.tokenizer)

    def step(*passes):
        batches = [prepare(trained.module, rows_of(rows), bench.generator) for rows in passes]
        total = sum(float(batch.weights.sum()) for batch in batches)
        parts = [[g * float(b.weights.sum()) / total for g in gradients(trained.module, b)] for b in batches]
        return [sum(each) for each in zip(*parts, strict=True)]

    whole = step(range(6))
    for split in ([[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [4, 2, 1]]):
        for one, other in zip(whole, step(*split), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)  # losses are taken in float32


def test_gradients_are_linear_in_the_weights(trained, bench):
    trained.module.double()
    written = write(LESSONS, trained, bench)

    def at(weights):
        batch = paired(written, weights, trained.tokenizer)(trained.module, rows_of(range(6)), bench.generator)
        scale = float(batch.weights.sum()) / len(written)  # the loss is a mean by weights; this is their sum
        return [gradient * scale for gradient in gradients(trained.module, batch)]

    label, why, both = at({"label": 1.0}), at({"why": 1.0}), at({"label": 0.25, "why": 0.75})
    for a, b, mixed in zip(label, why, both, strict=True):
        assert torch.allclose(0.25 * a + 0.75 * b, mixed, rtol=1e-5, atol=1e-7)  # weights are stored in float32


SETTINGS = TrainingSettings(steps=4, learning_rate=1e-3, batch_size=2, checkpoint_steps=10)


def taught(lm, lessons, weights, bench, folder):
    folder.mkdir()
    copied = replace(lm, module=copy.deepcopy(lm.module))
    own = fresh(bench, folder)
    teach(copied, write(lessons, lm, own), weights, SETTINGS, own, "test")
    return list(copied.module.parameters()), own


def test_a_view_of_weight_0_is_as_if_it_were_not_there_bit_for_bit(trained, bench, tmp_path):
    alone = [Lesson({"label": lesson.views["label"]}, problem=lesson.problem) for lesson in LESSONS]
    one, _ = taught(trained, LESSONS, {"label": 1.0, "why": 0.0}, bench, tmp_path / "one")
    other, _ = taught(trained, alone, {"label": 1.0}, bench, tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_lesson_of_weight_2_is_the_lesson_twice(trained, bench):
    double = [replace(lesson, weight=2.0 if n == 3 else 1.0) for n, lesson in enumerate(LESSONS)]
    twice = [*LESSONS, LESSONS[3]]
    found = []
    for lessons in (double, twice):
        written = write(lessons, trained, bench)
        batch = paired(written, {"label": 1.0}, trained.tokenizer)(
            trained.module, rows_of(range(len(written))), bench.generator
        )
        found.append(float(language_modeling_loss(trained.module, batch)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_lesson_without_a_view_is_left_out_of_that_view_alone(trained, bench):
    some = [
        replace(lesson, views={"label": lesson.views["label"]}) if n % 2 else lesson for n, lesson in enumerate(LESSONS)
    ]
    written = write(some, trained, bench)
    assert written.counts == {"label": 6, "why": 3}
    batch = paired(written, {"label": 0.5, "why": 0.5}, trained.tokenizer)(
        trained.module, rows_of(range(6)), bench.generator
    )
    assert batch.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 2, 4]
    shares = shares_of(written, {"label": 0.5, "why": 0.5})
    sums = [float(batch.weights[:6].sum()), float(batch.weights[6:].sum())]
    assert sums == pytest.approx([0.5 * 6, 0.5 * 6])  # both views weigh as they should over the data set
    assert shares["label"] * written.tokens["label"] == pytest.approx(shares["why"] * written.tokens["why"])


def test_a_few_lessons_are_learned_by_heart(trained, bench, tmp_path):
    bench = fresh(bench, tmp_path / "scratch")
    bench.scratch.mkdir()
    settings = TrainingSettings(steps=200, learning_rate=2e-3, batch_size=3, checkpoint_steps=1000)
    sounds = {"cat": ("meow", "it purrs"), "dog": ("bark", "it runs"), "owl": ("hoot", "night")}
    lessons = [
        Lesson({"label": View(f"say: {name}", f" {sound}"), "why": View(f"why: {name}", f" {why}")})
        for name, (sound, why) in sounds.items()
    ]
    written = write(lessons, trained, bench)
    teach(trained, written, {"label": 0.5, "why": 0.5}, settings, bench, "test")
    views = [view for lesson in lessons for view in lesson.views.values()]
    said = complete(trained, [view.prompt for view in views], 20, (), 6, NoProgress())
    assert said == [view.response for view in views]
    assert bench.log.tokens > 200 * (written.tokens["label"] + written.tokens["why"])  # prompts are read, too


@pytest.mark.parametrize("weights", [{"label": 0.0}, {"label": -1.0, "why": 1.0}, {"other": 1.0}])
def test_weights_that_leave_nothing_to_learn_are_refused(weights, trained, bench):
    with pytest.raises(ConfigError, match="loss weights"):
        teach(trained, write(LESSONS, trained, bench), weights, SETTINGS, bench, "test")


# ---- ask and keep


def test_exactly_the_right_answers_are_kept(trained, bench):
    teacher = WorkedTeacher(error_rate=0.3)
    problems = list(ArithmeticProblems(train=100, test=1).read("train"))
    with teacher.opened(trained, bench) as ask:
        asked = ask(Request("any", problem) for problem in problems)
        kept = [problem for problem, _ in keep_right(asked, RULES["number"], bench)]
    assert kept == [problem for problem in problems if not teacher.errs(problem)]
    assert (bench.log.counts["answers"], bench.log.counts["kept answers"]) == (100, len(kept))


def test_a_prompt_never_demonstrates_its_own_question():
    problems = ArithmeticProblems(train=10, test=1)
    prompt = Prompt("Q: {question}\nA:", "Q: {question}\nA: {rationale} The answer is {gold}.\n\n", shots=3)
    shown = prompt.shown(problems)
    for problem in problems.read("train"):
        text = prompt.write(problem, shown)
        assert text.count("Q:") == 4
        assert text.count(problem.question) == 1
        assert text.endswith(f"Q: {problem.question}\nA:")
    with pytest.raises(ConfigError, match="demonstration"):
        Prompt("{question}", shots=2)
