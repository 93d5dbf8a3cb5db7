"""The contract, for every file in conf/method: a compressed model scores, is saved, and comes back the same."""

from __future__ import annotations

import pytest
import torch

from harness import artifact, run
from harness.cli import options
from harness.errors import ConfigError
from tests.test_conf import resolved

TOKENS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))


def method_of(name: str, *overrides: str):
    return run.make(resolved(f"method={name}", "training=smoke", "problems.train=12", *overrides)["method"], "method")


def unavailable(name: str) -> str:
    """Why a method cannot run here: it is another project's, whose library is not installed. Empty when it can."""
    try:
        getattr(method_of(name), "check_available", lambda: None)()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture(params=options("method"))
def name(request) -> str:
    if missing := unavailable(request.param):
        pytest.skip(missing)
    return request.param


def test_a_compressed_model_scores_finite_numbers_of_the_same_shape(name, trained, bench):
    before = trained.engine.score(TOKENS)
    after = method_of(name).compress(trained, bench).engine.score(TOKENS)
    assert after.shape == before.shape
    assert after.isfinite().all()


def test_it_comes_back_from_disk_bit_for_bit(name, trained, bench, tmp_path):
    compressed = method_of(name).compress(trained, bench)
    artifact.save(compressed, tmp_path / "first")
    first = artifact.load(tmp_path / "first", "cpu", torch.float32)
    artifact.save(first, tmp_path / "second")
    second = artifact.load(tmp_path / "second", "cpu", torch.float32)
    assert torch.equal(first.engine.score(TOKENS), second.engine.score(TOKENS))
    assert artifact.tensor_bytes(tmp_path / "first") == artifact.tensor_bytes(tmp_path / "second")


def test_two_runs_with_one_seed_agree(name, trained_folder, generated_corpus, tmp_path):
    from harness.method import Bench
    from harness.progress import NoProgress

    scores = []
    for _ in range(2):
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        bench = Bench(generated_corpus, torch.Generator().manual_seed(7), tmp_path, NoProgress())
        scores.append(method_of(name).compress(lm, bench).engine.score(TOKENS))
    assert torch.equal(*scores)


def test_tied_embeddings_stay_tied(name, trained, bench):
    module = method_of(name).compress(trained, bench).module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


@pytest.mark.parametrize("method", [name for name in options("method") if name != "dense"])
def test_fewer_bits_are_fewer_bytes_and_more_error(method, trained_folder, generated_corpus, tmp_path):
    """Stored size falls and the loss on held-out text rises as bits fall from 8 to 2."""
    from harness.method import Bench
    from harness.progress import NoProgress

    if missing := unavailable(method):
        pytest.skip(missing)
    card = resolved(f"method={method}", "bits=2")["card"]
    if card["bits"] != 2 or card.get("least_bits", 2) > 2:
        pytest.skip(f"{method} has no bit-width to choose, or is not made for 2 bits")
    held_out = generated_corpus.evaluation_tokens(artifact.load(trained_folder, "cpu", torch.float32).tokenizer)
    windows = held_out[: 64 * 16].view(16, 64)
    losses, sizes = [], []
    for bits in (8, 4, 2):
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        bench = Bench(generated_corpus, torch.Generator().manual_seed(0), tmp_path, NoProgress())
        compressed = method_of(method, f"bits={bits}").compress(lm, bench)
        losses.append(float(compressed.engine.score(windows).mean()))
        artifact.save(compressed, tmp_path / str(bits))
        sizes.append(artifact.stored_bytes(tmp_path / str(bits)))
    assert sizes[0] > sizes[1] > sizes[2]
    trained = resolved(f"method={method}")["card"]["taxonomy"].endswith("/trained")
    assert losses[0] < losses[1] + (1e-3 if trained else 0)  # training wins back what 4 bits cost a tiny model
    assert max(losses[:2]) < losses[2]
