"""LaMini-LM: what the teacher is shown, how its lists become a mixture, and which responses are learned."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from harness.answers import rule_named
from harness.errors import ConfigError
from harness.problems import made
from methods.distillation.instructions import Creation, Instructed, ReserveTeacher, wrapped
from methods.distillation.lamini import TOPICS, LaMini
from methods.distillation.students import Truncated
from methods.distillation.text_teachers import Answer, Sampling
from methods.training import TrainingSettings
from tests.harness.tiny_models import language_model

TRAINING = TrainingSettings(steps=2, learning_rate=1e-3, batch_size=2)


class Seeds:
    """Numbered instructions."""

    name, rule = "seeds", rule_named("text")

    def read(self, split):
        for i in range(40 if split == "train" else 4):
            yield made(f"{split} instruction {i}?", f"Response {i}")


def lamini(**changes) -> LaMini:
    settings = {
        "problems": Seeds(),
        "teacher": ReserveTeacher(Seeds()),
        "student": Truncated(1.0),
        "training": TRAINING,
        "decoding": Instructed(new_tokens=4),
        "mixture": {"without_topic": 5, "with_topic": 7, "original": 3},
        "example_prompt": "{examples}\n{count} like these",
        "topic_prompt": "{examples}\n{count} like these about {topics}",
        "example_line": "<example>{instruction}</example>",
        "sampling": Sampling(),
        "creation": Sampling(),
    }
    return LaMini(**settings | changes)


def lists(prompts, new=4):
    """A teacher that writes lists of numbered inventions and responds to everything."""
    made_up = Counter()

    def ask(requests):
        for request in requests:
            prompts.append(request.prompt)
            if not isinstance(request, Creation):
                yield request, [Answer(f"Response to {request.problem.question}")]
                continue
            texts = []
            for _ in range(new):
                made_up["new"] += 1
                texts.append(f"Invention {made_up['new']}")
            texts += ["Invention 1", request.seeds[0].question]  # copies of an older one and of a seed
            yield request, [Answer("\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1)))]

    return ask


def test_a_prompt_holds_exactly_the_examples_and_topics_asked_for(bench):
    prompts = []
    list(lamini().instructions(lists(prompts), bench))
    topics = set(lamini()._topics())
    without, about = ([p for p in prompts if (" about " in p) == flag] for flag in (False, True))
    assert len(without) == len(about) == 2  # lists of 4 for 5 and for 7
    for prompt in prompts:
        assert prompt.count("<example>train instruction") == 3
        assert len({line for line in prompt.splitlines() if line.startswith("<example>")}) == 3
        assert "20 like these" in prompt
    for prompt in about:
        named = prompt.partition(" about ")[2].split(", ")
        assert len(named) == len(set(named)) == 3
        assert set(named) <= topics


def test_the_mixture_is_what_was_asked_for_without_copies(bench):
    found = list(lamini().instructions(lists([]), bench))
    assert Counter(source for source, _ in found) == {"original": 3, "without_topic": 5, "with_topic": 7}
    questions = [problem.question for _, problem in found]
    assert len(set(questions)) == len(questions)
    seeds = {problem.question for problem in Seeds().read("train")}
    assert all((problem.question in seeds) == (source == "original") for source, problem in found)
    assert bench.log.counts["instructions: with_topic"] == 7


def test_a_teacher_that_invents_nothing_new_is_not_asked_for_ever(bench):
    prompts = []
    found = list(lamini().instructions(lists(prompts, new=0), bench))
    assert Counter(source for source, _ in found) == {"original": 3, "without_topic": 1}
    assert len(prompts) == 201  # one list with an invention, and twice a hundred without


def test_whole_responses_that_are_no_refusals_are_learned(bench):
    replies = [
        Answer("Fine."),
        Answer("I'm sorry, I cannot."),
        Answer("Cut", finish="length"),
        Answer(""),
        Answer("As an AI, no."),
    ]

    def ask(requests):
        for request, reply in zip(requests, replies, strict=True):
            yield request, [reply]

    method = lamini(mixture={"original": 5})
    lessons = list(method.lessons(ask, bench))
    assert [lesson.views["response"].response for lesson in lessons] == [" Fine."]
    assert (bench.log.counts["answers"], bench.log.counts["kept answers"]) == (5, 1)


def test_lessons_read_the_very_prompt_of_the_evaluation(bench, monkeypatch):
    from harness.progress import NoProgress
    from methods.distillation import instructions

    method = lamini(mixture={"original": 2})
    with method.teacher.opened(language_model(), bench) as ask:
        taught = [lesson.views["response"].prompt for lesson in method.lessons(ask, bench)]
    asked = []
    monkeypatch.setattr(instructions, "complete", lambda _lm, prompts, *_: asked.extend(prompts) or ["", ""])
    problems = list(Seeds().read("train"))[:2]
    method.decoding.decode(None, problems, NoProgress())
    assert taught == asked == [wrapped(problem) for problem in problems]


def test_from_the_reserve_to_a_student(bench):
    """The whole pipeline without a model for a teacher; the reserve ends before the mixture is full, which is fine."""
    method = lamini(mixture={"without_topic": 10, "with_topic": 10, "original": 10})
    method.compress(language_model(), bench)
    counts = bench.log.counts
    assert counts["instructions: original"] == 10
    assert counts["lessons"] == counts["kept answers"] >= 10
    assert len(bench.log.curves["training loss"]) == 2


def test_topics_are_many_short_and_different():
    lines = TOPICS.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) >= 200
    assert all(0 < len(line.split()) <= 3 for line in lines)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"mixture": {"alpaca": 1}}, "mixture"),
        ({"mixture": {"original": 0}}, "mixture"),
        ({"topic_prompt": "{examples} {count}"}, "topic_prompt"),
        ({"topics_file": "/no/such/file"}, "topics_file"),
        ({"count": 0}, "count"),
    ],
)
def test_values_out_of_bounds_are_refused(changes, name):
    with pytest.raises(ConfigError, match=name):
        replace(lamini(), **changes)
