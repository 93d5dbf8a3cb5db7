"""Methods one after the other: what the first one said about the weights holds after the second one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_model, tiny_tokens

from harness import artifact
from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.pruning.magnitude import Magnitude
from methods.pruning.sparse_linear import SparseLinear
from methods.pruning.sparsegpt import SparseGPT
from methods.pruning.wanda import Wanda
from methods.quantization.activations import InputGrid
from methods.quantization.gptq import GPTQ
from methods.quantization.grids import IntegerGrid
from methods.quantization.key_value_cache import KeyValueCache, KeyValueGrid
from methods.quantization.linear import QuantizedLinear
from methods.quantization.owq import OWQ
from methods.quantization.round_to_nearest import RoundToNearest
from methods.quantization.smoothquant import SmoothQuant
from methods.stack import Stack

GRID = IntegerGrid(4, group_size=16)
TOKENS = tiny_tokens(2, 16, seed=3)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))


def compressed(method, scratch: Path, name="llama") -> LanguageModel:
    from harness.engines.transformers import TransformersEngine

    module = tiny_model(name)
    base = LanguageModel(module, None, TransformersEngine(module), torch.float16)
    return method.compress(base, Bench(Windows(), torch.Generator().manual_seed(0), scratch, NoProgress()))


def stack(*steps):
    return Stack(steps, [type(step).__name__.lower() for step in steps])


def weights(lm: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: layer.dequantise() for name, layer in block_linears(lm.module).items()}


PRUNERS = [Magnitude(0.5), Wanda(0.5), Wanda("2:4"), SparseGPT(0.5, mask_columns=16)]
QUANTIZERS = [RoundToNearest(GRID), GPTQ(GRID), GPTQ(GRID, activation_order=False, groups="dynamic")]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("pruner", PRUNERS, ids=lambda m: f"{type(m).__name__}{m.sparsity}")
def test_what_is_pruned_first_is_pruned_at_the_end(pruner, quantizer, tmp_path):
    alone = compressed(pruner, tmp_path / "a")
    both = compressed(stack(pruner, quantizer), tmp_path / "b")
    pairs = zip(block_linears(alone.module).values(), block_linears(both.module).values(), strict=True)
    for before, after in pairs:
        assert isinstance(after, SparseLinear)
        assert after.grid == GRID
        assert torch.equal(before.removed(), after.removed())


def test_rounding_a_pruned_model_rounds_what_is_kept(tmp_path):
    """Magnitude pruning changes no kept weight, and zero lies on every grid: the order does not matter there."""
    first = weights(compressed(stack(Magnitude(0.5), RoundToNearest(GRID)), tmp_path / "a"))
    pruned = compressed(Magnitude(0.5), tmp_path / "b")
    for name, layer in block_linears(pruned.module).items():
        dense = layer.dequantise()
        expected = GRID.round(dense, GRID.fit(dense, torch.float16))
        assert torch.equal(first[name], expected.masked_fill(layer.removed(), 0)), name


@pytest.mark.parametrize("pruner", PRUNERS[:3], ids=lambda m: f"{type(m).__name__}{m.sparsity}")
def test_pruning_a_quantized_model_keeps_its_grid(pruner, tmp_path):
    """Pruners that change no kept weight leave it where rounding put it, and it is stored in as few bits."""
    rounded = weights(compressed(RoundToNearest(GRID), tmp_path / "a"))
    both = compressed(stack(RoundToNearest(GRID), pruner), tmp_path / "b")
    for name, layer in block_linears(both.module).items():
        assert isinstance(layer, SparseLinear)
        assert layer.grid == GRID
        assert torch.equal(layer.dequantise(), rounded[name].masked_fill(layer.removed(), 0))


def test_second_order_pruning_leaves_the_grid_is_stored_in_16_bits_and_says_so(tmp_path, caplog):
    both = compressed(stack(RoundToNearest(GRID), SparseGPT(0.5, mask_columns=16)), tmp_path)
    layers = block_linears(both.module)
    assert all(layer.grid is None for layer in layers.values())
    assert f"{len(layers)} linears off the grid" in caplog.text


def test_gptq_makes_up_for_what_is_missing(tmp_path):
    """On the calibration inputs GPTQ after pruning is nearer to the pruned model than rounding after pruning."""
    dense = tiny_model("llama")
    pruned = compressed(Wanda(0.5), tmp_path / "p").module
    tokens = Windows().calibration_windows(None, None)
    with torch.no_grad():
        target = pruned(tokens).logits
        errors = [
            float((compressed(stack(Wanda(0.5), step), tmp_path / str(k)).module(tokens).logits - target).norm())
            for k, step in enumerate(
                (GPTQ(IntegerGrid(3, group_size=16)), RoundToNearest(IntegerGrid(3, group_size=16)))
            )
        ]
        assert errors[0] < errors[1] < float((dense(tokens).logits - target).norm()) * 2


def test_the_file_is_smaller_than_either_alone(trained, bench, tmp_path, trained_folder):
    sizes = {}
    for name, method in (
        ("pruned", Magnitude(0.5)),
        ("rounded", RoundToNearest(GRID)),
        ("both", stack(Magnitude(0.5), RoundToNearest(GRID))),
    ):
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        artifact.save(method.compress(lm, bench), tmp_path / name)
        sizes[name] = artifact.stored_bytes(tmp_path / name)
        loaded = artifact.load(tmp_path / name, "cpu", torch.float32)
        assert torch.equal(loaded.engine.score(TOKENS), lm.engine.score(TOKENS))
    assert sizes["both"] < min(sizes["pruned"], sizes["rounded"])


def test_a_cache_stacks_with_anything(tmp_path):
    lm = compressed(
        stack(SmoothQuant(IntegerGrid(8, True, None), InputGrid(8)), KeyValueCache(KeyValueGrid(8))), tmp_path
    )
    assert lm.engine.cache == KeyValueGrid(8)
    alone = compressed(SmoothQuant(IntegerGrid(8, True, None), InputGrid(8)), tmp_path / "alone")
    assert all(torch.equal(a, b) for a, b in zip(weights(alone).values(), weights(lm).values(), strict=True))


def test_an_untouched_layer_comes_back_as_it_was(tmp_path):
    lm = compressed(stack(GPTQ(GRID), KeyValueCache(KeyValueGrid(8))), tmp_path)
    assert all(isinstance(layer, QuantizedLinear) for layer in block_linears(lm.module).values())


def test_a_step_that_fills_removed_weights_is_an_error(tmp_path):
    with pytest.raises(RunError, match="brought removed weights back; put it before"):
        compressed(stack(Wanda(0.5), OWQ(IntegerGrid(3, group_size=16), extra_bits=1.0)), tmp_path)


def test_statistics_of_the_dense_model_are_not_those_of_the_second_step(tmp_path):
    seen = []

    class Looks:
        def compress(self, base, bench):
            seen.append(bench.statistics)
            return base

    module = tiny_model("llama")
    statistics = tmp_path / "statistics"
    bench = Bench(Windows(), torch.Generator(), tmp_path, NoProgress(), statistics=statistics)
    stack(Looks(), Looks()).compress(LanguageModel(module, None, None, torch.float16), bench)
    assert seen == [statistics, None]


def test_one_method_is_no_stack():
    with pytest.raises(ConfigError, match="at least two"):
        Stack([Wanda(0.5)], ["wanda"])
