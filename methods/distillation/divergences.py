"""How far a student's distribution over the next token is from its teacher's.

Forward and reverse Kullback-Leibler divergence and the generalised Jensen-Shannon divergence between them (Agarwal et
al. 2023, https://arxiv.org/abs/2306.13649, Section 3.1), per position, in nats and in float32 whatever the logits are
stored in. Positions are taken in chunks, forwards and backwards: beside the logits no tensor of their size is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harness.errors import ConfigError

Kind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
SCALES = ("paper", "limit")

CHUNK_NUMBERS = 2**24  # logits per chunk: 64 MiB of float32
IMPOSSIBLE = -1e4  # log-probability of a token that is masked out: its probability is 0, and 0 · log 0 stays 0


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and of which distributions.

    kind: with p the teacher and q the student, "forward_kl" KL(p‖q), "reverse_kl" KL(q‖p), or "jensen_shannon"
        β KL(p‖m) + (1-β) KL(q‖m) with m = βp + (1-β)q.
    beta: β; exactly 0 is forward and exactly 1 reverse KL.
    scale: "paper", which falls to 0 with β and with 1-β, or "limit": divided by β(1-β), which goes over into both KL.
    temperature: T of softmax(logits / T) on both sides; the result is multiplied by T², so that the size of gradients
        does not depend on it (Hinton et al. 2015, https://arxiv.org/abs/1503.02531, Section 2).
    """

    kind: Kind = "forward_kl"
    beta: float = 0.5
    scale: Literal["paper", "limit"] = "paper"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"divergence.kind={self.kind}: choose one of {', '.join(KINDS)}")
        if self.scale not in SCALES:
            raise ConfigError(f"divergence.scale={self.scale}: choose one of {', '.join(SCALES)}")
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"divergence.beta={self.beta}: must lie between 0 (forward KL) and 1 (reverse KL)")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"divergence.temperature={self.temperature}: must be greater than 0")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Divergence per position, nats (times T²): logits [..., V] of both -> [...]."""
        student, teacher = same_vocabulary(student, teacher)
        return by_positions(self._of_chunk, student, teacher)

    def _of_chunk(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q = log_probabilities(student, self.temperature)
        log_p = log_probabilities(teacher, self.temperature)
        match self.kind, self.beta:
            case ("forward_kl", _) | ("jensen_shannon", 0):
                found = (log_p.exp() * (log_p - log_q)).sum(-1)
            case ("reverse_kl", _) | ("jensen_shannon", 1):
                found = (log_q.exp() * (log_q - log_p)).sum(-1)
            case _:
                found = _jensen_shannon(log_p, log_q, self.beta)
                if self.scale == "limit":
                    found = found / (self.beta * (1 - self.beta))
        return found * self.temperature**2


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """β KL(p‖m) + (1-β) KL(q‖m), log-probabilities [N, V] -> [N].

    log(m/q) = log(1-β) + softplus(d + logit β) with d = log p - log q, and the same with p and q exchanged: neither
    overflows, and neither loses its digits when β is small.
    """
    difference = log_p - log_q
    logit = math.log(beta) - math.log1p(-beta)
    against_p = math.log(beta) + functional.softplus(-difference - logit)  # log(m/p)
    against_q = math.log1p(-beta) + functional.softplus(difference + logit)  # log(m/q)
    return -(beta * log_p.exp() * against_p + (1 - beta) * log_q.exp() * against_q).sum(-1)


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-Σ p log q per position, nats (times T²): logits [..., V] of both -> [...].

    Forward KL plus the entropy of the teacher: the same gradient. A one-hot teacher makes it the loss of its token.
    """

    def of_chunk(student: Tensor, teacher: Tensor) -> Tensor:
        log_p = log_probabilities(teacher, temperature)
        return -(log_p.exp() * log_probabilities(student, temperature)).sum(-1) * temperature**2

    return by_positions(of_chunk, *same_vocabulary(student, teacher))


def token_log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """log q(token) in float32: logits [..., V], ids [...] -> [...]."""

    def of_chunk(logits: Tensor, tokens: Tensor) -> Tensor:
        return log_probabilities(logits).gather(-1, tokens[:, None])[:, 0]

    return by_positions(of_chunk, logits, tokens)


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax in float32 at least, [..., V] -> [..., V]; minus infinity becomes a number whose exponential is 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits / temperature).log_softmax(-1).clamp(min=IMPOSSIBLE)


def same_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits [..., V] with V of the narrower: one tokenizer, so what only one has is padding of its embedding."""
    width = min(student.shape[-1], teacher.shape[-1])
    return student[..., :width], teacher[..., :width]


def by_positions(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """`function` of some positions at a time: logits [..., V] and others [...] or [..., V] -> [...].

    What the function computes inside is not kept for the backward pass but computed again there.
    """
    if logits.ndim > 2 and not logits.is_contiguous():  # logits[:, :-1], say: flattening would copy them
        rows = zip(*(tensor.unbind() for tensor in (logits, *others)), strict=True)
        return torch.stack([by_positions(function, *row) for row in rows])
    shape, width = logits.shape[:-1], logits.shape[-1]
    rows = max(1, CHUNK_NUMBERS // width)
    flat = [logits.reshape(-1, width), *(other.reshape(-1, *other.shape[len(shape) :]) for other in others)]
    # split, not slices: its backward pass joins the parts once, where each slice would fill a whole tensor with zeros
    chunks = zip(*(tensor.split(rows) for tensor in flat), strict=True)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in flat)):
        return torch.cat([function(*chunk) for chunk in chunks]).view(shape)
    again = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.cat(again).view(shape)
