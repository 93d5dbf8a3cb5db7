from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import language_model
from tokenizers.processors import TemplateProcessing

from harness.engines.lm_eval import EngineLM
from harness.errors import RunError
from harness.progress import NoProgress


def wrapped(batch: int = 3, **changes) -> EngineLM:
    return EngineLM(language_model(**changes), batch, NoProgress())


def request(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def naive_loglikelihood(model: EngineLM, context: str, continuation: str) -> tuple[float, bool]:
    ids = model.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    count = len(model.tokenizer(continuation)["input_ids"])
    with torch.no_grad():
        logs = model._lm.module(input_ids=ids).logits[0, -count - 1 : -1].log_softmax(-1)
    target = ids[0, -count:]
    return float(logs.gather(1, target[:, None]).sum()), bool((logs.argmax(-1) == target).all())


PAIRS = [
    ("The pier", " was empty"),
    ("A much longer context than the others, then", " a"),
    ("x", " yes"),
    ("So", " no"),
]


@pytest.mark.parametrize("batch", [1, 3])
def test_loglikelihoods_are_sums_over_the_continuation_in_any_batch(batch):
    model = wrapped(batch)
    found = model.loglikelihood([request(*pair) for pair in PAIRS])
    for (score, greedy), pair in zip(found, PAIRS, strict=True):
        expected, expected_greedy = naive_loglikelihood(model, *pair)
        assert score == pytest.approx(expected, rel=1e-4)
        assert greedy == expected_greedy


def test_texts_encoded_at_once_have_the_ids_that_each_has_alone(monkeypatch):
    """Also where some texts already begin with the mark that the tokenizer puts before the others."""
    model = wrapped()
    model.tokenizer.bos_token = "x"
    mark = model.tokenizer.convert_tokens_to_ids("x")
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("x $A", special_tokens=[("x", mark)])
    asked = []
    monkeypatch.setattr(model, "_loglikelihood_tokens", lambda requests, **_: asked.extend(requests) or [])
    pairs = [*PAIRS, ("So ", "no"), ("", "alone")]
    model.loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (_, before, after) in zip(pairs, asked, strict=True):
        if context:
            assert (before, after) == model._encode_pair(context, continuation)
    assert {before[0] for _, before, _ in asked} == {mark}
    assert not model._encoded


def test_the_greedy_continuation_is_recognised():
    model = wrapped()
    prompt = "The pier"
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = [int(step) for step in model._lm.engine.generate(ids, 3)]
    scored = model._loglikelihood_tokens([(None, ids[0].tolist(), answer), (None, ids[0].tolist(), [answer[0], 1, 2])])
    assert [greedy for _, greedy in scored] == [True, False]


def test_rolling_scores_every_token_once_after_the_prefix():
    model = wrapped(max_position_embeddings=16)
    text = "forty bytes of text, more than a window."
    windows = model.loglikelihood_rolling([request(text)])[0]
    assert len(text) > 2 * 16
    ids = model.tokenizer(text)["input_ids"]
    expected, start = 0.0, 0
    while start < len(ids):  # every window is as long as it may be and predicts only what is new
        end = min(start + 16, len(ids))
        window = [model.prefix_token_id, *ids][max(0, end - 16) : end + 1]
        with torch.no_grad():
            logs = model._lm.module(input_ids=torch.tensor([window[:-1]])).logits[0].log_softmax(-1)
        new = end - start
        expected += float(logs[-new:].gather(1, torch.tensor(window[-new:])[:, None]).sum())
        start = end
    assert windows == pytest.approx(expected, rel=1e-4)


def test_answers_do_not_depend_on_the_batch_and_stop_before_the_stop_sequence():
    prompts = ["One", "Another, longer prompt", "Third prompt"]
    free = wrapped(1).generate_until([request(prompt, {"max_gen_toks": 12}) for prompt in prompts])
    together = wrapped(3).generate_until([request(prompt, {"max_gen_toks": 12}) for prompt in prompts])
    assert together == free
    stop = free[0][4:6]
    stopped = wrapped(3).generate_until([request(p, {"max_gen_toks": 12, "until": [stop]}) for p in prompts])
    assert stopped == [text.partition(stop)[0] for text in free]


def test_each_request_keeps_its_own_limit():
    answers = wrapped(2).generate_until([request("One", {"max_gen_toks": 2}), request("Two", {"max_gen_toks": 5})])
    free = wrapped(1).generate_until([request("One", {"max_gen_toks": 5})])[0]
    assert free.startswith(answers[0])
    assert len(answers[0]) < len(free)


def test_sampling_tasks_are_refused():
    with pytest.raises(RunError, match="greedily"):
        wrapped().generate_until([request("One", {"do_sample": True})])
