"""Kernels for packed weights against float64, also off a GPU, where Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harness.engines import placement
from harness.engines.joined import JoinedLayer
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
    run = packed_product.run_columns(width)
    words = packed_product.interleave(codes, slot, run)
    assert words.numel() * 32 == codes.numel() * slot
    operands = (words, scale, zero, packed_product.lifts(slot, run, "cpu"))
    found = packed_product.packed_product(x.to(DEVICE), *(t.to(DEVICE) for t in operands), slot).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(("outputs", "columns", "width"), [(4, 128, 128), (40, 128, 64), (10, 9216, 128)])
def test_a_program_of_several_blocks_and_parts_of_the_columns_add_up(outputs, columns, width):
    """40 outputs are more blocks than the interpreter's one processor takes; 9,216 columns are three parts."""
    codes = torch.randint(16, (outputs, columns), generator=GENERATOR, dtype=torch.uint8)
    zero = torch.randint(16, (outputs, columns // width), generator=GENERATOR, dtype=torch.uint8)
    scale, x = draw(outputs, columns // width).abs() + 0.1, draw(1, columns)
    zeros, scales = (t.double().repeat_interleave(width, 1) for t in (zero, scale))
    run = packed_product.run_columns(width)
    operands = (packed_product.interleave(codes, 4, run), scale, zero, packed_product.lifts(4, run, "cpu"))
    found = packed_product.packed_product(x.to(DEVICE), *(t.to(DEVICE) for t in operands), 4).cpu()
    expected = x.double() @ ((codes.double() - zeros) * scales).t()
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(("bits", "run"), [(2, 64), (4, 128), (4, 32), (8, 128)])
def test_inputs_are_spread_in_the_order_of_the_codes(bits, run):
    """Codes taken out of the words one after the other meet their columns; the kernel does what torch does."""
    x, lift = draw(3, 2 * run).to(DEVICE), packed_product.lifts(bits, run, DEVICE)
    columns = torch.arange(2 * run, dtype=torch.float32, device=DEVICE)[None]
    order = packed_product.spread_columns(columns, len(lift), run)[0]
    codes = torch.zeros(2 * run, 2 * run, dtype=torch.uint8, device=DEVICE).fill_diagonal_(1)
    planes = packed_product.planes_of(run, bits)
    words = packed_product.interleave(codes, bits, run).view(2 * run, planes, -1)
    for slot in range(len(lift)):
        plane, code = divmod(slot, 32 // bits)
        here = (words[:, plane] >> (bits * code)) & 1  # [column, place]: the one place of each column, or none
        assert torch.equal(here.argmax(0), order[slot].long())
    spread = packed_product.spread_columns(x, len(lift), run)
    assert torch.equal(spread * lift[:, None], packed_product.lifted_columns(x, lift, run // len(lift)))


@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_are_their_products_side_by_side(bias):
    layers = [packed(torch.nn.Linear(128, outputs, bias=bias)) for outputs in (5, 3, 9)]
    whole = layers[0].joined(layers[1:])
    x = draw(2, 128).to(DEVICE)
    assert torch.equal(whole(x), torch.cat([layer(x) for layer in layers], -1))
    assert (whole.out_features, whole.kernel) == (17, layers[0].kernel)
    assert {name for name, buffer in whole.named_buffers()} == {name for name, buffer in layers[0].named_buffers()}


def test_all_of_a_joined_layer_lies_where_its_parts_do():
    """Meta stands for a GPU: what is made on the host would lie beside it."""
    layers = [packed(torch.nn.Linear(128, outputs)).to("meta") for outputs in (5, 3)]
    whole = layers[0].joined(layers[1:])
    assert placement.devices_of(whole) == [torch.device("meta")]


def test_layers_that_differ_are_not_joined():
    layer = packed(torch.nn.Linear(128, 5))
    for other in (
        packed(torch.nn.Linear(128, 5), bits=8),
        packed(torch.nn.Linear(128, 5), group_size=64),
        packed(torch.nn.Linear(256, 5)),
        packed(torch.nn.Linear(128, 5, bias=False)),
        rounded_linear(torch.nn.Linear(128, 5), IntegerGrid(4, False, 128), torch.bfloat16),  # not prepared
        torch.nn.Linear(128, 5),
    ):
        assert layer.joined([other]) is None


def packed(linear: torch.nn.Linear, bits: int = 4, group_size: int = 128) -> QuantizedLinear:
    """A layer prepared with the GPU's operand, wherever it is."""
    layer = rounded_linear(linear, IntegerGrid(bits, False, group_size), torch.bfloat16).to(DEVICE)
    layer._triton_operand()
    for name in layer.stored_names:
        setattr(layer, name, None)
    layer.mode = "decoding"
    return layer


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
    assert "packed (Triton" in layer.kernel
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
    lm = rounded_model(*grids[name])
    lm.engine.prepare("decoding", torch.bfloat16)
    prompt = torch.randint(320, (2, 9), generator=GENERATOR)
    with monkeypatch.context() as patch:
        patch.setattr("harness.engines.captured._capture", lambda step, warm_up: step)
        plain = torch.stack(list(lm.engine.on_hardware(None, "captured").generate(prompt, 20)))
    captured = lm.engine.on_hardware(None, "captured")
    for _ in range(2):
        assert torch.equal(torch.stack(list(captured.generate(prompt, 20))), plain)
    assert "CUDA graph, prompts too" in captured.kernels()
    assert "plain steps" not in captured.kernels()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU captures steps")
def test_joined_layers_generate_what_separate_ones_do():
    prompt = torch.randint(320, (2, 9), generator=GENERATOR)
    separate, joined = (rounded_model(IntegerGrid(8, False, 64)) for _ in range(2))
    separate.engine.prepare("decoding", torch.bfloat16)
    engine = joined.engine.on_hardware(None, "captured")
    engine.prepare("decoding", torch.bfloat16)
    assert sum(isinstance(module, JoinedLayer) for module in joined.module.modules()) == 2 * 2
    expected = torch.stack(list(separate.engine.on_hardware(None, "captured").generate(prompt, 20)))
    assert torch.equal(torch.stack(list(engine.generate(prompt, 20))), expected)


def rounded_model(grid, inputs: InputGrid | None = None):
    """A random model of two blocks on the GPU, its linears rounded to a grid."""
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 512, "vocab_size": 320, "max_position_embeddings": 128}
    lm, _ = RandomModel("packed", "llama", shape).load(None, "cuda", torch.bfloat16)
    for layer, linear in plain_linears(lm.module).items():
        replace_module(lm.module, layer, rounded_linear(linear, grid, torch.bfloat16, inputs))
    return lm
