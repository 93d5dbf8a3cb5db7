"""Integer grids: closed forms, bounds and invariances."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError
from methods.quantization.grids import IntegerGrid

SIZES = [None, "tensor", 8, 16]


def weights(rows=6, columns=32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_moves_a_weight_by_at_most_one_step(bits, size, symmetric):
    grid, weight = IntegerGrid(bits, symmetric, size), weights()
    scales = grid.fit(weight, torch.float32)
    step = grid.decode(torch.ones_like(weight, dtype=torch.uint8), scales) - grid.decode(
        torch.zeros_like(weight, dtype=torch.uint8), scales
    )
    error = (weight - grid.round(weight, scales)).abs()
    assert (error <= step * (1 + 1e-5)).all()  # half a step inside the range, up to another half at its ends


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_code_is_the_nearest_of_all_codes(bits, symmetric):
    grid, weight = IntegerGrid(bits, symmetric, 8), weights()
    scales = grid.fit(weight, torch.float16)
    every = torch.stack(
        [grid.decode(torch.full_like(weight, code, dtype=torch.uint8), scales) for code in range(2**bits)]
    )
    best = (every - weight).abs().amin(0)
    assert torch.allclose((grid.round(weight, scales) - weight).abs(), best, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_exact_zeros_stay_zero(size):
    weight = weights()
    weight[:, ::3] = 0
    weight[2] = 0
    grid = IntegerGrid(3, group_size=size)
    rounded = grid.round(weight, grid.fit(weight, torch.float16))
    assert (rounded[weight == 0] == 0).all()
    assert rounded.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-7])
def test_a_group_of_equal_weights_is_exact_to_the_scale_type(value):
    grid, weight = IntegerGrid(4, group_size=8), torch.full((2, 16), value)
    rounded = grid.round(weight, grid.fit(weight, torch.float16))
    assert torch.allclose(rounded, weight, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scaling_the_weights_scales_the_result(symmetric):
    grid, weight = IntegerGrid(3, symmetric, 8), weights().double()
    rounded = grid.round(weight, grid.fit(weight, torch.float64))
    doubled = grid.round(4 * weight, grid.fit(4 * weight, torch.float64))
    assert torch.equal(doubled, 4 * rounded)


def test_smaller_groups_never_have_a_larger_step_and_more_bits_err_less():
    weight = weights(columns=64)
    steps = [IntegerGrid(4, group_size=g).fit(weight, torch.float32).scale.amax(1) for g in (64, 32, 8)]
    assert (steps[0] >= steps[1]).all()
    assert (steps[1] >= steps[2]).all()
    errors = []
    for bits in range(2, 9):
        grid = IntegerGrid(bits, group_size=16)
        errors.append((weight - grid.round(weight, grid.fit(weight, torch.float16))).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_scales_are_rounded_before_encoding():
    grid, weight = IntegerGrid(4, group_size=8), weights()
    scales = grid.fit(weight, torch.bfloat16)
    assert scales.scale.dtype == torch.bfloat16
    stored = grid.decode(grid.encode(weight, scales), scales)
    expected = scales.scale.float().repeat_interleave(8, 1) * (
        grid.encode(weight, scales).float() - scales.zero.float().repeat_interleave(8, 1)
    )
    assert torch.equal(stored, expected)


def test_symmetric_codes_of_a_known_vector():
    grid = IntegerGrid(8, symmetric=True, group_size=None)
    weight = torch.tensor([[1.0, -1.0, 0.5]])
    assert torch.allclose(
        grid.round(weight, grid.fit(weight, torch.float32)), torch.tensor([[0.9961, -0.9961, 0.5020]]), atol=1e-4
    )


def test_a_short_last_group_is_that_group_alone():
    weight = weights(columns=20)
    short = IntegerGrid(4, group_size=8, short_group=True)
    rounded = short.round(weight, short.fit(weight, torch.float16))
    for first, last in ((0, 8), (8, 16), (16, 20)):
        row = IntegerGrid(4, group_size=None)
        part = weight[:, first:last].contiguous()
        assert torch.equal(rounded[:, first:last], row.round(part, row.fit(part, torch.float16)))
    with pytest.raises(ConfigError, match=r"mlp\.up: 20 input channels.*groups of 8.*short_group=true"):
        IntegerGrid(4, group_size=8).check("mlp.up", 20)
    short.check("mlp.up", 20)


def test_clipping_saturates_at_the_limit():
    weight = weights()
    grid = IntegerGrid(4, group_size=8)
    limit = torch.full((6, 4), 0.5)
    scales, clamped = grid.fit(weight, torch.float32, limit), weight.clamp(-0.5, 0.5)
    assert torch.equal(scales.scale, grid.fit(clamped, torch.float32).scale)
    half_step = scales.scale.repeat_interleave(8, 1) / 2
    assert (grid.round(weight, scales).abs() <= 0.5 + half_step * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "fields", [{"bits": 1}, {"bits": 9}, {"bits": 3.5}, {"bits": 4, "group_size": 0}, {"bits": 4, "group_size": "row"}]
)
def test_impossible_grids_are_refused(fields):
    with pytest.raises(ConfigError):
        IntegerGrid(**fields)


@pytest.mark.parametrize("size", [16, None, "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_encoding_and_decoding_to_the_bit(size, symmetric):
    weight = torch.randn(12, 48, generator=torch.Generator().manual_seed(3))
    grid = IntegerGrid(3, symmetric, size)
    scales = grid.fit(weight, torch.float16)
    assert torch.equal(grid.round(weight, scales), grid.decode(grid.encode(weight, scales), scales))
