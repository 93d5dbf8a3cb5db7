"""Magnitude, Wanda and SparseGPT: identities of their papers, storage, orders."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn

from harness import artifact
from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel
from harness.probes.footprint import linear_bits
from harness.progress import NoProgress
from methods.blocks import TRIAL_TOKENS, block_linears
from methods.curvature import sweep_columns
from methods.pruning.magnitude import Magnitude
from methods.pruning.masks import Pattern, lowest
from methods.pruning.sparse_linear import SparseLinear
from methods.pruning.sparsegpt import SparseGPT
from methods.pruning.wanda import Wanda, scores
from methods.quantization.grids import IntegerGrid

METHODS = [Magnitude, Wanda, SparseGPT]


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def bench():
    return Bench(Windows(), torch.Generator().manual_seed(0), Path("."), NoProgress())


def language_model(name="llama"):
    return LanguageModel(tiny_model(name), None, None, torch.float16)


def problem(rows=12, columns=32, tokens=400, seed=0):
    """A weight [R, C], correlated inputs [N, C] and their second moment, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5 + 0.3 * x
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x, x.T @ x / tokens


def damped(moment, share=0.01):
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def solve(weight, moment, sparsity, **settings):
    method = SparseGPT(sparsity, mask_columns=16, **settings)
    return method.solve(weight, moment, torch.float64, [len(weight)])


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_linear_is_pruned_and_the_model_still_runs(name, method):
    done = method(0.5).compress(language_model(name), bench()).module
    linears = block_linears(done)
    assert len(linears) == len(block_linears(tiny_model(name)))
    for linear in linears.values():
        share = float(linear.removed().float().mean())
        assert share == pytest.approx(0.5, abs=0.02)
        assert not linear.dequantise()[linear.removed()].any()
    with torch.no_grad():
        assert done(tiny_tokens(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_embeddings_head_and_norms_are_not_touched(method, sparsity):
    before, after = tiny_model("llama"), method(sparsity).compress(language_model(), bench()).module
    kept = {name: p for name, p in before.named_parameters() if "proj" not in name}
    assert kept
    for name, parameter in kept.items():
        assert torch.equal(after.get_parameter(name), parameter), name


@pytest.mark.parametrize("method", [Magnitude, Wanda])
def test_what_is_kept_is_as_it_was(method):
    before = block_linears(tiny_model("llama"))
    for name, linear in block_linears(method(0.5).compress(language_model(), bench()).module).items():
        kept = ~linear.removed()
        assert torch.equal(linear.dequantise()[kept], before[name].weight[kept].half().float())


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
@pytest.mark.parametrize("grid", [None, IntegerGrid(4, group_size=8)])
def test_bits_on_disk_are_the_closed_form(sparsity, grid, trained, tmp_path):
    done = SparseGPT(sparsity, grid).compress(trained, Bench(Bytes(), torch.Generator(), tmp_path, NoProgress()))
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = done.engine.score(tokens)
    described = artifact.save(done, tmp_path / "saved")
    again = artifact.load(tmp_path / "saved", "cpu", torch.float32)
    assert torch.equal(again.engine.score(tokens), expected)
    counted = linear_bits(artifact.tensor_bytes(tmp_path / "saved"), described["linears"])
    assert counted == pytest.approx(1 + (8 if grid is None else 2 + (16 + 8) / 8), abs=0.02)


class Bytes:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(0, 256, (4, 32), generator=generator)


def test_sparsegpt_errs_less_than_wanda_and_that_less_than_magnitude_on_the_calibration_text():
    tokens = Windows().calibration_windows(None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = tiny_model("llama")(tokens).logits
        errors = [
            float((method(0.5).compress(language_model(), bench()).module(tokens).logits - dense).square().mean())
            for method in (SparseGPT, Wanda, Magnitude)
        ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_inputs_that_are_no_numbers_end_the_run(method):
    """Nothing is lower than what is no number: all would be kept, and the row would be of the dense model."""
    lm = language_model()
    windows = Windows().calibration_windows(None, torch.Generator().manual_seed(0))
    late = next(token for token in windows.flatten().tolist() if token not in windows[0, :TRIAL_TOKENS])
    lm.module.get_input_embeddings().weight.data[late] = torch.inf
    with pytest.raises(RunError, match=r"calibration inputs .* not finite.*float32"):
        method(0.5).compress(lm, bench())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0, "3:2", 1.2])
def test_bad_sparsity_is_refused_before_anything_is_loaded(method, sparsity):
    with pytest.raises(ConfigError, match=f"sparsity={sparsity}"):
        method(sparsity)


# ------------------------------------------------------------------------------------------------------- Wanda


def test_equal_norms_make_wanda_magnitude_by_rows():
    weight, _, _ = problem()
    squares = torch.full((32,), 3.0)
    pattern = Pattern.parse(0.5)
    assert torch.equal(lowest(scores(weight, squares), pattern, "row"), lowest(weight.abs(), pattern, "row"))


def test_wanda_does_not_see_how_channels_are_scaled():
    weight, x, moment = problem()
    scale = torch.logspace(-1, 1, 32, dtype=torch.float64)
    pattern = Pattern.parse(0.5)
    one = lowest(scores(weight, moment.diagonal()), pattern, "row")
    scaled = (x / scale).square().mean(0)
    assert torch.equal(lowest(scores(weight * scale, scaled), pattern, "row"), one)


def test_for_uncorrelated_inputs_wanda_is_optimal():
    """With a diagonal moment the error of a set is the sum of its squared scores: no set of that size has less."""
    weight, _, moment = problem(rows=3, columns=8)
    squares = moment.diagonal()
    chosen = lowest(scores(weight, squares), Pattern.parse(0.5), "row")
    for row, removed in zip(weight, chosen, strict=True):
        costs = row.square() * squares
        best = min(float(costs[list(which)].sum()) for which in itertools.combinations(range(8), 4))
        assert float(costs[removed].sum()) == pytest.approx(best)


# --------------------------------------------------------------------------------------------------- SparseGPT


@pytest.mark.parametrize("sparsity", [0.3, 0.5, "2:4", "4:8"])
@pytest.mark.parametrize("block_columns", [4, 16, 128])
@pytest.mark.parametrize("grid", [None, IntegerGrid(4, group_size=8)])
def test_the_summed_errors_are_the_output_error(sparsity, block_columns, grid):
    weight, _, moment = problem()
    sweep, removed, _ = solve(weight, moment, sparsity, block_columns=block_columns, grid=grid)
    change = sweep.weight - weight
    expected = torch.einsum("ri,ij,rj->r", change, damped(moment), change)
    torch.testing.assert_close(sweep.error, expected)
    assert not sweep.weight[removed].any()


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_blocks_of_updates_change_the_cost_only(sparsity):
    weight, _, moment = problem()
    one, two = (solve(weight, moment, sparsity, block_columns=columns) for columns in (16, 128))
    torch.testing.assert_close(one[0].weight, two[0].weight)
    assert torch.equal(one[1], two[1])


def test_for_its_mask_exact_least_squares_is_a_lower_bound():
    weight, _, moment = problem()
    sweep, removed, _ = solve(weight, moment, 0.5)
    full = damped(moment)
    for row, gone, error in zip(weight, removed, sweep.error, strict=True):
        kept = ~gone
        change = torch.zeros_like(row)
        change[gone] = -row[gone]
        change[kept] = torch.linalg.solve(full[kept][:, kept], full[kept][:, gone] @ row[gone])
        least = change @ full @ change
        assert least <= error * (1 + 1e-9)


def test_if_what_goes_comes_first_it_is_least_squares():
    weight, _, moment = problem()
    removed = torch.zeros_like(weight, dtype=torch.bool)
    removed[:, :10] = True
    sweep = sweep_columns(weight, moment, lambda column, k, _: column * (k >= 10), 0.01)
    full = damped(moment)
    kept = slice(10, None)
    exact = weight[:, kept] + weight[:, :10] @ full[:10, kept] @ torch.linalg.inv(full[kept, kept])
    torch.testing.assert_close(sweep.weight[:, kept], exact)


@pytest.mark.parametrize("sparsity", ["2:4", "4:8"])
def test_with_uncorrelated_inputs_it_is_wanda_and_keeps_its_weights(sparsity):
    weight, _, moment = problem()
    diagonal = torch.diag(moment.diagonal())
    sweep, removed, _ = solve(weight, diagonal, sparsity)
    level = diagonal.diagonal() + 0.01 * diagonal.diagonal().mean()  # SparseGPT sees the damped diagonal
    assert torch.equal(removed, lowest(scores(weight, level), Pattern.parse(sparsity), "row"))
    torch.testing.assert_close(sweep.weight, weight.masked_fill(removed, 0))


def test_stacked_linears_are_pruned_each_to_the_share():
    weight, _, moment = problem(rows=12)
    weight[:4] *= 100  # would keep everything if rows of other linears competed with it
    method = SparseGPT(0.5, mask_columns=16)
    _, together, _ = method.solve(weight, moment, torch.float64, [4, 8])
    alone = [method.solve(part, moment, torch.float64, [len(part)])[1] for part in weight.split([4, 8])]
    assert torch.equal(together, torch.cat(alone))


def test_rounding_in_the_same_sweep_beats_rounding_afterwards():
    weight, _, moment = problem(rows=64, columns=64)
    grid = IntegerGrid(3, group_size=None)
    together, _, scales = solve(weight, moment, 0.5, grid=grid)
    pruned, removed, _ = solve(weight, moment, 0.5)
    after = grid.round(pruned.weight, scales[0]).masked_fill(removed, 0) - weight
    assert together.error.sum() < torch.einsum("ri,ij,rj->", after, damped(moment), after)


# ----------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("columns", [32, 30])
@pytest.mark.parametrize("grid", [None, IntegerGrid(3, group_size=None), IntegerGrid(4, True, group_size=10)])
def test_a_sparse_layer_computes_with_what_it_stores(columns, grid):
    torch.manual_seed(0)
    linear = nn.Linear(columns if grid is None or grid.group_size is None else 30, 7)
    weight = linear.weight.detach().half().float()
    removed = lowest(weight.abs(), Pattern.parse(0.4), "layer")
    scales = None if grid is None else grid.fit(weight, torch.float16)
    layer = SparseLinear.from_mask(linear, weight, removed, "0.4", torch.float16, grid, scales)
    expected = (weight if grid is None else grid.round(weight, scales)).masked_fill(removed, 0)
    assert torch.equal(layer.dequantise(), expected)
    assert torch.equal(layer.removed(), removed)
    again = SparseLinear(**layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantise(), expected)
    x = torch.randn(3, linear.in_features)
    for mode in ("stored", "scoring", "decoding"):
        layer.prepare(mode, torch.float32)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, layer.bias.float()))
        assert layer.kernel == "dense with zeros, no sparse kernel"


def test_a_kept_zero_is_kept_and_a_removed_weight_stays_away():
    linear = nn.Linear(8, 1, bias=False)
    weight = torch.tensor([[0.0, 1, 0, 2, 3, 4, 5, 6]])
    removed = torch.tensor([[True, False, False, True, False, False, False, False]])
    layer = SparseLinear.from_mask(linear, weight, removed, "0.25", torch.float16)
    assert layer.kept == 6
    assert torch.equal(layer.removed(), removed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 products are for GPUs")
def test_a_gpu_multiplies_two_of_four_without_the_zeros():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 96, bias=True)
    weight = torch.randn(96, 256, generator=generator)
    removed = lowest(weight.abs(), Pattern.parse("2:4"), "row")
    layer = SparseLinear.from_mask(linear, weight, removed, "2:4", torch.bfloat16).cuda()
    dense, bias = layer.dequantise(torch.float64), linear.bias.detach().bfloat16().double().cuda()
    layer.prepare("decoding", torch.bfloat16)
    assert "2:4 sparse" in layer.kernel
    for rows in (1, 3, 40, 500):
        x = torch.randn(rows, 256, generator=generator).cuda().bfloat16()
        expected = x.double() @ dense.t() + bias
        assert float((layer(x).double() - expected).norm() / expected.norm()) < 1e-2
