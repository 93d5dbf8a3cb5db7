from __future__ import annotations

import pytest
import torch
from tiny_models import language_model

from harness.decoding import Plain, batches, complete, complete_ids, encode, padded
from harness.errors import ConfigError, RunError
from harness.problems import ArithmeticProblems
from harness.progress import NoProgress


def one_by_one(lm, prompt: str, new_tokens: int) -> list[int]:
    """Greedy decoding without a cache and without a batch."""
    ids = lm.tokenizer(prompt)["input_ids"]
    for _ in range(new_tokens):
        logits = lm.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids[-new_tokens:]


@pytest.fixture(scope="module")
def lm():
    return language_model()


def test_a_batch_of_prompts_is_answered_as_each_alone(lm):
    prompts = ["a", "quite a bit longer than that", "in between"]
    found = complete_ids(lm, [lm.tokenizer(p)["input_ids"] for p in prompts], [((), 12)] * 3, 12)
    for prompt, completion in zip(prompts, found, strict=True):
        alone = one_by_one(lm, prompt, 12)
        end = alone.index(lm.tokenizer.eos_token_id) if lm.tokenizer.eos_token_id in alone else len(alone)
        assert list(completion.ids) == alone[:end]
        assert completion.ended == (end < len(alone))
        assert completion.text == lm.tokenizer.decode(alone[:end])


def test_rows_that_have_ended_are_left_out_and_change_no_other(lm, monkeypatch):
    """Every row is what it is alone, and half of a batch costs half as soon as the other half has ended."""
    prompts = ["a", "quite a bit longer than that", "in between", "b", "number four", "five"]
    most = [12, 2, 3, 1, 9, 3]
    widths = []
    plain = type(lm.engine).advance

    def counted(self, ids, *more, **named):
        widths.append(len(ids))
        return plain(self, ids, *more, **named)

    monkeypatch.setattr(type(lm.engine), "advance", counted)
    found = complete_ids(lm, [lm.tokenizer(p)["input_ids"] for p in prompts], [((), n) for n in most], 12)
    for prompt, count, completion in zip(prompts, most, found, strict=True):
        alone = one_by_one(lm, prompt, count)
        assert lm.tokenizer.eos_token_id not in alone
        assert list(completion.ids) == alone
    assert widths == [6] * 3 + [2] * 6 + [1] * 3


def test_texts_come_in_the_order_of_their_prompts_whatever_the_batches(lm):
    prompts = [f"{'word ' * (n % 4)}number {n}" for n in range(7)]
    assert complete(lm, prompts, 6, (), 3, NoProgress()) == complete(lm, prompts, 6, (), 1, NoProgress())


def test_a_stop_sequence_ends_a_text_and_is_left_out(lm):
    ids = lm.tokenizer("some words")["input_ids"]
    whole = complete_ids(lm, [ids], [((), 20)], 20)[0].text
    stop = whole[5:8]
    found = complete_ids(lm, [ids], [((stop, "never there"), 20)], 20)[0]
    assert found.text == whole[: whole.index(stop)]
    assert found.ended


def test_likeliest_alternatives_are_those_of_the_model(lm):
    ids = lm.tokenizer("some words")["input_ids"]
    found = complete_ids(lm, [ids], [((), 4)], 4, top=3)[0]
    read = torch.tensor([ids + list(found.ids)])
    scores = lm.module(input_ids=read, use_cache=False).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    best = scores.topk(3)
    assert [list(some) for some, _ in found.top] == best.indices.tolist()
    assert torch.allclose(torch.tensor([list(s) for _, s in found.top]), best.values, atol=1e-4)


def test_a_prompt_that_leaves_no_room_is_refused(lm):
    assert encode(lm, "x" * 500, 12)
    with pytest.raises(RunError, match="exceed the 512 positions"):
        encode(lm, "x" * 501, 12)


def test_batches_hold_everything_once_and_the_longest_first():
    lengths = [3, 9, 1, 7, 7]
    found = list(batches(lengths, 2, NoProgress(), ""))
    assert sorted(index for some in found for index in some) == [0, 1, 2, 3, 4]
    assert found[0] == [1, 3]


def test_padding_stands_where_it_should():
    ids, mask = padded([[5, 6], [7]], left=True)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[True, True], [False, True]]


def test_questions_are_put_as_the_template_says(lm, monkeypatch):
    asked = []
    monkeypatch.setattr("harness.decoding.complete", lambda lm, prompts, *_: asked.extend(prompts) or prompts)
    problems = list(ArithmeticProblems(train=2, test=1).read("train"))
    Plain(prompt="Frage: {question}\nAntwort:").decode(lm, problems, NoProgress())
    assert asked == [f"Frage: {problem.question}\nAntwort:" for problem in problems]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"prompt": "Q:"}, "{question}"), ({"new_tokens": 0}, "new_tokens=0"), ({"batch": 0}, "batch=0")],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plain(**changes)
