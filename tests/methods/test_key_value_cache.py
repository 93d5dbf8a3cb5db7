"""A quantized cache: its bytes, its error, its place in the engine."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model

from harness import artifact
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError
from methods.quantization.key_value_cache import KeyValueCache, KeyValueGrid

STATES = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
INTEGERS = [KeyValueGrid(bits) for bits in range(2, 9)]


@pytest.mark.parametrize("grid", INTEGERS, ids=str)
def test_no_entry_is_further_from_itself_than_half_a_step(grid):
    decoded = grid.decode(grid.encode(STATES), 64, torch.float32)
    step = (STATES.amax(-1, keepdim=True) - STATES.amin(-1, keepdim=True)) / (2**grid.bits - 1)
    half_precision = 2**-10 * STATES.abs().amax(-1, keepdim=True)  # of the stored scale and lowest value
    assert ((decoded - STATES).abs() <= step / 2 + 2 * half_precision).all()


@pytest.mark.parametrize("grid", [*INTEGERS, KeyValueGrid(8, "e4m3")], ids=str)
def test_bytes_are_those_that_are_counted(grid):
    assert grid.encode(STATES).shape[-1] == grid.bytes_per_token(64)
    assert grid.encode(STATES).dtype == torch.uint8


def test_e4m3_is_a_cast():
    grid = KeyValueGrid(8, "e4m3")
    expected = STATES.to(torch.float8_e4m3fn).float()
    assert torch.equal(grid.decode(grid.encode(STATES), 64, torch.float32), expected)
    assert grid.decode(grid.encode(STATES * 1e6), 64, torch.float32).isfinite().all()


def test_what_is_decoded_is_a_fixed_point():
    grid = KeyValueGrid(4)
    once = grid.encode(STATES)
    again = grid.encode(grid.decode(once, 64, torch.float32))
    torch.testing.assert_close(
        grid.decode(again, 64, torch.float32), grid.decode(once, 64, torch.float32), rtol=0, atol=2e-3
    )


def test_a_token_of_equal_entries_survives():
    grid = KeyValueGrid(2)
    same = torch.full((1, 1, 1, 16), 3.25)
    assert torch.equal(grid.decode(grid.encode(same), 16, torch.float32), same)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "mistral"])
def test_scoring_reads_the_cache_as_decoding_does(architecture):
    """One pass over a text and its tokens one by one meet the same rounded keys and values."""
    engine = TransformersEngine(tiny_model(architecture), cache=KeyValueGrid(3))
    together = engine.hidden(TOKENS)
    cache, steps = engine.new_cache(), []
    with torch.no_grad():
        for k in range(TOKENS.shape[1]):
            out = engine.module.base_model(input_ids=TOKENS[:, k : k + 1], past_key_values=cache, use_cache=True)
            steps.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), together, rtol=1e-3, atol=1e-3)


def test_more_bits_are_nearer_to_none():
    module = tiny_model("llama")
    exact = TransformersEngine(module).hidden(TOKENS)
    errors = [
        float((TransformersEngine(module, cache=KeyValueGrid(bits)).hidden(TOKENS) - exact).norm())
        for bits in (8, 4, 2)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_the_cache_is_smaller_by_what_its_grid_says(trained):
    plain = trained.engine.kv_cache_bytes_per_token(torch.bfloat16)
    config, grid = trained.module.config, KeyValueGrid(4)
    quantized = TransformersEngine(trained.module, cache=grid).kv_cache_bytes_per_token(torch.bfloat16)
    heads, width = config.num_key_value_heads, config.head_dim
    assert quantized == 2 * config.num_hidden_layers * heads * grid.bytes_per_token(width)
    assert quantized < plain


def test_a_saved_model_comes_back_with_its_cache(trained, bench, tmp_path):
    compressed = KeyValueCache(KeyValueGrid(2)).compress(trained, bench)
    artifact.save(compressed, tmp_path / "model")
    loaded = artifact.load(tmp_path / "model", "cpu", torch.float32)
    assert loaded.engine.cache == KeyValueGrid(2)
    assert "int2 KV cache" in loaded.engine.kernels()


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 9}, {"bits": 4, "kind": "e4m3"}, {"kind": "int4"}], ids=str)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"method\.(bits|kind)="):
        KeyValueGrid(**wrong)
