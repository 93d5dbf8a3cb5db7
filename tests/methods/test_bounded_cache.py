"""Windowed attention and attention sinks: what a token reads, at which places, and what is kept of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, tiny_model, tiny_tokens
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from harness import artifact
from harness.engines.transformers import TransformersEngine, held_bytes
from harness.errors import ConfigError, RunError
from harness.method import LanguageModel
from methods.architecture.attention_sinks import AttentionSinks, SinkCache
from methods.architecture.bounded_cache import BoundedLayer, Rotary, Rule, as_taken, rotary_of
from methods.architecture.drafts import PromptLookup
from methods.architecture.speculative_decoding import Speculation
from methods.architecture.windowed_attention import WindowedAttention, WindowedCache

TOKENS = tiny_tokens(2, 40)
ROTARY = [name for name in ARCHITECTURES if not name.startswith(("opt", "bloom", "falcon_alibi"))]
TAKES_A_MASK = [name for name in ARCHITECTURES if name not in ("bloom", "falcon_alibi")]


def applied(method, architecture: str) -> TransformersEngine:
    module = tiny_model(architecture)
    return method.compress(LanguageModel(module, None, TransformersEngine(module)), None).engine


def one_by_one(engine: TransformersEngine, tokens: torch.Tensor) -> torch.Tensor:
    cache = engine.new_cache()
    return torch.cat([engine.read_body(part, cache) for part in tokens.split(1, dim=1)], dim=1)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------------- what is read


def with_mask(architecture: str, allowed: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Full attention with a mask [T, T] and no cache: what a bounded cache must amount to."""
    with torch.no_grad():
        body = tiny_model(architecture).base_model
        return body(tokens, attention_mask=allowed[None, None], use_cache=False).last_hidden_state


def brute_force(length: int, window: int, kept: set[int]) -> torch.Tensor:
    """The rule, pair by pair."""
    return torch.tensor(
        [[j <= i and (i - j < window or j in kept or i in kept) for j in range(length)] for i in range(length)]
    )


@pytest.mark.parametrize(("window", "kept"), [(1, ()), (6, ()), (6, (0, 1)), (4, (0, 5, 9)), (50, (3,))], ids=str)
def test_the_rule_is_the_rule(window, kept):
    places = torch.arange(20)
    assert torch.equal(Rule(window, kept).allowed(places, places), brute_force(20, window, set(kept)))


@pytest.mark.parametrize(("window", "kept"), [(8, 0), (8, 3), (1, 2), (6, [0, 4, 11])], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "phi3"])
def test_a_cache_that_forgets_is_a_masked_text(architecture, window, kept):
    engine = applied(WindowedAttention(window, kept, chunk=7), architecture)
    places = set(range(kept)) if isinstance(kept, int) else set(kept)
    close(engine.hidden(TOKENS), with_mask(architecture, brute_force(40, window, places), TOKENS))


@pytest.mark.parametrize("architecture", TAKES_A_MASK)
@pytest.mark.parametrize("method", [WindowedAttention(6, 2, 7), AttentionSinks(2, 6, 7)], ids=["window", "sinks"])
def test_read_in_chunks_is_read_one_by_one(architecture, method):
    if isinstance(method, AttentionSinks) and architecture not in ROTARY:
        pytest.skip("no rotary embedding")
    engine = applied(method, architecture)
    close(engine.hidden(TOKENS), one_by_one(engine, TOKENS))


@pytest.mark.parametrize("architecture", TAKES_A_MASK)
def test_a_window_or_global_tokens_as_long_as_the_text_are_full_attention(architecture):
    expected = TransformersEngine(tiny_model(architecture)).hidden(TOKENS)
    for method in (WindowedAttention(40, 0, 7), WindowedAttention(64, 2, 64), WindowedAttention(4, 40, 16)):
        close(applied(method, architecture).hidden(TOKENS), expected)


@pytest.mark.parametrize("architecture", ROTARY)
def test_sinks_are_full_attention_while_nothing_was_evicted(architecture):
    expected = TransformersEngine(tiny_model(architecture)).hidden(TOKENS)
    for sinks, window in ((2, 38), (4, 60), (0, 40)):
        close(applied(AttentionSinks(sinks, window, 7), architecture).hidden(TOKENS), expected)


@pytest.mark.parametrize("architecture", ROTARY)
def test_without_sinks_places_in_the_cache_are_an_ordinary_window(architecture):
    """Rotary embedding knows distances alone (the sinks' first test in the paper's own terms: window attention)."""
    sinks = applied(AttentionSinks(0, 9, 7), architecture).hidden(TOKENS)
    close(sinks, applied(WindowedAttention(9, 0, 7), architecture).hidden(TOKENS))


@pytest.mark.parametrize("attention", ["eager", "sdpa_math", "tiled"])
@pytest.mark.parametrize("method", [WindowedAttention(6, 2, 7), AttentionSinks(2, 6, 7)], ids=["window", "sinks"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_implementation_of_attention_reads_the_same(architecture, method, attention):
    """Eager attention adds its mask to the scores: one of True and False would hide nothing."""
    engine = applied(method, architecture)
    expected = engine.hidden(TOKENS)
    other = engine.on_hardware(attention, "plain")
    close(other.hidden(TOKENS), expected)
    close(one_by_one(other, TOKENS), expected)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_implementation_that_takes_no_mask_is_refused(attention):
    with pytest.raises(RunError, match="takes no mask"):
        as_taken(torch.ones(2, 2, dtype=torch.bool), attention, torch.float16)


def test_what_is_there_for_a_global_token_to_come_is_not_read_before():
    """Token 20 reads everything, so all stays until then; token 15 reads its window and token 0 all the same."""
    engine = applied(WindowedAttention(6, [0, 20], 7), "llama")
    expected = with_mask("llama", brute_force(40, 6, {0, 20}), TOKENS)
    close(one_by_one(engine, TOKENS), expected)
    close(engine.hidden(TOKENS), expected)


def test_nothing_reads_the_future_and_influence_reaches_layers_times_window_minus_one():
    engine = applied(WindowedAttention(4, 0, 5), "llama")  # 3 layers: a token reaches 9 tokens ahead
    changed = TOKENS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 97
    moved = (engine.hidden(TOKENS) - engine.hidden(changed)).abs().amax((0, 2))
    assert (moved[:10] == 0).all()
    assert (moved[10:20] > 1e-6).all()
    assert (moved[20:] < 1e-6).all()


# ------------------------------------------------------------------------------------------- places in the cache


def sinks_by_definition(module, tokens: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """No cache: for every token the set of those it reads, keys rotated by rank in it, the query by the last rank."""
    model, config = module.model, module.config
    width, groups = config.hidden_size // config.num_attention_heads, config.num_attention_heads // 2
    hidden = model.embed_tokens(tokens)
    length = tokens.shape[1]
    cosine, sine = model.rotary_emb(hidden, torch.arange(length)[None])
    for layer in model.layers:
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        split = [
            f(x).view(*x.shape[:2], -1, width).transpose(1, 2)
            for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        query, key, value = split[0], repeat_kv(split[1], groups), repeat_kv(split[2], groups)
        rows = []
        for i in range(length):
            read = [j for j in range(i + 1) if j < sinks or j > i - window]
            ranks = torch.arange(len(read))
            keys = apply_rotary_pos_emb(key[:, :, read], key[:, :, read], cosine[:, ranks], sine[:, ranks])[0]
            last = query[:, :, i : i + 1]
            rotated = apply_rotary_pos_emb(last, last, cosine[:, ranks[-1:]], sine[:, ranks[-1:]])[0]
            rows.append((rotated @ keys.mT * width**-0.5).softmax(-1) @ value[:, :, read])
        hidden = hidden + attention.o_proj(torch.cat(rows, 2).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.norm(hidden)


@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 16), (1, 7), (3, 1)], ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_sinks_are_what_their_definition_says(sinks, window, chunk):
    module = tiny_model("llama")
    engine = TransformersEngine(module, cache=SinkCache(sinks, window, chunk))
    with torch.no_grad():
        expected = sinks_by_definition(module, TOKENS, sinks, window)
    close(engine.hidden(TOKENS), expected)


def test_places_in_the_text_instead_of_the_cache_would_show():
    """The mistake of a cache that counts places in the text: more than rounding, by orders of magnitude."""
    right = applied(AttentionSinks(2, 6, 7), "llama").hidden(TOKENS)
    wrong = applied(WindowedAttention(6, 2, 7), "llama").hidden(TOKENS)
    assert float((right - wrong).abs().max()) > 1e-2


def test_rotating_and_back_is_nothing_and_rotating_once_beats_rotating_again_and_again():
    rotary = rotary_of(tiny_model("llama"), 600)[0]
    keys = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([501])
    close(rotary.undone(rotary.at(keys, place), place), keys)
    low = keys.bfloat16()
    again, one, back = low, torch.tensor([1]), torch.tensor([0])
    for _ in range(300):
        again = rotary.at(again, one)
    exact = rotary.at(keys, torch.tensor([300]))
    once = rotary.at(low, torch.tensor([300]))
    assert float((once - exact).norm() / exact.norm()) < 0.01 < float((again - exact).norm() / exact.norm())
    assert torch.equal(rotary.at(keys, back), keys)


def test_a_scaled_rotary_table_is_undone_too():
    plain = rotary_of(tiny_model("llama"), 20)[0]
    scaled = Rotary(1.3 * plain.cosine, 1.3 * plain.sine, plain.turn)
    keys, places = torch.randn(1, 2, 5, 8), torch.arange(5, 10)
    close(scaled.undone(scaled.at(keys, places), places), keys)


def test_a_text_of_any_length_decodes_in_constant_memory():
    engine = applied(AttentionSinks(2, 14, 7), "llama")  # 64 positions; the text is 5 times as long
    assert engine.context_tokens is None
    cache, sizes = engine.new_cache(), []
    tokens = tiny_tokens(1, 320)
    for part in tokens.split(1, dim=1):
        hidden = engine.read_body(part, cache)
        sizes.append(held_bytes(cache, torch.float32))
    assert hidden.isfinite().all()
    assert set(sizes[16:]) == {2 * 3 * 2 * 16 * 8 * 4}  # keys and values, layers, heads, tokens, width, bytes
    for method in (AttentionSinks(2, 14, 7), AttentionSinks(2, 14, 40), WindowedAttention(14, 2, 11)):
        engine = applied(method, "llama")  # of a long text as much, however many tokens of it are read at once
        for held, length in ((1, 1), (12, 12), (16, 17), (16, 60)):
            assert engine.kv_cache_bytes(torch.float32, length) == 2 * 3 * 2 * held * 8 * 4


def test_generation_goes_on_past_the_models_positions_only_with_sinks():
    prompt = tiny_tokens(1, 50)
    assert len(list(applied(AttentionSinks(2, 14, 7), "llama").generate(prompt, 40))) == 40
    with pytest.raises(RunError, match="64 positions"):
        next(applied(WindowedAttention(14, 2, 7), "llama").generate(prompt, 40))


# ------------------------------------------------------------------------------------------------- in the engine


@pytest.mark.parametrize("method", [WindowedAttention(6, 2, 7), AttentionSinks(2, 6, 7)], ids=["window", "sinks"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral", "gpt_neox"])
def test_decoding_is_the_argmax_of_scoring_also_for_padded_rows_and_with_guesses(method, architecture):
    engine = applied(method, architecture)
    generated = torch.stack(list(engine.generate(TOKENS, 12)), dim=1)
    hidden = engine.hidden(torch.cat([TOKENS, generated], dim=1))
    logits = torch.stack([engine.logits(row) for row in hidden])
    assert torch.equal(generated, logits[:, TOKENS.shape[1] - 1 : -1].argmax(-1))
    guessing = engine.changed(decoding=Speculation(PromptLookup(), 3))
    assert torch.equal(torch.stack(list(guessing.generate(TOKENS, 12)), dim=1), generated)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[0, :9] = False
    padded = torch.stack(list(engine.generate(TOKENS, 6, mask)), dim=1)
    alone = torch.stack(list(engine.generate(TOKENS[:1, 9:], 6)), dim=1)
    assert torch.equal(padded[:1], alone)


def test_tokens_taken_back_leave_no_trace():
    engine = applied(AttentionSinks(2, 6, 7), "llama")
    cache, other = engine.new_cache(), engine.new_cache()
    for part in (TOKENS[:, :7], TOKENS[:, 7:14]):
        engine.read_body(part, cache)
        engine.read_body(part, other)
    engine.read_body(TOKENS[:, 20:25], cache)
    cache.crop(-5)
    close(engine.read_body(TOKENS[:, 14:20], cache), engine.read_body(TOKENS[:, 14:20], other))


@pytest.mark.parametrize(
    ("method", "read"), [(WindowedAttention(6, [0, 9], 7), 8), (AttentionSinks(4, 6, 7), 1)], ids=["window", "sinks"]
)
def test_kept_tokens_are_taken_back_too(method, read):
    """A guess may stand where a token is kept, in the middle of a text or right at its start."""
    engine = applied(method, "llama")
    cache, other = engine.new_cache(), engine.new_cache()
    for each in (cache, other):
        engine.read_body(TOKENS[:, :read], each)
    engine.read_body(TOKENS[:, 20:24], cache)
    cache.crop(-3)
    engine.read_body(TOKENS[:, 20:21], other)
    for part in TOKENS[:, 24:36].split(4, dim=1):
        close(engine.read_body(part, cache), engine.read_body(part, other))
    assert held_bytes(cache, torch.float32) == held_bytes(other, torch.float32)


@pytest.mark.parametrize(
    "method", [WindowedAttention(6, [0, 3], 7), AttentionSinks(2, None, 7)], ids=["window", "sinks"]
)
def test_a_saved_model_comes_back_with_its_cache(method, trained, bench, tmp_path):
    compressed = method.compress(trained, bench)
    artifact.save(compressed, tmp_path / "model")
    loaded = artifact.load(tmp_path / "model", "cpu", torch.float32)
    assert loaded.engine.cache.as_dict() == compressed.engine.cache.as_dict()
    assert torch.equal(loaded.engine.score(TOKENS), compressed.engine.score(TOKENS))
    assert "window of" in loaded.engine.kernels()


@pytest.mark.parametrize("architecture", ["opt", "bloom", "falcon_alibi"])
def test_models_without_rotary_embedding_are_refused(architecture):
    with pytest.raises(ConfigError, match=r"choose (a|another) model"):
        applied(AttentionSinks(2, 6, 7), architecture)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: WindowedAttention(0, 0, 7), "window=0"),
        (lambda: WindowedAttention(4, -1, 7), "global_tokens=-1"),
        (lambda: AttentionSinks(-1, 8, 7), "sinks=-1"),
        (lambda: AttentionSinks(4, 8, 0), "chunk=0"),
        (lambda: applied(AttentionSinks(4, 64, 7), "llama"), "at most 60"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()


def test_places_in_memory_are_bounded():
    assert WindowedCache(100, 4).slots(5000, 8192) == 104
    assert WindowedCache(100, [0, 999]).slots(5000, 8192) == 1000  # nothing is forgotten before token 999
    assert SinkCache(4, 100).slots(50, 60) == 60


def test_a_layer_counts_the_keys_that_it_returns():
    layer = BoundedLayer(Rule(5, (0, 2)))
    for length in (1, 1, 4, 3, 1, 6, 1):
        states = torch.randn(1, 2, length, 4)
        expected, told = layer.allowed(length).shape[1], layer.get_mask_sizes(length)[0]
        keys, _ = layer.update(states, states)
        assert keys.shape[2] == expected == told


def test_attention_is_a_mean_over_what_is_left():
    """Equal keys: each query's output is the mean of the values it may read."""
    layer, outputs = BoundedLayer(Rule(3, (0,))), []
    values = torch.arange(10.0).view(1, 1, 10, 1)
    for t in range(10):
        keys, read = layer.update(torch.zeros(1, 1, 1, 1), values[:, :, t : t + 1])
        outputs.append(float(F.scaled_dot_product_attention(torch.zeros(1, 1, 1, 1), keys, read)))
    expected = [sum(s) / len(s) for s in ([v for v in range(t + 1) if v == 0 or v > t - 3] for t in range(10))]
    assert outputs == pytest.approx(expected)
