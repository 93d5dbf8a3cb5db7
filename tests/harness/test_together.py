"""Processes that a launcher started beside the first one: they train what it trains, and do not wait for more."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from harness import run, together
from harness.errors import ConfigError, RunError
from harness.records import read_records
from harness.run import Paths
from tests.test_conf import resolved

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model=tiny", "evaluation=smoke", "corpus=generated", "training=smoke", "hardware.threads=1", "tracker=none")


@pytest.fixture
def launcher(monkeypatch):
    """The store of a launcher, and this process as the first of two that it started."""
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(stores[0].port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    restart(monkeypatch)
    yield stores
    together._store.cache_clear()


def restart(monkeypatch, **environment: str) -> None:
    """From here on this is another process, which has its connection and its counts to itself."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(together, "_turns", Counter())
    together._store.cache_clear()


def heard(*runs: str) -> list[str]:
    """What another process hears in as many turns."""
    calls = []
    for name in runs:
        with together.turn(name):
            calls.append(together.await_call(name))
    return calls


def test_however_a_run_ends_the_others_hear_whether_it_is_trained(launcher, monkeypatch):
    """Runs that come again in a sweep are told apart, and each training has a place of its own to meet."""
    called = []
    for name in ("a", "b", "a", "a"):
        with together.turn(name):
            if name == "a" and len(called) < 2:
                called.append(together.call_others(name))
    with pytest.raises(KeyboardInterrupt), together.turn("c"):
        raise KeyboardInterrupt
    restart(monkeypatch, RANK="1")
    assert heard("a", "b", "a", "a", "c") == [called[0], "", called[1], "", ""]
    assert called[0] != called[1]


def test_who_comes_first_waits_for_the_word_and_not_for_that_of_an_earlier_start(launcher, monkeypatch):
    with together.turn("a"):
        together.call_others("a")
    restart(monkeypatch, TORCHELASTIC_RESTART_COUNT="1")
    calls = []
    waiting = threading.Thread(target=lambda: calls.append(together.await_call("a")), daemon=True)
    waiting.start()
    waiting.join(3 * together.POLL_SECONDS)
    assert not calls
    called = together.call_others("a")
    waiting.join(10)
    assert calls == [called]


def test_a_launcher_that_ends_is_no_reason_to_wait_on(launcher):
    together._store()
    launcher.clear()
    gc.collect()
    with pytest.raises(RunError, match="2 processes has ended"):
        together.await_call("a")
    with together.turn("a"):  # ends without an error of its own
        pass


@pytest.mark.parametrize("rank", ["0", "1"])
def test_without_a_launcher_to_talk_through_a_training_is_refused(rank, monkeypatch, tmp_path):
    restart(monkeypatch, WORLD_SIZE="2", RANK=rank)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    outcome = run.run(resolved("method=word_kd", *SMALL), Paths(tmp_path, tmp_path))
    assert outcome.status == "refused"
    assert "torchrun --nproc_per_node 2 -m harness" in outcome.reason
    with pytest.raises(ConfigError):
        together.call_others("a")


def test_what_trains_nothing_is_left_to_the_first_process(monkeypatch, tmp_path):
    restart(monkeypatch, WORLD_SIZE="2", RANK="1")  # and needs no launcher
    outcome = run.run(resolved("method=rtn", *SMALL), Paths(tmp_path / "results", tmp_path))
    assert (outcome.status, outcome.reason) == ("skipped", "nothing to train; the process of rank 0 does it all")
    assert not list(tmp_path.iterdir())


def test_the_others_train_exactly_what_the_first_process_trains(launcher, monkeypatch, tmp_path):
    """Trained, recorded, its model there already, made anew, refused, its baseline failed: one after the other."""
    report = {"cost": {"compress_seconds": None}, "artifact": {}, "curves": {}, "origin": {}}
    trained: list[str] = []

    def stage_of(name, _function, arguments, **_):
        if name == "compress":
            if run.is_dense(arguments["config"]):
                raise run.stages.StageFailure("compress", "memory", "planted")
            assert together._store().get(arguments["called"]).decode() == together.TRAIN  # before it begins
            trained.append(arguments["called"])
        return run.stages.StageResult(report if name == "compress" else [], 0.1, None)

    monkeypatch.setattr(run.stages, "run_stage", stage_of)
    monkeypatch.setattr(run.stages, "warm_up", lambda: None)
    monkeypatch.setattr(run, "_baseline_needed", lambda config, _: config["seed"] == 1 and not run.is_dense(config))
    changes = ("seed=0", "evaluation.probes.perplexity.windows=4", "method.training.steps=-1", "seed=1")
    plain, again, wrong, unfounded = (resolved("method=word_kd", *SMALL, change) for change in changes)
    jobs = [(plain, False), (plain, False), (again, False), (plain, True), (wrong, False), (unfounded, False)]

    def outcomes() -> list[run.Outcome]:
        return [run.run(config, Paths(tmp_path, tmp_path), force, say=lambda _: None) for config, force in jobs]

    statuses = [outcome.status for outcome in outcomes()]
    assert statuses == ["finished", "skipped", "finished", "finished", "refused", "failed"]
    first, trained = trained, []
    assert len(first) == 2
    restart(monkeypatch, RANK="1")
    others = outcomes()
    assert {outcome.status for outcome in others} == {"skipped"}
    assert [outcome.reason.startswith("trained along") for outcome in others] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    assert trained == first


@pytest.mark.launcher
def test_two_launched_processes_train_several_students_and_end(tmp_path):
    """Two trainings of one sweep, each in a group of its own; then one is recorded and one's model is there."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "harness", "-m"]
    rates = "method.training.learning_rate=1e-3,2e-3"
    for windows, trained in (("8", 2), ("8,4", 0)):
        settings = ["method=word_kd", *SMALL, rates, f"evaluation.probes.perplexity.windows={windows}"]
        command = [*torchrun, *settings, f"paths.results={tmp_path}"]
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.count("trained along") == trained
        assert answer.stdout.count("not trained;") == (4 if windows == "8,4" else 0)
        assert answer.stdout.count("runs:") == 1  # one summary, of the process that writes
    found = [record for _, record in read_records(tmp_path) if record.card["name"] == "word_kd"]
    assert [record.environment["training_processes"] for record in found] == [2] * 4
    assert len({record.artifact["sha256"] for record in found}) == 2
