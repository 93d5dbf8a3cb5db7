"""The loss of the text and the forward KL divergence from a teacher in one pass over both logits, on a GPU.

Over a vocabulary of 49,152 words the operations of torch read and write some 10 MB for every token (conversions to
float32, a log-softmax of each side, probabilities, products, and the same again backwards), which takes longer than
both models. Here a program keeps running maxima and sums of one position, as softmax in one pass does (Milakov and
Gimelshein 2018, https://arxiv.org/abs/1805.02867), and the gradient is one more pass:

    loss      (1 - s) (lse(z) - z_t) + s (Σ p (u - z) - lse(u) + lse(z)),   p = softmax(u)
    gradient  softmax(z) - (1 - s) onehot(t) - s p

with z the student's logits, u the teacher's, t the token and s the share. Sums are float32 whatever the logits are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
LEAST = -1e4  # of a logit: a token that is masked out has no probability, and 0 · infinity is no number


@triton.jit
def _loss(student, teacher, targets, out, sums, WORDS, SHARE, TAUGHT: tl.constexpr, BLOCK: tl.constexpr, FLOOR):
    """out[n] = loss of position n; sums[n] = log-sum-exp of the student's logits, then of the teacher's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    top_z = tl.full((), -float("inf"), tl.float32)
    sum_z = tl.zeros((), tl.float32)
    top_u = tl.full((), -float("inf"), tl.float32)
    sum_u = tl.zeros((), tl.float32)
    cross = tl.zeros((), tl.float32)
    for start in range(0, WORDS, BLOCK):
        here = start + columns < WORDS
        place = row * WORDS + start + columns
        z = tl.maximum(tl.load(student + place, mask=here, other=0).to(tl.float32), FLOOR)
        top = tl.maximum(top_z, tl.max(tl.where(here, z, -float("inf")), 0))
        sum_z = sum_z * tl.exp(top_z - top) + tl.sum(tl.where(here, tl.exp(z - top), 0.0), 0)
        top_z = top
        if TAUGHT:
            u = tl.maximum(tl.load(teacher + place, mask=here, other=0).to(tl.float32), FLOOR)
            top = tl.maximum(top_u, tl.max(tl.where(here, u, -float("inf")), 0))
            mass = tl.where(here, tl.exp(u - top), 0.0)
            fade = tl.exp(top_u - top)
            sum_u = sum_u * fade + tl.sum(mass, 0)
            cross = cross * fade + tl.sum(mass * (u - z), 0)
            top_u = top
    lse_z = top_z + tl.log(sum_z)
    target = tl.load(targets + row)
    chosen = tl.maximum(tl.load(student + row * WORDS + target).to(tl.float32), FLOOR)
    loss = (1.0 - SHARE) * (lse_z - chosen)
    if TAUGHT:
        lse_u = top_u + tl.log(sum_u)
        loss += SHARE * (cross / sum_u - lse_u + lse_z)
        tl.store(sums + 2 * row + 1, lse_u)
    tl.store(sums + 2 * row, lse_z)
    tl.store(out + row, loss)


@triton.jit
def _gradient(
    student, teacher, targets, sums, upstream, out, WORDS, SHARE, TAUGHT: tl.constexpr, BLOCK: tl.constexpr, FLOOR
):
    """out[n, v] = upstream[n] · gradient of the loss of position n by its logit v."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WORDS
    place = row * WORDS + column
    factor = tl.load(upstream + row).to(tl.float32)
    z = tl.maximum(tl.load(student + place, mask=here, other=0).to(tl.float32), FLOOR)
    found = tl.exp(z - tl.load(sums + 2 * row))
    if TAUGHT:
        u = tl.maximum(tl.load(teacher + place, mask=here, other=0).to(tl.float32), FLOOR)
        found -= SHARE * tl.exp(u - tl.load(sums + 2 * row + 1))
    found -= tl.where(column == tl.load(targets + row), 1.0 - SHARE, 0.0)
    tl.store(out + place, (found * factor).to(out.dtype.element_ty), mask=here)


class _MixedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor | None, targets: Tensor, share: float) -> Tensor:
        rows, words = student.shape
        losses = torch.empty(rows, dtype=torch.float32, device=student.device)
        sums = torch.zeros(rows, 2, dtype=torch.float32, device=student.device)
        taught = teacher is not None
        other = teacher if taught else student
        _loss[(rows,)](student, other, targets, losses, sums, words, share, taught, BLOCK, LEAST, num_warps=WARPS)
        ctx.save_for_backward(student, other, targets, sums)
        ctx.share, ctx.taught = share, taught
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student, other, targets, sums = ctx.saved_tensors
        rows, words = student.shape
        found = torch.empty_like(student)
        grid = (rows, triton.cdiv(words, BLOCK))
        _gradient[grid](
            student,
            other,
            targets,
            sums,
            upstream.contiguous(),
            found,
            words,
            ctx.share,
            ctx.taught,
            BLOCK,
            LEAST,
            num_warps=WARPS,
        )
        return found, None, None, None


def mixed_losses(student: Tensor, teacher: Tensor | None, targets: Tensor, share: float) -> Tensor:
    """(1 - share) · loss of the token + share · KL(teacher‖student) at every position, nats, float32.

    student, teacher: logits [N, V] of any floating type, the teacher's without gradients; None with share 0.
    targets: ids [N]. Logits below LEAST count as LEAST.
    """
    return _MixedLoss.apply(
        student.contiguous(), None if teacher is None else teacher.detach().contiguous(), targets.contiguous(), share
    )
