from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import context, language_model

from harness.errors import ConfigError
from harness.probes import energy
from harness.probes.energy import Energy, RaplCounter, counter_of


def package(folder, number: int, microjoules: int, most: int = 999_999, name: str = "package"):
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}-{number}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_add_up_and_a_counter_may_wrap_around(tmp_path):
    package(tmp_path, 0, 500_000)
    package(tmp_path, 1, 900_000)
    package(tmp_path, 2, 500_000, name="psys")  # the whole board, both packages in it
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of package 0, which already counts it
    counter = RaplCounter(tmp_path)
    counter.start()
    package(tmp_path, 0, 750_000)
    package(tmp_path, 1, 100_000)
    package(tmp_path, 2, 750_000, name="psys")
    assert counter.joules() == pytest.approx(0.25 + 0.2)


def test_without_a_readable_counter_there_is_no_number(tmp_path, monkeypatch):
    assert counter_of(torch.device("cpu"), powercap=tmp_path) is None
    monkeypatch.setattr(energy, "counter_of", lambda *devices: None)
    found = list(Energy(prompt_tokens=4, new_tokens=2).measure(language_model(), context(tmp_path)))
    assert found[0].value is None
    assert "no energy counter" in found[0].note


def test_energy_per_token_is_the_power_times_the_time_a_token_takes(tmp_path, monkeypatch):
    now = [0.0]

    class Constant:  # 20 watts
        name = "made up"

        def start(self):
            self.started = now[0]

        def joules(self):
            return 20 * (now[0] - self.started)

    class Engine:  # half a second a step
        def generate(self, prompt, new_tokens):
            for _ in range(new_tokens):
                now[0] += 0.5
                yield prompt[:, 0]

        def kernels(self):
            return "none"

    lm = language_model()
    lm.engine = Engine()
    monkeypatch.setattr(energy, "counter_of", lambda *devices: Constant())
    probe = Energy(batch=2, prompt_tokens=4, new_tokens=8, seconds=10, clock=lambda: now[0])
    found = list(probe.measure(lm, context(tmp_path)))
    assert found[0].value == pytest.approx(20 * 0.5 / 2)


def test_all_gpus_that_share_the_layers_are_counted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(energy, "counter_of", lambda *devices: asked.extend(map(str, devices)))
    lm = language_model()
    where = context(tmp_path)
    where = replace(where, hardware=replace(where.hardware, device="cuda"))
    for several, expected in ((1, ["cuda"]), (2, ["cuda:0", "cuda:1"])):
        lm.engine.tensor_parallel = several
        list(Energy().measure(lm, where))
        assert asked == expected
        asked.clear()


def test_impossible_workloads_are_refused():
    with pytest.raises(ConfigError, match="seconds=0"):
        Energy(seconds=0)
