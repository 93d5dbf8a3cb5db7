"""One process at a time holds a claim; dead ones are taken over by exactly one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import claims
from harness.claims import claimed
from harness.run import ROOT

ADD_ONE = """
import sys, time
from pathlib import Path
from harness import claims
from harness.claims import claimed
claims.POLL_SECONDS = 0.005
folder, count = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(5):
    with claimed(folder, say=lambda _: None):
        value = int(count.read_text())
        time.sleep(0.002)
        count.write_text(str(value + 1))
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)


def held_by(folder, **changes) -> None:
    """A claim as another process would have left it."""
    folder.mkdir(exist_ok=True)
    (folder / "1.json").write_text(json.dumps(claims.identity() | changes))


def gone() -> dict:
    """A process that existed."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return {"pid": ended.pid, "start": 1.0}


def waits(folder, monkeypatch) -> bool:
    """Whether somebody who wants the claim has to wait for it."""
    said = []

    def interrupt(_):
        raise InterruptedError

    monkeypatch.setattr(claims.time, "sleep", interrupt)
    try:
        with claimed(folder, say=said.append):
            return False
    except InterruptedError:
        return bool(said)


def test_processes_never_hold_it_together(tmp_path):
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", ADD_ONE, str(tmp_path / "claim"), str(tmp_path / "count")]
    for process in [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]:
        assert process.wait(60) == 0
    assert (tmp_path / "count").read_text() == "20"


@pytest.mark.parametrize(
    ("changes", "waiting"),
    [
        ({}, True),  # this very process
        ({"start": 1.0}, False),  # its number was given to another one since
        ({"boot": "before"}, False),  # the machine was started again
        ({"host": "elsewhere", "boot": "other", "start": 1.0}, True),  # nobody here can know
        ({"host": "elsewhere", "pid": 1 << 22}, True),
        ({"machine": "twin of the same name", "boot": "other"}, True),
        ({"namespace": "another container", "pid": 1 << 22}, True),
        ({"pid": "many"}, False),
    ],
)
def test_whose_claim_is_waited_for(changes, waiting, tmp_path, monkeypatch):
    held_by(tmp_path / "claim", **changes)
    assert waits(tmp_path / "claim", monkeypatch) is waiting


def test_a_dead_claim_is_taken_over_by_exactly_one_of_many(tmp_path):
    folder, inside, most = tmp_path / "claim", [], []
    held_by(folder, **gone())

    def take(number):
        with claimed(folder, say=lambda _: None):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(8)))
    assert most == [1] * 8


def test_silence_and_nothing_else_ends_a_claim_of_another_host(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "SILENCE_SECONDS", 0.3)
    held_by(tmp_path / "claim", host="elsewhere")
    os.utime(tmp_path / "claim" / "1.json", (1e9, 1e9))  # its clock may be years behind
    started = time.monotonic()
    with claimed(tmp_path / "claim", say=lambda _: None):
        assert time.monotonic() - started > 0.3


def test_who_holds_it_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.02)
    with claimed(tmp_path):
        os.utime(tmp_path / "1.json", (1e9, 1e9))
        deadline = time.monotonic() + 10  # half of what it waits where it is not told otherwise
        while (tmp_path / "1.json").stat().st_mtime <= 1e9:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (tmp_path / "1.json").stat().st_mtime == 0


def test_an_error_inside_releases_it(tmp_path, monkeypatch):
    with pytest.raises(KeyError), claimed(tmp_path):
        raise KeyError
    assert not waits(tmp_path, monkeypatch)


def test_a_file_system_without_links_works_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(claims.os, "link", refuse)
    with claimed(tmp_path / "claim"):
        assert waits(tmp_path / "claim", monkeypatch)
    assert not waits(tmp_path / "claim", monkeypatch)


def test_an_answer_lost_on_the_network_is_no_lost_claim(tmp_path, monkeypatch):
    """The link was made, the server's answer was lost, and the second try finds it there."""
    link = os.link

    def made_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(claims.os, "link", made_twice)
    with claimed(tmp_path / "claim"):
        assert [file.name for file in (tmp_path / "claim").iterdir()] == ["1.json"]
