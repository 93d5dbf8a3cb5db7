"""Students: a truncated model is the original with blocks bypassed; what cannot learn from a teacher is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens
from torch import nn

from harness import artifact
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError
from harness.method import LanguageModel
from harness.models import LocalModel, RandomModel, byte_tokenizer
from methods.blocks import block_linears, decoder_blocks
from methods.distillation.students import (
    PATTERNS,
    Checkpoint,
    Fresh,
    Truncated,
    kept_blocks,
    per_layer_fields,
    require_same_tokenizer,
    truncated,
)

TOKENS = tiny_tokens(2, 20)


def language_model(name: str) -> LanguageModel:
    module = tiny_model(name)
    return LanguageModel(module, byte_tokenizer(), TransformersEngine(module))


class Bypassed(nn.Module):
    """A block that hands its input on."""

    def __init__(self, block: nn.Module, like: tuple | torch.Tensor) -> None:
        super().__init__()
        self.tuple = isinstance(like, tuple)
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, hidden, *args, **kwargs):
        return (hidden,) if self.tuple else hidden


@torch.no_grad()
def with_blocks_bypassed(module: nn.Module, kept: list[int]) -> nn.Module:
    whole = copy.deepcopy(module)
    _prefix, blocks = decoder_blocks(whole)
    outputs = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, out, index=index: outputs.__setitem__(index, out))
        for index, block in enumerate(blocks)
    ]
    whole(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, block in enumerate(blocks):
        if index not in kept:
            blocks[index] = Bypassed(block, outputs[index])
    return whole


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_truncated_model_is_the_original_with_blocks_bypassed(name):
    """Exactly, with a cache and without; its other weights are copies."""
    base = language_model(name)
    for kept in ([0, 2], [1, 2], [0, 1, 2]):
        student = truncated(base, kept)
        with torch.no_grad():
            expected = with_blocks_bypassed(base.module, kept)(TOKENS, use_cache=False).logits
            got = student.module(TOKENS, use_cache=False).logits
        assert torch.equal(got, expected), kept
        ours, theirs = ({p.data_ptr() for p in m.parameters()} for m in (student.module, base.module))
        assert not ours & theirs


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "opt"])
def test_it_decodes_past_a_cache_and_comes_back_from_disk(name, tmp_path):
    student = truncated(language_model(name), [0, 2])
    with torch.no_grad():
        whole = student.module(TOKENS, use_cache=False).logits[:, -1]
        first = student.module(TOKENS[:, :-1], use_cache=True)
        step = student.module(TOKENS[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=1e-4)
    student.storage_dtype = torch.float32
    student.tokenizer = byte_tokenizer()
    artifact.save(student, tmp_path / "student")
    back = artifact.load(tmp_path / "student", "cpu", torch.float32)
    assert torch.equal(back.engine.score(TOKENS), student.engine.score(TOKENS))


def test_lists_by_layer_are_cut_with_the_layers():
    base = language_model("gemma3")
    assert "layer_types" in per_layer_fields(base.module.config)
    student = truncated(base, [0, 2])
    assert student.module.config.layer_types == [base.module.config.layer_types[index] for index in (0, 2)]


def test_the_number_of_weights_is_the_total_less_those_of_the_blocks_taken_out():
    base = language_model("llama")
    _, blocks = decoder_blocks(base.module)
    of_a_block = sum(p.numel() for p in blocks[0].parameters())
    total = sum(p.numel() for p in base.module.parameters())
    student = truncated(base, [0, 2])
    assert sum(p.numel() for p in student.module.parameters()) == total - of_a_block


@torch.no_grad()
def test_taking_out_blocks_that_add_nothing_changes_nothing():
    base = language_model("llama")
    for name, linear in block_linears(base.module).items():
        if ".1." in name and name.endswith(("o_proj", "down_proj")):
            linear.weight.zero_()
    expected = base.module(TOKENS).logits
    torch.testing.assert_close(truncated(base, [0, 2]).module(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("count", "kept"), [(30, 15), (24, 12), (12, 7), (5, 2), (4, 4)])
def test_first_and_last_stay_and_so_many_as_asked(pattern, count, kept):
    blocks = kept_blocks(count, kept, pattern)
    assert len(set(blocks)) == kept
    assert blocks == sorted(blocks)
    assert {blocks[0], blocks[-1]} == {0, count - 1}


def test_patterns_are_named_after_where_blocks_are_taken_out():
    assert kept_blocks(8, 4, "input") == [0, 5, 6, 7]
    assert kept_blocks(8, 4, "output") == [0, 1, 2, 7]
    assert kept_blocks(8, 4, "middle") == [0, 1, 6, 7]
    assert kept_blocks(8, 4, "both") == [0, 3, 4, 7]
    assert kept_blocks(7, 4, "maximal_gap") == [0, 2, 4, 6]


def test_a_fresh_student_has_its_own_shape_and_learns_nothing_from_the_teacher(bench):
    base = language_model("gemma3")
    student = Fresh({"num_hidden_layers": 2, "intermediate_size": 32}).make(base, bench)
    assert len(decoder_blocks(student.module)[1]) == 2
    assert student.module.config.layer_types == base.module.config.layer_types[:2]
    again = Fresh({"num_hidden_layers": 2, "intermediate_size": 32}).make(base, bench)
    assert all(torch.equal(a, b) for a, b in zip(student.module.parameters(), again.module.parameters(), strict=True))


def test_a_checkpoint_can_be_the_student(trained, trained_folder, bench):
    student = Checkpoint(LocalModel(str(trained_folder))).make(trained, bench)
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(student.engine.score(tokens), trained.engine.score(tokens))


SHAPE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320}


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Checkpoint(RandomModel("large", "llama", SHAPE)), r"student has .* million weights, its teacher"),
        (Fresh({"num_hidden_layers": 9}), "million weights"),
        (Fresh({"depth": 2}), "no field depth"),
    ],
)
def test_students_that_cannot_learn_from_the_teacher_are_refused(student, message, trained, bench):
    with pytest.raises(ConfigError, match=message):
        student.make(trained, bench)


@pytest.mark.parametrize(("values", "message"), [({"keep": 0.0}, "keep=0"), ({"pattern": "every"}, "pattern=every")])
def test_bad_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Truncated(**values)


def test_another_tokenizer_is_found_by_what_it_does():
    class Doubling:
        def __call__(self, text):
            return {"input_ids": [2 * one for one in byte_tokenizer()(text)["input_ids"]]}

    require_same_tokenizer(byte_tokenizer(), byte_tokenizer())
    with pytest.raises(ConfigError, match="token by token they cannot be compared"):
        require_same_tokenizer(Doubling(), byte_tokenizer())


def test_a_share_that_takes_out_nothing_says_so(trained, bench, caplog):
    student = Truncated(0.5).make(trained, bench)
    assert len(decoder_blocks(student.module)[1]) == 2
    assert "of 2 blocks that takes out none" in caplog.text


def test_fewer_than_two_blocks_are_refused():
    with pytest.raises(ConfigError, match="at least the first and the last"):
        kept_blocks(4, 1, "input")
