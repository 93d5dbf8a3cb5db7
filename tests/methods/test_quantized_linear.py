"""The packed linear means what its codes mean, in every mode, and its memory is its bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.errors import RunError
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import DEQUANTISED, INT4, INT8, QuantizedLinear

GRIDS = [
    IntegerGrid(bits, symmetric, size)
    for bits, size in ((2, 32), (3, 64), (4, 64), (4, None), (5, 32), (8, None), (3, "tensor"))
    for symmetric in (False, True)
] + [IntegerGrid(4, False, 48, short_group=True)]


def made(grid, rows=64, columns=128, bias=True, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator) * 0.1)
    scales = grid.fit(linear.weight.detach(), dtype)
    codes = grid.encode(linear.weight.detach(), scales)
    return linear, QuantizedLinear.from_codes(linear, codes, scales, grid), grid.decode(codes, scales)


def loaded_bytes(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_float32_mode_computes_with_the_decoded_weights(grid):
    _, layer, weight = made(grid)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    expected = functional.linear(x, weight, layer.bias.float())
    assert torch.equal(layer.dequantise(), weight)
    for mode in ("stored", "scoring", "stored", "decoding"):
        layer.prepare(mode, torch.float32)
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert layer.kernel == DEQUANTISED


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_state_is_the_checkpoint(grid):
    _, layer, weight = made(grid)
    again = QuantizedLinear(**layer.spec())
    assert again.spec() == layer.spec()
    again.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(again.dequantise(), weight)
    assert set(layer.state_dict()) - {"bias", "weight_zero_point"} == {"weight_packed", "weight_scale", "weight_shape"}


@pytest.mark.parametrize("bits", range(2, 9))
def test_memory_is_the_bits_of_the_formula(bits):
    grid = IntegerGrid(bits, group_size=64)
    _, layer, _ = made(grid, rows=64, columns=128, bias=False)
    layer.prepare("stored", torch.float32)
    assert loaded_bytes(layer) * 8 / layer.weight_count == pytest.approx(bits + 16 / 64 + bits / 64 + 128 / (64 * 128))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "size"), [(64, 64), (48, 32), (128, None), (64, 128)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_kernel_is_close_to_the_decoded_weights(bits, rows, size, symmetric):
    _, layer, weight = made(IntegerGrid(bits, symmetric, size), rows=rows)
    layer.prepare("decoding", torch.bfloat16)
    assert layer.kernel.startswith(INT4)
    assert layer.kernel == INT4 if bits == 4 else f"{bits}-bit codes in 4-bit slots" in layer.kernel
    assert loaded_bytes(layer) < 0.8 * 2 * layer.weight_count
    for tokens in (1, 7, 200):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
        expected = functional.linear(x.float(), weight, layer.bias.float())
        assert (layer(x).float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_int8_kernel_is_close_to_the_decoded_weights():
    _, layer, weight = made(IntegerGrid(8, True, None))
    layer.prepare("decoding", torch.bfloat16)
    assert layer.kernel == INT8
    for tokens in (1, 100):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
        expected = functional.linear(x.float(), weight, layer.bias.float())
        assert (layer(x).float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "grid", [IntegerGrid(5, False, 64), IntegerGrid(8, False, None), IntegerGrid(4, False, 48, True)], ids=str
)
def test_without_a_kernel_decoding_is_dense_and_says_so(grid):
    _, layer, weight = made(grid)
    layer.prepare("decoding", torch.bfloat16)
    assert layer.kernel == DEQUANTISED
    assert torch.equal(layer.dense, weight.bfloat16())


def test_after_decoding_the_packed_state_is_gone_and_said_so():
    _, layer, _ = made(IntegerGrid(4, False, 64))
    layer.prepare("decoding", torch.bfloat16)
    with pytest.raises(RunError, match="load the artifact again"):
        layer.prepare("scoring", torch.float32)


def test_casting_the_model_leaves_the_format_alone():
    _, layer, weight = made(IntegerGrid(3, False, 64))
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float16
    assert torch.equal(layer.dequantise(), weight)


@pytest.mark.parametrize(
    ("grid", "scheme"),
    [
        (IntegerGrid(4, False, 64), {"strategy": "group", "group_size": 64, "num_bits": 4, "symmetric": False}),
        (IntegerGrid(8, True, None), {"strategy": "channel", "group_size": None, "num_bits": 8, "symmetric": True}),
        (IntegerGrid(4, False, "tensor"), None),
        (IntegerGrid(4, False, 48, True), None),
    ],
)
def test_scheme_says_what_the_format_can_say(grid, scheme):
    _, layer, _ = made(grid)
    said = layer.compressed_tensors_scheme()
    if scheme is None:
        assert said is None
    else:
        weights = {"type": "int", **scheme}
        assert said == {"format": "pack-quantized", "weights": weights, "input_activations": None}
