"""Sweeps handed to other processes: the same records, one device each, and a lost worker is a row that is repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from harness import launching, sweep
from harness.cli import main, resolve
from harness.errors import ConfigError
from harness.records import read_records
from harness.run import CONF, ROOT

SETTINGS = ["model=tiny", "corpus=generated", "calibration=smoke", "evaluation=smoke", "tracker=none"]
SWEEP = ["-m", "method=rtn", "bits=3,4", *SETTINGS, "hardware.threads=1"]
QUALITY = ("perplexity", "kl_divergence", "top1_agreement", "effective_bits_per_weight", "stored_bytes")
LAUNCHERS = ("parallel", "slurm_rehearsal")


def needs(launcher: str) -> None:
    pytest.importorskip(launching.NEEDS[launcher][0])


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


# ------------------------------------------------------------------------------------------------------ before a sweep


def test_a_launcher_without_its_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(launching, "_is_installed", lambda _: False)
    monkeypatch.setattr(sys, "argv", ["harness", "-m", "method=rtn", "hydra/launcher=slurm"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert 'pip install "llm-inference-harness[slurm]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["parallel", "slurm", "slurm_rehearsal"])
def test_ready_launchers_compose(name):
    needs(name)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
    assert config.hydra.launcher._target_.startswith(launching.NEEDS[name][0])


# ------------------------------------------------------------------------------------------------------------- devices


def test_every_worker_has_a_device_of_its_own_for_as_long_as_it_lives(tmp_path):
    assert launching.take_device(tmp_path, ["0", "1"]) == "0"
    assert launching.take_device(tmp_path, ["0", "1"]) == "0"  # the next job of the same worker
    (tmp_path / "0").write_text(str(os.getppid()))
    assert launching.take_device(tmp_path, ["0", "1"]) == "1"
    (tmp_path / "1").write_text(str(os.getppid()))
    with pytest.raises(ConfigError, match="n_jobs=2"):
        launching.take_device(tmp_path, ["0", "1"])
    (tmp_path / "0").write_text(str(ended_process()))
    assert launching.take_device(tmp_path, ["0", "1"]) == "0"


def test_only_gpus_that_are_visible_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.environment.machine", lambda: {"gpus": ["H100"] * 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    launching.share_devices("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "cpu", tmp_path)
    launching.share_devices("hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher", "cuda", tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"  # nothing to share, or shared out by Slurm
    launching.share_devices("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "cuda", tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"


# -------------------------------------------------------------------------------------------------------- lost workers


def test_a_job_that_was_begun_and_not_ended_becomes_a_failed_record(tmp_path, monkeypatch, capsys):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["method=rtn", *SETTINGS, f"paths.results={tmp_path}"])
    config, paths, _ = resolve(cfg)
    monkeypatch.setattr(launching, "mark_of_this_process", lambda: {"host": "here", "process": ended_process()})
    for number, host in enumerate(("here", "there")):
        sweep.begin(config, paths, "RTN, 4 bits, on tiny", tmp_path / "sweep" / str(number))
        mark = tmp_path / "sweep" / str(number) / sweep.OUTCOME_FILE
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "host": host}))
    monkeypatch.setattr(sweep, "_begun", [tmp_path / "sweep"])
    assert sweep.close_cut_short() == 1
    ((_, record),) = read_records(tmp_path)
    assert record.status == "failed"
    assert record.failure.stage == "worker"
    said = " ".join(capsys.readouterr().out.split())
    assert launching.REASON in said
    assert launching.ELSEWHERE in said  # of the job on another machine nothing is claimed, and no record is left


def call(*arguments: str, results: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "harness", *SWEEP, *arguments, f"paths.results={results}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def numbers(results: Path) -> dict[str, list[float | None]]:
    return {path.name: [record.value(metric) for metric in QUALITY] for path, record in read_records(results)}


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory) -> dict[str, list[float | None]]:
    results = tmp_path_factory.mktemp("serial")
    answer = call(results=results)
    assert answer.returncode == 0, answer.stderr
    return numbers(results)


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_leaves_the_same_records(launcher, one_after_the_other, tmp_path):
    needs(launcher)
    answer = call(f"hydra/launcher={launcher}", results=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "2 runs: 2 finished" in answer.stdout
    assert numbers(tmp_path) == one_after_the_other


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_lost_worker_is_a_failed_row_that_the_same_command_repeats(launcher, one_after_the_other, tmp_path):
    needs(launcher)
    command = [sys.executable, "-m", "harness", *SWEEP, f"hydra/launcher={launcher}", f"paths.results={tmp_path}"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (marks := list(tmp_path.glob(f"scratch/sweeps/*/*/{sweep.OUTCOME_FILE}"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(json.loads(marks[0].read_text())["process"], signal.SIGKILL)
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 1
    assert "cut short" in said
    failed = [record for _, record in read_records(tmp_path) if record.status == "failed"]
    assert failed
    assert {record.failure.stage for record in failed} == {"worker"}
    answer = call(f"hydra/launcher={launcher}", results=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert numbers(tmp_path) == one_after_the_other
