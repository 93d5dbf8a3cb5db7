"""A noise floor is what repeats of one run differ by, kept under the machine that it is of."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from fake_records import EPYC, QUICK, XEON, failed, record

from harness import noise_floor
from harness.errors import ConfigError, RunError
from harness.noise_floor import NoiseFloor, measure, read_floors, spreads_of
from harness.records import Measurement, write_json_atomically
from harness.run import Outcome

TIME = ("time_per_output_token_ms", "batch 1, prompt 128, 32 new")


def repeats(*milliseconds):
    run = record("gptq", 4)
    perplexity = run.find("perplexity")
    return [
        replace(run, measurements=[perplexity, Measurement(TIME[0], ms, "ms", TIME[1], "lower")]) for ms in milliseconds
    ]


def floor(machine=EPYC, **spreads):
    return NoiseFloor(machine, "cpu", machine["cores"], 5, "GPTQ", "2026-11-26", spreads)


def test_the_floor_is_student_s_share_of_the_median():
    spreads = spreads_of(repeats(10.0, 11.0, 9.0))
    assert spreads["time_per_output_token_ms"][TIME[1]] == pytest.approx(4.303 * np.sqrt(2) * 1.0 / 10, rel=1e-3)
    assert spreads["perplexity"] == {QUICK: 0.0}
    assert spreads_of(repeats(0.1, 0.1, 0.1))["time_per_output_token_ms"] == {TIME[1]: 0.0}, "their mean is not 0.1"


def test_numbers_that_a_repeat_lacks_and_zeros_have_none():
    assert TIME[0] not in spreads_of([*repeats(10.0, 11.0), *repeats(None)])
    assert TIME[0] not in spreads_of(repeats(0.0, 0.0, 0.0))


def test_a_record_finds_the_floor_of_its_machine_and_of_its_workload(tmp_path):
    known = floor(time_per_output_token_ms={TIME[1]: 0.03, "batch 4, prompt 128, 32 new": 0.05})
    write_json_atomically(asdict(known), tmp_path / "noise_floor" / "a.json")
    floors = read_floors(tmp_path, tmp_path / "nowhere")
    assert floors.relative(record("gptq", 4), *TIME) == 0.03
    assert floors.relative(record("gptq", 4), TIME[0], "batch 32, prompt 1, 1 new") == 0.05, "the widest known"
    assert floors.relative(record("gptq", 4), "perplexity", QUICK) is None
    assert floors.relative(record("gptq", 4, machine=XEON), *TIME) is None
    assert floors.relative(replace(record("gptq", 4), environment={}), *TIME) is None
    (tmp_path / "noise_floor" / "b.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"b\.json is not a noise floor"):
        read_floors(tmp_path)


def test_measuring_runs_it_as_often_as_asked_and_a_failure_is_no_floor(tmp_path, monkeypatch):
    runs = iter(repeats(10.0, 10.5, 9.5))
    said = []

    def run(config, paths, **_):
        kept = paths.scratch / "statistics"
        assert not kept.exists(), "or the next run would not collect its own"
        kept.mkdir(parents=True)
        return Outcome("finished", "GPTQ", record=next(runs))

    monkeypatch.setattr("harness.run.run", run)
    config = {"card": {"title": "GPTQ", "bits": 4}, "model": {"name": "tiny"}, "hardware": {"device": "cpu"}}
    found = measure(config, tmp_path, tmp_path, 3, said.append)
    assert (found.runs, found.threads, len(said)) == (3, 2, 3)
    assert "time_per_output_token_ms" in noise_floor.report(found)
    assert "Other processes" not in noise_floor.report(found)
    broken = Outcome("failed", "GPTQ", "out of memory", record=failed(record("gptq", 4)))
    monkeypatch.setattr("harness.run.run", lambda *_, **__: broken)
    with pytest.raises(RunError, match="run 1 of 3 failed: out of memory"):
        measure(config, tmp_path, tmp_path, 3, said.append)


def test_a_floor_of_a_busy_machine_says_so(tmp_path, monkeypatch):
    quiet, *busy = repeats(10.0, 10.5, 9.5)
    runs = iter([quiet, *(disturbed(run) for run in busy)])
    monkeypatch.setattr("harness.run.run", lambda *_, **__: Outcome("finished", "GPTQ", record=next(runs)))
    config = {"card": {"title": "GPTQ", "bits": 4}, "model": {"name": "tiny"}, "hardware": {"device": "cpu"}}
    found = measure(config, tmp_path, tmp_path, 3, lambda _: None)
    assert found.disturbed == 2
    assert "beside 2 of the runs" in noise_floor.report(found)


def disturbed(run):
    perplexity, time = run.measurements
    note = "int4 packed (torch); other processes used 31% of the cores meanwhile"
    return replace(run, measurements=[perplexity, replace(time, note=note)])


@pytest.mark.parametrize(("arguments", "words"), [(["runs=2"], "at least 3"), (["methd=awq"], "unknown option")])
def test_what_is_typed_wrong_is_said_before_anything_runs(arguments, words, capsys):
    assert noise_floor.main(arguments) == 2
    assert words in capsys.readouterr().err
