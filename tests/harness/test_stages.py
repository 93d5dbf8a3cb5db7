"""A stage in its own process: its answer, its memory, and every way it can end."""

from __future__ import annotations

import os
import signal
import time

import pytest

from harness.errors import ConfigError
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
