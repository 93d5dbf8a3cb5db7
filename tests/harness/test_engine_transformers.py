from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, byte_tokenizer, causal_model, token_ids
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from harness.engines.attention import asks_for_sdpa
from harness.engines.captured import CapturedSteps
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError, RunError

ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 2},
}


def naive_losses(module, tokens):
    """What score() must equal: the whole log-softmax of the module's own logits, at once."""
    with torch.no_grad():
        logits = module(input_ids=tokens).logits[:, :-1].float()
    return -F.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_the_modules_own(kind):
    module = causal_model(kind, **ARCHITECTURES[kind])
    tokens = token_ids(2, 24)
    torch.testing.assert_close(
        TransformersEngine(module).score(tokens), naive_losses(module, tokens), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_logits_of_hidden_are_the_modules_own_even_where_capped_or_scaled(kind):
    module = causal_model(kind, **ARCHITECTURES[kind])
    engine, tokens = TransformersEngine(module), token_ids(1, 12)
    hidden = engine.hidden(tokens)
    torch.testing.assert_close(engine.logits(hidden[0]), module(input_ids=tokens).logits[0], rtol=1e-4, atol=1e-4)
    other = causal_model(kind, seed=1, **ARCHITECTURES[kind])
    own_head = copy.deepcopy(module.get_output_embeddings())
    assert torch.equal(engine.logits(hidden[0], own_head), engine.logits(hidden[0]))
    assert not torch.allclose(engine.logits(hidden[0], other.get_output_embeddings()), engine.logits(hidden[0]))


def test_uniform_logits_lose_the_logarithm_of_the_vocabulary():
    module = causal_model()
    module.get_output_embeddings().weight.data.zero_()
    losses = TransformersEngine(module).score(token_ids(2, 9))
    torch.testing.assert_close(losses, torch.full((2, 8), float(torch.tensor(VOCABULARY).log())))


def test_batch_size_and_padding_do_not_change_scores():
    engine, tokens = TransformersEngine(causal_model()), token_ids(4, 40)
    alone = torch.cat([engine.score(row[None]) for row in tokens])
    torch.testing.assert_close(engine.score(tokens), alone, rtol=1e-4, atol=1e-5)
    padded = torch.cat([tokens, torch.zeros(4, 7, dtype=torch.long)], dim=1)
    torch.testing.assert_close(engine.score(padded)[:, :39], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "bloom"])
def test_generation_is_the_argmax_of_reading_everything_again(kind):
    module = causal_model(kind, **ARCHITECTURES[kind])
    tokens = token_ids(2, 11)
    generated = torch.stack(list(TransformersEngine(module).generate(tokens, 6)), dim=1)
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, module(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens[:, 11:])


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
def test_rows_padded_at_their_start_generate_what_they_generate_alone(kind):
    engine, tokens = TransformersEngine(causal_model(kind, **ARCHITECTURES[kind])), token_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    together = torch.stack(list(engine.generate(tokens, 6, mask)), dim=1)
    alone = torch.stack(list(engine.generate(tokens[:1, 5:], 6)), dim=1)
    assert torch.equal(together[:1], alone)


def test_generation_beyond_the_models_positions_is_refused():
    engine = TransformersEngine(causal_model(max_position_embeddings=16))
    with pytest.raises(RunError, match="16 positions"):
        next(engine.generate(token_ids(1, 12), 5))


def test_cache_bytes_are_two_vectors_per_layer_and_key_head():
    engine = TransformersEngine(causal_model())  # 2 layers, 2 key-value heads of 8 channels
    assert engine.kv_cache_bytes_per_token(torch.bfloat16) == 2 * 2 * 2 * 8 * 2
    assert engine.kv_cache_bytes_per_token(torch.float32) == 2 * 2 * 2 * 8 * 4


def test_preparing_casts_parameters_and_keeps_rotary_frequencies_and_ties():
    module = causal_model(tie_word_embeddings=True)
    engine = TransformersEngine(module)
    frequencies = module.model.rotary_emb.inv_freq.clone()
    engine.prepare("decoding", torch.bfloat16)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert torch.equal(module.model.rotary_emb.inv_freq, frequencies)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert engine.kernels() == "dense matmul, sdpa attention, bfloat16"
    with pytest.raises(ValueError, match="load it again"):
        engine.prepare("scoring", torch.float32)


def test_layers_that_prepare_themselves_are_not_cast():
    class Prepared(torch.nn.Linear):
        kernel = "made up"

        def prepare(self, mode, dtype):
            self.seen = (mode, dtype)

    module = causal_model()
    module.model.layers[0].mlp.up_proj = layer = Prepared(32, 64, bias=False)
    engine = TransformersEngine(module)
    engine.prepare("decoding", torch.bfloat16)
    assert layer.seen == ("decoding", torch.bfloat16)
    assert layer.weight.dtype == torch.float32
    assert engine.kernels() == "made up, sdpa attention, bfloat16"


def test_the_byte_tokenizer_of_these_tests_is_lossless():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer("a é\n b")["input_ids"]) == "a é\n b"


def test_scores_do_not_depend_on_how_many_logits_are_held(monkeypatch):
    module, tokens = causal_model(), token_ids(3, 60)
    whole = TransformersEngine(module).score(tokens)
    monkeypatch.setattr("harness.engines.transformers.LOGITS_HELD", 0)  # 64 positions at a time
    torch.testing.assert_close(TransformersEngine(module).score(tokens), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox"])
def test_a_static_cache_generates_the_same(kind):
    module = causal_model(kind, **ARCHITECTURES[kind])
    plain, captured = TransformersEngine(module), TransformersEngine(module, steps="captured")
    for seed, length in ((0, 11), (1, 11), (2, 5)):  # the second reuses memory, the third needs another
        prompt = token_ids(2, length, seed)
        expected = torch.stack(list(plain.generate(prompt, 7)), dim=1)
        assert torch.equal(torch.stack(list(captured.generate(prompt, 7)), dim=1), expected)
    assert "static cache" in captured.kernels()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox", "bloom"])
def test_a_static_cache_generates_the_same_for_rows_padded_at_their_start(kind):
    """And keeps nothing; a model that takes no positions and adds to the mask itself (bloom) is left to plain steps."""
    module = causal_model(kind, **ARCHITECTURES[kind])
    plain, captured = TransformersEngine(module), TransformersEngine(module, steps="captured")
    for seed, length, padding in ((0, 12, 5), (1, 12, 7), (2, 9, 1)):
        prompt, mask = token_ids(2, length, seed), torch.ones(2, length, dtype=torch.bool)
        mask[0, :padding] = False
        expected = torch.stack(list(plain.generate(prompt, 6, mask)), dim=1)
        assert torch.equal(torch.stack(list(captured.generate(prompt, 6, mask)), dim=1), expected)
        assert torch.equal(*(torch.stack(list(engine.generate(prompt, 6))) for engine in (plain, captured)))
        assert ("plain steps" in captured.kernels()) == (kind == "bloom")
    two = zip(captured.generate(prompt, 6, mask), captured.generate(prompt + 1, 6, mask), strict=True)  # at one time
    for tokens, engine_steps in zip((prompt, prompt + 1), zip(*two, strict=True), strict=True):
        assert torch.equal(torch.stack(engine_steps), torch.stack(list(plain.generate(tokens, 6, mask))))
    list(captured.generate(prompt, 6, mask))
    assert captured._captured is None or captured._captured._slot is None


def test_a_model_without_a_static_cache_is_decoded_in_plain_steps():
    """GPT-Neo cuts its window at the end of the cache, not of the text."""
    module = causal_model(
        "gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8
    )
    plain, captured = TransformersEngine(module), TransformersEngine(module, steps="captured")
    prompt, mask = token_ids(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :3] = False
    for padding in (None, mask):
        expected = torch.stack(list(plain.generate(prompt, 12, padding)))
        assert torch.equal(torch.stack(list(captured.generate(prompt, 12, padding))), expected)
    assert "plain steps" in captured.kernels()


@torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)  # past it torch gives up, silently
def test_a_compiled_step_generates_the_same_whatever_shapes_came_before():
    module = causal_model()
    engine = TransformersEngine(module)
    steps = CapturedSteps(engine, compiler="eager")  # traced as for inductor, and nothing is generated
    for length in (3, 4, 6):
        prompt = token_ids(1, length)
        expected = torch.stack(list(engine.generate(prompt, 4)))
        assert torch.equal(torch.stack(list(steps.generate(prompt, 4))), expected)
    assert "compiled" in steps.state


def test_layers_with_windows_of_their_own_are_decoded_in_plain_steps_and_the_row_says_so():
    module = causal_model("gemma2", **ARCHITECTURES["gemma2"])
    captured, prompt = TransformersEngine(module, steps="captured"), token_ids(1, 12)
    expected = list(TransformersEngine(module).generate(prompt, 5))
    assert torch.equal(torch.stack(list(captured.generate(prompt, 5))), torch.stack(expected))
    assert "plain steps" in captured.kernels()


def test_a_captured_prompt_is_read_anew_for_every_request(monkeypatch):
    """The graph's stand-in runs the same work, on the memory it was captured with."""
    engine = TransformersEngine(causal_model(), steps="captured")
    steps = CapturedSteps(engine)
    monkeypatch.setattr("harness.engines.captured._capture", lambda step, warm_up: step)
    monkeypatch.setattr("harness.engines.captured.GRAPHS_ON", ("cpu",))
    for seed in range(3):
        prompt = token_ids(2, 11, seed)
        expected = torch.stack(list(TransformersEngine(engine.module).generate(prompt, 6)))
        assert torch.equal(torch.stack(list(steps.generate(prompt, 6))), expected)
    assert list(steps._slot.prompts) == [11]
    assert steps.state.endswith("prompts too")
    monkeypatch.setattr("harness.engines.captured.PROMPT_TOKENS", 21)
    list(steps.generate(token_ids(2, 11), 6))
    assert "prompts" not in steps.state  # of this prompt, whatever was said of the one before
    list(steps.generate(token_ids(2, 10), 6))
    list(steps.generate_after_noise(2, 11, 6))
    assert "prompts" not in steps.state


@pytest.mark.parametrize("name", ["eager", "sdpa", "sdpa_math", "sdpa_flash"])
def test_implementations_of_attention_agree_and_name_themselves(name):
    module, tokens = causal_model(), token_ids(2, 24)
    expected = TransformersEngine(module).score(tokens)
    engine = TransformersEngine(causal_model(), attention=name)
    torch.testing.assert_close(engine.score(tokens), expected, rtol=1e-4, atol=1e-4)
    assert f"{name} attention" in engine.kernels()
    generated = torch.stack(list(TransformersEngine(module).generate(tokens, 5)), dim=1)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :3] = False
    assert torch.equal(torch.stack(list(engine.generate(tokens, 5)), dim=1), generated)
    padded = torch.stack(list(TransformersEngine(module).generate(tokens, 5, mask)), dim=1)
    assert torch.equal(torch.stack(list(engine.generate(tokens, 5, mask)), dim=1), padded)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_padded_rows_read_shared_keys_where_they_lie(kind, monkeypatch):
    """The distributions are those of copied keys, also where layers have windows, and the row says sdpa as before."""
    changes = {"head_dim": 16} | ({"sliding_window": 8} if kind in ("mistral", "gemma3_text") else {})
    module = causal_model(kind, **changes).double()
    engine, tokens = TransformersEngine(module), token_ids(3, 14)
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask[0, :5], mask[1, :2] = False, False
    seen, key_heads = [], set()

    def keep(logits, _step):
        seen.append(logits)
        return logits.argmax(-1)

    real = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *rest, **options):
        if query.shape[-2] != tokens.shape[1]:  # not the prompts
            key_heads.add(key.shape[1])
        return real(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    list(engine.generate(tokens, 6, mask, choose=keep))
    assert key_heads == {2}
    assert engine.attention == "sdpa"
    ours = torch.stack(seen)
    seen.clear()
    key_heads.clear()
    monkeypatch.setattr("harness.engines.transformers.share_heads", lambda: None)
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    list(engine.generate(tokens, 6, mask, choose=keep))
    assert key_heads == {4}
    torch.testing.assert_close(ours, torch.stack(seen), rtol=1e-9, atol=1e-9)


def test_a_model_that_looks_for_the_name_of_its_attention_keeps_it():
    """One with an index of keys reads all of them under another name."""
    pytest.importorskip("transformers.models.minimax_m3_vl", reason="newer than this transformers")
    index = {"index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1, "index_n_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 16, "index_head_dim": 16, "head_dim": 16}
    layers = ["full_attention", "minimax_m3_sparse"]
    module = causal_model("minimax_m3_vl_text", layer_types=layers, **index, **experts)
    engine, tokens, mask = TransformersEngine(module), token_ids(2, 40), torch.ones(2, 40, dtype=torch.bool)
    before = engine.score(tokens)
    mask[0, :5] = False
    list(engine.generate(tokens, 3, mask))
    assert torch.equal(engine.score(tokens), before)
    assert asks_for_sdpa(module)
    assert not asks_for_sdpa(causal_model())


def test_an_implementation_that_cannot_run_is_not_replaced():
    with pytest.raises(RunError, match="flash_attention_2"):
        TransformersEngine(causal_model(), attention="flash_attention_2")
    with pytest.raises(RunError, match="attention of its own"):
        TransformersEngine(causal_model("bloom", n_layer=2, n_head=4), attention="sdpa_flash")
    with pytest.raises(ConfigError, match="sdpa_flush"):
        TransformersEngine(causal_model(), attention="sdpa_flush")
    windowed = TransformersEngine(causal_model("mistral", sliding_window=8), attention="sdpa_flash")
    with pytest.raises(RunError, match="window of 8"):
        windowed.score(token_ids(1, 24))


def test_two_methods_cannot_put_in_the_same_part_of_the_engine():
    engine = TransformersEngine(causal_model(), attention="eager")
    with pytest.raises(RunError, match="is eager already"):
        engine.changed(attention="sdpa")
    assert engine.changed(causal_model(seed=1)).attention == "eager"


def test_a_machines_attention_is_the_methods_where_it_has_one():
    from harness.environment import telling

    engine = TransformersEngine(causal_model())
    assert engine.on_hardware("eager", "plain").attention == "eager"
    assert engine.changed(attention="sdpa_math").on_hardware("eager", "plain").attention == "sdpa_math"
    older = {"name": "cpu", "threads": None}
    assert telling(older | {"attention": None, "steps": "plain"}) == older
    assert telling(older | {"attention": "eager"}) != older
