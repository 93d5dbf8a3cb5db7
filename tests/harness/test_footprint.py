"""Bytes and bits by hand."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from harness import artifact
from harness.environment import Hardware
from harness.evaluation import Context
from harness.probes.footprint import Footprint, analytic_kv_bytes_per_token, linear_bits, loaded_bytes, peak_bytes
from harness.progress import NoProgress


@pytest.fixture
def measured(trained_folder, tmp_path):
    hardware = Hardware("cpu", decoding_dtype="bfloat16")
    lm = artifact.load(trained_folder, "cpu", torch.bfloat16)
    lm.engine.prepare("decoding", torch.bfloat16)
    context = Context(None, hardware, trained_folder, tmp_path, None, tmp_path, 0, NoProgress())
    return lm, {m.metric: m for m in Footprint(prompt_tokens=16, new_tokens=4).measure(lm, context)}


def test_a_dense_model_has_sixteen_bits_everywhere(measured):
    assert measured[1]["effective_bits_per_weight"].value == 16
    assert measured[1]["model_bits_per_weight"].value == 16


def test_loaded_bytes_agree_with_the_shape_within_two_percent(measured, trained_folder):
    parameters = artifact.read_description(trained_folder)["parameters"]
    assert measured[1]["loaded_weight_bytes"].value == pytest.approx(2 * parameters, rel=0.02)


def test_cache_bytes_are_those_of_the_shape(measured):
    # keys and values, 2 layers, 2 heads of 16, two bytes
    assert measured[1]["kv_cache_bytes_per_token"].value == 2 * 2 * 2 * 16 * 2
    assert analytic_kv_bytes_per_token(measured[0].module, torch.bfloat16) == 2 * 2 * 2 * 16 * 2


def test_a_static_cache_is_part_of_the_peak_and_not_of_what_was_held_before(trained_folder, tmp_path, monkeypatch):
    hardware = Hardware("cpu", decoding_dtype="float32", steps="captured")
    lm = artifact.load(trained_folder, "cpu", torch.float32)
    lm = replace(lm, engine=lm.engine.on_hardware(None, hardware.steps))
    lm.engine.prepare("decoding", torch.float32)
    held = []

    def peaks(work, devices):
        for _ in range(2):
            held.append(lm.engine._captured._slot is not None)
            work()
        return [0 for _ in devices]

    monkeypatch.setattr("harness.probes.footprint.peaks_by_device", peaks)
    context = Context(None, hardware, trained_folder, tmp_path, None, tmp_path, 0, NoProgress())
    list(Footprint(prompt_tokens=16, new_tokens=4).measure(lm, context))
    assert held == [False, True] * 2


def test_every_stored_part_of_a_linear_counts_but_its_bias():
    sizes = {
        "blocks.0.up.weight_packed": 40,
        "blocks.0.up.weight_scale": 8,
        "blocks.0.up.bias": 1000,
        "blocks.0.up.low_rank.left": 2,
        "blocks.0.norm.weight": 1000,
        "embedding.weight": 1000,
    }
    assert linear_bits(sizes, {"blocks.0.up": [10, 8]}) == 8 * 50 / 80


def test_tied_weights_count_once():
    embedding = torch.nn.Embedding(10, 4)
    head = torch.nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    assert loaded_bytes(torch.nn.ModuleList([embedding, head])) == 10 * 4 * 4


def test_peak_is_what_the_work_needed_above_what_was_held():
    held = torch.ones(50 << 18)

    def work():
        torch.ones(100 << 18)  # 100 MiB

    peak = peak_bytes(work, torch.device("cpu"))
    assert peak == pytest.approx(100 << 20, rel=0.1)
    assert held[0] == 1


def test_what_only_a_cycle_holds_is_gone_before_memory_is_measured():
    """It would otherwise go while the work runs, and hide as much of what that takes."""
    gc.disable()
    try:
        held = type("Held", (), {})()
        held.itself, known = held, weakref.ref(held)
        del held
        assert known() is not None
        peak_bytes(lambda: None, torch.device("cpu"))
        assert known() is None
    finally:
        gc.enable()
