"""What W&B gets, that it gets it without network, and that it can never harm a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fake_records import QUICK, failed, record
from wandb_stand_in import StandIn

from harness import tracking
from harness.records import read_record
from harness.tracking import NoTracker, WandbTracker, flat_config, metric_name, summary, tags
from tests.test_conf import resolved

WANDB_VARIABLES = [name for name in os.environ if name.startswith("WANDB_")]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def server(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setenv("WANDB_BASE_URL", stand_in.url)
    yield stand_in
    stand_in.stop()


def logged_elsewhere(
    record_path: Path, results: Path, mode: str, before: str = "", times: int = 1, limits: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Log a record in a process of its own: the SDK keeps settings for as long as a process lives.

    before: code that runs first; times: how often the record is logged; limits: of the tracker, as arguments.
    """
    code = (
        "from pathlib import Path; from harness.records import read_record; from harness import tracking\n"
        f"{before}\n"
        f"tracker = tracking.WandbTracker('project', mode={mode!r}, group='sweep-1', {limits})\n"
        f"for _ in range({times}):\n"
        f"    print(tracker.log(read_record(Path({str(record_path)!r})), Path({str(results)!r})))"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not ours to break
    variables = {**inherited, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=variables)


def inspect(folder: str) -> dict:
    """What the SDK's own reader finds in an offline run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def results(tmp_path):
    """A results folder with the samples of a run: outcomes, and a cached tensor that is not one."""
    run = record("gptq", 4, loss=0.03)
    samples = tmp_path / "results" / run.samples
    samples.mkdir(parents=True)
    (samples / "tokens.parquet").write_bytes(b"outcomes of tokens")
    (samples / "reference.safetensors").write_bytes(b"x" * 1000)
    return tmp_path / "results"


def test_offline_run_reads_back_as_the_record(results):
    run = record("gptq", 4, loss=0.03)
    place = WandbTracker("project", group="sweep-1").log(run, results)
    found = inspect(place)
    assert found["run_id"] == run.id
    assert found["state"] == "finished"
    assert set(found["tags"]) == {"gptq", "4bit", "quantization", "weight_only", "finished"}
    assert {name: found["config"][name] for name in ("method", "bits", "model", "hardware", "seed")} == {
        "method": "gptq", "bits": 4, "model": run.model, "hardware": "cpu", "seed": 0
    }  # fmt: skip
    for measurement in run.measurements:
        assert found["summary"][metric_name(measurement)] == pytest.approx(measurement.value)


def test_offline_run_carries_record_and_outcomes_in_its_own_folder(results):
    run = record("gptq", 4, loss=0.03)
    files = Path(WandbTracker("project").log(run, results)) / "files"
    assert read_record(files / "record.json") == run
    assert (files / "samples" / "tokens.parquet").read_bytes() == b"outcomes of tokens"
    assert not (files / "samples" / "tokens.parquet").is_symlink()
    assert not list(files.rglob("*.safetensors"))


def test_everything_stays_below_the_results_folder(results, tmp_path):
    WandbTracker("project").log(record("gptq", 4), results)
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.wandb"))
    assert list((results / "scratch").rglob("*.wandb"))


def test_the_environment_is_left_as_it_was(results):
    before = dict(os.environ)
    WandbTracker("project").log(record("gptq", 4), results)
    assert {k: v for k, v in os.environ.items() if k.startswith("WANDB_") and "SERVICE" not in k} == {
        k: v for k, v in before.items() if k.startswith("WANDB_") and "SERVICE" not in k
    }


def test_failed_runs_are_logged_as_failed(results):
    run = failed(record("awq", 3), "out of memory")
    found = inspect(WandbTracker("project").log(run, results))
    assert found["state"] == "failed"
    assert found["summary"]["failure_reason"] == "out of memory"
    assert "failed" in found["tags"]


def test_offline_asks_no_server(results, server, tmp_path):
    run = record("gptq", 4)
    path = _write(run, tmp_path)
    done = logged_elsewhere(path, results, "offline", WANDB_API_KEY="a" * 40)
    assert "offline-run" in done.stdout, done.stderr
    assert not server.runs
    assert not server.streams


def test_online_sends_the_record_to_the_server(results, server, tmp_path):
    run = record("gptq", 4, loss=0.03)
    done = logged_elsewhere(_write(run, tmp_path), results, "online", WANDB_API_KEY="a" * 40)
    assert run.id in done.stdout, done.stderr
    sent = server.runs[run.id]
    assert (sent["groupName"], sent["jobType"]) == ("sweep-1", "method")
    assert sent.get("host") is None
    assert json.loads(sent["config"])["method"]["value"] == "gptq"
    sent_files = [chunk.get("files") or {} for chunk in server.streams[run.id]]
    last = [files["wandb-summary.json"]["content"][-1] for files in sent_files if "wandb-summary.json" in files][-1]
    assert json.loads(last)[metric_name(run.find("perplexity"))] == pytest.approx(run.value("perplexity"))
    assert server.files["samples/tokens.parquet"] == b"outcomes of tokens"
    (artifact,) = server.artifacts
    table = json.loads(server.files[f"artifact/{artifact}/{tracking.TABLE}.table.json"])
    assert server.artifacts[artifact]["state"] == "COMMITTED"
    assert [row[:2] for row in table["data"]] == [[m.metric, pytest.approx(m.value)] for m in run.measurements]
    assert not server.unknown


def test_online_without_an_answer_is_logged_offline_at_once(results, tmp_path):
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = logged_elsewhere(
            _write(record("gptq", 4), tmp_path), results, "online", WANDB_API_KEY="a" * 40, WANDB_BASE_URL=url
        )
    assert "offline-run" in done.stdout
    assert "does not answer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_broken_servers_are_waited_for_once_and_the_run_goes_on(tmp_path):
    """One is slow, one answers with errors, one with errors after the run began; all at once, to wait only once."""
    path = _write(record("gptq", 4), tmp_path)
    faults = (
        ({"delay": 60}, "init_seconds=1", "did not take it"),
        ({"broken": ("/graphql",)}, "init_seconds=1", "did not take it"),
        ({"broken": ("/file_stream",)}, "finish_seconds=1", "Timed out finishing"),
    )

    def log(fault: dict, limits: str, reason: str) -> tuple[str, subprocess.CompletedProcess]:
        server = StandIn()
        vars(server).update(fault)
        folder = tmp_path / str(server.server.server_port)
        variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
        try:
            return reason, logged_elsewhere(path, folder, "online", times=2, limits=limits, **variables)
        finally:
            server.stop()

    with ThreadPoolExecutor(len(faults)) as workers:
        answers = list(workers.map(log, *zip(*faults, strict=True)))
    for reason, done in answers:
        assert done.returncode == 0
        assert done.stdout.count("offline-run") == 2
        first, second = done.stderr.splitlines()
        assert reason in first
        assert "failed before" in second


@pytest.mark.parametrize("end", ["kill", "suspend"])
def test_a_dead_or_stuck_service_is_a_warning_and_the_next_run_has_another(results, tmp_path, end):
    """The SDK's process dies or hangs while a run is logged; nothing raises, here or when the program ends."""
    breaking = f"""
import psutil
calls, attach = [], tracking._attach
def broken(*arguments):  # the second time; the process is up by then, and is waited for no longer than it must
    calls.append(arguments)
    tracking.SLACK_SECONDS = 0 if len(calls) == 1 else 60
    for child in psutil.Process().children() if len(calls) == 2 else ():
        child.{end}()
    attach(*arguments)
tracking._attach = broken
"""
    limits = "init_seconds=1, finish_seconds=1"
    done = logged_elsewhere(
        _write(record("gptq", 4), tmp_path), results, "offline", before=breaking, times=3, limits=limits
    )
    assert done.returncode == 0
    whole, lost, kept = done.stdout.splitlines()
    assert lost == "None"
    assert whole != kept
    assert inspect(kept)["state"] == "finished"
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())
    assert "is not in W&B" in done.stderr


def test_secrets_reach_neither_w_and_b_nor_any_file_nor_the_terminal(results, server, tmp_path):
    """Planted in the environment, in the configuration of a teacher, on the command line and in a failure's reason."""
    planted = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_TOKEN": "token-of-a-hub",
        "OPENAI_API_KEY": "key-of-an-endpoint",
    }
    in_config = "plain-text-key"
    config = {"text_teacher": {"api_key": in_config, "url": f"https://me:{in_config}@host/v1?k={planted['HF_TOKEN']}"}}
    run = failed(record("gptq", 4, loss=0.03), f"status 401: no such key {planted['OPENAI_API_KEY']}")
    path = tmp_path / "record.json"
    path.write_text(json.dumps(asdict(replace(run, config={**run.config, **config}))))
    before = "import sys; sys.argv.append('text_teacher.key=typed-on-the-command-line')"
    done = logged_elsewhere(path, results, "online", before=before, **planted)
    assert run.id in done.stdout, done.stderr
    files = [file.read_bytes() for file in results.rglob("*") if file.is_file()]
    everything = [*server.received, *files, done.stdout.encode(), done.stderr.encode()]
    assert any(b"no such key [secret]" in content for content in server.received)
    for secret in (*planted.values(), in_config, "typed-on-the-command-line"):
        assert not [content for content in everything if secret.encode() in content]


def test_online_without_a_key_neither_prompts_nor_fails(results, server, tmp_path):
    done = logged_elsewhere(_write(record("gptq", 4), tmp_path), results, "online")
    assert "offline-run" in done.stdout
    assert "has no key" in done.stderr
    assert not server.runs


def test_wandb_mode_of_the_environment_wins(results, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbTracker("project", mode="online").log(record("gptq", 4), results) is None
    assert not (results / "scratch").exists()


def test_a_sweep_agents_run_id_is_obeyed(results, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent7")
    assert inspect(WandbTracker("project").log(record("gptq", 4), results))["run_id"] == "agent7"


def test_a_broken_tracker_is_one_line_of_warning(results, monkeypatch, capsys):
    def broken(*_args, **_options):
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr("wandb.init", broken)
    assert WandbTracker("project").log(record("gptq", 4), results) is None
    warning = capsys.readouterr().err
    assert "the disk is full" in warning
    assert warning.count("\n") == 1


def test_a_run_that_breaks_after_it_started_is_closed(results, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_attach", lambda *_: 1 / 0)
    assert WandbTracker("project").log(record("gptq", 4), results) is None
    assert "ZeroDivisionError" in capsys.readouterr().err
    import wandb

    assert wandb.run is None


def test_too_many_bytes_of_outcomes_stay_where_they_are(results, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "OUTCOME_BYTES_LIMIT", 5)
    files = Path(WandbTracker("project").log(record("gptq", 4, loss=0.03), results)) / "files"
    assert not (files / "samples").exists()
    assert "stay in" in capsys.readouterr().err


def test_no_tracker_does_nothing(tmp_path):
    assert NoTracker(group="sweep").log(record("gptq", 4), tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_config_is_flat_and_loses_nothing():
    config = flat_config(record("gptq", 4, method={"order": [1, 2], "nested": {"a.b": {"deep": 1.5}}}))
    assert all(isinstance(value, str | int | float | bool | None) for value in config.values())
    assert not any("." in name or "/" in name for name in config)
    assert config["method_grid_group_size"] == 64
    assert config["method_nested_a_b_deep"] == 1.5
    assert config["method_order"] == "1, 2"


def test_config_says_where_the_survey_has_it_and_what_numbers_compare():
    config = flat_config(record("gptq", 4))
    assert (config["table"], config["family"], config["category"]) == ("table_1", "quantization", "weight_only")
    assert config["perplexity_on"] == QUICK
    assert config["machine"] == "AMD EPYC 9B14"
    assert flat_config(record("dense"))["table"] is None


def test_plain_names_hold_the_first_number_of_each_metric_and_its_interval():
    run = record("gptq", 4, batches=(1, 4))
    numbers = summary(run)
    for metric in ("perplexity", "time_per_output_token_ms", "effective_bits_per_weight"):
        assert numbers[metric] == run.value(metric)
    assert (numbers["perplexity_low"], numbers["perplexity_high"]) == run.find("perplexity").interval


def test_summary_has_every_number_under_a_name_of_its_own():
    run = record("gptq", 4)
    numbers = summary(run)
    assert len({metric_name(m) for m in run.measurements}) == len(run.measurements)
    assert all(numbers[metric_name(m)] == m.value for m in run.measurements)
    name = metric_name(run.find("perplexity"))
    assert name.startswith("perplexity_wikipedia_sample")
    assert QUICK.split()[-2] in name
    assert (numbers[f"{name}_low"], numbers[f"{name}_high"]) == run.find("perplexity").interval


def test_the_default_project_is_that_of_the_configuration():
    assert resolved()["tracker"]["project"] == tracking.PROJECT


def test_tags_fit_wandb():
    assert all(0 < len(tag) <= 64 for tag in tags(record("x" * 100, 4)))


def _write(run, folder: Path) -> Path:
    from harness.records import write_record

    return write_record(run, folder / "record.json")


def test_learning_curves_are_line_charts_over_their_own_steps(results):
    """Read back row by row with the SDK's own reader: every point of every curve, at its own step."""
    curves = {"training loss": [[1, 3.5], [2, 3.0], [40, 2.0]], "block 3 loss": [[0, 0.5], [1, 0.25]]}
    run = replace(record("peqa", 4, loss=0.03), curves=curves)
    place = WandbTracker("project").log(run, results)
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", place]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    found = {}
    for line in lines:
        entry = json.loads(line)
        if entry.get("type") == "history":
            row = entry["history"]["item"]
            for name in ("training_loss", "block_3_loss"):
                if name in row:
                    found.setdefault(name, []).append([row[tracking.CURVE_STEP], row[name]])
    assert found == {"training_loss": curves["training loss"], "block_3_loss": curves["block 3 loss"]}
