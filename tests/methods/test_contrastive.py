"""Contrastive decoding: its limits, its closed form, and batches against one prompt at a time."""

from __future__ import annotations

import pytest
import torch

from methods.distillation.contrastive import contrastive_continuations, contrastive_scores
from tests.harness.tiny_models import causal_model, token_ids

END = 256


def greedy(module, prompt, new_tokens):
    tokens = torch.tensor([prompt])
    for _ in range(new_tokens):
        tokens = torch.cat([tokens, module(input_ids=tokens).logits[:, -1].argmax(-1, keepdim=True)], -1)
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def module():
    return causal_model(seed=1).eval()


def prompts(seed):
    return [row[: 5 + 3 * i].tolist() for i, row in enumerate(token_ids(3, 12, seed))]


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_the_same_prompt_twice_is_plain_greedy_decoding(module, strength):
    """log p - λ log p = (1 - λ) log p: the order does not change while λ < 1."""
    right = prompts(0)
    found = contrastive_continuations(module, right, right, 6, lambda token: False, strength)
    assert found == [greedy(module, prompt, 6) for prompt in right]


@torch.no_grad()
def test_no_strength_is_plain_greedy_decoding_whatever_the_other_prompt(module):
    right, wrong = prompts(0), prompts(1)[::-1]
    found = contrastive_continuations(module, right, wrong, 6, lambda token: False, 0.0)
    assert found == [greedy(module, prompt, 6) for prompt in right]


@torch.no_grad()
def test_batched_and_cached_equals_the_definition(module):
    """Each token by two whole forward passes of unpadded prompts."""
    right, wrong = prompts(0), prompts(1)[::-1]
    found = contrastive_continuations(module, right, wrong, 5, lambda token: False, 0.5)
    for a, b, tokens in zip(right, wrong, found, strict=True):
        grown: list[int] = []
        for _ in range(5):
            first, second = (
                module(input_ids=torch.tensor([p + grown])).logits[0, -1].double().softmax(-1) for p in (a, b)
            )
            grown.append(int((first.log() + (first.log() - second.log())).argmax()))  # the paper's sum
        assert tokens == grown


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


@torch.no_grad()
def test_a_continuation_ends_before_a_stop_of_either_kind(module):
    right, wrong = prompts(0), prompts(1)
    free = contrastive_continuations(module, right, wrong, 8, lambda token: False, 0.5)
    stop = free[0][3]
    cut = contrastive_continuations(module, right, wrong, 8, lambda token: token == stop, 0.5)
    assert len(cut[0]) <= 3
    assert cut[0] == free[0][: len(cut[0])]
    assert stop not in [token for row in cut for token in row]
