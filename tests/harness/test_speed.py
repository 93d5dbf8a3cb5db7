"""Times by a clock that only moves when told: every figure has a closed form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from harness import artifact, environment
from harness.ceilings import Ceilings, ceilings
from harness.environment import Hardware
from harness.errors import ConfigError
from harness.evaluation import Context
from harness.probes.speed import Speed, bytes_read_per_step
from harness.progress import NoProgress

HARDWARE = Hardware("cpu", decoding_dtype="float32", threads=1)
FIRST, LATER = 0.5, 0.01  # seconds that the fake engine takes


class Clock:
    """A clock that others move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class SteadyEngine:
    """Takes FIRST seconds for the first token and LATER for each of the others."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.requests = clock, 0

    def generate(self, prompt, new_tokens):
        self.requests += 1
        for step in range(new_tokens):
            self.clock.now += LATER if step else FIRST
            yield prompt[:, 0]

    def kernels(self):
        return "steady, float32"

    def kv_cache_bytes_per_token(self, dtype):
        return 1000.0


@pytest.fixture
def context(tmp_path):
    limit = {"read_bytes_per_second": 1e9, "matmul_flops_per_second": 1e12, "dtype": "float32", "threads": 1}
    measured = ceilings(HARDWARE, "float32", tmp_path)  # finds out the file's name
    (path,) = (tmp_path / "ceilings").iterdir()
    assert measured.read_bytes_per_second > 0
    path.write_text(json.dumps(limit))
    return Context(None, HARDWARE, tmp_path, tmp_path / "samples", None, tmp_path, 0, NoProgress())


def speed(clock, **changes) -> Speed:
    values = {
        "batch_sizes": [4],
        "prompt_tokens": 50,
        "new_tokens": 11,
        "warm_up": 2,
        "max_repeats": 20,
        "precision": 0.03,
        "seconds_limit": 1e9,
    }
    return Speed(**(values | changes), clock=clock)


@pytest.fixture
def steady(trained, context):
    clock = Clock()
    trained.engine = SteadyEngine(clock)
    measured = {m.metric: m for m in speed(clock).measure(trained, context)}
    return measured, trained, context


def test_every_time_has_its_closed_form(steady):
    measured, lm, _ = steady
    expected = {
        "time_to_first_token_ms": 1e3 * FIRST,
        "time_per_output_token_ms": 1e3 * LATER,
        "inter_token_latency_p50_ms": 1e3 * LATER,
        "inter_token_latency_p99_ms": 1e3 * LATER,
        "decode_tokens_per_second": 4 / LATER,
        "prefill_tokens_per_second": 4 * 50 / FIRST,
        # one step reads the weights and 4 × (50 + 11 / 2) cached tokens of 1000 bytes, at 1 GB/s
        "decode_roofline_fraction": (bytes_read_per_step(lm.module) + 4 * 55.5 * 1000) / 1e9 / LATER,
    }
    for metric, value in expected.items():
        assert measured[metric].value == pytest.approx(value), metric
        assert measured[metric].on == "batch 4, prompt 50, 11 new, float32"


def test_gpus_that_share_every_layer_read_their_parts_at_once(steady, monkeypatch):
    measured, lm, where = steady
    clock = Clock()
    lm.engine = SteadyEngine(clock)
    lm.engine.tensor_parallel = 2
    where = replace(where, hardware=replace(where.hardware, device="cuda"))
    monkeypatch.setattr("harness.probes.speed.ceilings", lambda *_: Ceilings(1e9, 1e12, "float32", 1))
    shared = {m.metric: m for m in speed(clock).measure(lm, where)}
    assert shared["decode_roofline_fraction"].value == pytest.approx(measured["decode_roofline_fraction"].value / 2)


def test_repeats_stop_as_soon_as_the_interval_is_narrow(steady):
    measured, lm, _ = steady
    # six values are the fewest whose extremes enclose the median with 95 %; two requests warmed up
    assert lm.engine.requests == 2 + 6
    assert "steady, float32; 6 requests" in measured["time_per_output_token_ms"].note


def test_raw_stamps_are_kept_and_reproduce_the_figures(steady):
    measured, _, context = steady
    raw = pd.read_parquet(context.samples / "speed.parquet")
    assert len(raw) == 6 * 12
    assert raw.loc[raw["token"] == 1, "seconds"].median() * 1e3 == pytest.approx(
        measured["time_to_first_token_ms"].value
    )


def test_an_unsteady_machine_is_said(trained, context):
    clock = Clock()
    trained.engine = SteadyEngine(clock)
    jitter = np.random.default_rng(0)
    steady_generate = trained.engine.generate

    def generate(prompt, new_tokens):
        for tokens in steady_generate(prompt, new_tokens):
            clock.now += jitter.exponential(0.05)
            yield tokens

    trained.engine.generate = generate
    (measured,) = [
        m for m in speed(clock, max_repeats=6).measure(trained, context) if m.metric == "time_per_output_token_ms"
    ]
    assert "6 requests, interval wider than ±3%" in measured.note
    low, high = measured.interval
    assert low < measured.value < high


def test_time_limit_ends_the_repeats(trained, context):
    clock = Clock()
    trained.engine = SteadyEngine(clock)
    list(speed(clock, seconds_limit=1.0).measure(trained, context))
    assert trained.engine.requests == 2 + 2  # each takes 0.6 s


def test_the_real_engine_is_timed(trained_folder, context):
    lm = artifact.load(trained_folder, "cpu", torch.float32)
    lm.engine.prepare("decoding", torch.float32)
    probe = Speed([1, 2], 8, 4, warm_up=1, max_repeats=2, precision=0.03, seconds_limit=10)
    measured = list(probe.measure(lm, context))
    assert all(m.value is not None and m.value > 0 for m in measured)
    assert {m.on.split(",")[0] for m in measured} == {"batch 1", "batch 2"}
    stamps = pd.read_parquet(context.samples / "speed.parquet").groupby(["batch", "request"])["seconds"]
    assert all(all(a < b for a, b in pairwise(times)) for _, times in stamps)


def test_untied_input_embeddings_are_not_read_whole():
    from harness.models import RandomModel
    from tests.conftest import SHAPE

    def read(tied):
        shape = SHAPE | {"tie_word_embeddings": tied}
        return bytes_read_per_step(RandomModel("tiny", "llama", shape).load(None, "cpu", torch.float32)[0].module)

    assert read(True) == read(False)


def test_ceilings_are_measured_once(tmp_path):
    first = ceilings(HARDWARE, "float32", tmp_path)
    assert ceilings(HARDWARE, "float32", tmp_path) == first
    assert first.read_bytes_per_second > 1e8
    assert first.matmul_flops_per_second > 1e9


def test_what_this_process_starts_is_no_foreign_load():
    """A child that computes for 0.3 s is left out while it lives and when it has ended."""
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"

    def left_out() -> float:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        busy = sum(int(fields[k]) for k in (0, 1, 2, 5, 6)) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return busy - own.user - own.system - environment.foreign_cpu_seconds()

    before = left_out()
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alive = left_out() - before
        child.communicate(b"\n")
    assert min(alive, left_out() - before) > 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_sizes": []}, "batch_sizes"), ({"new_tokens": 1}, "new_tokens=1"), ({"precision": 0}, "precision=0")],
)
def test_a_workload_that_cannot_be_timed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        speed(Clock(), **changes)
