"""Errors of layers: what a changed weight is worth, by hand; scales that moved are no error."""

from __future__ import annotations

import pytest
import torch

from harness.layer_errors import layer_errors
from harness.method import Bench
from harness.progress import NoProgress
from harness.records import RunRecord, from_json, to_json
from methods.blocks import block_linears
from methods.dense import Dense
from methods.low_rank import LowRankLinear
from methods.quantization.awq import AWQ
from methods.quantization.grids import IntegerGrid
from methods.quantization.round_to_nearest import RoundToNearest
from tests.harness.tiny_models import language_model, token_ids

TOKENS = token_ids(1, 40)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return token_ids(4, 32, seed=3)


@pytest.fixture
def bench(tmp_path):
    return Bench(Windows(), torch.Generator().manual_seed(0), tmp_path, NoProgress())


def errors_of(lm):
    return layer_errors(lm.module, language_model().module, TOKENS, torch.float32)


@torch.no_grad()
def test_errors_are_shares_of_energy_of_weight_and_output():
    lm = language_model()
    halved, zeroed = list(block_linears(lm.module).items())[:2]
    halved[1].weight.mul_(0.5)
    zeroed[1].weight.zero_()
    found = errors_of(lm)
    for errors in (found.weights, found.outputs):
        assert errors.pop(halved[0]) == pytest.approx(0.25)
        assert errors.pop(zeroed[0]) == 1.0
        assert len(errors) == 12
        assert set(errors.values()) == {0.0}


@torch.no_grad()
def test_rounding_is_measured_against_the_packed_weights(bench):
    grid = IntegerGrid(3, group_size=16)
    lm = RoundToNearest(grid).compress(language_model(), bench)
    found = errors_of(lm)
    for name, linear in block_linears(language_model().module).items():
        weight = linear.weight
        change = grid.round(weight, grid.fit(weight, torch.float16)) - weight
        assert found.weights[name] == pytest.approx(float(change.square().sum() / weight.square().sum()), rel=6e-3)


def test_scales_that_moved_between_layers_are_no_error(bench):
    lm = AWQ(IntegerGrid(8, group_size=16), search_points=4).compress(language_model(), bench)
    assert any(getattr(module, "moved_scales", None) for module in lm.module.modules())
    fine = errors_of(lm)
    assert len(fine.weights) == len(fine.outputs) == 14
    assert max(fine.weights.values()) < 1e-3


def test_what_stands_beside_a_layer_counts():
    lm = language_model()
    name, linear = next(iter(block_linears(lm.module).items()))
    left, right = torch.ones(linear.out_features, 1), torch.ones(1, linear.in_features)
    parent, _, attribute = name.rpartition(".")
    energy = linear.weight.detach().square().sum().item()
    setattr(lm.module.get_submodule(parent), attribute, LowRankLinear.from_factors(linear, left, right))
    assert errors_of(lm).weights[name] == pytest.approx(left.numel() * right.numel() / energy, rel=6e-3)


def test_layers_without_a_counterpart_and_weights_that_did_not_change_are_absent(bench):
    assert errors_of(Dense().compress(language_model(), bench)).absent == "no weight changed"
    fewer = language_model(num_hidden_layers=1)
    assert "no layer matches" in errors_of(fewer).absent
    narrow = errors_of(language_model(intermediate_size=48))
    assert not any("mlp" in name for name in narrow.weights)
    foreign = language_model(seed=1)
    foreign.module.scales_moved_elsewhere = True
    assert "other units" in errors_of(foreign).absent
    assert errors_of(foreign).weights == {}


def test_a_record_without_them_reads_and_one_with_them_keeps_them():
    plain = RunRecord("a", "finished", {"name": "dense"}, "tiny", None, {})
    assert "layer_errors" not in to_json(plain)
    assert from_json(to_json(plain)) == plain
    rounded = RunRecord("b", "finished", {"name": "rtn"}, "tiny", 4, {}, layer_errors={"0.q": 0.00321})
    assert from_json(to_json(rounded)).layer_errors == {"0.q": 0.00321}
