"""Loss and gradient of the kernel against torch in float64, also off a GPU, where Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Triton")

from methods import mixed_loss
from methods.distillation.divergences import Divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_the_formulas(dtype, close, share):
    generator = torch.Generator().manual_seed(0)
    words, rows = mixed_loss.BLOCK + 77, 6
    student, teacher = (3 * torch.randn(rows, words, generator=generator) for _ in range(2))
    teacher[1, 5], student[2, 7] = -torch.inf, -1e9
    targets = torch.randint(words, (rows,), generator=generator)
    upstream = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 0.1])
    ours, theirs = (logits.to(DEVICE, dtype) for logits in (student, teacher))
    ours.requires_grad_(True)
    found = mixed_loss.mixed_losses(ours, theirs if share else None, targets.to(DEVICE), share)
    (found * upstream.to(DEVICE)).sum().backward()
    exact = ours.detach().double().cpu().clamp(min=mixed_loss.LEAST).requires_grad_(True)
    kl = Divergence("forward_kl")(exact, theirs.double().cpu())
    token = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    expected = (1 - share) * token + share * kl
    (expected * upstream).sum().backward()
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=1e-4)
    difference = (ours.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert float(difference) < close
    assert not ours.grad[3].any()
