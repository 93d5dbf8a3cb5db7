"""Attention in tiles: exact, whatever the tile; what a fused kernel must agree with."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens

from harness import artifact
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError, RunError
from harness.method import LanguageModel
from methods.architecture.flash_attention import FlashAttention, tiled_attention

TOKENS = tiny_tokens(2, 40)


def inputs(queries=37, keys=37, heads=4, kv_heads=2, width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(count, length):
        return torch.randn(2, count, length, width, generator=generator, dtype=torch.float64).to(dtype)

    return draw(heads, queries), draw(kv_heads, keys), draw(kv_heads, keys)


def plain(query, key, value, mask=None, causal=True, softcap=None):
    """The whole matrix of scores at once, in the dtype of its inputs."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    queries, keys = scores.shape[-2:]
    if causal:
        future = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
        scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("tile", [1, 5, 16, 37, 64])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (1, 37), (5, 37)])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_of_any_size_are_the_whole(tile, queries, keys, causal):
    arguments = inputs(queries, keys)
    out, log_sum = tiled_attention(*arguments, causal=causal, tile=tile)
    expected, total = plain(*arguments, causal=causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(log_sum, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_more_than_that_of_the_whole_in_the_same_dtype(dtype):
    """The criterion of the authors' tests: at most twice the error of plain attention in this dtype."""
    arguments = inputs(300, 300, width=32, dtype=dtype)
    exact = plain(*(t.double() for t in arguments))[0]
    ours = (tiled_attention(*arguments, tile=64)[0].double() - exact).abs().max()
    theirs = (plain(*arguments)[0].double() - exact).abs().max()
    assert float(ours) <= 2 * float(theirs) + 1e-5


def test_windows_caps_and_rows_that_read_nothing():
    arguments = inputs()
    distance = torch.arange(37)[:, None] - torch.arange(37)
    window = (distance >= 0) & (distance < 6)
    out = tiled_attention(*arguments, mask=window, tile=8)[0]
    torch.testing.assert_close(out, plain(*arguments, mask=window)[0], rtol=0, atol=1e-13)
    capped = tiled_attention(*arguments, softcap=2.0, tile=8)[0]
    torch.testing.assert_close(capped, plain(*arguments, softcap=2.0)[0], rtol=0, atol=1e-13)
    window[3] = False
    out, log_sum = tiled_attention(*arguments, mask=window, tile=8)
    assert (out[:, :, 3] == 0).all()
    assert (log_sum[:, :, 3] == -torch.inf).all()
    assert out.isfinite().all()


def test_large_scores_stay_finite_and_pick_the_largest():
    query, key, value = inputs(8, 8, dtype=torch.float32)
    out = tiled_attention(1e4 * query, 1e4 * key, value, tile=3)[0]
    assert out.isfinite().all()
    torch.testing.assert_close(out, plain(1e4 * query, 1e4 * key, value)[0])


def test_gradients_are_those_of_the_whole():
    arguments = [t.requires_grad_(True) for t in inputs(7, 7, heads=2, kv_heads=2, width=4)]
    assert torch.autograd.gradcheck(lambda *a: tiled_attention(*a, tile=3)[0], arguments)


@pytest.mark.parametrize("architecture", [n for n in ARCHITECTURES if not n.startswith(("bloom", "falcon"))])
@pytest.mark.parametrize("implementation", ["tiled", "sdpa_flash", "sdpa_math"])
def test_models_answer_the_same_and_generate_the_same(architecture, implementation):
    plain_engine = TransformersEngine(tiny_model(architecture), attention="eager")
    module = tiny_model(architecture)
    tokens = TOKENS[:, :4] if "sliding_window" in ARCHITECTURES[architecture][1] else TOKENS
    base = LanguageModel(module, None, TransformersEngine(module))
    method = FlashAttention(implementation)
    if "sliding_window" in ARCHITECTURES[architecture][1]:
        with pytest.raises(RunError, match=r"own window of 4|do not cap"):
            method.compress(base, None)
        return
    engine = method.compress(base, None).engine
    torch.testing.assert_close(engine.score(tokens), plain_engine.score(tokens), rtol=1e-4, atol=1e-4)
    expected = torch.stack(list(plain_engine.generate(tokens, 8)), 1)
    assert torch.equal(torch.stack(list(engine.generate(tokens, 8)), 1), expected)


@pytest.mark.parametrize("architecture", ["bloom", "falcon_new"])
def test_models_with_an_attention_of_their_own_are_refused(architecture):
    module = tiny_model(architecture)
    with pytest.raises(RunError, match="attention of its own"):
        FlashAttention("sdpa_flash").compress(LanguageModel(module, None, TransformersEngine(module)), None)


def test_the_reference_holds_one_tile_of_scores_and_never_the_whole(monkeypatch):
    sizes = []
    exp = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda t: sizes.append(t.numel()) or exp(t))
    tiled_attention(*inputs(256, 256, heads=1, kv_heads=1), tile=32)
    assert max(sizes) <= 2 * 32 * 32


def test_a_saved_model_comes_back_with_its_attention(trained, bench, tmp_path):
    artifact.save(FlashAttention("tiled").compress(trained, bench), tmp_path / "model")
    loaded = artifact.load(tmp_path / "model", "cpu", torch.float32)
    assert "tiled attention" in loaded.engine.kernels()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ConfigError, match="implementation=flush"):
        FlashAttention("flush")
