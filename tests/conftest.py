"""Shared by all tests: no network, no accounts, and one tiny model that has learned something."""

from __future__ import annotations

import os
import random
import signal
import zlib
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: kernels run without a GPU

from harness import artifact
from harness.corpus import Corpus, GeneratedText
from harness.method import Bench, LanguageModel
from harness.models import RandomModel
from harness.progress import NoProgress

torch.set_num_threads(1)  # for models this small a second thread only waits

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
TRAINING_STEPS = 150


LONG = ("test_cli.py", "test_adding_a_method.py", "test_engine_vllm.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest tests first: begun last, one would keep all but one process waiting."""
    items.sort(key=lambda item: item.path.name not in LONG)


def tiny_llama() -> LanguageModel:
    """Two random blocks that read bytes."""
    return RandomModel("tiny", "llama", SHAPE).load(Path("unused"), "cpu", torch.float32)[0]


@pytest.fixture(scope="session")
def generated_corpus() -> Corpus:
    text = GeneratedText(sentences=800)
    return Corpus("generated", text, text, samples=8, window=64)


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory, generated_corpus) -> Path:
    """A tiny model trained on generated sentences, saved: losses mean something."""
    lm = tiny_llama()
    tokens = generated_corpus._tokens(lm.tokenizer, generated_corpus.calibration, "calibration")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(lm.module.requires_grad_(True).parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, TRAINING_STEPS)
    lm.module.train()
    for _ in range(TRAINING_STEPS):
        starts = torch.randint(len(tokens) - 65, (16,), generator=generator)
        batch = tokens[starts[:, None] + torch.arange(64)]
        optimizer.zero_grad()
        lm.module(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    lm.module.requires_grad_(False).eval()
    folder = tmp_path_factory.mktemp("models") / "trained"
    artifact.save(lm, folder)
    return folder


@pytest.fixture
def trained(trained_folder) -> LanguageModel:
    """A fresh copy of the trained tiny model: tests may rework it."""
    return artifact.load(trained_folder, "cpu", torch.float32)


@pytest.fixture
def bench(generated_corpus, tmp_path) -> Bench:
    return Bench(generated_corpus, torch.Generator().manual_seed(0), tmp_path, NoProgress())


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode()) + int(os.environ.get("HARNESS_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Fixtures that many tests share draw the same numbers whichever test asks first."""
    if fixturedef.scope != "function":
        _seed(fixturedef.argname)


@pytest.fixture(autouse=True)
def own_random_numbers(request: pytest.FixtureRequest) -> None:
    """What a test draws does not depend on the tests before it: processes share them out anew each time."""
    _seed(request.node.nodeid)


@pytest.fixture(autouse=True)
def broken_pipes_are_errors():
    """Commands that are called here may have made them deadly, as they should be in a process of their own."""
    yield
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
