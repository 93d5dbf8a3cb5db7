"""The column solver and its statistics, against textbook formulas in float64."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model, tiny_tokens

from harness.errors import RunError
from methods.blocks import record_blocks
from methods.curvature import (
    PANEL_COLUMNS,
    Moments,
    calibrate_block,
    inverse_factor,
    inverse_of_upper,
    quadratic_form,
    sweep_columns,
    windows_that_fit,
)
from methods.quantization.gptq import ColumnGrids
from methods.quantization.grids import IntegerGrid


def correlated(columns, seed=0, tokens=None):
    """A second moment [C, C] of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) + torch.eye(columns)
    x = torch.randn(tokens or 2 * columns, columns, generator=generator, dtype=torch.float64) @ mix.T
    return x.T @ x / len(x)


def weights(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounding(weight, bits=3, size=None):
    """A projection onto static grids of `weight`, and the rounded weight."""
    grid = IntegerGrid(bits, group_size=size)
    scales = grid.fit(weight, torch.float64)
    return ColumnGrids(grid, [scales], [len(weight)], weight.shape[1], weight.dtype).round, grid.round(weight, scales)


def damped(moment, damping):
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def proxy(change, moment):
    return torch.einsum("ij,jk,ik->i", change, moment, change)


def optimal_brain_surgeon(weight, moment, project):
    """Textbook update with an explicit inverse of the remaining H at every column."""
    work, answer = weight.clone(), weight.clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(moment[j:, j:])
        answer[:, j] = project(work[:, j], j, None)
        work[:, j:] -= ((work[:, j] - answer[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return answer


def test_sweep_is_the_textbook_update():
    weight, moment = weights(24, 40), correlated(40)
    project, _ = rounding(weight)
    sweep = sweep_columns(weight, moment, project, damping=0.01)
    assert torch.allclose(sweep.weight, optimal_brain_surgeon(weight, damped(moment, 0.01), project), atol=1e-9)


def test_squared_errors_add_up_to_the_output_error():
    weight, moment = weights(24, 40), correlated(40)
    sweep = sweep_columns(weight, moment, rounding(weight)[0], damping=0.02)
    assert torch.allclose(sweep.error, proxy(weight - sweep.weight, damped(moment, 0.02)), rtol=1e-9)


@pytest.mark.parametrize("size", [None, 8])
def test_without_correlation_the_sweep_is_rounding_bit_for_bit(size):
    weight = weights(24, 32)
    diagonal = torch.diag(torch.rand(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1)
    for moment in (7.3 * torch.eye(32, dtype=torch.float64), diagonal):
        project, rounded = rounding(weight, size=size)
        assert torch.equal(sweep_columns(weight, moment, project).weight, rounded)
        order = moment.diagonal().argsort(descending=True)
        assert torch.equal(sweep_columns(weight, moment, project, order=order).weight, rounded)


@pytest.mark.parametrize("block_columns", [1, 5, 16, 33, 70, 128])
def test_block_size_changes_nothing(block_columns):
    weight, moment = weights(8, 70), correlated(70)
    project, _ = rounding(weight)
    expected = sweep_columns(weight, moment, project, block_columns=70).weight
    assert torch.allclose(sweep_columns(weight, moment, project, block_columns=block_columns).weight, expected)


@pytest.mark.parametrize("block_columns", [4, 24, 40, 80])
def test_dynamic_groups_see_up_to_date_weights_whatever_the_block_size(block_columns):
    weight, moment = weights(8, 80), correlated(80)
    grid = IntegerGrid(3, group_size=20)

    def solve(block):
        grids = ColumnGrids(grid, [grid.fit(weight, torch.float64)], [8], 80, weight.dtype)
        return sweep_columns(weight, moment, grids.refit_then_round, block_columns=block).weight

    assert torch.allclose(solve(block_columns), solve(1))


def test_present_values_are_the_optimum_given_the_columns_done():
    """After column j the columns to come satisfy ((W - Ŵ) H)[:, j+1:] = 0."""
    weight, moment = weights(5, 48), correlated(48)
    project, _ = rounding(weight)
    full = damped(moment, 0.01)
    done = []

    def watch(column, k, current):
        state = torch.cat([*done, current(k, 48)], 1)
        assert torch.allclose(current(k, k + 1)[:, 0], column)
        if k:
            residual = ((weight - state) @ full)[:, k:]
            assert residual.abs().max() < 1e-9 * (weight @ full).abs().max()
        done.append(project(column, k, current)[:, None])
        return done[-1][:, 0]

    for block_columns in (1, 20, 128):
        done.clear()
        sweep_columns(weight, moment, watch, block_columns=block_columns)


def test_projection_to_itself_changes_nothing_and_costs_nothing():
    weight = weights(6, 40)
    sweep = sweep_columns(weight, correlated(40), lambda column, k, current: column.clone())
    assert torch.equal(sweep.weight, weight)
    assert sweep.error.sum() == 0


def test_a_kept_column_absorbs_the_error():
    """Columns that are swept last and kept satisfy the normal equations (OWQ)."""
    weight, moment = weights(6, 40), correlated(40)
    project, _ = rounding(weight)
    kept = 7
    sweep = sweep_columns(weight, moment, lambda c, k, now: c.clone() if k >= 40 - kept else project(c, k, now))
    residual = ((weight - sweep.weight) @ damped(moment, 0.01))[:, -kept:]
    assert residual.abs().max() < 1e-9 * (weight @ moment).abs().max()
    assert (weight - sweep.weight)[:, -kept:].abs().max() > 1e-3


def test_correlated_layers_gain_nearly_always():
    ratios = []
    for seed in range(100):
        weight, moment = weights(8, 32, seed), correlated(32, seed + 1000, tokens=48)
        project, rounded = rounding(weight)
        swept = sweep_columns(weight, moment, project).weight
        ratios.append((proxy(weight - swept, moment).sum() / proxy(weight - rounded, moment).sum()).item())
    assert sum(ratios) / len(ratios) < 0.8
    assert sum(ratio < 1 for ratio in ratios) >= 99


def test_dead_columns_become_zero_and_do_not_disturb_the_others():
    weight, moment = weights(6, 30), correlated(30)
    dead = torch.tensor([3, 17])
    moment[dead] = 0
    moment[:, dead] = 0
    project, _ = rounding(weight)
    swept = sweep_columns(weight, moment, project, damping=1e-9).weight
    live = [k for k in range(30) if k not in (3, 17)]
    alone = sweep_columns(
        weight[:, live], moment[live][:, live], lambda c, k, now: project(c, live[k], now), damping=1e-9
    ).weight
    assert (swept[:, dead] == 0).all()
    assert torch.allclose(swept[:, live], alone)


def test_the_unit_of_the_moments_does_not_matter_where_columns_are_dead():
    """Damping is a share of what live columns have; a mean over tokens is thousands of times less than a sum."""
    weight, moment = weights(6, 30), correlated(30)
    moment[3::4] = moment[:, 3::4] = 0
    project, _ = rounding(weight)
    expected = sweep_columns(weight, moment, project).weight
    assert torch.equal(sweep_columns(weight, moment * 2**-14, project).weight, expected)
    assert (sweep_columns(weight, torch.zeros_like(moment), project).weight == 0).all()


def test_damping_is_raised_until_the_factor_exists():
    low_rank = torch.ones(40, 40) - 1e-3 * torch.eye(40)
    factor, used, retries = inverse_factor(low_rank, 1e-6)
    assert retries >= 1
    assert used == pytest.approx(1e-6 * 10**retries)
    inverse = torch.linalg.inv(damped(low_rank.double(), used))
    assert torch.allclose((factor.T @ factor).double(), inverse, rtol=0.05, atol=0.05 * inverse.abs().max())
    with pytest.raises(RunError, match="not finite"):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01)


@pytest.mark.parametrize("size", [1, 5, 300, 601])
def test_inverse_by_halves(size):
    upper = torch.triu(weights(size, size)) / size + 3 * torch.eye(size, dtype=torch.float64)
    inverse = inverse_of_upper(upper)
    assert torch.allclose(inverse @ upper, torch.eye(size, dtype=torch.float64), atol=1e-10)
    assert torch.equal(inverse, inverse.triu())


def test_moments_are_plain_sums():
    columns = PANEL_COLUMNS + 37
    chunks = [weights(50, columns, seed).float() for seed in range(3)]
    moments = Moments(columns, torch.device("cpu"), magnitudes=True)
    for chunk in chunks:
        moments.add(chunk)
    x = torch.cat(chunks).double()
    assert moments.tokens == 150
    assert torch.equal(moments.second(), moments.second().T)
    assert torch.allclose(moments.second().double(), x.T @ x / 150, atol=1e-4)
    assert torch.allclose(moments.squares().double(), x.square().mean(0), rtol=1e-4)
    assert torch.allclose(moments.mean_magnitude().double(), x.abs().mean(0), rtol=1e-4)
    assert torch.equal(moments.largest(), x.abs().amax(0).float())


@pytest.mark.parametrize("columns", [3, PANEL_COLUMNS, 2 * PANEL_COLUMNS + 5])
def test_quadratic_form_is_the_trace(columns):
    change, second = weights(7, columns), correlated(columns)
    assert quadratic_form(change, second) == pytest.approx(torch.trace(change @ second @ change.T).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "phi", "opt", "falcon_new"])
@pytest.mark.parametrize("sequential", ["linear", "block"])
def test_chunks_and_one_batch_see_the_same_inputs_and_give_the_same_outputs(name, sequential):
    results = []
    for windows_per_chunk in (None, 2):
        blocks, hidden = record_blocks(tiny_model(name), tiny_tokens(6, 12), windows_per_chunk)
        seen = {}

        def halve(names, moments, blocks=blocks, seen=seen):
            seen[names[0]] = moments.second()
            for linear_name in names:
                blocks[0].linears()[linear_name].weight.mul_(0.5)

        with torch.no_grad():
            outputs = calibrate_block(blocks[0], hidden, halve, sequential, last=False)
            results.append((seen, torch.cat(outputs), torch.cat(blocks[0](hidden))))
    (seen, outputs, again), (seen_in_chunks, outputs_in_chunks, _) = results
    assert list(seen) == list(seen_in_chunks)
    for linear_name, moment in seen.items():
        assert torch.allclose(moment, seen_in_chunks[linear_name], rtol=1e-4, atol=1e-6)
    assert torch.allclose(outputs, outputs_in_chunks, atol=1e-5)
    assert torch.allclose(outputs, again, atol=1e-6)  # outputs are those of the changed block


def test_sequential_linear_sees_changed_inputs_and_block_does_not():
    moments = {}
    for sequential in ("linear", "block"):
        blocks, hidden = record_blocks(tiny_model("llama"), tiny_tokens(4, 12))

        def silence(names, found, blocks=blocks, sequential=sequential):
            moments[sequential, names[0].rsplit(".", 1)[1]] = found.second()
            for linear_name in names:
                blocks[0].linears()[linear_name].weight.zero_()

        with torch.no_grad():
            calibrate_block(blocks[0], hidden, silence, sequential, last=True)
    assert torch.equal(moments["linear", "q_proj"], moments["block", "q_proj"])
    assert moments["linear", "o_proj"].abs().max() == 0  # v was silenced before
    assert moments["block", "o_proj"].abs().max() > 0


def test_windows_that_fit_respects_the_budget():
    block = record_blocks(tiny_model("llama"), tiny_tokens(1, 9))[0][0].module
    windows = torch.zeros(100, 64, dtype=torch.long)
    assert windows_that_fit(block, windows, 4.0) == 100
    assert windows_that_fit(block, windows, 1e-9) == 1
    assert 1 < windows_that_fit(block, windows, 0.005) < 100
