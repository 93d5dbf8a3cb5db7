"""Foldings: only those that leave the block alone are found, and folding leaves it alone."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens

from harness.errors import RunError
from methods.blocks import norm_readers, record_blocks
from methods.quantization.smoothing import Folding, find_foldings, fold

ATTENTION_IN, MLP_IN = "attention input", "MLP input"
# producer -> readers by the last part of their names, as the shape of the block implies
EXPECTED = {
    "llama": {("input_layernorm", "q_proj"), ("post_attention_layernorm", "gate_proj"), ("up_proj", "down_proj")},
    "llama_all_heads": {
        ("input_layernorm", "q_proj"),
        ("v_proj", "o_proj"),
        ("post_attention_layernorm", "gate_proj"),
        ("up_proj", "down_proj"),
    },
    "gemma2": {("input_layernorm", "q_proj"), ("pre_feedforward_layernorm", "gate_proj"), ("up_proj", "down_proj")},
    "gemma3": {("input_layernorm", "q_proj"), ("pre_feedforward_layernorm", "gate_proj"), ("up_proj", "down_proj")},
    "opt": {
        ("self_attn_layer_norm", "q_proj"),
        ("v_proj", "out_proj"),
        ("final_layer_norm", "fc1"),
        ("fc1", "fc2"),
    },
    "opt_norm_after": {("v_proj", "out_proj"), ("fc1", "fc2")},  # its norms also feed the residual
    "bloom": {("input_layernorm", "query_key_value"), ("post_attention_layernorm", "dense_h_to_4h")},
    "falcon_old": {("input_layernorm", "query_key_value")},  # read by attention and MLP at once
    "gpt_neox": {("input_layernorm", "query_key_value"), ("post_attention_layernorm", "dense_h_to_4h")},
    "phi": {("input_layernorm", "q_proj"), ("v_proj", "dense")},
    "phi3": {("input_layernorm", "qkv_proj"), ("post_attention_layernorm", "gate_up_proj")},
}


def last(name):
    return name.rsplit(".", 1)[1]


def one_block(name):
    return record_blocks(tiny_model(name), tiny_tokens(3, 11))


def random_scale(width, seed=0):
    return torch.exp(torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 0.7)


@pytest.mark.parametrize("name", EXPECTED)
def test_foldings_are_those_of_the_block_shape(name):
    blocks, _ = one_block(name)
    foldings, unscaled = find_foldings(blocks[1])
    assert {(last(f.producer), last(f.readers[0])) for f in foldings} == EXPECTED[name]
    assert set(unscaled) == set(blocks[1].linears()) - {reader for f in foldings for reader in f.readers}


def test_a_massive_activation_does_not_hide_that_silu_is_curved():
    """A huge gate is a straight line for one token; the others tell that gate -> down is no folding."""
    model, tokens = tiny_model("llama"), tiny_tokens(1, 8)
    mlp = model.model.layers[0].mlp
    inputs = []
    handle = mlp.register_forward_hook(lambda _module, args, _out: inputs.append(args[0][0]))
    with torch.no_grad():
        model(tokens)
        handle.remove()
        only_first = torch.linalg.pinv(inputs[0])[:, 0]  # [C]: 1 for the first token, 0 for the other seven
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[5] = 1e4 * only_first
        block = record_blocks(model, tokens)[0][0]
        assert block.trial()[0, 0].norm() > 1e5 * block.trial()[0, 1:].norm()
    producers = [last(folding.producer) for folding in find_foldings(block)[0]]
    assert "up_proj" in producers
    assert "gate_proj" not in producers


def test_all_readers_of_a_shared_norm_are_balanced_together():
    blocks, _ = one_block("falcon_old")
    (folding,) = find_foldings(blocks[0])[0]
    assert [last(name) for name in folding.readers] == ["query_key_value", "dense_h_to_4h"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_looking_for_foldings_leaves_the_block_as_it_was(name):
    blocks, _ = one_block(name)
    before = {key: tensor.clone() for key, tensor in blocks[0].module.state_dict().items()}
    find_foldings(blocks[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in blocks[0].module.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_random_scales_everywhere_leaves_the_model_alone(name):
    model, tokens = tiny_model(name), tiny_tokens(3, 11)
    with torch.no_grad():
        before = model(tokens).logits
        for block in record_blocks(model, tokens)[0]:
            state = {key: tensor.clone() for key, tensor in block.module.state_dict().items()}
            for seed, folding in enumerate(find_foldings(block)[0]):
                width = block.linears()[folding.readers[0]].in_features
                fold(block, folding, random_scale(width, seed))
            if name != "opt_norm_after":
                changed = block.module.state_dict()
                assert any(not torch.equal(state[key], tensor) for key, tensor in changed.items())
        after = model(tokens).logits
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize(
    ("name", "producer", "readers"),
    [
        ("llama", "input_layernorm", ["self_attn.q_proj", "self_attn.k_proj"]),  # v is forgotten
        ("gemma2", "post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),  # not the norm they read
        ("phi", "mlp.fc1", ["mlp.fc2"]),  # GELU is not homogeneous
        ("llama_all_heads", "self_attn.q_proj", ["self_attn.o_proj"]),
    ],
)
def test_a_wrong_folding_is_caught(name, producer, readers):
    block = one_block(name)[0][0]
    folding = Folding(f"{block.name}.{producer}", tuple(f"{block.name}.{reader}" for reader in readers))
    width = block.linears()[folding.readers[0]].in_features
    with pytest.raises(RunError, match="changed the block's output"):
        fold(block, folding, random_scale(width))


def test_norm_readers_of_a_parallel_block_span_attention_and_mlp():
    readers = norm_readers(one_block("phi")[0][0])
    assert [[last(name) for name in names] for names in readers.values()] == [["q_proj", "k_proj", "v_proj", "fc1"]]
