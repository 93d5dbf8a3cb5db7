"""SpQR: leave-one-out and sweep against loops, the limits in which it is another method, and its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_model, tiny_tokens
from torch import nn

from harness import artifact
from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.quantization.outliers import SparseOutlierLinear, SparseSolution, quantise_statistics
from methods.quantization.spqr import SpQR, fit_group, leave_one_out_gain

ROWS, COLUMNS = 32, 48


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def problem(seed=0, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) + 2 * torch.eye(COLUMNS)
    x = torch.randn(4 * COLUMNS, COLUMNS, generator=generator) @ mix.T
    weight = torch.randn(rows, COLUMNS, generator=generator)
    weight[torch.rand(rows, COLUMNS, generator=generator) < 0.02] *= 6  # single large weights
    return weight, x.T @ x / len(x)


def layer_of(method, weight, solution, bias=True):
    linear = nn.Linear(weight.shape[1], len(weight), bias=bias).requires_grad_(False)
    return SparseOutlierLinear.from_solution(
        linear, solution, method.bits, method.statistics_bits, method.statistics_rows
    )


def rounded(values, low, high, bits):
    """Values [n] on 2^bits points from low to high, the zero point not rounded."""
    scale, zero = fit_group(low, high, bits)
    return scale * ((values / scale + zero).round().clamp(0, 2**bits - 1) - zero)


# ----------------------------------------------------------------------------------------------- leave one out


def test_leave_one_out_is_what_leaving_one_out_gives():
    weight, _ = problem()
    values = weight[:, :8]
    importance = torch.rand(8, generator=torch.Generator().manual_seed(3)) + 0.5
    expected = torch.empty_like(values)
    for row, own in enumerate(values):
        every = ((rounded(own, own.min(), own.max(), 3) - own) * importance).square().sum()
        for k in range(8):
            rest = torch.arange(8) != k
            others = own[rest]
            without = ((rounded(others, others.min(), others.max(), 3) - others) * importance[rest]).square().sum()
            expected[row, k] = every - without
    torch.testing.assert_close(leave_one_out_gain(values, importance, 3), expected, rtol=1e-4, atol=1e-6)


def test_a_group_without_spread_is_exact_and_its_zero_point_stays_small():
    low = torch.tensor([0.3, -0.3, 0.0, 0.3])
    high = torch.tensor([0.3, -0.3, 0.0, 0.30001])
    scale, zero = fit_group(low, high, 3)
    assert (scale > 0).all()
    assert (zero.abs() <= 2 * 7 + 1e-4).all()
    torch.testing.assert_close(rounded(low, low, high, 3), low)


@pytest.mark.parametrize("count", [32, 24, 1])
def test_statistics_err_by_half_a_step(count):
    values = torch.rand(3, count, generator=torch.Generator().manual_seed(0)) + 0.5
    for bits in (3, 8):
        found = quantise_statistics(values, bits, 16, torch.float32)
        blocks = -(-count // 16)
        assert found.low.shape == found.step.shape == (3, blocks)
        step = found.step.repeat_interleave(16, 1)[:, :count]
        assert ((found.decode(16) - values).abs() <= 0.501 * step + 1e-6).all()


def test_one_row_of_statistics_is_stored_as_it_is():
    values = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantise_statistics(values, 3, 1, torch.float32).decode(1), values)


# ------------------------------------------------------------------------------------------------------ the sweep


def naive(weight, moment, order, bits, size, damping):
    """GPTQ with float zero points, groups fitted on the way, explicit inverses; float64."""
    work, moment = weight.double()[:, order], moment.double()[order][:, order]
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    answer = work.clone()
    for j in range(len(order)):
        if j % size == 0:
            group = work[:, j : j + size]
            scale, zero = fit_group(group.amin(1), group.amax(1), bits)
        answer[:, j] = scale * ((work[:, j] / scale + zero).round().clamp(0, 2**bits - 1) - zero)
        inverse = torch.linalg.inv(moment[j:, j:])
        work[:, j:] -= ((work[:, j] - answer[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return answer[:, order.argsort()]


@pytest.mark.parametrize("order", [False, True])
def test_without_outliers_and_second_level_it_is_gptq_with_a_float_zero(order):
    weight, moment = problem()
    method = SpQR(3, statistics_rows=1, outlier_threshold=None, activation_order=order)
    sweep, solution = method.solve(weight, moment, torch.float32)
    by = moment.diagonal().argsort(descending=True) if order else torch.arange(COLUMNS)
    expected = naive(weight, moment, by, 3, 16, 1.0)
    assert (sweep.weight - expected).abs().max() < 1e-4
    assert not solution.outliers.any()


@pytest.mark.parametrize("order", [False, True])
def test_threshold_zero_is_lossless(order):
    weight, moment = problem()
    method = SpQR(3, outlier_threshold=0.0, activation_order=order)
    sweep, solution = method.solve(weight, moment, torch.float32)
    torch.testing.assert_close(sweep.weight, weight, rtol=1e-5, atol=1e-5)
    assert solution.outliers.float().mean() > 0.9


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_a_lower_threshold_takes_more_outliers_and_errs_less(leave_one_out):
    weight, moment = problem()
    shares, errors = [], []
    for threshold in (None, 1.0, 0.2, 0.05, 0.01):
        method = SpQR(3, outlier_threshold=threshold, leave_one_out=leave_one_out)
        sweep, solution = method.solve(weight, moment, torch.float16)
        shares.append(solution.outliers.float().mean().item())
        errors.append(torch.einsum("ij,jk,ik->", weight - sweep.weight, moment, weight - sweep.weight).item())
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert errors[2] < 0.9 * errors[0]
    assert errors[2:] == sorted(errors[2:], reverse=True)


@pytest.mark.parametrize("order", [False, True])
def test_a_channel_that_is_never_active_has_no_outliers_whatever_the_unit_of_the_moments(order):
    weight, moment = problem()
    moment[5::6] = moment[:, 5::6] = 0
    method = SpQR(3, activation_order=order)
    expected, found = (method.solve(weight, moment * unit, torch.float16)[1] for unit in (1, 2**-14))
    back = torch.arange(COLUMNS) if found.order is None else found.order.argsort()
    assert torch.equal(found.outliers, expected.outliers)
    assert torch.equal(found.codes, expected.codes)
    assert found.outliers.any()
    assert not found.outliers[:, back][:, 5::6].any()


def test_every_weight_is_rounded_within_the_threshold_or_kept():
    """Σ e² is the error of the sweep; an entry contributes at most the threshold, an outlier next to nothing."""
    weight, moment = problem()
    free, _ = SpQR(3, outlier_threshold=None).solve(weight, moment, torch.float32)
    kept, solution = SpQR(3, outlier_threshold=0.05).solve(weight, moment, torch.float32)
    assert solution.outliers.any()
    assert kept.error.sum() < free.error.sum()


def test_eight_bits_of_statistics_are_nearly_all_of_them():
    weight, moment = problem()
    exact, few, many = (
        SpQR(3, statistics_bits=bits, statistics_rows=rows, outlier_threshold=None).solve(
            weight, moment, torch.float32
        )[0]
        for bits, rows in ((3, 1), (3, 16), (8, 16))
    )
    assert (many.error.sum() / exact.error.sum() - 1).abs() < 0.1
    assert few.error.sum() > exact.error.sum()


# ------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("rows", [32, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layer_holds_what_the_sweep_found(order, rows, bits):
    weight, moment = problem(rows=rows)
    method = SpQR(bits, activation_order=order)
    sweep, solution = method.solve(weight, moment, torch.float16)
    layer = layer_of(method, weight, solution)
    assert torch.equal(layer.dequantise(), sweep.weight)
    again = SparseOutlierLinear(**layer.spec())
    again.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(again.to(torch.bfloat16).dequantise(), sweep.weight)


def test_outliers_are_the_weights_in_sixteen_bits():
    weight, moment = problem()
    method = SpQR(3, outlier_threshold=0.05)
    sweep, solution = method.solve(weight, moment, torch.float16)
    back = solution.outliers[:, solution.order.argsort()]
    assert back.any()
    assert torch.equal(sweep.weight[back], sweep.weight[back].half().float())


@pytest.mark.parametrize(("rows", "columns", "order"), [(32, 64, False), (64, 128, True), (160, 96, True)])
@pytest.mark.parametrize("bits", [3, 4])
def test_stored_bits_are_those_of_the_formula(rows, columns, order, bits):
    """b + 2·3/16 + 64/256 and 32 for each outlier, as the paper counts; row pointers and the order on top."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, columns, generator=generator), torch.randn(400, columns, generator=generator)
    method = SpQR(bits, activation_order=order)
    _, solution = method.solve(weight, x.T @ x / 400, torch.float16)
    layer = layer_of(method, weight, solution, bias=False)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values()) * 8 / (rows * columns)
    share = solution.outliers.float().mean().item()
    paper = bits + 6 / 16 + 64 / 256 + 32 * share
    assert stored == pytest.approx(paper + 32 * (rows + 1) / (rows * columns) + (32 / rows if order else 0), abs=1e-6)


def test_a_column_index_fills_all_sixteen_bits():
    columns = 49152
    codes = torch.zeros(2, columns, dtype=torch.uint8)
    statistics = quantise_statistics(torch.ones(columns // 16, 2), 3, 16, torch.float16)
    outliers = torch.zeros(2, columns, dtype=torch.bool)
    outliers[0, 40000] = outliers[1, [3, 49151]] = True
    values = torch.full((2, columns), 7.0)
    layer = layer_of(SpQR(3), codes, SparseSolution(codes, statistics, statistics, outliers, values, None))
    assert torch.equal(layer.dequantise() == 7, outliers)


def test_after_decoding_the_packed_state_is_gone_and_said_so():
    weight, moment = problem()
    method = SpQR(3)
    layer = layer_of(method, weight, method.solve(weight, moment, torch.float16)[1])
    expected = layer.dequantise()
    layer.prepare("decoding", torch.float32)
    assert torch.equal(layer.dense, expected)
    with pytest.raises(RunError, match="load the artifact again"):
        layer.prepare("scoring", torch.float32)


# ----------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("sequential", ["block", "linear"])
def test_whole_models(name, sequential, tmp_path):
    bench = Bench(Windows(), torch.Generator().manual_seed(0), tmp_path, NoProgress())
    lm = LanguageModel(tiny_model(name), None, None, torch.float16)
    done = SpQR(3, sequential=sequential).compress(lm, bench).module
    layers = block_linears(done).values()
    assert all(isinstance(layer, SparseOutlierLinear) for layer in layers)
    with torch.no_grad():
        assert done(tiny_tokens(2, 9)).logits.isfinite().all()
    shares = bench.log.curves["outlier share by block"]
    assert list(shares) == list(range(len(shares)))
    assert all(0 < share < 0.5 for share in shares.values())


def test_no_outliers_are_stored_and_come_back(trained, bench, tmp_path):
    """An empty list is a tensor too."""
    lm = SpQR(4, outlier_threshold=None).compress(trained, bench)
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(5))
    expected = lm.engine.score(tokens)
    artifact.save(lm, tmp_path / "saved")
    again = artifact.load(tmp_path / "saved", "cpu", torch.float32)
    assert all(len(layer.outlier_values) == 0 for layer in block_linears(again.module).values())
    torch.testing.assert_close(again.engine.score(tokens), expected, rtol=1e-3, atol=1e-3)  # the rest is in 16 bits


def test_fewer_bits_are_fewer_bytes_down_to_three():
    """Below, the threshold, which is relative to the weights and not to the grid, makes too many outliers."""
    weight, moment = problem()
    stored, shares = [], []
    for bits in (8, 4, 3, 2):
        method = SpQR(bits)
        layer = layer_of(method, weight, method.solve(weight, moment, torch.float16)[1])
        stored.append(sum(t.numel() * t.element_size() for t in layer.state_dict().values()))
        shares.append(len(layer.outlier_values) / layer.weight_count)
    assert stored[0] > stored[1] > stored[2] < stored[3]
    assert shares == sorted(shares)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 9},
        {"statistics_bits": 16},
        {"group_size": 1},
        {"statistics_rows": 0},
        {"outlier_threshold": -1},
        {"damping": 0},
        {"block_columns": 0},
        {"sequential": "model"},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        SpQR(**{"bits": 3, **fields})


def test_groups_that_do_not_divide_are_refused_before_any_work():
    bench = Bench(Windows(), torch.Generator().manual_seed(0), Path("."), NoProgress())
    with pytest.raises(ConfigError, match=r"model\.layers\.0\..*32 input channels.*group_size=24"):
        SpQR(3, group_size=24).compress(LanguageModel(tiny_model("llama"), None, None, torch.float16), bench)
