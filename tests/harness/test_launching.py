"""Sweeps handed to other processes: the same records, one device each, and a lost worker is a row that is repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from harness import launching, slurm_queue, sweep
from harness.cli import main, resolve
from harness.errors import ConfigError
from harness.records import read_records
from harness.run import CONF, ROOT
from tests.harness.one_node_slurm import one_node_cluster, what_is_missing

SETTINGS = ["model=tiny", "corpus=generated", "calibration=smoke", "evaluation=smoke", "tracker=none"]
SWEEP = ["-m", "method=rtn", "bits=3,4", *SETTINGS, "hardware.threads=1"]
QUALITY = ("perplexity", "kl_divergence", "top1_agreement", "effective_bits_per_weight", "stored_bytes")
LAUNCHERS = ("parallel", "slurm_rehearsal", "ray_cluster", pytest.param("slurm", marks=pytest.mark.slurm))
OPTIONS = {
    "ray_cluster": [f"hydra.launcher.ray.{key}" for key in ("init.num_cpus=2", "remote.num_gpus=0")],
    "slurm": [f"hydra.launcher.{key}" for key in ("gpus_per_node=0", "cpus_per_task=1", "mem_gb=1")],
}


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


@pytest.mark.parametrize("name", ["parallel", "ray_cluster", "slurm", "slurm_rehearsal"])
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
    config, paths, *_ = resolve(cfg)
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


def command(launcher: str, results: Path) -> list[str]:
    options = [f"hydra/launcher={launcher}", *OPTIONS.get(launcher, []), f"paths.results={results}"]
    return [sys.executable, "-m", "harness", *SWEEP, *options]


def call(launcher: str, results: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command(launcher, results), cwd=ROOT, env=environment, **options)


def numbers(results: Path) -> dict[str, list[float | None]]:
    return {path.name: [record.value(metric) for metric in QUALITY] for path, record in read_records(results)}


@pytest.fixture(scope="module")
def one_after_the_other(tmp_path_factory) -> dict[str, list[float | None]]:
    results = tmp_path_factory.mktemp("serial")
    answer = call("basic", results)
    assert answer.returncode == 0, answer.stderr
    return numbers(results)


@pytest.fixture
def environment(launcher) -> Iterator[dict[str, str] | None]:
    """In which the launcher finds its cluster, which lives as long as the test."""
    needs(launcher)
    if launcher != "slurm":
        yield None
        return
    if what_is_missing():
        pytest.skip(what_is_missing())
    with one_node_cluster() as found:
        yield found


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_leaves_the_same_records(launcher, environment, one_after_the_other, tmp_path):
    answer = call(launcher, tmp_path, environment)
    assert answer.returncode == 0, answer.stderr
    assert "2 runs: 2 finished" in answer.stdout
    assert numbers(tmp_path) == one_after_the_other


def run_and_disturb(
    launcher: str, results: Path, environment: dict[str, str] | None, disturb: Callable[[dict[str, Any]], Any]
) -> str:
    """What a sweep said of which one worker was disturbed, as soon as it had marked its job."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(command(launcher, results), cwd=ROOT, env=environment, **pipes)
    deadline = time.monotonic() + 120
    while not (marks := list(results.glob(f"scratch/sweeps/*/*/{sweep.OUTCOME_FILE}"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    disturb(json.loads(marks[0].read_text()))
    said, _ = running.communicate(timeout=300)
    assert running.returncode == 1, said
    return said


def failed_stages(results: Path) -> set[str]:
    return {record.failure.stage for _, record in read_records(results) if record.status == "failed"}


@pytest.mark.launcher
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_lost_worker_is_a_failed_row_that_the_same_command_repeats(
    launcher, environment, one_after_the_other, tmp_path
):
    said = run_and_disturb(launcher, tmp_path, environment, lambda mark: os.kill(mark["process"], signal.SIGKILL))
    assert "cut short" in said
    assert failed_stages(tmp_path) == {"worker"}
    answer = call(launcher, tmp_path, environment)
    assert answer.returncode == 0, answer.stderr
    assert numbers(tmp_path) == one_after_the_other


@pytest.mark.launcher
@pytest.mark.slurm
@pytest.mark.parametrize("launcher", ["slurm"])
def test_a_cancelled_job_of_slurm_is_a_failed_row_that_the_same_command_repeats(
    launcher, environment, one_after_the_other, tmp_path
):
    def cancel(mark: dict[str, Any]) -> None:
        subprocess.run(["scancel", mark["slurm_job"]], env=environment, check=True)

    run_and_disturb(launcher, tmp_path, environment, cancel)
    assert failed_stages(tmp_path)  # of the worker or of its stage: Slurm ends both
    answer = call(launcher, tmp_path, environment)
    assert answer.returncode == 0, answer.stderr
    assert numbers(tmp_path) == one_after_the_other


# -------------------------------------------------------------------------------------------------------- Slurm's queue


def test_the_queue_of_slurm_tells_which_jobs_have_ended():
    known = slurm_queue.states("2|FAILED\n1_1|PENDING\n1_0|COMPLETING\n4|SUSPENDED\n5|CANCELLED\n")
    ended = [job for job in ("1_0", "1_1", "2", "4", "5", "6") if slurm_queue.has_ended(job, known)]
    assert ended == ["2", "5", "6"]  # the queue has forgotten the last one


def test_a_job_of_slurm_on_another_machine_is_asked_for_in_the_queue(monkeypatch):
    monkeypatch.setattr(slurm_queue, "queue", lambda: {"7": "RUNNING", "8": "FAILED"})
    mark = {"host": "elsewhere", "process": 1}
    assert [launching.is_at_work({**mark, "slurm_job": job}) for job in ("7", "8")] == [True, False]
    assert launching.is_at_work(mark) is None  # of a process elsewhere nothing is known
    monkeypatch.setattr(slurm_queue, "queue", lambda: subprocess.run("false", check=True))
    assert launching.is_at_work({**mark, "slurm_job": "7"}) is None
