"""Socratic CoT: chains and their views, decoding with students that know everything, two models in one artifact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import artifact
from harness.answers import rule_named
from harness.errors import ConfigError
from harness.problems import ArithmeticProblems, made
from harness.progress import NoProgress
from methods.distillation import socratic_cot
from methods.distillation.companions import Companion
from methods.distillation.socratic_cot import Socratic, SocraticCoT, known_steps, read_steps, sub_questions
from methods.distillation.students import Truncated
from methods.distillation.text_teachers import Answer, WorkedTeacher
from methods.training import TrainingSettings
from tests.harness.tiny_models import language_model

DECODING = Socratic(
    "P: {question}\nS:", "P: {question}\n{history}Q: {sub_question}\nA:", "Q: {sub_question}\nA: {solution}\n"
)
TRAINING = TrainingSettings(steps=2, learning_rate=1e-3, batch_size=2)


def socratic(problems=None, **changes) -> SocraticCoT:
    return SocraticCoT(
        problems=problems or ArithmeticProblems(train=6, test=4),
        teacher=WorkedTeacher(),
        student=Truncated(1.0),
        training=TRAINING,
        decoding=DECODING,
        teacher_prompt="{question}",
        **changes,
    )


def lessons_of(method, bench, ask=None):
    if ask is not None:
        return list(method.lessons(ask, bench))
    with method.teacher.opened(language_model(), bench) as own:
        return list(method.lessons(own, bench))


def test_one_lesson_in_asking_and_one_for_each_solution(bench):
    method = socratic()
    lessons = lessons_of(method, bench)
    for problem in method.problems.read("train"):
        own = [lesson for lesson in lessons if lesson.problem == problem.id]
        asking = [lesson.views["decompose"] for lesson in own if "decompose" in lesson.views]
        solving = [lesson.views["solve"] for lesson in own if "solve" in lesson.views]
        assert [view.response for view in asking] == ["".join(f"\n{q}" for q, _ in problem.steps)]
        assert len(solving) == len(problem.steps)
        assert sub_questions(asking[0].response, 10) == [q for q, _ in problem.steps]
        assert solving[-1].response.endswith(f"The answer is {problem.gold}.")


def test_solutions_are_read_with_all_that_came_before(bench):
    """Prompts and responses of a problem's solutions, put together, are its chain: the chain rule has no gap."""
    method = socratic()
    problem = next(method.problems.read("train"))
    steps = known_steps(problem)
    chain = f"P: {problem.question}\n" + "".join(f"Q: {q}\nA: {s}\n" for q, s in steps)
    solving = [lesson.views["solve"] for lesson in lessons_of(method, bench) if "solve" in lesson.views][: len(steps)]
    for view in solving:
        assert chain.startswith(view.prompt + view.response)
    assert solving[-1].prompt + solving[-1].response + "\n" == chain


@torch.no_grad()
def test_the_solutions_losses_add_up_to_the_chain_s(bench):
    """Σ_j log p(s_j | P, q_≤j, s_<j) is the log-probability of the solutions' tokens in the chain, by one model."""
    lm = language_model()
    method = socratic()
    problem = next(method.problems.read("train"))
    views = [lesson.views["solve"] for lesson in lessons_of(method, bench) if "solve" in lesson.views]
    views = views[: len(problem.steps)]
    ids = lm.tokenizer(views[-1].prompt + views[-1].response)["input_ids"]
    whole = lm.engine.score(torch.tensor([ids]))[0]
    total = parts = 0.0
    for view in views:
        start, end = (len(lm.tokenizer(text)["input_ids"]) for text in (view.prompt, view.prompt + view.response))
        total += float(whole[start - 1 : end - 1].sum())
        own = torch.tensor([lm.tokenizer(view.prompt + view.response)["input_ids"]])
        parts += float(lm.engine.score(own)[0, start - 1 :].sum())
    assert parts == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("One? ** 1.\nTwo? ** 2.", (("One?", "1."), ("Two?", "2."))),
        ("One? ** 1.\n\nTwo? ** 2.\n", (("One?", "1."), ("Two?", "2."))),
        ("One? ** 1.\nTwo?", ()),
        ("One? **\nTwo? ** 2.", ()),
        ("", ()),
    ],
)
def test_chains_are_read_whole_or_not_at_all(text, steps):
    assert read_steps(text) == steps


def test_reading_undoes_writing():
    for problem in ArithmeticProblems(train=20, test=4).read("train"):
        assert read_steps("\n".join(f"{q} ** {s}" for q, s in problem.steps)) == problem.steps


class Untold:
    """Problems that come without sub-questions."""

    name = "untold"
    rule = rule_named("number")

    def read(self, split):
        yield from (made(f"{i} and {i}?", str(2 * i)) for i in range(4))


def test_a_teacher_is_asked_where_there_are_no_sub_questions_and_kept_where_it_is_right(bench):
    replies = [
        "Sum? ** 0. The answer is 0.",
        "Sum? ** The answer is 3.",
        "No form.",
        "A? ** 3.\nB? ** The answer is 6.",
    ]

    def ask(requests):
        for request, text in zip(requests, replies, strict=True):
            yield request, [Answer(text)]

    lessons = lessons_of(socratic(Untold()), bench, ask)
    kept = [problem.id for i, problem in enumerate(Untold().read("train")) if i in (0, 3)]
    assert [lesson.problem for lesson in lessons if "decompose" in lesson.views] == kept
    assert (bench.log.counts["answers"], bench.log.counts["kept answers"]) == (4, 2)


def test_facts_stand_for_solutions_where_there_are_none():
    questions = ("One?", "Two?", "Is #1 more than #2?")
    problem = made("?", "no", steps=tuple((q, "") for q in questions), facts=("First.", "Second.", "Third."))
    assert [s for _, s in known_steps(problem)] == ["First.", "Second. Third.", "The answer is no."]
    few = replace(problem, facts=("First.",))
    assert [s for _, s in known_steps(few)] == ["First.", "Not known.", "The answer is no."]
    single = replace(problem, steps=(("All?", ""),), facts=("A.", "B."))
    assert [s for _, s in known_steps(single)] == ["A. B. The answer is no."]


def test_a_conclusion_is_said_once():
    problem = made("?", "4", steps=(("Sum?", "2 + 2 = 4. The answer is 4."),))
    assert known_steps(problem) == problem.steps


def knowing(problems, right=True):
    """`complete` of students that know every chain (if not right: whose sub-questions are another problem's)."""
    chains = {problem.fields()["question"]: known_steps(problem) for problem in problems}
    order = list(chains)

    def complete(_lm, prompts, *_):
        for prompt in prompts:
            question, _, rest = prompt.removeprefix("P: ").partition("\n")
            if rest == "S:":
                own = question if right else order[(order.index(question) + 1) % len(order)]
                yield "".join(f"\n{q}" for q, _ in chains[own])
            else:
                asked = rest.rpartition("Q: ")[2].removesuffix("\nA:")
                step = rest.count("\nA:") - 1
                known = chains[question]
                yield f" {known[step][1]}" if step < len(known) and known[step][0] == asked else " I do not know."

    return lambda *arguments: list(complete(*arguments))


def test_students_that_know_everything_are_always_right(monkeypatch):
    problems = list(ArithmeticProblems(train=30, test=4).read("train"))
    rule = rule_named("number")
    monkeypatch.setattr(socratic_cot, "complete", knowing(problems))
    texts = DECODING.decode(language_model(), problems, NoProgress())
    assert all(rule.correct(text, problem) for text, problem in zip(texts, problems, strict=True))
    monkeypatch.setattr(socratic_cot, "complete", knowing(problems, right=False))
    worse = DECODING.decode(language_model(), problems, NoProgress())
    assert sum(rule.correct(text, problem) for text, problem in zip(worse, problems, strict=True)) < len(problems)


def test_asking_ends_though_it_repeats_itself_for_ever():
    assert sub_questions("a?\n" * 50, 10) == ["a?"] * 10
    assert sub_questions("\n a?\n\nb? \n", 10) == ["a?", "b?"]
    assert sub_questions("", 10) == []


def test_without_sub_questions_there_is_no_answer(monkeypatch):
    monkeypatch.setattr(socratic_cot, "complete", lambda _lm, prompts, *_: [""] * len(prompts))
    assert DECODING.decode(language_model(), [made("?", "1")], NoProgress()) == [""]


@pytest.mark.parametrize("tied", [False, True])
def test_two_models_come_back_from_one_artifact(bench, tmp_path, tied):
    """Both decode after loading as before, in 16-bit weights that are counted, tied ones once."""
    lm = language_model(tie_word_embeddings=tied)
    taught = socratic().compress(lm, bench)
    assert isinstance(taught.module.decomposer, Companion)
    description = artifact.save(taught, tmp_path / "two")
    back = artifact.load(tmp_path / "two", "cpu", torch.float32)
    for name, tensor in taught.module.decomposer.state_dict().items():
        assert torch.equal(tensor, back.module.decomposer.state_dict()[name]), name
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = (each.module.decomposer.opened(each).engine.score(tokens) for each in (taught, back))
    assert torch.equal(first, second)
    one = artifact.save(language_model(tie_word_embeddings=tied), tmp_path / "one")
    assert description["parameters"] == 2 * one["parameters"]
    assert sum(artifact.tensor_bytes(tmp_path / "two").values()) == 2 * sum(
        artifact.tensor_bytes(tmp_path / "one").values()
    )
    problems = list(ArithmeticProblems(train=4, test=2).read("test"))
    assert DECODING.decode(taught, problems, NoProgress()) == DECODING.decode(back, problems, NoProgress())


def test_one_model_learns_both(bench):
    taught = socratic(models="one").compress(language_model(), bench)
    assert not hasattr(taught.module, "decomposer")
    assert len(bench.log.curves["training loss"]) == TRAINING.steps


def test_values_out_of_bounds_are_refused():
    with pytest.raises(ConfigError, match="models"):
        socratic(models="three")
    with pytest.raises(ConfigError, match="history_line"):
        replace(DECODING, history_line="{solution}")
