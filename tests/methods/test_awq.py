"""AWQ: its search contains plain rounding, its losses are output errors, and it runs on every block shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens

from harness.errors import ConfigError
from harness.method import Bench, LanguageModel, TrainingLog
from harness.progress import NoProgress
from methods.blocks import block_linears, record_blocks
from methods.curvature import observe_block
from methods.quantization.awq import AWQ, _output_loss, channel_scale, moment_loss, moment_of_scaled
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import QuantizedLinear
from methods.quantization.round_to_nearest import RoundToNearest

GRID = IntegerGrid(3, group_size=16)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def bench():
    return Bench(Windows(), torch.Generator().manual_seed(0), Path("."), NoProgress())


def language_model(name="llama"):
    return LanguageModel(tiny_model(name), None, None, torch.float16)


def layer(rows=24, columns=64, tokens=500, seed=0):
    """A weight [R, C] and inputs [N, C] of which a few channels are much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, :: columns // 4] *= 20
    return torch.randn(rows, columns, generator=generator), x


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("search", ["second_moments", "block_output"])
def test_every_linear_is_packed_and_the_model_still_runs(name, search):
    done = AWQ(GRID, search_points=4, search=search).compress(language_model(name), bench()).module
    linears = block_linears(done)
    assert len(linears) == len(block_linears(tiny_model(name)))
    assert all(isinstance(linear, QuantizedLinear) for linear in linears.values())
    with torch.no_grad():
        assert done(tiny_tokens(2, 9)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama_all_heads", "opt", "gemma2", "phi", "falcon_old"])
def test_at_eight_bits_scales_and_clips_nearly_vanish(name):
    """Folded and rounded finely, the model is the model: scales were divided out where they were multiplied in."""
    tokens = tiny_tokens(3, 12)
    with torch.no_grad():
        dense = tiny_model(name)(tokens).logits
        done = AWQ(IntegerGrid(8, group_size=16)).compress(language_model(name), bench()).module(tokens).logits
    assert (done - dense).norm() < 0.03 * dense.norm()


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_scale_is_never_worse_than_rounding(seed):
    weight, x = layer(seed=seed)
    second, grid = x.T @ x / len(x), IntegerGrid(3, group_size=16)
    loss = moment_loss(second)
    scale, losses = AWQ(grid).search_scale([weight], x.abs().mean(0), loss, torch.float16)
    rounded = grid.round(weight, grid.fit(weight, torch.float16))
    assert losses[0] == loss([weight], [rounded])  # the first candidate is plain rounding, exactly
    chosen = grid.round(weight * scale, grid.fit(weight * scale, torch.float16)) / scale
    assert loss([weight], [chosen]) == min(losses) <= losses[0]
    assert min(losses) < 0.9 * losses[0]  # large channels are there to be protected


def test_scale_exponents():
    magnitude = torch.tensor([0.0, 0.5, 1.0, 4.0])
    assert torch.equal(channel_scale(magnitude, 0.0), torch.ones(4))
    for exponent in (0.3, 0.95):
        scale = channel_scale(magnitude, exponent)
        assert scale.max() * scale.min() == pytest.approx(1)
        assert (scale.diff() > 0).all()


def test_moment_loss_is_the_squared_output_error():
    weight, x = layer()
    change = torch.randn_like(weight) * 0.1
    expected = ((x @ (weight + change).T - x @ weight.T).square().sum() / len(x)).item()
    assert moment_loss(x.T @ x / len(x))([weight], [weight + change]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("size", [None, 16, "tensor", 24])
def test_clipping_never_raises_the_output_error_of_a_group(size):
    weight, x = layer()
    second = x.T @ x / len(x)
    grid = IntegerGrid(3, group_size=size, short_group=True)
    limit = AWQ(grid).best_limit(weight, second, torch.float16)
    plain = grid.round(weight, grid.fit(weight, torch.float16))
    clipped = grid.round(weight, grid.fit(weight, torch.float16, limit))
    width = 64 if size in (None, "tensor") else size

    def errors(rounded):
        parts = []
        for first in range(0, 64, width):
            part = slice(first, first + width)
            parts.append((x[:, part] @ (rounded - weight)[:, part].T).square().mean(0))
        found = torch.stack(parts)
        return found.sum() if size == "tensor" else found

    assert (errors(clipped) <= errors(plain) * (1 + 1e-4)).all()
    assert errors(clipped).sum() < errors(plain).sum()


def test_block_output_loss_is_the_error_of_the_module_that_holds_the_readers():
    blocks, hidden = record_blocks(tiny_model("llama"), tiny_tokens(4, 12), 2)
    block = blocks[0]
    mlp = block.module.mlp
    linears = [mlp.gate_proj, mlp.up_proj]
    weights = [linear.weight.clone() for linear in linears]
    with torch.no_grad():
        inputs = []
        handle = mlp.register_forward_hook(lambda _m, args, out: inputs.append((args[0], out)))
        block(hidden)
        handle.remove()
        loss = _output_loss(block, f"{block.name}.mlp", hidden, linears)
        assert loss(weights, weights) == 0
        found = loss(weights, [weight * 1.1 for weight in weights])
        assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, weights, strict=True))
        for linear in linears:
            linear.weight.mul_(1.1)
        expected = sum((mlp(x) - out).square().sum().item() for x, out in inputs)
    assert found == pytest.approx(expected, rel=1e-5)


def test_nothing_compressed_is_propagated():
    """The second block is searched on what the uncompressed first block gives it."""
    moments = []
    for compressed in (False, True):
        blocks, hidden = record_blocks(tiny_model("llama"), tiny_tokens(4, 12))
        with torch.no_grad():
            found, outputs = observe_block(blocks[0], hidden, magnitudes=True)
            if compressed:
                AWQ(IntegerGrid(2, group_size=16))._compress_block(blocks[0], hidden, found, torch.float16)
            moments.append(observe_block(blocks[1], outputs)[0])
    for name, one in moments[0].items():
        assert torch.equal(one.second(), moments[1][name].second())


def uneven_model():
    """A model some of whose channels are much louder than the others, where scales have something to protect."""
    model = tiny_model("llama_all_heads")
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[::8] *= 8
    return model


def test_awq_errs_less_than_rounding_when_channels_differ():
    tokens = Windows().calibration_windows(None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = uneven_model()(tokens).logits
        errors = []
        for method in (RoundToNearest(GRID), AWQ(GRID)):
            done = method.compress(LanguageModel(uneven_model(), None, None, torch.float16), bench()).module
            errors.append((done(tokens).logits - dense).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


@torch.no_grad()
def test_both_searches_lower_their_own_loss_where_channels_differ():
    blocks, hidden = record_blocks(uneven_model(), tiny_tokens(8, 24))
    for block in blocks:
        moments, outputs = observe_block(block, hidden, magnitudes=True)
        for reader, container in (("self_attn.q_proj", "self_attn"), ("mlp.gate_proj", "mlp")):
            siblings = [n for n, found in moments.items() if found is moments[f"{block.name}.{reader}"]]
            linears = [block.linears()[name] for name in siblings]
            weights = [linear.weight.clone() for linear in linears]
            found = moments[siblings[0]]
            for loss in (
                moment_loss(found.second()),
                _output_loss(block, f"{block.name}.{container}", hidden, linears),
            ):
                _, losses = AWQ(GRID).search_scale(weights, found.mean_magnitude(), loss, torch.float16)
                assert min(losses) < 0.9 * losses[0]
        hidden = outputs


@pytest.mark.parametrize(
    "fields", [{"search_points": 0}, {"max_shrink": 1.0}, {"clip_points": 0}, {"search": "logits"}]
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        AWQ(**{"grid": GRID, **fields})


def test_moments_after_folding_are_those_of_the_divided_inputs():
    generator = torch.Generator().manual_seed(11)
    x, scale = torch.randn(50, 6, generator=generator), torch.rand(6, generator=generator) + 0.5
    divided = x / scale
    expected = divided.T @ divided / len(x)
    assert torch.allclose(moment_of_scaled(x.T @ x / len(x), scale), expected, rtol=1e-5, atol=1e-6)


def test_statistics_of_an_earlier_width_are_used_and_change_nothing(tmp_path, monkeypatch):
    import methods.curvature as curvature

    def weights(bits, statistics):
        from methods.blocks import block_linears

        log = TrainingLog()
        bench = Bench(Windows(), torch.Generator().manual_seed(0), tmp_path, NoProgress(), log, statistics)
        lm = LanguageModel(tiny_model("llama"), None, None, torch.float16)
        module = AWQ(IntegerGrid(bits, group_size=16)).compress(lm, bench).module
        return [linear.dequantise() for linear in block_linears(module).values()], log.spared_seconds

    alone, spared_alone = weights(3, None)
    weights(4, tmp_path / "statistics")
    monkeypatch.setattr(curvature, "observe_block", None)  # the model must not run again
    after, spared = weights(3, tmp_path / "statistics")
    assert all(torch.equal(a, b) for a, b in zip(alone, after, strict=True))
    assert spared_alone == 0 < spared
