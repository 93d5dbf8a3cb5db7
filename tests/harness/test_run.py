"""The order of a run, with stages that fail on purpose."""

from __future__ import annotations

import os
import threading
import types

import pytest

from harness import claims, environment, run
from harness.records import read_records
from harness.run import Paths
from tests.test_conf import resolved


@pytest.fixture
def config():
    return resolved("model=tiny", "method=rtn", "evaluation=smoke", "tracker=none", "hardware.threads=1")


def paths(tmp_path) -> Paths:
    return Paths(tmp_path / "results", tmp_path / "cache")


def test_a_disk_that_fills_up_is_a_message_and_leaves_no_record(config, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run, "write_record", full)
    monkeypatch.setattr(run, "_baseline_needed", lambda *_: False)
    monkeypatch.setattr(run, "_measure", lambda *_: None)
    outcome = run.run(config, paths(tmp_path), say=lambda _: None)
    assert outcome.status == "failed"
    assert "No space left" in outcome.reason
    assert "paths.results=DIR" in outcome.reason
    assert list(read_records(tmp_path / "results")) == []


def test_a_disk_too_full_for_a_claim_is_a_message(config, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run.claims, "_create", full)
    monkeypatch.setattr(run, "_baseline_needed", lambda *_: False)
    outcome = run.run(config, paths(tmp_path), say=lambda _: None)
    assert (outcome.status, "No space left" in outcome.reason) == ("failed", True)


def test_a_failed_baseline_is_named_and_nothing_is_compared_with_it(config, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise run.stages.StageFailure("compress", "memory", "out of memory: planted")

    monkeypatch.setattr(run.stages, "run_stage", fail)
    outcome = run.run(config, paths(tmp_path), say=lambda _: None)
    assert outcome.status == "failed"
    assert "dense baseline failed" in outcome.reason
    assert "planted" in outcome.reason
    ((_, record),) = read_records(tmp_path / "results")
    assert (record.card["name"], record.status, record.failure.stage) == ("dense", "failed", "compress")


def test_what_was_kept_by_other_versions_is_measured_again(tmp_path, monkeypatch):
    """A sweep that was killed goes on after an upgrade: its record names one set of versions, and one schema."""
    kept, said = tmp_path / "kept", []

    def left_of(torch: str) -> bool:
        run._forget_other_versions(kept, {"versions": {"torch": torch}, "load_average_before": len(said)}, said.append)
        return (kept / "0-Perplexity.json").exists()

    assert not left_of("2.11")
    (kept / "0-Perplexity.json").write_text("[]")
    assert left_of("2.11")
    assert not said
    assert not left_of("2.13")
    assert len(said) == 1
    (kept / "0-Perplexity.json").write_text("[]")
    assert left_of("2.13")
    monkeypatch.setattr(run, "SCHEMA", run.SCHEMA + 1)
    assert not left_of("2.13")


def test_the_word_on_versions_is_written_once_and_nothing_is_trusted_without_it(tmp_path):
    """Going on rewrites no finished file; forgetting that was killed half-way is made whole, whatever went first."""
    kept, said = tmp_path / "kept", []

    def go_on() -> None:
        run._forget_other_versions(kept, {"versions": {"torch": "2.13"}}, said.append)

    kept.mkdir()  # all that a run leaves which was killed before its first file
    go_on()
    before = (kept / run.VERSIONS).stat()
    go_on()
    after = (kept / run.VERSIONS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not said
    (kept / "0-Perplexity.json").write_text("[]")
    (kept / run.VERSIONS).unlink()
    go_on()
    assert len(said) == 1
    assert [path.name for path in kept.iterdir()] == [run.VERSIONS]


def test_a_torn_record_is_named_and_not_overwritten(config, tmp_path):
    wanted = run.identity(config)
    path = run.record_path(wanted, run.digest_of(wanted), paths(tmp_path))
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1, "id": ')
    outcome = run.run(config, paths(tmp_path), say=lambda _: None)
    assert outcome.status == "failed"
    assert path.name in outcome.reason
    assert path.read_text() == '{"schema": 1, "id": '


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", ".", "/etc/passwd", "a/b\\c\0d", "", "é" * 300, "..\n/"])
@pytest.mark.parametrize("where", ["model", "card", "hardware", "bits", "sparsity", "engine"])
def test_names_cannot_leave_the_results_folder(where, name, tmp_path):
    wanted = {"model": {"name": "m"}, "card": {"name": "c"}, "hardware": {"name": "h"}, "method": {}}
    if where in ("bits", "sparsity"):
        wanted["method"] = {where: name}
    else:
        wanted[where] = {"name": name}
    path = run.record_path(wanted, "0" * 12, paths(tmp_path))
    folder = tmp_path / "results" / "records"
    assert path.resolve().parent.parent == folder.resolve()
    assert path.name.endswith("000000000000.json")
    path.parent.mkdir(parents=True)
    path.touch()  # a name that the file system takes


def test_the_dense_twin_differs_in_method_and_card_alone(config):
    twin = run.dense_twin(config)
    assert run.is_dense(twin)
    assert {key for key in config if config[key] != twin[key]} == {"method", "card"}


def test_seconds_of_compressing_say_that_others_used_the_cores_meanwhile(config, tmp_path, monkeypatch):
    """A quarter of the one core is noted; what the stage and its children use is not foreign, and the note stays."""
    used, now = iter([50.0, 50.25, 90.0, 90.05]), iter([7.0, 8.0, 7.0, 8.0])
    monkeypatch.setattr(environment, "foreign_cpu_seconds", lambda: next(used))
    monkeypatch.setattr(environment, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    notes = []
    for name in ("beside", "alone"):
        cost = run.compress(config, str(tmp_path / "cache"), str(tmp_path / name), "")["cost"]
        notes.append({m.metric: m.note for m in run._cost_measurements(cost)}["compress_seconds"])
    assert notes == ["other processes used 25% of the cores meanwhile", ""]


def test_a_peak_without_the_statistics_is_no_peak():
    cost = {"compress_seconds": 3.0, "calibration_tokens": 0, "peak_host_bytes": 7, "spared_seconds": 0.0}
    peaks = []
    for spared in (0.0, 2.0):
        found = {m.metric: m for m in run._cost_measurements(cost | {"spared_seconds": spared})}
        peaks.append((found["peak_compress_bytes"].value, found["compress_seconds"].value))
    assert peaks == [(7, 3.0), (None, 3.0)]


def test_a_model_is_made_anew_only_when_no_other_run_reads_it(tmp_path, monkeypatch):
    """`force=true` waits for whoever holds the claim of a reader, alive; one that has ended is not waited for."""
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    model, readers, said = tmp_path / "model", tmp_path / "model.readers", []
    model.mkdir()
    with claims.claimed(readers / "ended"):
        pass
    with claims.claimed(readers / "reads"):
        forgetting = threading.Thread(target=run._forget, args=(model, readers, said.append))
        forgetting.start()
        forgetting.join(0.3)
        assert model.exists()
    forgetting.join(10)
    assert not model.exists()
    assert len(said) == 1
    assert "a run that reads model" in said[0]


def test_what_several_processes_train_is_another_run_than_what_one_does(monkeypatch):
    """Every process reads texts of its own. A method that trains nothing is the same run, sharded or not."""

    def digest(method: str, *overrides: str) -> str:
        return run.digest_of(run.identity(resolved(f"method={method}", "model=tiny", *overrides)))

    alone = {method: digest(method) for method in ("word_kd", "rtn")}
    assert digest("word_kd", "hardware.sharded=true") != alone["word_kd"]
    assert digest("rtn", "hardware.sharded=true") == alone["rtn"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert digest("word_kd") != alone["word_kd"]
    assert digest("rtn") == alone["rtn"]


def test_a_sharded_training_has_a_model_of_its_own(monkeypatch):
    """Its weights agree with those of a data-parallel one to rounding, and a record names the bytes it is about."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def model(method: str, *overrides: str) -> dict:
        return run.compression_identity(run.identity(resolved(f"method={method}", "model=tiny", *overrides)))

    whole = model("word_kd")
    assert "sharded" not in whole
    assert model("word_kd", "hardware.sharded=true") == whole | {"sharded": True}
    assert model("rtn", "hardware.sharded=true") == model("rtn")


def test_what_was_trained_in_16_bits_is_no_run_of_today():
    """Training is in float32 now, whatever scores are: a record that is older must not stand for such a run."""

    def parts(method: str, dtype: str) -> tuple[dict, dict]:
        wanted = run.identity(resolved(f"method={method}", "model=tiny", f"hardware.scoring_dtype={dtype}"))
        return wanted, run.compression_identity(wanted)

    for method, dtype, said in (
        ("word_kd", "bfloat16", True),
        ("word_kd", "float32", False),
        ("rtn", "bfloat16", False),
    ):
        assert all(("trained_in" in part) == said for part in parts(method, dtype))


# ---------------------------------------------------------------------------------------------------- timing by itself


def test_what_was_measured_at_once_is_timed_later_and_nothing_is_done_twice(config, tmp_path, monkeypatch):
    """The same numbers as in one go. Between the two there is no record, and the second only times."""
    started = []

    def here(stage, function, arguments, **_):
        started.append(stage)
        return run.stages.StageResult(function(**arguments), 1.0, None)

    monkeypatch.setattr(run.stages, "run_stage", here)
    monkeypatch.setattr(run.stages, "warm_up", lambda: None)
    later = run.run(config, paths(tmp_path), timing="later", say=lambda _: None)
    assert (later.status, later.path) == ("untimed", None)
    assert later.record.find("perplexity").value > 1
    assert list(read_records(tmp_path / "results")) == []
    assert started == ["compress", "evaluate"] * 2  # of the dense model, and of this one
    again = run.run(config, paths(tmp_path), timing="later", say=lambda _: None)
    assert (again.status, len(started)) == ("untimed", 4)

    now = run.run(config, paths(tmp_path), say=lambda _: None)
    assert (now.status, started[4:]) == ("finished", ["time"] * 2)
    assert run.run(config, paths(tmp_path), timing="later", say=lambda _: None).status == "skipped"
    once = run.run(config, paths(tmp_path / "once"), say=lambda _: None)
    quality = ("perplexity", "kl_divergence", "top1_agreement", "effective_bits_per_weight", "stored_bytes")
    assert [m.metric for m in now.record.measurements] == [m.metric for m in once.record.measurements]
    assert [now.record.find(name) for name in quality] == [once.record.find(name) for name in quality]


def test_a_run_without_a_stage_that_times_has_nothing_to_do_later(config, tmp_path, monkeypatch):
    config["evaluation"]["probes"] = {"perplexity": config["evaluation"]["probes"]["perplexity"]}
    monkeypatch.setattr(run, "_baseline_needed", lambda *_: False)
    monkeypatch.setattr(run, "_measure", lambda config, *_: lost_record(config, paths(tmp_path)))
    assert run.run(config, paths(tmp_path), timing="later", say=lambda _: None).path is not None


def lost_record(config, where):
    return run.lost(config, where, "planted")[1]


def test_two_runs_are_never_timed_at_once_on_one_device(config, tmp_path, monkeypatch):
    """Nor do they wait for each other with anything else, or on two devices."""
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    meeting, met = {}, {}

    def stage_of(name, *_, **__):
        if name != "compress":
            barrier, patience = meeting[name]
            try:
                barrier.wait(patience)
                met[name].append(True)
            except threading.BrokenBarrierError:
                met[name].append(False)
            return run.stages.StageResult([], 0.2, None)
        report = {"cost": {"compress_seconds": None}, "artifact": {}, "curves": [], "origin": {}}
        return run.stages.StageResult(report, 0.2, None)

    monkeypatch.setattr(run.stages, "run_stage", stage_of)
    monkeypatch.setattr(run, "_baseline_needed", lambda *_: False)

    def check(devices: dict, meet_while_timed: bool) -> None:
        for name, together in (("evaluate", True), ("time", meet_while_timed)):
            meeting[name], met[name] = (threading.Barrier(2), 60 if together else 0.5), []
        threads = []
        for seed, device in devices.items():
            job = {**config, "seed": seed, "hardware": {**config["hardware"], "device": device}}
            threads.append(threading.Thread(target=run.run, args=(job, paths(tmp_path)), kwargs={"say": print}))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert met == {"evaluate": [True] * 2, "time": [meet_while_timed] * 2}

    check({1: "cpu", 2: "cpu"}, meet_while_timed=False)
    monkeypatch.setattr(run.environment.Hardware, "check_device", lambda _: None)
    monkeypatch.setattr(run.launching, "visible_devices", lambda _: ["3", "5"])
    check({3: "cuda:0", 4: "cuda:1"}, meet_while_timed=True)
    check({5: "cuda:0", 6: "cuda"}, meet_while_timed=False)


def test_a_device_has_one_name_whatever_a_process_sees_of_the_machine(monkeypatch):
    monkeypatch.setattr("harness.environment.machine", lambda: {"gpus": ["H100"] * 4})
    assert run.launching.own_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    seen = run.launching.own_device("cuda"), run.launching.own_device("cuda:1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert seen == (run.launching.own_device("cuda:2"), run.launching.own_device("cuda:0"))


def test_another_word_for_when_to_time_is_refused(config, tmp_path):
    outcome = run.run(config, paths(tmp_path), timing="soon", say=lambda _: None)
    assert (outcome.status, "now, later" in outcome.reason) == ("refused", True)
