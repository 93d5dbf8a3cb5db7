"""Context cost, cache waste, decoding gain: closed forms, and clocks that only move when told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import context, language_model

from harness.errors import ConfigError, RunError
from harness.probes.cache_waste import CacheWaste
from harness.probes.context import ContextCost, _exponent
from harness.probes.decoding import DecodingGain
from methods.architecture.attention_sinks import AttentionSinks
from methods.architecture.drafts import PromptLookup, TruncatedDraft
from methods.architecture.paged_attention import PagedAttention
from methods.architecture.speculative_decoding import SpeculativeDecoding
from methods.architecture.windowed_attention import WindowedAttention

TEXT = "one two three four, one two three four, five. " * 12
BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, float32


def by_metric(measurements) -> dict[str, list]:
    found: dict[str, list] = {}
    for m in measurements:
        found.setdefault(m.metric, []).append(m)
    return found


# ------------------------------------------------------------------------------------------------- long contexts


def test_a_cache_that_keeps_all_grows_with_the_text_and_one_that_forgets_does_not(tmp_path):
    place = context(tmp_path, decoding_dtype="float32")
    probe = ContextCost([32, 64, 128, 300], 4)
    plain = by_metric(probe.measure(language_model(), place))["context_cache_bytes"]
    assert [m.value for m in plain] == [length * BYTES for length in (32, 64, 128, 300)]
    assert plain[2].on == "batch 1, context 128, 4 new, float32"
    sinks = AttentionSinks(2, 30, 16).compress(language_model(), None)
    held = [m.value for m in by_metric(probe.measure(sinks, place))["context_cache_bytes"]]
    assert max(held) <= (32 + 16) * BYTES


def test_lengths_beyond_the_model_are_empty_with_the_reason(tmp_path):
    found = by_metric(ContextCost([16, 600], 4).measure(language_model(), context(tmp_path, decoding_dtype="float32")))
    first = found["context_output_token_ms"]
    assert first[0].value > 0
    assert first[1].value is None
    assert "512 tokens" in first[1].note
    endless = AttentionSinks(2, 30, 16).compress(language_model(), None)
    found = by_metric(ContextCost([16, 600], 4).measure(endless, context(tmp_path, decoding_dtype="float32")))
    assert all(m.value is not None for m in found["context_output_token_ms"])


def test_what_the_first_request_of_a_length_costs_is_in_no_number(tmp_path):
    lm, now, seen = language_model(), [0.0], set()
    generate = lm.engine.generate

    def slow_at_first(prompt, new_tokens):
        for tokens in generate(prompt, new_tokens):
            now[0] += 1 if prompt.shape[1] in seen else 100
            yield tokens
        seen.add(prompt.shape[1])

    lm.engine.generate = slow_at_first
    probe = ContextCost([16, 32], 4, clock=lambda: now[0])
    found = by_metric(probe.measure(lm, context(tmp_path, decoding_dtype="float32")))
    for metric in ("context_first_token_ms", "context_output_token_ms"):
        assert [m.value for m in found[metric]] == [1000, 1000]


def test_exponents_are_slopes_of_logarithms():
    (found,) = _exponent("x", {(1, n): 3.0 * n**1.5 for n in (1, 2, 64, 128, 256, 512)})
    assert found.value == pytest.approx(1.5)
    assert found.on == "contexts 128 to 512"
    assert list(_exponent("x", {(1, 8): 1.0, (2, 16): 1.0})) == []


def test_the_interval_of_a_mean_is_not_that_of_the_median():
    """One slow step in eight moves the mean beyond all others, and so beyond the middle of them."""
    stamps = np.cumsum([0.0, 0.5, *[0.010] * 15, 0.040])
    probe = ContextCost([8], 16)
    found = {m.metric: m for m in probe._measurements(stamps, None, 0, "here", "")}["context_output_token_ms"]
    assert found.value == pytest.approx(1000 * (15 * 0.010 + 0.040) / 16)
    assert found.interval[0] < found.value < found.interval[1]


def test_batches_and_contexts_that_do_not_fit_say_so_with_bytes_that_were_computed(tmp_path, monkeypatch):
    place = context(tmp_path, decoding_dtype="float32")
    monkeypatch.setattr("harness.probes.context.MARGIN_BYTES", 0)
    monkeypatch.setattr("harness.probes.context.least_free_bytes", lambda devices: 500 * BYTES)
    probe = ContextCost([32, 64, 128], 4, batch_sizes=[1, 2], read_tokens=32)
    lm = language_model()
    for steps in ("plain", "captured"):
        lm.engine = lm.engine.on_hardware(None, steps)
        found = by_metric(probe.measure(lm, place))
        tokens, first = found["context_output_token_ms"], found["context_first_token_ms"]
        assert [m.on.split(", ")[:2] for m in tokens] == [
            [f"batch {batch}", f"context {length}"] for batch in (1, 2) for length in (32, 64, 128)
        ]
        assert [m.value is None for m in tokens] == [False, False, False, False, False, True]
        assert "does not fit" in tokens[5].note
        assert "GiB needed" in tokens[5].note
        assert [m.value is None for m in first] == [False, True, True, True, True, True]
        assert "not read" in first[1].note
        held = [m.value for m in found["context_cache_bytes"]]
        assert held == [32 * BYTES, 64 * BYTES, 128 * BYTES, 64 * BYTES, 128 * BYTES, None]
        assert "context_peak_exponent" not in found


@pytest.mark.parametrize("steps", ["plain", "captured"])
def test_a_cache_of_noise_holds_what_was_asked_for_and_steps_go_on_from_there(steps):
    lm = language_model()
    engine = lm.engine.on_hardware(None, steps)
    tokens = list(engine.generate_after_noise(3, 20, 5))
    assert [len(step) for step in tokens] == [3] * 5
    cache = engine.new_cache()
    engine.fill_with_noise(cache, 3, 20)
    assert cache.get_seq_length() == 20
    assert cache.layers[1].keys.shape == (3, 2, 20, 8)
    if steps == "captured":
        assert int(engine._captured._slot.cache.get_seq_length()) == 25
        assert engine.forget_requests()
        assert engine._captured._slot is None
    assert not engine.forget_requests()
    sinks = AttentionSinks(2, 30, 16).compress(language_model(), None)
    with pytest.raises(RunError, match="read_tokens"):
        next(sinks.engine.generate_after_noise(1, 8, 2))


# ------------------------------------------------------------------------------------------------- mixed lengths


def test_slots_for_a_mixed_load_are_those_of_the_closed_forms(tmp_path):
    probe, place = CacheWaste(4000, 512, 150.0, 0.8), context(tmp_path, decoding_dtype="float32")
    tokens = probe.lengths(place.seed)
    assert tokens.min() >= 1
    assert tokens.max() <= 512
    assert np.array_equal(tokens, probe.lengths(place.seed))
    contiguous, room = probe.measure(language_model(), place)
    assert contiguous.value == pytest.approx(512 / tokens.mean())
    assert room.value == pytest.approx(2**30 / (512 * BYTES))
    paged, _ = probe.measure(PagedAttention(16).compress(language_model(), None), place)
    assert paged.value == pytest.approx((np.ceil(tokens / 16) * 16).sum() / tokens.sum())
    assert paged.value == pytest.approx(1 + 7.5 / tokens.mean(), rel=0.01)  # last blocks are half full on average
    assert "blocks of 16" in paged.note
    for method in (PagedAttention(16), PagedAttention(128), WindowedAttention(8, 2, 16)):
        slots, room = probe.measure(method.compress(language_model(), None), place)
        assert room.value == pytest.approx(2**30 / (slots.value * tokens.mean() * BYTES))
    sinks, _ = probe.measure(AttentionSinks(4, 60, 16).compress(language_model(), None), place)
    assert sinks.value == pytest.approx(64 / tokens.mean())


# ------------------------------------------------------------------------------------------------------- guessing


def test_nothing_is_measured_where_nothing_is_guessed(tmp_path):
    assert list(DecodingGain(2, 16, 8).measure(language_model(), context(tmp_path, TEXT))) == []


@pytest.mark.parametrize("draft", [PromptLookup(), TruncatedDraft(1)], ids=lambda draft: draft.name)
def test_guessing_is_counted_and_agrees(tmp_path, draft):
    lm = SpeculativeDecoding(draft, 3).compress(language_model(), None)
    found = {m.metric: m for m in DecodingGain(6, 32, 16).measure(lm, context(tmp_path, TEXT))}
    assert found["decoding_agreement"].value == 1
    tokens = 6 * 15  # the first of each comes from the prompt
    passes = int(found["tokens_per_pass"].note.split()[0])
    assert found["tokens_per_pass"].value == pytest.approx(tokens / passes)
    assert 0 <= found["guess_acceptance"].value <= 1
    low, high = found["decoding_speedup"].interval
    assert low <= found["decoding_speedup"].value <= high


def test_where_no_guess_was_made_none_has_a_share(tmp_path):
    lm = SpeculativeDecoding(PromptLookup(40, 40), 3).compress(language_model(), None)  # nothing stands there twice
    found = {m.metric: m for m in DecodingGain(2, 32, 8).measure(lm, context(tmp_path, TEXT))}
    assert found["guess_acceptance"].value is None
    assert found["guess_acceptance"].note.startswith("0 guesses")


def test_the_gain_is_the_ratio_of_times(tmp_path):
    """A clock that moves 1 s a pass: as many times faster as there are fewer passes."""
    lm = SpeculativeDecoding(PromptLookup(), 3).compress(language_model(), None)
    now = [0.0]
    forward = lm.module.forward

    def counted(*arguments, **keywords):
        now[0] += 1.0
        return forward(*arguments, **keywords)

    lm.module.forward = counted
    probe = DecodingGain(3, 32, 16, clock=lambda: now[0])
    found = {m.metric: m for m in probe.measure(lm, context(tmp_path, TEXT))}
    passes = int(found["tokens_per_pass"].note.split()[0])
    assert found["decoding_speedup"].value == pytest.approx(3 * 15 / passes)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ContextCost([], 4),
        lambda: ContextCost([8], 1),
        lambda: CacheWaste(0),
        lambda: CacheWaste(4, 16, -1.0),
        lambda: DecodingGain(0),
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()
