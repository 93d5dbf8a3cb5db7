"""Contrastive decoding: continue a prompt in the way that a second prompt, which differs in one fact, would not.

SCOTT (Wang et al. 2023, Section 3.1) asks a teacher to explain the right answer, and steers each token away from what
it would have written for another answer: log p(t | q, a*) + [log p(t | q, a*) - log p(t | q, a')], whose order is that
of log p(t | q, a*) - ½ log p(t | q, a').
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.decoding import Completion, complete_ids, encode
from harness.errors import RunError

if TYPE_CHECKING:
    from harness.method import LanguageModel


def contrastive_scores(right: Tensor, wrong: Tensor, strength: float, plausible: float | None = None) -> Tensor:
    """Scores of the next token from logits [..., V] under two prompts: log p - strength · log p', float32.

    strength: λ; 0 is plain decoding, 1/2 the rule of SCOTT. plausible: tokens less likely than this share of the
    likeliest under the first prompt are out (Li et al. 2022, Equation 3); None: no such bound, as in SCOTT.
    """
    first = right.float().log_softmax(-1)
    scores = first - strength * wrong.float().log_softmax(-1)
    if plausible is None:
        return scores
    bound = first.amax(-1, keepdim=True) + torch.tensor(plausible).log()
    return scores.masked_fill(first < bound, -torch.inf)


def contrastive_completions(
    lm: LanguageModel,
    right: Sequence[str],
    wrong: Sequence[str],
    new_tokens: int,
    stop: Sequence[str],
    strength: float,
    plausible: float | None = None,
) -> list[Completion]:
    """Greedy continuations of the prompts in `right` away from those in `wrong`, in one batch.

    Both prompts of a pair go on with the same tokens. A continuation ends at a stop sequence, where the likeliest
    token of the first prompt alone ends the text or is (part of) a stop sequence of one token, or after `new_tokens`.
    Raises RunError for prompts that leave no room for `new_tokens`, and for a model without an end mark.
    """
    end = lm.tokenizer.eos_token_id
    if end is None:
        raise RunError("contrastive decoding ends where the model would: this tokenizer has no end mark")
    pairs = len(right)
    stopping: dict[int, bool] = {end: True}

    def stops(token: int) -> bool:
        if token not in stopping:
            text = lm.tokenizer.decode([token])
            stopping[token] = any(mark in text for mark in stop)
        return stopping[token]

    def choose(logits: Tensor, _step: int) -> Tensor:
        first, second = logits.split(pairs)
        chosen = contrastive_scores(first, second, strength, plausible).argmax(-1)
        ended = torch.tensor([stops(token) for token in first.argmax(-1).tolist()], device=chosen.device)
        return chosen.masked_fill(ended, end).repeat(2)

    prompts = [encode(lm, prompt, new_tokens) for prompt in (*right, *wrong)]
    return complete_ids(lm, prompts, [(stop, new_tokens)] * (2 * pairs), new_tokens, choose)[:pairs]
