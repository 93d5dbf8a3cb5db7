"""Eight bits against eight bits: grids, exact products, SmoothQuant's identities, what other programs load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn

from harness import artifact
from harness.errors import ConfigError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears, norm_readers, record_blocks
from methods.curvature import observe_block
from methods.quantization.activations import InputGrid
from methods.quantization.eight_bit import INT8_PRODUCT, EightBitGrid, EightBitLinear, symmetric_channel_grid
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import QuantizedLinear, pack_linear
from methods.quantization.round_to_nearest import RoundToNearest
from methods.quantization.smoothing import find_foldings, fold
from methods.quantization.smoothquant import SmoothQuant, balance

WEIGHT = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
STATIC = InputGrid(8, scope="tensor", static=True)


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return torch.randint(3, 97, (8, 24), generator=generator)


def bench(scratch=Path("unused")):
    return Bench(Windows(), torch.Generator().manual_seed(0), scratch, NoProgress())


def language_model(name="llama"):
    return LanguageModel(tiny_model(name), None, None, torch.float16)


def layer_of(kind="int", scope="channel", inputs=None, scale=None):
    torch.manual_seed(0)
    linear = nn.Linear(40, 16)
    linear.weight.data = WEIGHT.clone()
    grid = EightBitGrid(kind, scope)
    scales = grid.fit(WEIGHT, torch.float16)
    return pack_linear(linear, grid.encode(WEIGHT, scales), scales, grid, inputs, scale)


# ------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("scope", ["channel", "tensor"])
def test_integers_reach_127_and_err_by_half_a_step(scope):
    grid = EightBitGrid("int", scope)
    scales = grid.fit(WEIGHT, torch.float16)
    codes = grid.encode(WEIGHT, scales)
    assert int(codes.abs().max()) == 127
    assert ((grid.round(WEIGHT, scales) - WEIGHT).abs() <= scales.scale * 0.5001).all()


def test_floats_err_by_a_sixteenth_at_most():
    weight = WEIGHT * torch.logspace(-1, 1, 40)
    grid = EightBitGrid("e4m3")
    scales = grid.fit(weight, torch.float16)
    normal = weight.abs() > scales.scale * 2**-6
    error = ((grid.round(weight, scales) - weight).abs() / weight.abs())[normal]
    assert error.max() <= 2**-4 / (1 + 2**-4) + 1e-6


def test_the_grid_of_a_width_is_restricted_at_eight_bits_only():
    assert symmetric_channel_grid(8) == EightBitGrid("int", "channel")
    assert symmetric_channel_grid(4) == IntegerGrid(4, True, None)


# ------------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("kind", ["int", "e4m3"])
@pytest.mark.parametrize("scope", ["channel", "tensor"])
def test_a_layer_is_eight_bits_and_a_scale_and_comes_back(kind, scope):
    layer = layer_of(kind, scope)
    again = EightBitLinear(**layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantise(), layer.dequantise())
    stored = sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if n != "bias")
    assert stored == 16 * 40 + 4 * (16 if scope == "channel" else 1)


@pytest.mark.parametrize("inputs", [InputGrid(8), InputGrid(8, scope="tensor"), STATIC])
@pytest.mark.parametrize("scope", ["channel", "tensor"])
def test_the_integer_product_is_the_simulation(inputs, scope):
    """Codes are multiplied exactly; what differs is the order of float32 roundings."""
    x = 3 * torch.randn(5, 7, 40, generator=torch.Generator().manual_seed(1))
    scale = inputs.scale_of(x.abs().max()) if inputs.static else None
    layer = layer_of("int", scope, inputs, scale)
    layer.prepare("scoring", torch.float32)
    simulated = layer(x)
    layer.prepare("decoding", torch.float32)
    assert layer.kernel == INT8_PRODUCT
    torch.testing.assert_close(layer(x), simulated, atol=2e-5, rtol=1e-5)


def test_the_integer_product_accumulates_beyond_float32():
    """127² · 4096 needs 26 bits: float32 sums would already round."""
    linear = nn.Linear(4096, 1, bias=False)
    linear.weight.data = torch.ones(1, 4096)
    linear.weight.data[0, 1::2] = 126 / 127
    grid = EightBitGrid()
    scales = grid.fit(linear.weight.data, torch.float16)
    layer = pack_linear(linear, grid.encode(linear.weight.data, scales), scales, grid, InputGrid(8))
    layer.prepare("decoding", torch.float32)
    x = torch.ones(1, 4096)
    assert float(layer(x)) == pytest.approx((127 + 126) * 127 * 2048 / 127**2, rel=1e-6)


def test_float_products_are_said_to_be_simulated_where_they_are():
    layer = layer_of("e4m3", inputs=InputGrid(kind="e4m3"))
    layer.prepare("decoding", torch.float32)
    assert layer.kernel == "dequantised, inputs rounded"


def test_eight_bit_weights_alone_have_no_product():
    layer = layer_of("int")
    layer.prepare("decoding", torch.float32)
    assert layer.kernel == "dequantised"


# ------------------------------------------------------------------------------------------------- SmoothQuant


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "qwen2"])
@pytest.mark.parametrize("migration", [0.0, 0.5, 1.0])
def test_smoothing_changes_nothing_before_rounding(name, migration):
    module = tiny_model(name)
    tokens = tiny_tokens(2, 12)
    with torch.no_grad():
        expected = module(tokens).logits
        blocks, hidden = record_blocks(module, tokens)
        for block in blocks:
            moments, hidden = observe_block(block, hidden, magnitudes=True, matrix=False)
            norms = norm_readers(block)
            for folding in (f for f in find_foldings(block)[0] if f.producer in norms):
                weights = [block.linears()[reader].weight for reader in folding.readers]
                fold(block, folding, balance(moments[folding.readers[0]].largest(), weights, migration))
        torch.testing.assert_close(module(tokens).logits, expected, atol=2e-4, rtol=2e-4)


def test_half_way_inputs_and_weights_are_equally_large():
    largest, weight = torch.rand(40) * 10 + 0.1, WEIGHT
    scale = balance(largest, [weight[:8], weight[8:]], 0.5)
    torch.testing.assert_close(largest / scale, (weight * scale).abs().amax(0))


def test_the_ends_of_the_range_level_one_side():
    largest = torch.rand(40) * 10 + 0.1
    torch.testing.assert_close(largest / balance(largest, [WEIGHT], 1.0), torch.ones(40))
    torch.testing.assert_close((WEIGHT * balance(largest, [WEIGHT], 0.0)).abs().amax(0), torch.ones(40))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_linear_is_quantized_and_the_model_still_runs(name, bits):
    method = SmoothQuant(symmetric_channel_grid(bits), InputGrid(bits))
    done = method.compress(language_model(name), bench()).module
    linears = block_linears(done)
    assert len(linears) == len(block_linears(tiny_model(name)))
    assert all(isinstance(layer, EightBitLinear if bits == 8 else QuantizedLinear) for layer in linears.values())
    assert all(layer.inputs.bits == bits for layer in linears.values())
    with torch.no_grad():
        assert done(tiny_tokens(2, 9)).logits.isfinite().all()


def test_smoothing_helps_where_a_channel_stands_out():
    """One channel of the norm's output 100 times the others: per-tensor inputs drown without smoothing."""
    tokens = tiny_tokens(4, 16)

    def model():
        module = tiny_model("llama")
        with torch.no_grad():
            for layer in module.model.layers:
                layer.input_layernorm.weight[3] *= 100
                layer.post_attention_layernorm.weight[5] *= 100
        return module

    def error(smoothing):
        lm = LanguageModel(model(), None, None, torch.float16)
        method = SmoothQuant(EightBitGrid("int", "tensor"), STATIC, smoothing=smoothing)
        with torch.no_grad():
            return float((method.compress(lm, bench()).module(tokens).logits - model()(tokens).logits).square().mean())

    assert error(True) < 0.8 * error(False)


def test_static_scales_are_the_largest_smoothed_input():
    lm = language_model()
    done = SmoothQuant(EightBitGrid(), STATIC).compress(lm, bench()).module
    tokens = Windows().calibration_windows(None, torch.Generator().manual_seed(0))
    blocks, hidden = record_blocks(tiny_model("llama"), tokens)
    moments, _ = observe_block(blocks[0], hidden, magnitudes=True, matrix=False)
    for folding in (f for f in find_foldings(blocks[0])[0] if f.producer in norm_readers(blocks[0])):
        weights = [blocks[0].linears()[reader].weight for reader in folding.readers]
        largest = moments[folding.readers[0]].largest()
        smoothed = (largest / balance(largest, weights, 0.5)).max()
        for reader in folding.readers:
            layer = block_linears(done)[reader]
            torch.testing.assert_close(layer.input_scale[0].float(), smoothed / 127, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"migration": 1.1}, "migration=1.1"),
        ({"inputs": None}, "inputs=null"),
        ({"working_memory_gib": 0}, "working_memory_gib=0"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        SmoothQuant(**{"grid": EightBitGrid(), "inputs": InputGrid(8), **arguments})


# ------------------------------------------------------------------------------------------------- other programs


@pytest.mark.parametrize(
    "method",
    [
        SmoothQuant(EightBitGrid(), InputGrid(8)),
        SmoothQuant(EightBitGrid("int", "tensor"), STATIC),
        RoundToNearest(EightBitGrid("e4m3"), InputGrid(kind="e4m3")),
    ],
    ids=["int8-dynamic", "int8-static", "fp8"],
)
def test_transformers_loads_the_artifact_with_the_same_logits(method, trained, tmp_path, generated_corpus):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    run = Bench(generated_corpus, torch.Generator().manual_seed(0), tmp_path, NoProgress())
    artifact.save(method.compress(trained, run), tmp_path / "saved")
    ours = artifact.load(tmp_path / "saved", "cpu", torch.float32)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        expected, found = ours.module(tokens).logits, theirs(tokens).logits
    # theirs rounds inputs to 127.5 steps and decodes scales in 16 bits: close, not equal
    assert (found - expected).norm() < 0.05 * expected.norm()
