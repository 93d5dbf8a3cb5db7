"""What runs otherwise on a GPU gives what the CPU gives: fused solver, moments, masks, blocks that take turns.

Without a GPU the kernels run in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/methods/test_gpu.py
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch
from architectures import tiny_model, tiny_tokens
from test_curvature import correlated, weights

from methods import blocks
from methods.blocks import Block, one_at_a_time, record_blocks
from methods.curvature import Moments, quadratic_form, tensor_cores
from methods.fused_sweep import FusedColumns
from methods.pruning.masks import Pattern, lowest
from methods.pruning.sparsegpt import SparseGPT
from methods.quantization.gptq import GPTQ
from methods.quantization.grids import IntegerGrid
from methods.quantization.owq import OWQ
from methods.streaming import lent, lent_in_turn, tensors_outside

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture
def kernels(monkeypatch):
    """The fused solver, whatever the device; its launches, as widths of blocks."""
    from methods import fused_sweep

    pytest.importorskip("triton", reason="the kernels are written in Triton")
    if DEVICE == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when it is first imported, which may be earlier
            pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
        monkeypatch.setattr(FusedColumns, "runs_on", lambda self, work: work.dtype == torch.float32)
    launches, launch = [], fused_sweep.solve_block

    def counted(*args):
        launches.append(args[-1] - args[-2])
        launch(*args)

    monkeypatch.setattr(fused_sweep, "solve_block", counted)
    return launches


def before(rows, columns):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)) < 0.2


def gptq(size, **settings):
    removed = settings.pop("removed", False)
    method = GPTQ(IntegerGrid(4, group_size=size), **settings)

    def solve(weight, moment):
        gone = before(*weight.shape).to(weight.device) if removed else None
        return method.solve(weight, moment, torch.float16, [len(weight) - 3, 3], gone)[0]

    return solve


def sparse(sparsity, grid=None, removed=False, block_columns=128):
    method = SparseGPT(sparsity, grid, block_columns=block_columns, mask_columns=48)

    def solve(weight, moment):
        gone = before(*weight.shape).to(weight.device) if removed else None
        sweep, mask, _ = method.solve(weight, moment, torch.float16, [len(weight) - 3, 3], gone)
        assert (sweep.weight[mask] == 0).all()
        return sweep

    return solve


def owq(weight, moment):
    return OWQ(IntegerGrid(4, group_size=None)).solve(weight, moment, torch.bfloat16, 6)[0]


SOLVERS = {
    "rows": gptq(None),
    "symmetric groups": gptq(12, block_columns=33),
    "earlier mask": gptq(12, removed=True),
    "dynamic groups": gptq(12, groups="dynamic", activation_order=False),
    "half": sparse(0.5),
    "half, earlier mask, 4 bits": sparse(0.5, IntegerGrid(4, group_size=None), removed=True),
    "2:4": sparse("2:4", block_columns=38),
    "2:4, earlier mask": sparse("2:4", removed=True),
    "columns in 16 bits": owq,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_fused_sweep_is_the_sweep(name, kernels):
    weight, moment = weights(35, 84).float(), correlated(84).float()
    fused = SOLVERS[name](weight.to(DEVICE), moment.to(DEVICE))
    assert sum(kernels) == 84
    reference = SOLVERS[name](weight.double(), moment.double())
    assert fused.error.double().sum().item() == pytest.approx(reference.error.sum().item(), rel=1e-3)
    apart = (fused.weight.double().cpu() - reference.weight).abs() > 1e-3
    # a GPU adds up in another order: a tie may fall elsewhere, and the rest of its row with it
    assert apart.double().mean() <= (0 if DEVICE == "cpu" else 0.02)


def test_taken_moments_are_the_moments():
    moments = Moments(50, torch.device(DEVICE))
    moments.add(weights(80, 50).float().to(DEVICE))
    second = moments.second()
    assert torch.equal(moments.take_second(), second)


def test_lent_tensors_come_back():
    model = tiny_model("llama")
    kept = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    outside = tensors_outside(model, model.model.layers)
    assert len(outside) + len(list(model.model.layers.parameters())) >= len(kept)
    with lent(outside, torch.device(DEVICE)), lent_in_turn(model.model.layers, torch.device(DEVICE)):
        model(tiny_tokens(1, 5).to(DEVICE))
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == kept


def test_weights_move_while_other_blocks_are_computed_on(monkeypatch):
    """A thread pins the next block and unpins the one before; never the one that is computed on."""
    moved, present = [], set()

    def moving(what):
        def move(module):
            assert id(module) not in present
            moved.append((what, id(module)))

        return move

    @contextmanager
    def visiting(self, pinned):
        assert ("pin", id(self.module)) in moved
        present.add(id(self.module))
        yield self
        present.clear()

    for name in ("pin", "unpin"):
        monkeypatch.setattr(blocks, name, moving(name))
    monkeypatch.setattr(Block, "comes_from_host", True)
    monkeypatch.setattr(Block, "visiting", visiting)
    all_blocks, _ = record_blocks(tiny_model("llama"), tiny_tokens(1, 5))
    assert list(one_at_a_time(all_blocks)) == all_blocks
    assert sorted(moved) == sorted((what, id(block.module)) for what in ("pin", "unpin") for block in all_blocks)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_of_16_bit_inputs_add_up_in_float32(dtype):
    x = (weights(5000, 4400).float() + 0.5).to(dtype)
    moments = Moments(4400, torch.device("cuda"), magnitudes=True)
    for part in x.to("cuda").split(1234):
        moments.add(part)
    exact = x.double().T @ x.double() / len(x)
    assert (moments.second().cpu() - exact).norm() < 1e-5 * exact.norm()
    assert torch.allclose(moments.mean_magnitude().cpu().double(), x.double().abs().mean(0), rtol=1e-5)


@on_gpu
def test_output_errors_in_tf32():
    change, second = weights(30, 2500).float(), correlated(2500, tokens=3000).float()
    exact = quadratic_form(change.double(), second.double()).item()
    with tensor_cores():
        found = quadratic_form(change.cuda(), second.cuda()).item()
    assert found == pytest.approx(exact, rel=2e-3)
    assert not torch.backends.cuda.matmul.allow_tf32


@on_gpu
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_masks_with_ties_are_the_same(scope):
    scores = torch.randint(9, (40, 300), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(lowest(scores.cuda(), Pattern(0.4), scope).cpu(), lowest(scores, Pattern(0.4), scope))


@on_gpu
@pytest.mark.parametrize("keep_on", [None, "cpu"])
def test_blocks_take_turns_on_the_gpu(keep_on):
    model, tokens = tiny_model("llama"), tiny_tokens(9, 17)
    resident, hidden = record_blocks(model, tokens)
    streamed, arriving = record_blocks(model, tokens, 2, keep_on, "cuda")
    with torch.no_grad():
        for block in resident:
            hidden = block(hidden)
        for block in one_at_a_time(streamed):
            assert next(block.module.parameters()).is_cuda
            arriving = block(arriving)
    assert all(parameter.device.type == "cpu" and not parameter.is_pinned() for parameter in model.parameters())
    assert [chunk.device.type for chunk in arriving] == [keep_on or "cuda"] * 5
    assert torch.allclose(torch.cat([chunk.cpu() for chunk in arriving]), hidden[0], atol=1e-4)
