"""OWQ: the columns it keeps, the equations they solve, and the layer that stores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_model, tiny_tokens
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.quantization import owq
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.gptq import GPTQ
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import INT4, QuantizedLinear, pack_linear
from methods.quantization.outliers import ColumnOutlierLinear
from methods.quantization.owq import OWQ, kept_columns

ROWS, COLUMNS, WEAK = 24, 48, 6
GRID = IntegerGrid(3, group_size=None)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def bench():
    return Bench(Windows(), torch.Generator().manual_seed(0), Path("."), NoProgress())


def layer_problem(seed=0, dtype=torch.float64):
    """Weights [R, C] and a second moment [C, C] of correlated inputs, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=dtype) + 2 * torch.eye(COLUMNS, dtype=dtype)
    x = torch.randn(3 * COLUMNS, COLUMNS, generator=generator, dtype=dtype) @ mix.T
    x[:, [5, 17]] *= 12
    return torch.randn(ROWS, COLUMNS, generator=generator, dtype=dtype), x.T @ x / len(x)


def output_error(change, moment):
    return torch.einsum("ij,jk,ik->", change, moment, change)


HIDDEN, WIDE = 4096, 11008
LLAMA = {
    **dict.fromkeys(("q", "k", "v", "o"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("up", "gate"), (WIDE, HIDDEN)),
    "down": (HIDDEN, WIDE),
}
OPT = {
    **dict.fromkeys(("q", "k", "v", "out"), (4096, 4096)),
    "fc1": (16384, 4096),
    "fc2": (4096, 16384),
}


@pytest.mark.parametrize(
    ("shapes", "bits", "extra", "expected"),
    [
        (LLAMA, 3, 0.01, [6, 6, 6, 6, 2, 2, 6]),
        (LLAMA, 4, 0.01, [6, 6, 6, 6, 2, 2, 6]),
        (LLAMA, 3, 0.1, [54, 54, 54, 54, 20, 20, 54]),
        (OPT, 3, 0.01, [6, 6, 6, 6, 2, 6]),
    ],
)
def test_the_budget_gives_the_authors_tables(shapes, bits, extra, expected):
    assert list(kept_columns(shapes, bits, extra).values()) == expected


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("size", [None, 16])
def test_kept_columns_solve_the_normal_equations(order, size):
    """No change of a kept column could lower the error further: ((W - Ŵ) H)[:, weak] = 0, H damped."""
    weight, moment = layer_problem()
    method = OWQ(IntegerGrid(3, group_size=size), activation_order=order)
    sweep, _, weak = method.solve(weight, moment, torch.float64, WEAK)
    damped = moment + sweep.damping * moment.diagonal().mean() * torch.eye(COLUMNS, dtype=moment.dtype)
    gradient = (weight - sweep.weight) @ damped
    assert gradient[:, weak].abs().max() < 1e-10 * (weight @ damped).abs().max()
    assert (sweep.weight - weight)[:, weak].abs().max() > 1e-3  # they are not what they were


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("size", [None, 16])
def test_without_kept_columns_and_search_it_is_gptq(order, size, monkeypatch):
    monkeypatch.setattr(owq, "searched_scales", lambda grid, weight, dtype, points: grid.fit(weight, dtype))
    weight, moment = layer_problem()
    grid = IntegerGrid(3, group_size=size)
    ours, scales, weak = OWQ(grid, activation_order=order).solve(weight, moment, torch.float16, 0)
    theirs, (own,) = GPTQ(grid, activation_order=order).solve(weight, moment, torch.float16, [ROWS])
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(scales.scale, own.scale)
    assert not len(weak)


def test_all_columns_kept_is_lossless():
    weight, moment = layer_problem()
    sweep, _, _ = OWQ(GRID).solve(weight, moment, torch.float64, COLUMNS)
    assert torch.equal(sweep.weight, weight)


def test_weak_columns_are_where_rounding_costs_most():
    weight, moment = layer_problem()
    weak = OWQ(GRID).weak_columns(weight, moment, torch.float64, 2)
    assert weak.tolist() == [5, 17]
    assert torch.equal(weak, OWQ(GRID).weak_columns(weight, 1000 * moment, torch.float64, 2))


def test_kept_columns_lower_the_error_more_than_the_search_alone():
    weight, moment = layer_problem()
    errors = []
    for count in (0, 2, 6, 12):
        sweep, _, _ = OWQ(GRID).solve(weight, moment, torch.float16, count)
        errors.append(output_error(weight - sweep.weight, moment).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]


def test_a_channel_that_is_never_active_does_no_harm():
    weight, moment = layer_problem()
    moment[7], moment[:, 7] = 0, 0
    weight[:, 7] = 1e6  # would blow up its rows' grids
    sweep, scales, weak = OWQ(GRID).solve(weight, moment, torch.float64, WEAK)
    assert 7 not in weak
    assert scales.scale.max() < 10
    assert not sweep.weight[:, 7].any()


# --------------------------------------------------------------------------------------------------- the layer


def column_layer(bits=3, size=None, rows=64, columns=128, weak=(3, 50, 127), bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    linear.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.1)
    grid, index = IntegerGrid(bits, group_size=size), torch.tensor(weak)
    rest = linear.weight.index_fill(1, index, 0)
    scales = grid.fit(rest, torch.float16)
    bare = nn.Linear(columns, rows, bias=False, device="meta")
    packed = pack_linear(bare, grid.encode(rest, scales), scales, grid)
    expected = grid.round(rest, scales)
    expected[:, index] = linear.weight[:, index].half().float()
    return ColumnOutlierLinear.from_columns(linear, packed, index, linear.weight[:, index]), expected, linear


def test_columns_take_their_places():
    layer, expected, _ = column_layer()
    assert torch.equal(layer.dequantise(), expected)


@pytest.mark.parametrize("mode", ["stored", "scoring", "decoding"])
def test_every_mode_computes_the_same(mode):
    layer, expected, linear = column_layer()
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    layer.prepare(mode, torch.float32)
    torch.testing.assert_close(layer(x), functional.linear(x, expected, linear.bias.half().float()))


def test_the_packed_kernel_decodes_with_the_columns_beside_it():
    layer, expected, linear = column_layer(4, 64)
    layer.prepare("decoding", torch.bfloat16)
    assert layer.kernel == f"{INT4} + 16-bit columns"
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    reference = functional.linear(x.float(), expected, linear.bias)
    assert (layer(x).float() - reference).abs().max() < 0.02 * reference.abs().max()
    with pytest.raises(RunError, match="load the artifact again"):
        layer.prepare("scoring", torch.float32)


@pytest.mark.parametrize("bits", [3, 4])
def test_size_is_the_bits_of_the_formula(bits):
    """b bits everywhere, 16 for each kept weight and 32 for its column's index, scale and zero a row, the shape."""
    layer, _, _ = column_layer(bits, bias=False)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values()) * 8
    assert stored == 64 * 128 * bits + 3 * (64 * 16 + 32) + 64 * (16 + bits) + 128


def test_state_is_the_checkpoint():
    layer, expected, _ = column_layer()
    spec = layer.spec()
    spec["packed"].pop("_target_")
    again = ColumnOutlierLinear(**{**spec, "packed": QuantizedLinear(**spec["packed"])})
    again.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(again.to(torch.bfloat16).dequantise(), expected)
    assert layer.compressed_tensors_scheme() is None


# --------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("sequential", ["block", "linear"])
def test_whole_models(name, sequential):
    method = OWQ(IntegerGrid(3, group_size=16), extra_bits=0.5, sequential=sequential)
    done = method.compress(LanguageModel(tiny_model(name), None, None, torch.float16), bench()).module
    layers = block_linears(done).values()
    assert any(isinstance(layer, ColumnOutlierLinear) for layer in layers)
    assert all(layer.weight_count == layer.in_features * layer.out_features for layer in layers)
    with torch.no_grad():
        assert done(tiny_tokens(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_bits": -0.1},
        {"extra_bits": 13},
        {"search_points": 0},
        {"damping": 0},
        {"sequential": "model"},
        {"grid": IntegerGrid(3, group_size="tensor")},
        {"grid": EightBitGrid()},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        OWQ(**{"grid": GRID, **fields})
