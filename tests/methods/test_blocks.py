"""The block walker is the model: same hidden states, for every block shape, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from harness.errors import ConfigError
from methods.blocks import (
    block_linears,
    decoder_blocks,
    gain_offset,
    input_groups,
    norm_readers,
    plain_linears,
    record_blocks,
    watching,
)

PARALLEL = {"falcon_old", "phi"}  # one norm feeds attention and MLP


def last_block_output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the last block hands to the final norm in a plain run of the model."""
    seen = []
    _, blocks = decoder_blocks(model)
    handle = blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("windows_per_chunk", [None, 2])
def test_walking_the_blocks_is_running_the_model(name, windows_per_chunk):
    model, tokens = tiny_model(name), tiny_tokens(5, 17)
    blocks, hidden = record_blocks(model, tokens, windows_per_chunk)
    with torch.no_grad():
        for block in blocks:
            hidden = block(hidden)
        expected = [last_block_output(model, chunk) for chunk in tokens.split(windows_per_chunk or 5)]
    for walked, run in zip(hidden, expected, strict=True):
        assert torch.equal(walked, run)


def test_recording_runs_no_block_on_the_calibration_windows():
    model = tiny_model("llama")
    lengths = []
    with watching(block_linears(model), lambda _name, x: lengths.append(len(x))):
        record_blocks(model, tiny_tokens(6, 32))
    assert max(lengths) <= 8  # only the trial run on a handful of tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recording_leaves_the_model_as_it_was(name):
    model, tokens = tiny_model(name), tiny_tokens(2, 9)
    with torch.no_grad():
        before = model(tokens).logits
        record_blocks(model, tokens)
        assert torch.equal(model(tokens).logits, before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_of_the_blocks_is_found_and_no_other(name):
    model = tiny_model(name)
    prefix, _ = decoder_blocks(model)
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix + ".")}
    assert set(block_linears(model)) == expected
    assert not any("head" in n.split(".")[0] for n in block_linears(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_that_share_an_input_see_equal_rows(name):
    model = tiny_model(name)
    block = record_blocks(model, tiny_tokens(2, 9))[0][1]
    seen = {}
    with torch.no_grad(), watching(block.linears(), lambda n, x: seen.__setitem__(n, x.clone())):
        block.trial()
    groups = input_groups(block)
    assert sorted(name for group in groups for name in group) == sorted(block.linears())
    for group in groups:
        assert all(torch.equal(seen[group[0]], seen[other]) for other in group)
    firsts = [seen[group[0]] for group in groups]
    for i, x in enumerate(firsts):
        for y in firsts[i + 1 :]:
            assert x.shape != y.shape or not torch.equal(x, y)


def test_query_key_value_and_gate_up_share():
    block = record_blocks(tiny_model("llama"), tiny_tokens(1, 9))[0][0]
    shapes = [[name.rsplit(".", 1)[1] for name in group] for group in input_groups(block)]
    assert shapes == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"opt_norm_after"}))
def test_norm_readers_read_the_norm(name):
    block = record_blocks(tiny_model(name), tiny_tokens(1, 9))[0][0]
    readers = norm_readers(block)
    assert len(readers) == (1 if name in PARALLEL else 2)
    for norm, linears in readers.items():
        outputs, inputs = [], {}
        handle = dict(block.module.named_modules(prefix=block.name))[norm].register_forward_hook(
            lambda _m, _a, out, outputs=outputs: outputs.append(out)
        )
        with torch.no_grad(), watching(block.linears(), lambda n, x, inputs=inputs: inputs.__setitem__(n, x)):
            block.trial()
        handle.remove()
        equal = {n for n, x in inputs.items() if x.shape[-1] == 32 and torch.equal(x, outputs[0].flatten(0, -2))}
        assert set(linears) == equal


@pytest.mark.parametrize(
    ("name", "offset"), [("llama", 0.0), ("opt", 0.0), ("gemma", 1.0), ("gemma2", 1.0), ("gemma3", 1.0)]
)
def test_gemma_norms_multiply_by_one_plus_weight(name, offset):
    block = record_blocks(tiny_model(name), tiny_tokens(1, 9))[0][0]
    modules = dict(block.module.named_modules(prefix=block.name))
    for norm in norm_readers(block):
        before = modules[norm].weight.clone()
        assert gain_offset(modules[norm]) == offset
        assert torch.equal(modules[norm].weight, before)


def test_conv1d_and_fused_experts_are_refused_by_name():
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=97))
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\..*Conv1D.*nn\.Linear"):
        plain_linears(gpt2)
    fields = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    mixtral = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", vocab_size=97, num_key_value_heads=2, num_local_experts=2, **fields)
    )
    with pytest.raises(ConfigError, match=r"model\.layers\.0\..*nn\.Linear"):
        plain_linears(mixtral)


def test_a_model_that_works_between_blocks_is_refused():
    model = tiny_model("llama")

    class Louder(type(model.model.layers[0])):
        def __call__(self, hidden, **kwargs):
            return super().__call__(hidden, **kwargs) * 2

    for layer in model.model.layers:
        layer.__class__ = Louder
    with pytest.raises(ConfigError, match="between blocks"):
        record_blocks(model, tiny_tokens(1, 9))


def test_no_blocks_is_an_error():
    with pytest.raises(ConfigError, match="no list of equal decoder blocks"):
        decoder_blocks(nn.Linear(2, 2))
