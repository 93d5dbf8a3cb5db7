"""The cache in blocks: to the bit a contiguous one; blocks shared, copied on writing, all given back."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, tiny_model, tiny_tokens

from harness import artifact
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError, RunError
from methods.architecture.drafts import TruncatedDraft
from methods.architecture.paged_attention import (
    BlockPool,
    PagedAttention,
    PagedCache,
    PagedCacheState,
    Text,
    paged_attention,
    waste,
)
from methods.architecture.speculative_decoding import Speculation

TOKENS = tiny_tokens(3, 40)
ATTENDS_TO_ALL = [name for name, (_, fields) in ARCHITECTURES.items() if "sliding_window" not in fields]


# ------------------------------------------------------------------------------------------- equal to contiguous


@pytest.mark.parametrize("block_tokens", [1, 4, 16])
@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "falcon_old"])
def test_a_text_read_in_mixed_pieces_is_that_of_a_contiguous_cache_to_the_bit(architecture, block_tokens):
    module = tiny_model(architecture)
    engines = TransformersEngine(module), TransformersEngine(module, cache=PagedCache(block_tokens))
    caches = [engine.new_cache() for engine in engines]
    for part in TOKENS.split([17, *([1] * 8), 5, 10], dim=1):
        one, other = (engine.read_body(part, cache) for engine, cache in zip(engines, caches, strict=True))
        assert torch.equal(one, other)


@pytest.mark.parametrize("architecture", ATTENDS_TO_ALL)
def test_generation_is_the_same_also_padded_and_with_guesses_taken_back(architecture):
    module = tiny_model(architecture)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, :7] = False
    for given in (None, mask):
        expected = torch.stack(list(TransformersEngine(module).generate(TOKENS, 12, given)), 1)
        for decoding in (None, Speculation(TruncatedDraft(2), 3)):
            engine = TransformersEngine(module, cache=PagedCache(4), decoding=decoding)
            assert torch.equal(torch.stack(list(engine.generate(TOKENS, 12, given)), 1), expected)


def test_attention_over_blocks_where_they_lie_is_attention():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(9, 4, 2, 8, generator=generator) for _ in range(2))
    query = torch.randn(6, 8, generator=generator)
    for length, table in ((1, [3]), (4, [8]), (14, [5, 0, 7, 2]), (16, [1, 2, 3, 4])):
        gathered = [t[table].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(3, 0) for t in (keys, values)]
        expected = F.scaled_dot_product_attention(query[:, None], *gathered)[:, 0]
        torch.testing.assert_close(paged_attention(query, keys, values, table, length), expected)
    moved = torch.randperm(9, generator=generator)  # where blocks lie changes nothing
    place = [int((moved == block).nonzero()) for block in (5, 0, 7, 2)]
    assert torch.equal(
        paged_attention(query, keys[moved], values[moved], place, 14),
        paged_attention(query, keys, values, [5, 0, 7, 2], 14),
    )


# ------------------------------------------------------------------------------------------------- blocks


def test_no_block_is_lost_or_held_twice_whatever_texts_do():
    """Random growing, forking, cutting and freeing, against texts kept as plain lists."""
    draw = random.Random(0)
    pool = BlockPool(4, 40)
    memory: dict[tuple[int, int], int] = {}  # (block, place) -> token
    texts: list[tuple[Text, list[int]]] = []
    for step in range(3000):
        action = draw.choice(("new", "grow", "grow", "fork", "cut", "free"))
        if action == "new" and len(texts) < 8:
            texts.append((Text(pool, []), []))
        elif action == "fork" and texts and len(texts) < 8:
            text, tokens = draw.choice(texts)
            texts.append((text.fork(), list(tokens)))
        elif action == "grow" and texts:
            text, tokens = draw.choice(texts)
            count = draw.randint(1, 9)
            held = list(text.table), text.length
            try:
                copies = text.grow(count)
            except RunError:
                assert held == (text.table, text.length)
                continue
            for old, new in copies:
                memory |= {(new, place): memory[old, place] for place in range(4) if (old, place) in memory}
            for place in range(len(tokens), len(tokens) + count):
                memory[text.table[place // 4], place % 4] = step
                tokens.append(step)
        elif action == "cut" and texts:
            text, tokens = draw.choice(texts)
            length = draw.randint(0, len(tokens))
            text.cut(length)
            del tokens[length:]
        elif action == "free" and texts:
            texts.pop(draw.randrange(len(texts)))[0].cut(0)
        held = [block for text, _ in texts for block in text.table]
        assert sum(pool.holders) == len(held)
        assert pool.used == len(set(held))
        assert pool.used + pool.free == 40
        for text, tokens in texts:
            assert len(text.table) == -(-len(tokens) // 4)
            assert [memory[text.table[k // 4], k % 4] for k in range(len(tokens))] == tokens
    for text, _ in texts:
        text.cut(0)
    assert pool.used == 0
    assert pool.free == 40


def test_forked_rows_share_blocks_until_one_writes_and_do_not_see_each_other():
    module = tiny_model("llama")
    engine = TransformersEngine(module, cache=PagedCache(4))
    cache, prompt = engine.new_cache(), TOKENS[:1, :10]
    assert isinstance(cache, PagedCacheState)
    engine.read_body(prompt, cache)
    cache.fork(2)
    assert cache.rows.pool.used == 3  # two texts in the blocks of one
    both = engine.read_body(torch.stack([TOKENS[0, 20:22], TOKENS[1, 20:22]]), cache)
    assert cache.rows.pool.used == 4  # the last, half-full block was copied; two full ones are shared
    for row in range(2):
        alone = engine.new_cache()
        engine.read_body(prompt, alone)
        torch.testing.assert_close(both[row : row + 1], engine.read_body(TOKENS[row : row + 1, 20:22], alone))
    cache.free()
    assert cache.rows.pool.used == 0


def test_a_prefix_is_found_by_its_tokens_alone():
    pool = BlockPool(4)
    tokens = list(range(11))
    first = Text(pool, [])
    first.grow(11)
    first.publish(tokens)
    same, other, longer = (Text(pool, []) for _ in range(3))
    assert same.adopt(tokens) == 8
    assert same.table == first.table[:2]
    assert other.adopt([*range(4), 99, *range(5, 11)]) == 4  # the second block has another token
    assert longer.adopt(tokens[:8]) == 4  # a last token must be read to answer
    for text in (first, same, other, longer):
        text.cut(0)
    assert Text(pool, []).adopt(tokens) == 0  # freed blocks hold nothing any more


def test_a_block_that_is_written_again_is_not_found_by_what_it_held():
    pool = BlockPool(4)
    tokens = list(range(12))
    first = Text(pool, [])
    first.grow(12)
    first.publish(tokens)
    first.cut(6)
    first.grow(3)
    assert Text(pool, []).adopt(tokens) == 4
    shared = Text(pool, [])
    shared.adopt(tokens[:5])
    first.cut(2)
    first.grow(1)  # into a copy: the other one still holds what it held
    assert Text(pool, []).adopt(tokens) == 4


def test_waste_is_less_than_a_block_a_text_and_shared_blocks_count_once():
    pool = BlockPool(16)
    lengths = [1, 16, 17, 250, 31]
    texts = [Text(pool, []) for _ in lengths]
    for text, length in zip(texts, lengths, strict=True):
        text.grow(length)
    places = 16 * pool.used
    assert waste(texts) == pytest.approx(1 - sum(lengths) / places)
    assert places - sum(lengths) <= 15 * len(lengths)
    assert waste([*texts, texts[3].fork()]) == waste(texts)


def test_a_full_pool_says_so_and_stays_as_it_was():
    pool = BlockPool(4, 2)
    text = Text(pool, [])
    text.grow(8)
    with pytest.raises(RunError, match="1 blocks are needed and 0 are free"):
        text.grow(1)
    assert (text.length, pool.used) == (8, 2)


# ------------------------------------------------------------------------------------------------- in the engine


def test_bytes_are_those_of_whole_blocks_and_slots_say_the_same():
    engine = TransformersEngine(tiny_model("llama"), cache=PagedCache(16))
    per_place = TransformersEngine(engine.module).kv_cache_bytes(torch.bfloat16, 1)
    for tokens in (1, 16, 17, 50):
        assert engine.kv_cache_bytes(torch.bfloat16, tokens) == per_place * engine.slots(tokens, 64)
    assert engine.slots(17, 64) == 32
    assert TransformersEngine(engine.module).slots(17, 64) == 64


def test_memory_goes_with_the_last_use_and_waits_for_no_collection():
    engine = TransformersEngine(tiny_model("llama"), cache=PagedCache(4))
    gc.disable()
    try:
        cache = engine.new_cache()
        engine.read_body(TOKENS, cache)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_layers_that_forget_are_refused(architecture):
    with pytest.raises(ConfigError, match="models that attend to everything"):
        PagedCache(16).new_cache(tiny_model(architecture))


def test_a_saved_model_comes_back_with_its_cache(trained, bench, tmp_path):
    artifact.save(PagedAttention(8).compress(trained, bench), tmp_path / "model")
    loaded = artifact.load(tmp_path / "model", "cpu", torch.float32)
    assert loaded.engine.cache == PagedCache(8)
    assert "blocks of 8" in loaded.engine.kernels()


def test_a_block_holds_something():
    with pytest.raises(ConfigError, match="block_tokens=0"):
        PagedAttention(0)
