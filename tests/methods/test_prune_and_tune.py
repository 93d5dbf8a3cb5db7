"""The ladder: zeros only grow, tuning revives none of them, and without tuning and with one rung it is SparseGPT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import tiny_model, tiny_tokens

from harness.errors import ConfigError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.pruning import prune_and_tune
from methods.pruning.prune_and_tune import PruneAndTune
from methods.pruning.sparsegpt import SparseGPT
from methods.training import TrainingSettings, language_modeling_loss

PRUNER = SparseGPT(0.6, mask_columns=16)
NONE = TrainingSettings(steps=0, learning_rate=0)
SOME = TrainingSettings(steps=6, learning_rate=1e-2, weight_decay=0.1)
TEXT = tiny_tokens(8, 24, seed=1)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return TEXT


def compressed(method, scratch: Path):
    bench = Bench(Windows(), torch.Generator().manual_seed(0), scratch, NoProgress())
    module = method.compress(LanguageModel(tiny_model("llama"), None, None, torch.float16), bench).module
    return block_linears(module), module, bench


def masks(layers):
    return [layer.removed() for layer in layers.values()]


def test_one_rung_without_tuning_is_sparsegpt(tmp_path):
    one, _, _ = compressed(PruneAndTune(PRUNER, NONE, ladder=()), tmp_path / "a")
    other, _, _ = compressed(PRUNER, tmp_path / "b")
    for a, b in zip(one.values(), other.values(), strict=True):
        assert torch.equal(a.removed(), b.removed())
        assert torch.equal(a.dequantise(), b.dequantise())


@pytest.mark.parametrize("sparsity", [0.6, "2:4", "1:4"])
def test_what_a_rung_removed_stays_removed(sparsity, tmp_path, monkeypatch):
    seen = []
    original = prune_and_tune.open_layers

    def spy(module):
        seen.append(masks(block_linears(module)))
        return original(module)

    monkeypatch.setattr(prune_and_tune, "open_layers", spy)
    method = PruneAndTune(replace(PRUNER, sparsity=sparsity), SOME, ladder=(0.2, 0.4))
    layers, _, bench = compressed(method, tmp_path)
    assert len(seen) == len(method.rungs) == 3 - (sparsity == "2:4")
    for earlier, later in zip(seen, [*seen[1:], masks(layers)], strict=True):
        assert all((before & after).equal(before) for before, after in zip(earlier, later, strict=True))
    for layer in layers.values():
        assert not layer.dequantise()[layer.removed()].any()
        wanted = {"2:4": 1 / 2, "1:4": 3 / 4}.get(sparsity, 0.6)
        assert layer.removed().float().mean() == pytest.approx(wanted, abs=0.02)
    assert len(bench.log.curves["training loss"]) == SOME.steps * len(method.rungs)


def test_tuning_helps_on_the_text_it_sees(tmp_path):
    with torch.no_grad():
        plain = language_modeling_loss(compressed(PRUNER, tmp_path / "a")[1], TEXT)
        tuned = language_modeling_loss(compressed(PruneAndTune(PRUNER, SOME), tmp_path / "b")[1], TEXT)
    assert tuned < plain - 0.05


def test_gradients_of_removed_weights_do_not_shorten_the_others_step(tmp_path):
    """Clipping to a norm sees kept weights alone: what removed weights would have wanted changes nothing."""
    lengths = []
    original = torch.nn.utils.clip_grad_norm_

    def spy(parameters, *args, **kwargs):
        parameters = list(parameters)
        lengths.append([p.grad.clone() for p in parameters if p.grad is not None and p.ndim == 2])
        return original(parameters, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        layers, _, _ = compressed(PruneAndTune(PRUNER, replace(SOME, steps=1), ladder=()), tmp_path)
    shapes = {tuple(layer.removed().shape) for layer in layers.values()}
    gradients = [g for g in lengths[0] if tuple(g.shape) in shapes]
    assert gradients
    for layer in layers.values():
        removed = layer.removed()
        assert any(g.shape == removed.shape and not g[removed].any() for g in gradients)


@pytest.mark.parametrize("ladder", [(0.5, 0.3), (0.0,), (0.3, 0.3)], ids=str)
def test_ladders_that_do_not_rise_are_refused(ladder):
    with pytest.raises(ConfigError, match=r"method\.ladder"):
        PruneAndTune(PRUNER, NONE, ladder)
