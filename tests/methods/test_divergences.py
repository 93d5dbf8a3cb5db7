"""Divergences against closed forms, against each other, and in chunks."""

from __future__ import annotations

import math

import pytest
import torch

from harness.errors import ConfigError
from methods.distillation import divergences
from methods.distillation.divergences import Divergence, cross_entropy, token_log_probabilities

EVERY = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jensen_shannon", 0.1),
    Divergence("jensen_shannon", 0.5),
    Divergence("jensen_shannon", 0.9, "limit"),
    Divergence("forward_kl", temperature=2.0),
]


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2, torch.randn(*shape, generator=generator) * 2


def shares(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).log()


def test_two_outcomes_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2), m = (5/8, 3/8)."""
    p, q = shares(0.75, 0.25), shares(0.5, 0.5)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3)) + 0.5 * (
        0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)
    )
    assert float(Divergence("forward_kl")(q, p)) == pytest.approx(forward, rel=1e-5)
    assert float(Divergence("reverse_kl")(q, p)) == pytest.approx(reverse, rel=1e-5)
    assert float(Divergence("jensen_shannon")(q, p)) == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_equal_distributions_have_no_divergence_and_no_gradient(divergence):
    logits, _ = pair(5, 11)
    student = logits.clone().requires_grad_(True)
    found = divergence(student, logits)
    torch.testing.assert_close(found, torch.zeros(5), atol=1e-6, rtol=0)
    found.sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros(5, 11), atol=1e-6, rtol=0)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_a_constant_added_to_logits_changes_nothing(divergence):
    student, teacher = pair(5, 11)
    torch.testing.assert_close(divergence(student + 3, teacher - 7), divergence(student, teacher))


def test_jensen_shannon_is_symmetric_and_bounded_and_standard_at_one_half():
    student, teacher = pair(64, 11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = (p + q) / 2
    standard = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    torch.testing.assert_close(Divergence("jensen_shannon", 0.5)(student, teacher), standard)
    for beta in (0.1, 0.3, 0.5):
        one = Divergence("jensen_shannon", beta)(student, teacher)
        torch.testing.assert_close(one, Divergence("jensen_shannon", 1 - beta)(teacher, student))
        assert (one >= 0).all()
        assert (one <= math.log(2)).all()


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.3, 0.999, 1 - 1e-6])
def test_jensen_shannon_keeps_its_digits(beta):
    """Against its definition in float64."""
    student, teacher = pair(64, 11)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    m = beta * p + (1 - beta) * q
    wanted = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    found = Divergence("jensen_shannon", beta)(student, teacher)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("near", "kind"), [(1e-5, "forward_kl"), (1 - 1e-5, "reverse_kl")])
def test_jensen_shannon_goes_over_into_both_kl(near, kind):
    """JSD_β / β -> KL(p‖q) as β -> 0, JSD_β / (1-β) -> KL(q‖p) as β -> 1; at the ends themselves it is the KL."""
    student, teacher = (logits / 4 for logits in pair(64, 11))  # β is to be small beside every p/q
    wanted = Divergence(kind)(student, teacher)
    torch.testing.assert_close(
        Divergence("jensen_shannon", near, "limit")(student, teacher), wanted, rtol=2e-3, atol=1e-4
    )
    small = min(near, 1 - near)
    torch.testing.assert_close(
        Divergence("jensen_shannon", near)(student, teacher) / small, wanted, rtol=2e-3, atol=1e-4
    )
    for scale in ("paper", "limit"):
        assert torch.equal(Divergence("jensen_shannon", round(near), scale)(student, teacher), wanted)


def test_at_high_temperature_it_is_the_squared_difference_of_centred_logits():
    """T² KL(p_T‖q_T) -> ‖Δz - mean(Δz)‖² / 2V (Hinton et al. 2015, Section 2.1)."""
    student, teacher = pair(8, 11)
    difference = student - teacher
    centred = (difference - difference.mean(-1, keepdim=True)).square().sum(-1) / (2 * 11)
    torch.testing.assert_close(Divergence("forward_kl", temperature=100.0)(student, teacher), centred, rtol=0.1, atol=0)


def test_cross_entropy_is_forward_kl_plus_entropy():
    student, teacher = pair(8, 11)
    log_p = teacher.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(cross_entropy(student, teacher), Divergence()(student, teacher) + entropy)
    gradients = []
    for loss in (cross_entropy, Divergence()):
        leaf = student.clone().requires_grad_(True)
        loss(leaf, teacher).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_a_teacher_that_is_sure_teaches_its_token():
    student, _ = pair(8, 11)
    tokens = torch.arange(8)
    sure = torch.full((8, 11), -math.inf).scatter(1, tokens[:, None], 0.0)
    wanted = torch.nn.functional.cross_entropy(student, tokens, reduction="none")
    torch.testing.assert_close(cross_entropy(student, sure), wanted)
    torch.testing.assert_close(Divergence()(student, sure), wanted)
    torch.testing.assert_close(-token_log_probabilities(student, tokens), wanted)


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_masked_tokens_make_no_holes(divergence):
    """A token that both rule out counts for nothing, forwards and backwards."""
    student, teacher = pair(8, 11)
    wanted = divergence(student, teacher)
    ruled_out = torch.full((8, 2), -math.inf)
    leaf = student.clone().requires_grad_(True)
    found = divergence(torch.cat([leaf, ruled_out], 1), torch.cat([teacher, ruled_out], 1))
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert leaf.grad.isfinite().all()


def test_padding_of_an_embedding_is_no_vocabulary():
    student, teacher = pair(8, 11)
    wider = torch.cat([teacher, torch.full((8, 3), 5.0)], 1)
    assert torch.equal(Divergence()(student, wider), Divergence()(student, teacher))
    assert torch.equal(cross_entropy(wider, student), cross_entropy(teacher, student))


@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_chunks_change_neither_values_nor_gradients(divergence, monkeypatch):
    student, teacher = pair(3, 5, 11)
    results = []
    for numbers in (2**24, 11 * 4):  # all at once, four positions at a time
        monkeypatch.setattr(divergences, "CHUNK_NUMBERS", numbers)
        leaf = student.clone().requires_grad_(True)
        found = divergence(leaf, teacher)
        assert found.shape == (3, 5)
        found.square().sum().backward()
        results.append((found.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_half_precision_logits_are_read_in_float32():
    student, teacher = pair(8, 11)
    found = Divergence()(student.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, Divergence()(student.bfloat16().float(), teacher.bfloat16().float()))


def test_all_but_the_last_position_are_all_but_the_last_value():
    student, teacher = pair(3, 5, 11)
    for divergence in EVERY:
        torch.testing.assert_close(divergence(student[:, :-1], teacher[:, :-1]), divergence(student, teacher)[:, :-1])


@pytest.mark.parametrize("part", [slice(None), slice(-1)])
def test_only_the_logits_are_kept_for_the_backward_pass(monkeypatch, part):
    """Large tensors that autograd holds: views of the logits that came in, nothing of their size beside them."""
    monkeypatch.setattr(divergences, "CHUNK_NUMBERS", 64)
    student, teacher = pair(4, 10, 32)
    student.requires_grad_(True)
    given = {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    kept = []

    def see(tensor):
        if tensor.untyped_storage().data_ptr() not in given:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        Divergence("jensen_shannon")(student[:, part], teacher[:, part]).sum()
    assert sum(kept) <= 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "total_variation"}, "kind=total_variation"),
        ({"scale": "log"}, "scale=log"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"temperature": 0.0}, "temperature=0"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Divergence(**values)
