"""Offline runs arrive whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_records import record
from wandb_stand_in import StandIn

from harness import wandb_sync
from harness.tracking import TABLE, WandbTracker
from harness.wandb_sync import named_files, waiting


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def synced(results: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "harness.wandb_sync", f"paths.results={results}", *options]
    variables = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)


def test_a_run_whose_staged_bytes_are_gone_is_refused_by_name_and_the_others_arrive(tmp_path):
    whole, torn = record("gptq", 4), record("awq", 4)
    staging = tmp_path / "scratch" / "wandb" / "data" / "artifacts" / "staging"
    tracker = WandbTracker("project", group="sweep-1")
    tracker.log(whole, tmp_path)
    before = set(staging.iterdir())
    tracker.log(torn, tmp_path)
    for file in set(staging.iterdir()) - before:
        file.unlink()
    server = StandIn()
    try:
        done = synced(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY="a" * 40)
    finally:
        server.stop()
    assert done.returncode == 1
    assert f"refused: {torn.id}" in done.stderr
    assert f"\n  {staging}/" in done.stderr
    assert whole.id not in done.stderr
    assert list(server.runs) == [whole.id]
    assert server.runs[whole.id]["groupName"] == "sweep-1"
    assert [artifact["state"] for artifact in server.artifacts.values()] == ["COMMITTED"]
    assert any(name.endswith(f"{TABLE}.table.json") for name in server.files)
    assert json.loads(server.files["record.json"])["id"] == whole.id
    assert not server.unknown
    assert [log.stem for log in waiting(tmp_path)] == [f"run-{torn.id}"]


def test_files_of_a_log_are_those_staged_and_those_saved():
    entries = [
        {"type": "artifact", "artifact": {"manifest": {"contents": [{"local_path": "/d/staged"}, {"path": "remote"}]}}},
        {"type": "files", "files": {"files": [{"path": "samples/tokens.parquet"}]}},
        {"type": "summary", "summary": {}},
        {"type": "artifact", "artifact": {}},
    ]
    assert named_files(entries, Path("/run")) == [Path("/d/staged"), Path("/run/files/samples/tokens.parquet")]


def test_only_the_newest_folder_of_a_run_waits_and_none_that_is_synced(tmp_path):
    place = tmp_path / "scratch" / "wandb"
    for folder, name in (("20260101_000000-a", "a"), ("20260102_000000-a", "a"), ("20260101_000000-b", "b")):
        log = place / f"offline-run-{folder}" / f"run-{name}.wandb"
        log.parent.mkdir(parents=True)
        log.touch()
    (place / "offline-run-20260101_000000-b" / "run-b.wandb.synced").touch()
    assert [log.parent.name for log in waiting(tmp_path)] == ["offline-run-20260102_000000-a"]


def test_a_log_that_is_none_is_refused(tmp_path, capsys):
    log = tmp_path / "scratch" / "wandb" / "offline-run-20260101_000000-a" / "run-a.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"no log at all")
    assert wandb_sync.main([f"paths.results={tmp_path}", "check=true"]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["chek=true"], "Did you mean check"),
        (["check=maybe"], "true or false"),
        (["from=thin-air"], "runs or records"),
        (["paths.results=/nowhere"], "no such folder"),
        (["everything"], "KEY=VALUE"),
    ],
)
def test_what_was_typed_wrong_is_said(options, message, capsys):
    assert wandb_sync.main(options) == 2
    assert message in capsys.readouterr().err


def test_without_a_server_nothing_is_tried(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_sync.main([f"paths.results={tmp_path}"]) == 2
    assert "WANDB_MODE=offline" in capsys.readouterr().err


def test_help_is_fast_and_loads_no_torch(capsys):
    code = "import sys; from harness import wandb_sync, wandb_report; wandb_sync.main(['--help']); "
    code += "wandb_report.main(['--help']); assert not {'torch', 'wandb', 'pandas'} & set(sys.modules)"
    assert "usage" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
