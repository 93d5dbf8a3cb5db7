"""The command line as a user meets it: help, typos, one run, a sweep, failures as rows, resuming after a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import run
from harness.cli import GROUPS, check_names, composed, main, options
from harness.errors import ConfigError
from harness.records import read_records
from harness.run import ROOT
from tests.benchmarks.kill_sweep import drafts, killed_at, quality, start

SETTINGS = [
    "corpus=generated",
    "calibration=smoke",
    "evaluation=smoke",
    "tracker=none",
    "hardware.threads=1",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "harness", *arguments]


def call(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def settings(trained_folder) -> list[str]:
    return ["model=local", f"model.path={trained_folder}", *SETTINGS]


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """One sweep that every test below looks at: three methods, two widths, two of them without a width to read."""
    results = tmp_path_factory.mktemp("swept")
    answer = call("-m", "method=dense,rtn,gptq", "bits=3,4", *settings, f"paths.results={results}")
    return results, answer


def states(results: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(results)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in (results / "records").rglob("*.json")
    }


# ------------------------------------------------------------------------------------------------ before anything runs


def test_help_lists_every_choice_without_loading_torch():
    code = (
        "import sys; sys.argv = ['harness', '--help']; import harness.cli as c; c.main(); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.rstrip().endswith("False")
    for group in GROUPS:
        for name in options(group):
            assert re.search(rf"^  {re.escape(name)} +\S", answer.stdout, flags=re.M), name


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["method=awqq"], ["unknown method 'awqq'", "Did you mean awq?", "gptq"]),
        (["methd=awq"], ["unknown option 'methd'", "Did you mean method?"]),
        (["-m", "method=rtn,gptqq"], ["unknown method 'gptqq'", "Did you mean gptq?"]),
        (["evaluation=quik"], ["Did you mean quick?"]),
    ],
)
def test_a_typo_gets_the_valid_names_and_the_nearest(arguments, messages):
    answer = call(*arguments)
    assert answer.returncode == 2
    for message in messages:
        assert message in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["method=rtn", "bits=3,4"], ["bits=3,4: several values", "-m", "python -m harness -m method=rtn bits=3,4"]),
        (["gptq"], ["'gptq' is no KEY=VALUE", "Did you mean method=gptq?"]),
        (["--bits", "4"], ["--bits: written without dashes, as bits=VALUE"]),
        (["grid=nf4"], ["grid@method.grid=nf4"]),
        (["model=local", "model.path=/a=b(1)"], ["quotes of its own", "model.path='/a=b(1)'"]),
        (["method=rtn", "paths.results=/dev/null/x"], ["paths.results=/dev/null/x: ", "name a folder"]),
    ],
)
def test_what_is_no_run_is_said_before_anything_starts(arguments, messages, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["harness", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    for message in messages:
        assert message in said


def test_values_of_the_options_of_hydra_are_no_names():
    """`-sc install=bash` makes tab completion, as docs/quick-start.md says."""
    assert check_names(["-sc", "install=bash"]) == check_names(["--cfg", "job", "-m", "bits=3,4"]) == ""
    assert "is no KEY=VALUE" in check_names(["-m", "gptq"])


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["method.grid.group_sizes=64"], ["unknown option 'method.grid.group_sizes'", "mean method.grid.group_size?"]),
        (["method.gird.group_size=64"], ["unknown option 'method.gird'", "Did you mean method.grid?"]),
        (["model=tiny", "model.path=/x"], ["unknown option 'model.path'", "model.path is known to model=local"]),
        (["bits.x=3"], ["bits is one value and has no parts"]),
        (["method=dense", "grid@method.grid=nf4"], ["method=dense has no such part"]),
        (["bits=3,4"], ["bits=3,4: one run has one value"]),
        (["force=no"], ["force=no: must be true or false"]),
        (["seed=one"], ["seed=one: must be a whole number"]),
        (["seed=-1"], ["seed=-1: must be a whole number"]),
    ],
)
def test_names_and_values_that_nothing_has_are_refused_in_words(overrides, messages):
    with pytest.raises(ConfigError) as error:
        composed(["method=gptq", *overrides] if "method=dense" not in overrides else overrides)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("calibration.samples=1.5", "must be a whole number"),
        ("calibration.window=long", "must be a whole number"),
        ("hardware.device=cdua", "choose cpu or cuda"),
        ("hardware.compress_seconds_limit=0", "must be greater than 0"),
    ],
)
def test_values_that_would_fail_in_a_stage_are_refused_before_it(value, words, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{value}: {words}")):
        run("method=gptq", "model=tiny", *SETTINGS, value, f"paths.results={tmp_path}")
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["method=gptq", "method.grid.group_sizes=64"],
            "unknown option 'method.grid.group_sizes'. Did you mean method.grid.group_size?",
        ),
        (
            ["-m", "method=rtn,gptq", "hardware.thread=1"],
            "unknown option 'hardware.thread'. Did you mean hardware.threads?",
        ),
        (
            ["experiment=smoke", "seed=1,2", "hardware.step=x"],
            "unknown option 'hardware.step'. Did you mean hardware.steps?",
        ),
    ],
)
def test_hydra_s_own_errors_end_with_2_and_our_words(arguments, message):
    answer = call(*arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith(message)


def test_an_impossible_value_is_refused_and_leaves_nothing(settings, tmp_path):
    answer = call("method=rtn", "bits=9", *settings, f"paths.results={tmp_path}")
    assert answer.returncode == 2
    assert "9" in answer.stderr
    assert "bits" in answer.stderr
    assert not (tmp_path / "records").exists()


def test_a_text_too_short_for_one_window_is_said_with_the_way_out(trained_folder, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short", encoding="utf-8")
    model = ["model=local", f"model.path={trained_folder}", "corpus=text", f"corpus.path={text}"]
    answer = call("method=dense", *model, *SETTINGS[1:], f"paths.results={tmp_path}")
    assert answer.returncode == 1
    assert "less than one window of 64" in answer.stderr
    assert "longer text" in answer.stderr


# ------------------------------------------------------------------------------------------------------------- a sweep


def test_a_sweep_leaves_one_record_per_distinct_run(swept):
    results, answer = swept
    assert answer.returncode == 0, answer.stderr
    found = sorted((record.card["name"], record.bits) for _, record in read_records(results))
    # dense reads no bit-width: its two jobs are one run
    assert found == sorted([("dense", None), ("rtn", 3), ("rtn", 4), ("gptq", 3), ("gptq", 4)])
    assert all(record.status == "finished" for _, record in read_records(results))


def test_every_compressed_run_names_its_baseline(swept):
    records = {record.id: record for _, record in read_records(swept[0])}
    for record in records.values():
        if record.card["name"] == "dense":
            assert record.baseline is None
        else:
            assert records[record.baseline].card["name"] == "dense"


def test_quality_falls_with_bits_and_error_is_measured_against_dense(swept):
    by_run = {(r.card["name"], r.bits): r for _, r in read_records(swept[0])}
    dense = by_run["dense", None]
    for method in ("rtn", "gptq"):
        three, four = by_run[method, 3], by_run[method, 4]
        assert dense.value("perplexity") < four.value("perplexity") < three.value("perplexity")
        assert 0 < four.value("kl_divergence") < three.value("kl_divergence")
        assert 1 >= four.value("top1_agreement") >= three.value("top1_agreement")
    assert by_run["gptq", 3].value("kl_divergence") < by_run["rtn", 3].value("kl_divergence")


def test_bits_are_counted_on_the_artifact(swept):
    by_run = {(r.card["name"], r.bits): r for _, r in read_records(swept[0])}
    assert by_run["dense", None].value("effective_bits_per_weight") == 16
    for method in ("rtn", "gptq"):
        for bits in (3, 4):
            # 16-bit scale and a zero point of `bits` bits for each group of 64; shapes are stored too
            floor = bits + (16 + bits) / 64
            assert floor <= by_run[method, bits].value("effective_bits_per_weight") < floor + 0.6


def test_a_record_says_everything_about_its_numbers(swept):
    for _, record in read_records(swept[0]):
        assert record.environment["versions"]["torch"]
        assert record.environment["machine"]["processor"]
        assert record.config["seed"] == 0
        assert record.artifact["sha256"]
        assert record.started <= record.finished
        assert all(m.on and m.unit for m in record.measurements)
        assert (swept[0] / record.samples).is_dir()


def test_the_summary_shows_table_counts_and_place(swept):
    results, answer = swept
    assert "6 runs: " in answer.stdout
    assert str(results / "records") in answer.stdout
    for word in ("GPTQ", "RTN", "Dense"):
        assert word in answer.stdout


def test_a_second_sweep_only_prints(swept, settings):
    results, _ = swept
    before = states(results)
    answer = call("-m", "method=dense,rtn,gptq", "bits=3,4", *settings, f"paths.results={results}")
    assert answer.returncode == 0
    assert "6 already recorded" in answer.stdout
    assert states(results) == before


# ------------------------------------------------------------------------------------------------------------ failures


def test_two_sweeps_at_once_measure_everything_once(swept, settings, tmp_path):
    sweeps = [start(["-m", "method=rtn", "bits=4", *settings], tmp_path) for _ in range(2)]
    said = "".join(sweep.communicate(timeout=600)[0] for sweep in sweeps)
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    assert len(re.findall(r"compress: [0-9]+ s", said)) == len(re.findall(r"evaluate: [0-9]+ s", said)) == 2
    assert "is at it; waiting" in said
    assert_equal_quality(tmp_path, swept[0])


def test_a_failed_run_is_a_row_and_the_sweep_goes_on(settings, tmp_path):
    arguments = ["-m", "method=rtn", "bits=4", "method.grid.group_size=64,48", *settings, f"paths.results={tmp_path}"]
    answer = call(*arguments)
    assert answer.returncode == 1
    rounded = [record for _, record in read_records(tmp_path) if record.card["name"] == "rtn"]
    assert {record.config["method"]["grid"]["group_size"]: record.status for record in rounded} == {
        64: "finished",
        48: "failed",
    }
    (failed,) = (record for record in rounded if record.status == "failed")
    assert failed.failure.stage == "compress"
    assert "48" in failed.failure.reason
    assert "group_size" in failed.failure.reason
    assert failed.measurements == []
    assert "1 failed" in answer.stdout
    # a failed run is tried again, a finished one is not
    again = call(*arguments)
    assert again.returncode == 1
    assert "1 already recorded" in again.stdout


def test_a_sweep_killed_at_two_moments_leaves_what_an_undisturbed_one_does(swept, settings, tmp_path):
    """`tests/benchmarks/kill_sweep.py` does it at many."""
    arguments = ["-m", "method=rtn", "bits=4", *settings]
    rng = random.Random()
    killed_at(arguments, tmp_path, rng.uniform(0, 2), after_first_word=True, whole=False)
    killed_at(arguments, tmp_path, rng.uniform(0, 4), after_first_word=True, whole=True)
    assert killed_at(arguments, tmp_path, 600, after_first_word=False, whole=True) is not None
    assert_equal_quality(tmp_path, swept[0])
    assert drafts(tmp_path) == []


def test_a_killed_stage_ends_with_its_parent(settings, tmp_path):
    """No process goes on computing for a sweep that was killed."""
    sweep = subprocess.Popen(
        command("method=rtn", *settings, f"paths.results={tmp_path}"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert sweep.stdout.readline()
    time.sleep(2)
    assert len(_processes_of_session(sweep.pid)) > 1
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    deadline = time.monotonic() + 120  # a process may still be importing
    while _processes_of_session(sweep.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _processes_of_session(sweep.pid) == []


def test_ctrl_c_ends_with_a_word_and_no_partial_record(settings, tmp_path):
    sweep = subprocess.Popen(
        command("method=rtn", *settings, f"paths.results={tmp_path}"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert sweep.stdout.readline()
    time.sleep(2)
    os.killpg(sweep.pid, signal.SIGINT)
    _, errors = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    for file in (tmp_path / "records").rglob("*"):
        assert file.is_dir() or json.loads(file.read_text())["status"] == "finished"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_says_which_signal_ended_a_sweep(number, status):
    code = (
        "import os, sys, hydra, harness.cli as cli; sys.argv[1:] = []\n"
        f"hydra.main = lambda **_: lambda job: lambda: os.kill(os.getpid(), {int(number)})\n"
        "cli.main()"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == status
    assert answer.stderr.strip() == "interrupted: finished work is kept; the same command goes on from there"


def assert_equal_quality(results: Path, undisturbed: Path) -> None:
    """Dense and four bits, and every number to the last bit."""
    found = quality(results)
    assert found == {key: value for key, value in quality(undisturbed).items() if key in found}
    assert [key[:3] for key in sorted(found, key=str)] == [("dense", None, "finished"), ("rtn", 4, "finished")]


def _processes_of_session(session: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # the process ended while we looked
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found
