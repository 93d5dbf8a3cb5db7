"""Contrastive decoding: its limits, its closed form, and batches against one prompt at a time."""

from __future__ import annotations

import pytest
import torch

from harness.decoding import complete
from harness.progress import NoProgress
from methods.distillation.contrastive import contrastive_completions, contrastive_scores
from tests.harness.tiny_models import language_model

PROMPTS = ["Why?", "A longer prompt, why?", "Q: why\nA:"]
OTHERS = ["Why not?", "Q: because\nA:", "Never."]


@pytest.fixture(scope="module")
def lm():
    return language_model(seed=1)


def texts(lm, right, wrong, new_tokens=6, stop=(), strength=0.5):
    return [each.text for each in contrastive_completions(lm, right, wrong, new_tokens, stop, strength)]


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_the_same_prompt_twice_is_plain_greedy_decoding(lm, strength):
    """log p - λ log p = (1 - λ) log p: the order does not change while λ < 1."""
    assert texts(lm, PROMPTS, PROMPTS, strength=strength) == complete(lm, PROMPTS, 6, (), 3, NoProgress())


def test_no_strength_is_plain_greedy_decoding_whatever_the_other_prompt(lm):
    assert texts(lm, PROMPTS, OTHERS, strength=0.0) == complete(lm, PROMPTS, 6, (), 3, NoProgress())


@torch.no_grad()
def test_batched_and_cached_equals_the_definition(lm):
    """Each token by two whole forward passes of unpadded prompts, scored by the paper's sum."""
    found = contrastive_completions(lm, PROMPTS, OTHERS, 5, (), 0.5)
    for a, b, completion in zip(PROMPTS, OTHERS, found, strict=True):
        grown: list[int] = []
        for _ in range(5):
            first, second = (
                lm.module(input_ids=torch.tensor([lm.tokenizer(p)["input_ids"] + grown])).logits[0, -1].double()
                for p in (a, b)
            )
            first, second = first.log_softmax(-1), second.log_softmax(-1)
            if first.argmax() == lm.tokenizer.eos_token_id:
                break
            token = int((first + (first - second)).argmax())
            if token == lm.tokenizer.eos_token_id:
                break
            grown.append(token)
        assert list(completion.ids) == grown


def test_scores_follow_a_law_that_factorises():
    """p(t | a) ∝ f(t) g(t, a) is ranked by f^(1-λ) g(t, a*) / g(t, a')^λ: what both answers share is damped."""
    generator = torch.Generator().manual_seed(0)
    shared, right, wrong = torch.rand(3, 50, generator=generator, dtype=torch.float64) + 0.1
    for strength in (0.0, 0.3, 0.5, 1.0):
        scores = contrastive_scores((shared * right).log(), (shared * wrong).log(), strength)
        law = shared ** (1 - strength) * right / wrong**strength
        assert scores.argsort().tolist() == law.argsort().tolist()


def test_only_plausible_tokens_are_left():
    right, wrong = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))
    scores = contrastive_scores(right, wrong, 0.5, plausible=0.1)
    probabilities = right.softmax(-1)
    plausible = probabilities >= 0.1 * probabilities.amax(-1, keepdim=True)
    assert torch.equal(scores.isfinite(), plausible)
    free = contrastive_scores(right, wrong, 0.5)
    assert torch.equal(scores[plausible], free[plausible])


def test_a_continuation_ends_before_a_stop_of_either_kind(lm):
    free = contrastive_completions(lm, PROMPTS, OTHERS, 8, (), 0.5)
    longest = max(range(3), key=lambda row: len(free[row].ids))
    mark = lm.tokenizer.decode([free[longest].ids[-1]])
    cut = texts(lm, PROMPTS, OTHERS, 8, (mark,))
    assert all(mark not in text for text in cut)
    assert all(full.text.startswith(text) for full, text in zip(free, cut, strict=True))
    assert len(cut[longest]) < len(free[longest].text)


def test_where_the_plain_prompt_would_stop_the_contrasted_one_does(lm):
    plain = complete(lm, PROMPTS[:1], 1, (), 1, NoProgress())[0]
    assert texts(lm, PROMPTS[:1], OTHERS[:1], 8, (plain,)) == [""]
