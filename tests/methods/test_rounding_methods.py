"""Round to nearest and GPTQ on whole tiny models of every block shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens

from harness.errors import ConfigError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.dense import Dense
from methods.quantization.activations import InputGrid
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.gptq import GPTQ
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import QuantizedLinear
from methods.quantization.round_to_nearest import RoundToNearest

GRID = IntegerGrid(3, group_size=16)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def bench(seed=0):
    return Bench(Windows(), torch.Generator().manual_seed(seed), Path("."), NoProgress())


def language_model(name="llama"):
    return LanguageModel(tiny_model(name), None, None, torch.float16)


def weights(model):
    return {
        name: linear.dequantise() if isinstance(linear, QuantizedLinear) else linear.weight
        for name, linear in block_linears(model).items()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", [RoundToNearest(GRID), GPTQ(GRID)], ids=["rtn", "gptq"])
def test_every_linear_is_packed_and_the_model_still_runs(name, method):
    done = method.compress(language_model(name), bench()).module
    linears = block_linears(done)
    assert len(linears) == len(block_linears(tiny_model(name)))
    assert all(isinstance(linear, QuantizedLinear) for linear in linears.values())
    with torch.no_grad():
        assert done(tiny_tokens(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("method", [RoundToNearest(GRID), GPTQ(GRID), GPTQ(GRID, sequential="block")])
def test_one_seed_gives_one_result(method):
    one, two = (weights(method.compress(language_model(), bench()).module) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("size", [None, "tensor", 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_round_to_nearest_is_the_grid(size, symmetric):
    grid = IntegerGrid(4, symmetric, size)
    before = weights(tiny_model("llama"))
    after = weights(RoundToNearest(grid).compress(language_model(), bench()).module)
    for name, weight in before.items():
        assert torch.equal(after[name], grid.round(weight, grid.fit(weight, torch.float16)))


@pytest.mark.parametrize("size", [None, "tensor", 8])
def test_activation_order_keeps_the_static_grid_of_the_original_groups(size):
    grid = IntegerGrid(3, group_size=size)
    before = weights(tiny_model("llama"))
    after = weights(GPTQ(grid).compress(language_model(), bench()).module)
    for name, weight in before.items():
        assert torch.equal(after[name], grid.round(after[name], grid.fit(weight, torch.float16)))


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("sequential", ["linear", "block"])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("size", [None, 16])
def test_chunks_give_the_same_codes(name, sequential, order, size):
    grid = IntegerGrid(4, group_size=size)
    ample = GPTQ(grid, sequential=sequential, activation_order=order, damping=0.1)
    scarce = GPTQ(grid, sequential=sequential, activation_order=order, damping=0.1, working_memory_gib=1e-9)
    one, two = (method.compress(language_model(name), bench()).module for method in (ample, scarce))
    pairs = zip(block_linears(one).values(), block_linears(two).values(), strict=True)
    same = torch.cat([(a.codes() == b.codes()).flatten() for a, b in pairs]).float().mean()
    assert same > 0.99  # sums in another order may move a weight that lies between two codes


@pytest.mark.parametrize("groups", ["static", "dynamic"])
def test_the_model_computes_with_what_is_packed(groups):
    """In-place weights during calibration are the packed ones: the next block's inputs are those of the artifact."""
    method = GPTQ(GRID, groups=groups, activation_order=False)
    done = method.compress(language_model(), bench()).module
    seen = {}
    for name, linear in block_linears(done).items():
        linear.prepare("scoring", torch.float32)
        seen[name] = linear.dense
        linear.prepare("stored", torch.float32)
        assert torch.equal(seen[name], linear.dequantise())


@pytest.mark.parametrize("sequential", ["linear", "block"])
@pytest.mark.parametrize("groups", ["static", "dynamic"])
def test_gptq_errs_less_than_rounding_on_the_calibration_text(sequential, groups):
    tokens = Windows().calibration_windows(None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = tiny_model("llama")(tokens).logits
        errors = [
            (method.compress(language_model(), bench()).module(tokens).logits - dense).square().mean()
            for method in (
                RoundToNearest(GRID),
                GPTQ(GRID, groups=groups, sequential=sequential, activation_order=groups == "static"),
            )
        ]
    assert errors[1] < 0.8 * errors[0]


def test_eight_bits_are_nearly_lossless_and_error_falls_with_bits():
    tokens = tiny_tokens(4, 20)
    with torch.no_grad():
        dense = tiny_model("llama")(tokens).logits
        errors = []
        for bits in (2, 3, 4, 6, 8):
            done = GPTQ(IntegerGrid(bits, group_size=16)).compress(language_model(), bench()).module
            errors.append(((done(tokens).logits - dense).norm() / dense.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


def test_dense_is_untouched():
    base = language_model()
    before = {name: tensor.clone() for name, tensor in base.module.state_dict().items()}
    after = Dense().compress(base, bench()).module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("make", [RoundToNearest, GPTQ])
def test_groups_that_do_not_divide_are_refused_before_any_work(make):
    with pytest.raises(ConfigError, match=r"model\.layers\.0\..*32 input channels.*groups of 24.*short_group"):
        make(IntegerGrid(4, group_size=24)).compress(language_model(), bench())
    done = make(IntegerGrid(4, group_size=24, short_group=True)).compress(language_model(), bench()).module
    assert done(tiny_tokens(1, 5)).logits.isfinite().all()


def test_a_model_is_compressed_once():
    done = RoundToNearest(GRID).compress(language_model(), bench())
    with pytest.raises(ConfigError, match="already compressed"):
        GPTQ(GRID).compress(done, bench())


@pytest.mark.parametrize(
    "fields",
    [
        {"damping": 0},
        {"groups": "none"},
        {"sequential": "model"},
        {"block_columns": 0},
        {"working_memory_gib": -1},
        {"groups": "dynamic", "activation_order": True},
        {"groups": "dynamic", "activation_order": False, "grid": IntegerGrid(4, group_size="tensor")},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        GPTQ(**{"grid": GRID, **fields})


@pytest.mark.parametrize(
    "grid",
    [
        *(CodebookGrid(kind, 4, 16) for kind in ("float", "nf4", "int", "dynamic")),
        *(EightBitGrid(kind, scope) for kind in ("int", "e4m3") for scope in ("channel", "tensor")),
    ],
    ids=str,
)
def test_gptq_on_another_grid_than_integers_stays_on_it_and_errs_less_than_rounding(grid):
    tokens = Windows().calibration_windows(None, torch.Generator().manual_seed(0))
    before = weights(tiny_model("llama"))
    with torch.no_grad():
        dense = tiny_model("llama")(tokens).logits
        rounded, solved = (
            method.compress(language_model(), bench()).module for method in (RoundToNearest(grid), GPTQ(grid))
        )
        errors = [(module(tokens).logits - dense).square().mean() for module in (rounded, solved)]
    assert errors[1] < 0.9 * errors[0]
    for name, linear in block_linears(solved).items():
        fitted = grid.fit(before[name], torch.float16)
        assert torch.equal(linear.dequantise(), grid.round(linear.dequantise(), fitted))


def test_gptq_passes_the_input_grid_on():
    done = GPTQ(GRID, inputs=InputGrid(8)).compress(language_model(), bench()).module
    assert all(linear.inputs == InputGrid(8) for linear in block_linears(done).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": CodebookGrid("quantile", 4, 16)}, "quantile"),
        ({"grid": CodebookGrid("nf4", 4, 16, double_quantization=True)}, "double"),
        ({"grid": CodebookGrid("nf4", 4, 16), "groups": "dynamic", "activation_order": False}, "integer grid"),
        ({"grid": GRID, "inputs": InputGrid(8, scope="tensor", static=True)}, "static"),
    ],
)
def test_gptq_refuses_grids_that_it_cannot_solve(arguments, message):
    with pytest.raises(ConfigError, match=message):
        GPTQ(**arguments)


def test_gptq_refuses_blocks_that_cross_rows():
    with pytest.raises(ConfigError, match="cross"):
        GPTQ(CodebookGrid("nf4", 4, 48)).compress(language_model(), bench())
