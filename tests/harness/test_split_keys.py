"""Attention of one query by a kernel of ours against the formula; off a GPU Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harness.engines import split_keys
from harness.engines.attention import ONE_QUERY
from harness.engines.captured import static_cache
from harness.engines.transformers import TransformersEngine
from tests.harness.tiny_models import causal_model, token_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATOR = torch.Generator().manual_seed(0)
FIRST = torch.zeros(1, dtype=torch.long, device=DEVICE)  # a key that every row sees


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(DEVICE)


@pytest.mark.parametrize(
    ("rows", "heads", "group", "keys", "width"),
    [(1, 4, 1, 192, 128), (2, 8, 4, 200, 64), (1, 6, 3, 333, 80), (3, 2, 2, 5, 8)],
)
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("masking", ["none", "of each row", "first keys"])
def test_a_query_reads_the_keys_it_sees(rows, heads, group, keys, width, programs, masking, monkeypatch):
    """Also where most parts of the keys are not seen at all, and where queries lie strided in memory."""
    monkeypatch.setattr(split_keys, "PROGRAMS", programs)
    query = draw(rows, 1, heads, width).transpose(1, 2)[:, :, 0]
    key, value = (draw(rows, keys, heads // group, width).transpose(1, 2) for _ in range(2))
    mask = {
        "none": None,
        "of each row": torch.rand(rows, 1, 1, keys, generator=GENERATOR).to(DEVICE).index_fill(3, FIRST, 0) < 0.5,
        "first keys": (torch.arange(keys, device=DEVICE) < 3).view(1, 1, 1, keys),
    }[masking]
    found = split_keys.attend_one(query, key, value, mask, 0.2).double()
    scores = 0.2 * torch.einsum("bhd,bhkd->bhk", query.double(), key.double().repeat_interleave(group, 1))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], -torch.inf)
    expected = torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), value.double().repeat_interleave(group, 1))
    assert float((found - expected).norm() / expected.norm()) < 3e-6  # one key head a query head: 1.08e-6 on an H100


def test_parts_are_merged_alike_inside_a_compiled_function_and_by_the_kernel(monkeypatch):
    parts, logs = draw(3, 2, 4, 64), draw(3, 2, 4)
    logs[1, 0] = -torch.inf  # a part that was not seen
    parts[1, 0] = 0
    monkeypatch.setattr(split_keys, "split_keys", lambda *_: (parts, logs))
    key = draw(2, 4, 192, 64)
    alone = split_keys.attend_one(draw(2, 4, 64), key, key, None, 1.0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    inside = split_keys.attend_one(draw(2, 4, 64), key, key, None, 1.0)
    torch.testing.assert_close(alone, inside, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_decodes_as_by_torch_with_grouped_heads(kind):
    module, prompt, token = causal_model(kind).to(DEVICE), token_ids(2, 9), token_ids(2, 1).to(DEVICE)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    logits = {}
    for name in ("sdpa", ONE_QUERY):
        engine = TransformersEngine(module, attention=name, steps="captured")
        for padding in (None, mask):
            cache, told = engine.new_cache(), None if padding is None else padding.long().to(DEVICE)
            engine.advance(prompt.to(DEVICE), cache, mask=told)
            told = None if padding is None else torch.cat([told, told.new_ones(2, 1)], 1)
            logits[name, padding is None] = engine.advance(token, cache, mask=told)
    for padded in (True, False):
        torch.testing.assert_close(logits[ONE_QUERY, padded], logits["sdpa", padded], rtol=1e-4, atol=1e-4)
    steps = torch.stack(list(engine.generate(prompt, 6)))
    assert "split_keys attention" in engine.kernels()
    assert "plain steps" not in engine.kernels()
    if DEVICE == "cpu":  # on a GPU nearly equal logits may change places
        assert torch.equal(steps, torch.stack(list(TransformersEngine(module, attention="sdpa").generate(prompt, 6))))


def test_a_compiled_step_makes_one_mask_for_all_layers():
    module, prompt = causal_model("llama").to(DEVICE), token_ids(1, 9).to(DEVICE)
    expected = TransformersEngine(module, attention="sdpa").module(prompt).logits[:, -1]
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    engine = TransformersEngine(module, attention=ONE_QUERY, steps="captured")
    with torch.inference_mode():
        cache, held = static_cache(module, 12)
        engine.advance(prompt[:, :8], cache)
        held.add_(8)
        reader = torch.compile(module, backend=keep, dynamic=False, fullgraph=True)
        found = engine.advance(prompt[:, 8:], cache, reader=reader)[:, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    layers = module.config.num_hidden_layers
    assert [sum(name in call for call in calls) for name in ("kept", "split_keys")] == [1, layers], set(calls)
