"""A low-rank path beside a linear: identities, storage, training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness import artifact
from harness.errors import ConfigError, RunError
from harness.probes.footprint import linear_bits
from methods.blocks import block_linears, replace_module
from methods.low_rank import LowRankLinear
from methods.quantization.grids import IntegerGrid
from methods.quantization.round_to_nearest import rounded_linear

GENERATOR = torch.Generator().manual_seed(0)
LINEAR = nn.Linear(24, 12).requires_grad_(False)
X = torch.randn(5, 24, generator=GENERATOR)
LEFT, RIGHT = torch.randn(12, 3, generator=GENERATOR), torch.randn(3, 24, generator=GENERATOR)


def packed():
    return rounded_linear(LINEAR, IntegerGrid(4, group_size=8), torch.float16)


@pytest.mark.parametrize("mode", ["stored", "scoring", "decoding"])
def test_it_computes_with_the_corrected_weight(mode):
    layer = LowRankLinear.from_factors(packed(), LEFT, RIGHT, scaling=0.5, dtype=torch.float32)
    weight = layer.inner.dequantise() + 0.5 * LEFT @ RIGHT
    bias = layer.inner.bias.float()
    layer.prepare(mode, torch.float32)
    torch.testing.assert_close(layer(X), nn.functional.linear(X, weight, bias))


def test_a_zero_factor_changes_nothing_bit_for_bit():
    layer = LowRankLinear.from_factors(packed(), torch.zeros_like(LEFT), RIGHT)
    assert torch.equal(layer(X), layer.inner(X))


def test_eight_bit_factors_err_by_half_a_step_of_each_component():
    layer = LowRankLinear.from_factors(packed(), LEFT, RIGHT, factors="int8", dtype=torch.float32)
    left, right = layer.dense_factors()
    assert ((left - LEFT).abs() <= LEFT.abs().amax(0) / 127 * 0.501).all()
    assert ((right - RIGHT).abs() <= (RIGHT.abs().amax(1) / 127 * 0.501)[:, None]).all()


def test_the_sum_of_merging_and_running_is_the_same():
    linear = nn.Linear(24, 12).requires_grad_(False)
    layer = LowRankLinear.from_factors(linear, LEFT, RIGHT, dtype=torch.float32)
    expected = layer(X)
    torch.testing.assert_close(layer.merge()(X), expected, rtol=1e-5, atol=1e-5)


def test_only_the_factors_are_trained_and_then_stored_in_sixteen_bits():
    layer = LowRankLinear.from_factors(packed(), LEFT, RIGHT)
    before = {name: buffer.clone() for name, buffer in layer.inner.named_buffers()}
    trained = layer.train_factors()
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {id(p) for p in trained}
    assert all(p.dtype == torch.float32 for p in trained)
    layer(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained)
    layer.settle()
    assert layer.left.dtype == layer.right.dtype == torch.float16
    assert not any(p.requires_grad for p in layer.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.inner.named_buffers())


@pytest.mark.parametrize("rank", [0, 13])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank):
    with pytest.raises(ConfigError, match=f"rank={rank}.*12"):
        LowRankLinear(packed(), rank)


def test_a_packed_weight_is_not_merged():
    with pytest.raises(RunError, match="packed"):
        LowRankLinear.from_factors(packed(), LEFT, RIGHT).merge()


@pytest.mark.parametrize("factors", ["16bit", "int8"])
def test_it_is_saved_and_comes_back_with_every_byte_counted(factors, trained, tmp_path):
    module = trained.module
    for name, linear in block_linears(module).items():
        rows, columns = linear.weight.shape
        left, right = torch.randn(rows, 2, generator=GENERATOR), torch.randn(2, columns, generator=GENERATOR)
        inner = rounded_linear(linear, IntegerGrid(4, group_size=8), torch.float16)
        replace_module(module, name, LowRankLinear.from_factors(inner, left, right, factors))
    tokens = torch.randint(0, 256, (2, 16), generator=GENERATOR)
    expected = trained.engine.score(tokens)
    described = artifact.save(trained, tmp_path / "saved")
    again = artifact.load(tmp_path / "saved", "cpu", torch.float32)
    assert torch.equal(again.engine.score(tokens), expected)
    assert set(block_linears(again.module)) == set(block_linears(module)) == set(described["linears"])
    weights = sum(rows * columns for rows, columns in described["linears"].values())
    sides = sum(rows + columns for rows, columns in described["linears"].values())
    layers = len(described["linears"])
    beside = 16 * 2 * sides if factors == "16bit" else 8 * 2 * sides + 16 * 4 * layers
    groups = (16 + 4) / 8  # a scale and a zero point for 8 weights
    shapes = layers * 2 * 64
    counted = linear_bits(artifact.tensor_bytes(tmp_path / "saved"), described["linears"])
    assert counted == pytest.approx(4 + groups + (beside + shapes) / weights)
