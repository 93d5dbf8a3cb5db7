"""A stage in its own process: its answer, its memory, and every way it can end."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.errors import ConfigError
from harness.run import ROOT
from harness.stages import StageFailure, run_stage


def answer(number):
    return {"double": 2 * number}


def allocate(megabytes):
    block = bytearray(megabytes << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    return len(block)


def refuse(**_):
    raise ConfigError("bits=9: choose 2 to 8")


def break_down(**_):
    raise KeyError("nobody expected this")


def run_out_of_memory(**_):
    raise MemoryError("no more")


def be_killed(**_):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(**_):
    os._exit(7)


def hang(**_):
    time.sleep(600)


def crash(**_):
    ctypes.string_at(0)


def leave_by_unknown_signal(**_):
    os.kill(os.getpid(), signal.SIGRTMIN + 3)


def ask_for_too_much(with_torch):
    """More address space than a limit allows, as a scheduler sets it."""
    import torch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    return torch.zeros(1 << 28).numel() if with_torch else len(bytearray(1 << 30))


def fill_the_disk(folder):
    """A limit on the size of files stands in for a disk that is full: the write itself fails, in compiled code too."""
    import torch

    from harness import artifact
    from tests.harness.tiny_models import language_model

    lm = language_model()
    torch.nn.init.normal_(lm.module.lm_head.weight)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    artifact.save(lm, Path(folder))


def be_stubborn(noted):
    """Does not end when asked to, and has started another process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(noted).write_text(f"{os.getpid()} {subprocess.Popen(['sleep', '600']).pid}")
    time.sleep(600)


def stage(tmp_path, function, seconds_limit=120, **arguments):
    return run_stage("test", function, arguments, seconds_limit=seconds_limit, threads=1, log=tmp_path / "log.txt")


def test_the_answer_comes_back(tmp_path):
    result = stage(tmp_path, answer, number=21)
    assert result.value == {"double": 42}
    assert result.seconds > 0


def test_peak_memory_is_that_of_the_stage(tmp_path):
    small, large = (stage(tmp_path, allocate, megabytes=size).peak_bytes for size in (1, 300))
    assert 250 << 20 < large - small < 350 << 20


@pytest.mark.parametrize(
    ("function", "kind", "reason"),
    [
        (refuse, "config", "bits=9"),
        (break_down, "bug", "KeyError.*nobody expected"),
        (run_out_of_memory, "memory", "out of memory"),
        (be_killed, "signal", "SIGKILL.*memory"),
        (leave, "signal", "exit status 7"),
        (crash, "signal", "SIGSEGV: compiled code"),
        (leave_by_unknown_signal, "signal", f"signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_every_end_is_data(tmp_path, function, kind, reason):
    with pytest.raises(StageFailure, match=reason) as failure:
        stage(tmp_path, function)
    assert failure.value.kind == kind
    assert failure.value.stage == "test"


def test_an_unexpected_error_leaves_its_traceback_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "nobody expected")
    with pytest.raises(StageFailure, match=r"log\.txt"):
        stage(tmp_path, break_down)
    left = (tmp_path / "log.txt").read_text()
    assert "break_down" in left
    assert "[secret] this" in left
    assert "nobody expected" not in left


def test_a_stage_over_its_limit_is_ended(tmp_path):
    stage(tmp_path, answer, number=1)  # the fork server is up
    started = time.monotonic()
    with pytest.raises(StageFailure, match="limit of 1 s") as failure:
        stage(tmp_path, hang, seconds_limit=1)
    assert failure.value.kind == "time"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("with_torch", [False, True])
def test_a_limit_on_memory_is_named_whoever_meets_it(with_torch, tmp_path):
    with pytest.raises(StageFailure, match="out of memory") as failure:
        stage(tmp_path, ask_for_too_much, with_torch=with_torch)
    assert failure.value.kind == "memory"


def test_a_disk_that_fills_up_while_a_model_is_written_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(StageFailure, match=r"could not write the compressed model.*paths\.results=DIR") as failure:
        stage(tmp_path, fill_the_disk, folder=str(tmp_path / "artifacts" / "model"))
    assert failure.value.kind == "run"
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_a_stage_that_does_not_end_when_asked_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.stages.GRACE_SECONDS", 0.2)
    with pytest.raises(StageFailure, match="limit of 3 s"):
        stage(tmp_path, be_stubborn, seconds_limit=3, noted=str(tmp_path / "noted"))
    assert_gone((tmp_path / "noted").read_text())


@pytest.mark.parametrize("signals", [["SIGINT", "SIGINT"], ["SIGTERM"], ["SIGKILL"]], ids="+".join)
def test_whatever_ends_a_sweep_ends_its_stage_at_once(signals, tmp_path):
    noted = tmp_path / "noted"
    code = (
        "import signal, sys, harness.stages as stages, harness.cli as cli; from tests.harness.test_stages import *\n"
        "stages.PRELOAD, stages.GRACE_SECONDS = [], 60 if sys.argv[2] == 'SIGINT' else 0.2\n"
        "signal.signal(signal.SIGTERM, cli._terminated)\n"
        "stage(Path('.'), be_stubborn, noted=sys.argv[1])"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code, str(noted), signals[0]], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: noted.exists() and len(noted.read_text().split()) == 2)
    for name in signals:
        sweep.send_signal(signal.Signals[name])
        time.sleep(0.5)  # of two signals that come together the system delivers one
    sweep.wait(30)
    assert_gone(noted.read_text())


def assert_gone(noted: str) -> None:
    pids = [int(pid) for pid in noted.split()]
    wait_until(lambda: not any(_runs(pid) for pid in pids))


def wait_until(happened, seconds=60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
