"""LLM.int8(): its limits, the decomposition, exact integer sums, and the kernel against the simulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import tiny_model, tiny_tokens
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.quantization.activations import InputGrid
from methods.quantization.eight_bit import INT8_PRODUCT, integer_product
from methods.quantization.llm_int8 import LLMInt8, VectorwiseInt8Linear

ROWS, COLUMNS, OUTLIER = 40, 96, 11


def linear(bias=True):
    made = nn.Linear(COLUMNS, ROWS, bias=bias).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    made.weight.copy_(torch.randn(ROWS, COLUMNS, generator=generator) * 0.2)
    if bias:
        made.bias.copy_(torch.randn(ROWS, generator=generator))
    return made


def inputs(tokens=20, scale=40.0):
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1))
    x[:, OUTLIER] *= scale
    return x


def layer(threshold, keeps_weights=False, dtype=torch.float32, bias=True):
    return VectorwiseInt8Linear.from_linear(linear(bias), threshold, keeps_weights, dtype)


def test_without_a_threshold_it_is_plain_vector_wise_eight_bits():
    made, x = layer(None), inputs()
    weight = linear().weight
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(made.dequantise(), (weight * 127 / (127 * scale)).round() * scale)
    expected = functional.linear(InputGrid(8).round(x), made.dequantise(), linear().bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    beyond = layer(1e9)
    assert torch.equal(made(x), beyond(x))


@pytest.mark.parametrize("mode", ["scoring", "decoding"])
@pytest.mark.parametrize("keeps_weights", [False, True])
def test_a_threshold_near_zero_multiplies_everything_in_sixteen_bits(keeps_weights, mode):
    """With the stored weights that is X dq(W8)ᵀ, with the original ones X Wᵀ."""
    made, x = layer(1e-30, keeps_weights), inputs()
    weight = linear().weight if keeps_weights else made.dequantise()
    made.prepare(mode, torch.float32)
    torch.testing.assert_close(made(x), functional.linear(x, weight, linear().bias), rtol=1e-4, atol=1e-4)


def test_the_decomposition_saves_what_an_outlier_costs():
    x, exact = inputs(), functional.linear(inputs(), linear().weight, linear().bias)
    plain, bitsandbytes, paper = (
        (made(x) - exact).square().mean().item() for made in (layer(None), layer(6.0), layer(6.0, True))
    )
    assert bitsandbytes < 0.2 * plain
    assert paper < bitsandbytes


def test_outlier_channels_shrink_as_the_threshold_rises():
    x = inputs()
    counts = [layer(threshold).encode_inputs(x)[2].sum().item() for threshold in (0.5, 2.0, 3.0, 6.0, 1e9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == COLUMNS
    assert counts[-2:] == [1, 0]


def test_the_threshold_itself_is_an_outlier():
    x = torch.zeros(2, COLUMNS)
    x[0, 4], x[1, 7] = 6.0, 5.999
    assert layer(6.0).encode_inputs(x)[2].nonzero().flatten().tolist() == [4]


def test_codes_of_outlier_channels_are_zero_and_their_small_entries_still_scale():
    x = torch.ones(2, COLUMNS)
    x[0, OUTLIER], x[1, OUTLIER] = 50.0, 5.0  # the second is no outlier itself, its channel is
    codes, scale, channels = layer(6.0).encode_inputs(x)
    assert channels.nonzero().flatten().tolist() == [OUTLIER]
    assert not codes[:, OUTLIER].any()
    torch.testing.assert_close(scale[:, 0] * 127, torch.tensor([1.0, 5.0]))


def test_a_row_of_nothing_but_outliers_or_zeros_is_finite():
    x = torch.zeros(3, COLUMNS)
    x[0] = 100.0
    made = layer(6.0)
    for mode in ("stored", "scoring", "decoding"):
        made.prepare(mode, torch.float32)
        assert made(x).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 96), (3, 2048), (33, 1536)])
def test_integer_products_are_exact(shape):
    """Also where 127² · K is beyond what float32 can count (K > 1040)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    weight = torch.full((24, shape[1]), 127, dtype=torch.int8)
    product = integer_product(x, weight.T)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize(("threshold", "keeps_weights"), [(None, False), (6.0, False), (6.0, True)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_the_kernel_computes_what_is_simulated(threshold, keeps_weights, tokens):
    x = inputs(tokens).view(1, tokens, COLUMNS)
    made = layer(threshold, keeps_weights)
    stored = made(x)
    made.prepare("scoring", torch.float32)
    simulated = made(x)
    made.prepare("decoding", torch.float32)
    assert made.kernel.startswith(INT8_PRODUCT)
    assert torch.equal(stored, simulated)
    torch.testing.assert_close(made(x), simulated, rtol=1e-4, atol=1e-4)
    with pytest.raises(RunError, match="already prepared"):
        made.prepare("decoding", torch.float32)


@pytest.mark.parametrize("threshold", [None, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_simulation_in_sixteen_bits_is_as_close(threshold, dtype):
    """Both say every code exactly, so only outputs are rounded: once in the kernel, twice when simulated."""
    made, x = layer(threshold), inputs(20).to(dtype)
    stored = made(x)
    made.prepare("scoring", dtype)
    simulated = made(x)
    made.prepare("decoding", dtype)
    assert torch.equal(stored, simulated)
    simulated = simulated.float()
    assert ((made(x).float() - simulated).abs() <= 2**-6 * simulated.abs() + 2**-6).all()


def test_sums_of_codes_beyond_the_range_of_float16_are_simulated_in_it():
    wide = nn.Linear(4096, 8, bias=False).requires_grad_(False)
    wide.weight.fill_(0.01)
    made = VectorwiseInt8Linear.from_linear(wide, None, False, torch.float16)
    torch.testing.assert_close(made(torch.ones(2, 4096, dtype=torch.float16)), torch.full((2, 8), 40.96).half())


def test_what_a_token_gets_depends_on_its_companions():
    """As in the paper: one token's outlier takes the channel out of 8 bits for all."""
    made, x = layer(6.0), inputs(2, scale=1.0)
    alone = made(x[:1])
    x[1, OUTLIER] = 50.0
    assert not torch.allclose(made(x)[:1], alone, atol=1e-4)
    torch.testing.assert_close(layer(None)(x)[:1], layer(None)(x[:1]))


@pytest.mark.parametrize(("keeps_weights", "bits"), [(False, 8), (True, 24)])
def test_every_byte_is_counted(keeps_weights, bits):
    """8 bits a weight, 32 a row, one format byte; the originals besides if they are kept."""
    made = layer(6.0, keeps_weights, torch.float16, bias=False)
    stored = sum(t.numel() * t.element_size() for t in made.state_dict().values()) * 8
    assert stored == ROWS * COLUMNS * bits + 32 * ROWS + 8
    assert {"weight", "SCB", "weight_format"} <= set(made.state_dict())


def test_state_is_the_checkpoint():
    made = layer(6.0, True, torch.float16)
    again = VectorwiseInt8Linear(**made.spec())
    again.load_state_dict(made.state_dict(), strict=True, assign=True)
    x = inputs()
    assert torch.equal(again(x), made(x))
    assert again.to(torch.bfloat16).SCB.dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_whole_models(name):
    bench = Bench(None, torch.Generator(), Path("."), NoProgress())
    dense, tokens = tiny_model(name), tiny_tokens(2, 9)
    done = LLMInt8(threshold=2.0).compress(LanguageModel(tiny_model(name), None, None, torch.float16), bench).module
    assert all(isinstance(made, VectorwiseInt8Linear) for made in block_linears(done).values())
    with torch.no_grad():
        exact = dense(tokens).logits
        assert (done(tokens).logits - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "fields",
    [{"threshold": 0.0}, {"outlier_weights": "int4"}, {"threshold": None, "outlier_weights": "float16"}],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ConfigError):
        LLMInt8(**fields)
