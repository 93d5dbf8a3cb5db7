"""Kernels for packed weights against float64, also off a GPU, where Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harness.models import RandomModel
from methods.blocks import plain_linears, replace_module
from methods.quantization import packed_product
from methods.quantization.activations import InputGrid
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import QuantizedLinear, pack_linear, slot_bits
from methods.quantization.round_to_nearest import rounded_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("outputs", "columns", "width"), [(11, 256, 128), (5, 576, 576), (8, 96, 32)])
@pytest.mark.parametrize("rows", [2, 20, packed_product.DENSE_ROWS])
def test_products_are_those_of_the_decoded_weights(bits, outputs, columns, width, rows):
    if torch.cuda.is_available() and rows > packed_product.FEW_ROWS:
        pytest.skip("on a GPU tiles round weights to 16 bits: the next test")
    codes = torch.randint(2**bits, (outputs, columns), generator=GENERATOR, dtype=torch.uint8)
    zero = torch.randint(2**bits, (outputs, columns // width), generator=GENERATOR, dtype=torch.uint8)
    scale, x = draw(outputs, columns // width).abs() + 0.1, draw(rows, columns)
    spread = [t.double().repeat_interleave(width, 1) for t in (zero, scale)]
    expected = x.double() @ ((codes.double() - spread[0]) * spread[1]).t()
    slot = slot_bits(bits)
    words = packed_product.interleave(codes, slot, packed_product.run_columns(width))
    assert words.numel() * 32 == codes.numel() * slot
    found = packed_product.packed_product(*(t.to(DEVICE) for t in (x, words, scale, zero)), slot).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the layer chooses these kernels on a GPU alone")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 64, 128])
@pytest.mark.parametrize("rows", [1, 4, 5, 33, 64, 500])
def test_a_layer_on_a_gpu_multiplies_its_packed_codes(bits, symmetric, group_size, rows):
    grid = IntegerGrid(bits, symmetric, group_size)
    linear = torch.nn.Linear(512, 96, bias=True)
    linear.weight.data, linear.bias.data = draw(96, 512), draw(96)
    scales = grid.fit(linear.weight.data, torch.bfloat16)
    layer: QuantizedLinear = pack_linear(linear, grid.encode(linear.weight.data, scales), scales, grid).to(DEVICE)
    dense = layer.dequantise(torch.float64)
    layer.prepare("decoding", torch.bfloat16)
    assert "packed (Triton)" in layer.kernel
    x = draw(rows, 512).to(DEVICE, torch.bfloat16)
    expected = x.double() @ dense.t() + layer.bias.double()
    assert float((layer(x) - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU captures steps")
@pytest.mark.parametrize("name", ["int2", "int4", "int8", "int8 inputs", "fp8 inputs", "nf4"])
def test_captured_steps_of_packed_layers_generate_what_the_same_steps_do_uncaptured(name, monkeypatch):
    grids = {
        "int2": (IntegerGrid(2, False, 64), None),
        "int4": (IntegerGrid(4, False, 64), None),
        "int8": (IntegerGrid(8, True, None), None),
        "int8 inputs": (EightBitGrid("int", "channel"), InputGrid(8, "int")),
        "fp8 inputs": (EightBitGrid("e4m3", "channel"), InputGrid(8, "e4m3")),
        "nf4": (CodebookGrid("nf4", 4), None),
    }
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 512, "vocab_size": 320, "max_position_embeddings": 128}
    lm, _ = RandomModel("packed", "llama", shape).load(None, "cuda", torch.bfloat16)
    grid, inputs = grids[name]
    for layer, linear in plain_linears(lm.module).items():
        replace_module(lm.module, layer, rounded_linear(linear, grid, torch.bfloat16, inputs))
    lm.engine.prepare("decoding", torch.bfloat16)
    prompt = torch.randint(320, (2, 9), generator=GENERATOR)
    with monkeypatch.context() as patch:
        patch.setattr("harness.engines.captured._capture", lambda step, warm_up: step)
        plain = torch.stack(list(lm.engine.on_hardware(None, "captured").generate(prompt, 20)))
    captured = lm.engine.on_hardware(None, "captured")
    for _ in range(2):
        assert torch.equal(torch.stack(list(captured.generate(prompt, 20))), plain)
    assert "CUDA graph" in captured.kernels()
    assert "plain steps" not in captured.kernels()
