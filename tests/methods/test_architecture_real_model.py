"""On SmolLM2-135M: what sinks are for, in miniature, and guesses that change nothing."""

from __future__ import annotations

import pytest
import torch

from harness import wheels
from harness.corpus import WikipediaSample
from harness.models import EmbeddedModel
from methods.architecture.attention_sinks import SinkCache
from methods.architecture.drafts import PromptLookup
from methods.architecture.speculative_decoding import Speculation

pytestmark = pytest.mark.real_model

CACHE = 128


@pytest.fixture(scope="module")
def real():
    return EmbeddedModel("smollm2-135m-gguf").load(wheels.default_cache(), "cpu", torch.float32)[0]


@pytest.fixture(scope="module")
def text(real):
    words = "\n\n".join(WikipediaSample().documents("evaluation"))[:20000]
    return torch.tensor(real.tokenizer(words)["input_ids"])[None, :1024]


def test_without_its_first_tokens_the_model_is_lost_and_with_them_it_is_not(real, text):
    """A cache of 128 tokens over a stream of 1,024: no sinks, four sinks, and every token kept."""
    scored = {
        sinks: float(real.engine.changed(cache=SinkCache(sinks, CACHE - sinks, 64)).score(text)[0, CACHE:].mean().exp())
        for sinks in (0, 4)
    }
    everything = float(real.engine.score(text)[0, CACHE:].mean().exp())
    assert scored[0] > 1.5 * scored[4]
    assert everything < scored[4] < 1.6 * everything


def test_guesses_give_the_models_own_tokens_in_fewer_passes(real, text):
    decoding = Speculation(PromptLookup(), 4)
    plain = torch.stack(list(real.engine.generate(text[:, :200], 48)), 1)
    guessed = torch.stack(list(real.engine.changed(decoding=decoding).generate(text[:, :200], 48)), 1)
    assert torch.equal(plain, guessed)
    assert decoding.counts.passes < 47
