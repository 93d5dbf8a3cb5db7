"""The searched range against a search that tries every candidate exactly."""

from __future__ import annotations

import pytest
import torch

from methods.quantization.grids import IntegerGrid, Scales
from methods.quantization.range_search import NORM, searched_scales


def loss(grid, weight, scales):
    return (weight - grid.round(weight, scales)).abs().pow(NORM).mean(1)


def brute_force(bits, weight, points):
    """Least loss of every row over all ranges and zero points."""
    grid, top = IntegerGrid(bits, group_size=None), 2**bits - 1
    span = weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)
    best = torch.full((len(weight),), torch.inf)
    for point in range(1, points + 1):
        scale = (span * point / points / top)[:, None]
        for zero in range(top + 1):
            scales = Scales(scale, torch.full_like(scale, zero, dtype=torch.int32))
            best = torch.minimum(best, loss(grid, weight, scales))
    return best


def skewed(rows=24, columns=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).pow(3) * torch.rand(rows, 1, generator=generator)
    weight[0] = weight[0].abs()  # one side of zero only
    weight[1, 3] = 40 * weight[1].abs().max()  # one outlier that is better clipped
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_finds_what_an_exhaustive_search_finds(bits):
    weight = skewed()
    grid = IntegerGrid(bits, group_size=None)
    found = loss(grid, weight, searched_scales(grid, weight, torch.float32, 20))
    assert torch.all(found <= brute_force(bits, weight, 20) * 1.005)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [None, 16])
def test_never_worse_than_min_max(bits, symmetric, size):
    weight, grid = skewed(), IntegerGrid(bits, symmetric, size)
    searched, plain = (
        grid.round(weight, scales).sub(weight).abs().pow(NORM).view(24, -1, size or 96).mean(2)
        for scales in (searched_scales(grid, weight, torch.float16), grid.fit(weight, torch.float16))
    )
    assert torch.all(searched <= plain)
    assert bits == 8 or searched.sum() < 0.99 * plain.sum()


def test_a_larger_weight_errs_larger_and_nothing_else():
    weight, grid = skewed(), IntegerGrid(3, group_size=16)
    one, two = (grid.round(w, searched_scales(grid, w, torch.float32)) - w for w in (weight, 8 * weight))
    assert torch.allclose(8**NORM * one.abs().pow(NORM).sum(1), two.abs().pow(NORM).sum(1), rtol=1e-4)


def test_zeros_do_not_count():
    """Zeros beside a row leave its grid alone: that is how columns are taken out of a search."""
    weight, grid = skewed(), IntegerGrid(3, group_size=None)
    wider = torch.cat([weight, torch.zeros(24, 8)], 1)
    one, two = (searched_scales(grid, values, torch.float32) for values in (weight, wider))
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(one.zero, two.zero)


def test_rows_of_zeros_decode_to_zeros():
    weight, grid = torch.zeros(3, 32), IntegerGrid(3, group_size=16)
    scales = searched_scales(grid, weight, torch.float16)
    assert scales.scale.isfinite().all()
    assert not grid.round(weight, scales).any()
