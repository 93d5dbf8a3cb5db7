"""A stream's perplexity by place, and its reference in windows, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import context, language_model

from harness.errors import ConfigError, RunError
from harness.probes.stream import StreamPerplexity
from methods.architecture.attention_sinks import AttentionSinks

TEXT = "the quick brown fox jumps over the lazy dog. " * 6


def measured(probe, lm, place):
    return list(probe.measure(lm, place))


def test_a_dense_stream_by_part_is_the_models_own_losses(tmp_path):
    lm = language_model()
    found = measured(StreamPerplexity(200, window=64, stride=16), lm, context(tmp_path, TEXT))
    tokens = torch.tensor(lm.tokenizer(TEXT)["input_ids"])[None, :200]
    losses = lm.engine.score(tokens)[0].double().numpy()
    parts = [losses[:63], losses[63:127], losses[127:191], losses[191:]]
    assert [m.value for m in found[:-1]] == pytest.approx([float(np.exp(p.mean())) for p in parts])
    assert found[1].on == "made-up text, stream-200, tokens 64 to 127"
    reference = np.load(tmp_path / "samples" / "stream-200-windows-64-16.npy")
    ids = tokens[0]
    for place in (5, 63, 64, 100, 199):  # each token from the window that reaches it first
        start = max(0, -(-(place - 63) // 16) * 16)
        alone = lm.engine.score(ids[None, start : place + 1])[0, -1]
        assert reference[place - 1] == pytest.approx(float(alone), abs=1e-4)
    ratio = found[-1]
    assert ratio.metric == "stream_perplexity_ratio"
    assert ratio.value == pytest.approx(float(np.exp((losses[63:] - reference[63:]).mean())))
    assert ratio.interval[0] <= ratio.value <= ratio.interval[1]


def test_a_stream_within_the_window_loses_nothing_and_others_compare_with_the_dense_run(tmp_path):
    probe = StreamPerplexity(200, window=64, stride=32)
    dense = measured(probe, language_model(), context(tmp_path / "dense", TEXT))
    sinks = AttentionSinks(2, 250, 40).compress(language_model(), None)
    found = measured(probe, sinks, context(tmp_path / "sinks", TEXT, tmp_path / "dense" / "samples"))
    for one, other in zip(found, dense, strict=True):
        assert one.on == other.on
        assert one.value == pytest.approx(other.value, rel=1e-3)
    assert "2 sinks and window of 250" in found[0].note


def test_the_dense_run_can_leave_it_at_the_reference(tmp_path):
    place = context(tmp_path, TEXT)
    assert measured(StreamPerplexity(200, 64, 16, everything=False), language_model(), place) == []
    assert (place.samples / "stream-200-windows-64-16.npy").exists()


def test_what_cannot_be_measured_says_why(tmp_path):
    with pytest.raises(RunError, match="too few for a stream of 5000"):
        measured(StreamPerplexity(5000, 64), language_model(), context(tmp_path, TEXT))
    with pytest.raises(RunError, match="the dense run left no reference"):
        measured(StreamPerplexity(200, 64), language_model(), context(tmp_path, TEXT, tmp_path / "nowhere"))
    for wrong in ({"window": 1}, {"window": 300}, {"window": 64, "stride": 64}, {"stride": 8}):
        with pytest.raises(ConfigError, match="stream"):
            StreamPerplexity(200, **wrong)
