"""Grids of inputs: closed forms, orders, and what a layer does with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ConfigError, RunError
from methods.quantization.activations import InputGrid, straight_through
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import pack_linear

X = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 40)


@pytest.mark.parametrize("bits", [3, 4, 8, 12])
def test_symmetric_integers_reach_both_ends_and_err_by_half_a_step_at_most(bits):
    grid = InputGrid(bits)
    rounded = grid.round(X)
    step = X.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - X).abs() <= step * (0.5 + 1e-4)).all()
    torch.testing.assert_close(rounded.abs().amax(-1), X.abs().amax(-1))
    torch.testing.assert_close(grid.round(rounded), rounded)


def test_asymmetric_integers_use_all_codes_and_keep_zero():
    x = torch.tensor([[-1.0, 0.0, 0.5, 3.0, 7.0]])
    rounded = InputGrid(3, symmetric=False).round(x)
    step = 8 / 7
    assert torch.equal((rounded / step).round(), torch.tensor([[-1.0, 0.0, 0.0, 3.0, 6.0]]))


def test_asymmetric_beats_symmetric_on_one_sided_inputs():
    x = X.abs()
    errors = [(InputGrid(4, symmetric=s).round(x) - x).square().mean() for s in (False, True)]
    assert errors[0] < errors[1]


def test_by_token_is_for_each_row_what_by_tensor_is_for_one():
    by_token, by_tensor = InputGrid(8), InputGrid(8, scope="tensor")
    rows = X.flatten(0, 1)
    assert torch.equal(by_token.round(rows), torch.stack([by_tensor.round(row) for row in rows]))


def test_a_static_scale_is_used_and_clips():
    grid = InputGrid(8, scope="tensor", static=True)
    scale = grid.scale_of(torch.tensor(1.0))
    rounded = grid.round(torch.tensor([0.5, 2.0, -3.0]), scale)
    torch.testing.assert_close(rounded, torch.tensor([64 / 127, 1.0, -1.0]))


def test_e4m3_has_the_relative_error_of_three_mantissa_bits_whatever_the_size():
    grid = InputGrid(kind="e4m3")
    x = X.flatten(0, 1)
    normal = x.abs() >= x.abs().amax(-1, keepdim=True) * 2**-6 / 448
    error = ((grid.round(x) - x).abs() / x.abs())[normal]
    assert error.max() <= 2**-4 / (1 + 2**-4) + 1e-4


def test_e4m3_tolerates_an_outlier_better_than_integers():
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 1000
    small = x[:, 1:]
    errors = [(InputGrid(8, kind=kind).round(x)[:, 1:] - small).square().mean() for kind in ("e4m3", "int")]
    assert errors[0] < 0.1 * errors[1]


def test_zeros_stay_zeros():
    for grid in (InputGrid(4), InputGrid(4, symmetric=False), InputGrid(kind="e4m3")):
        assert not grid.round(torch.zeros(2, 8)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 4, "kind": "e4m3"}, "bits=4"),
        ({"kind": "e5m2"}, "kind=e5m2"),
        ({"scope": "channel"}, "scope=channel"),
        ({"static": True}, "static=true"),
        ({"static": True, "scope": "tensor", "symmetric": False}, "static=true"),
    ],
)
def test_grids_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        InputGrid(**arguments)


def test_the_gradient_goes_straight_through():
    x = torch.randn(5, requires_grad=True)
    y = straight_through(x, x.round())
    assert torch.equal(y, x.round())
    (3 * y).sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 3.0))


def layer_with(inputs: InputGrid | None, scale=None):
    torch.manual_seed(0)
    linear = nn.Linear(40, 16)
    grid = IntegerGrid(4, group_size=8)
    weight = linear.weight.detach()
    scales = grid.fit(weight, torch.float16)
    return linear, pack_linear(linear, grid.encode(weight, scales), scales, grid, inputs, scale)


@pytest.mark.parametrize("mode", ["stored", "scoring", "decoding"])
def test_a_layer_multiplies_rounded_inputs_by_rounded_weights(mode):
    grid = InputGrid(8, scope="tensor", static=True)
    _, layer = layer_with(grid, torch.tensor(0.7))
    weight, scale = layer.dequantise(), layer.input_scale.clone()
    layer.prepare(mode, torch.float32)
    expected = nn.functional.linear(grid.round(X, scale), weight, layer.bias.float())
    torch.testing.assert_close(layer(X), expected)
    assert "rounded" in layer.kernel


def test_a_rebuilt_layer_has_the_same_input_grid():
    _, layer = layer_with(InputGrid(6))
    again = type(layer)(**layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), layer(X))


def test_a_static_grid_without_its_scale_is_an_error():
    with pytest.raises(RunError, match="calibration"):
        layer_with(InputGrid(8, scope="tensor", static=True))
