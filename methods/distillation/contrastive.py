"""Contrastive decoding: continue a prompt in the way that a second prompt, which differs in one fact, would not.

SCOTT (Wang et al. 2023, Section 3.1) asks a teacher to explain the right answer, and steers each token away from what
it would have written for another answer: log p(t | q, a*) + [log p(t | q, a*) - log p(t | q, a')], whose order is that
of log p(t | q, a*) - ½ log p(t | q, a').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


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


@torch.no_grad()
def contrastive_continuations(
    module: nn.Module,
    right: Sequence[Sequence[int]],
    wrong: Sequence[Sequence[int]],
    new_tokens: int,
    stops: Callable[[int], bool],
    strength: float,
    plausible: float | None = None,
) -> list[list[int]]:
    """Greedy continuations of the prompts in `right` away from those in `wrong`: token ids, without the stop.

    Both prompts of a pair are read once and go on with the same tokens. A continuation ends after `new_tokens`, or
    where `stops` holds of the likeliest token of the first prompt alone, or of the chosen one.
    """
    pairs = len(right)
    device = next(module.parameters()).device
    tokens, attention = _left_padded([*right, *wrong], device)
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    found: list[list[int]] = [[] for _ in range(pairs)]
    live = torch.ones(pairs, dtype=torch.bool)
    cache = None
    for _ in range(new_tokens):
        read = module(
            input_ids=tokens, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = read.past_key_values
        first, second = read.logits[:, -1].split(pairs)
        chosen = contrastive_scores(first, second, strength, plausible).argmax(-1)
        for row, (plain, token) in enumerate(zip(first.argmax(-1).tolist(), chosen.tolist(), strict=True)):
            live[row] &= not (stops(plain) or stops(token))
            if live[row]:
                found[row].append(token)
        if not live.any():
            break
        tokens = chosen[:, None].repeat(2, 1)
        attention = torch.cat([attention, attention.new_ones(2 * pairs, 1)], -1)
        positions = positions[:, -1:] + 1
    return found


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, T] that end together, and 1 where a token stands, 0 on padding."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention[row, longest - len(prompt) :] = 1
    return tokens.to(device), attention.to(device)
