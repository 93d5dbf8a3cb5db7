"""Records survive the way to disk and back, whole or not at all."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
from fake_records import QUICK, failed, record, sweep

from harness import statistics
from harness.records import (
    SCHEMA,
    Measurement,
    from_json,
    read_record,
    read_records,
    remove_drafts,
    to_json,
    write_json_atomically,
    write_record,
)


@pytest.mark.parametrize("run", [*sweep(), failed(record("awq", 3, model="mödel|<b>"))], ids=lambda r: r.id)
def test_a_record_comes_back_equal(run, tmp_path):
    assert read_record(write_record(run, tmp_path / "record.json")) == run


def test_what_is_no_number_becomes_null(tmp_path):
    values = (math.nan, math.inf, -math.inf)
    run = replace(record("gptq", 4), measurements=[Measurement("m", v, "", "", "lower", (v, 1.0)) for v in values])
    path = write_record(run, tmp_path / "record.json")
    assert [m["value"] for m in json.loads(path.read_text())["measurements"]] == [None] * 3
    assert "NaN" not in path.read_text()
    assert read_record(path).value("m") is None


def test_fields_that_scripts_rely_on():
    data = to_json(record("gptq", 4))
    assert {
        "status",
        "failure",
        "card",
        "model",
        "bits",
        "config",
        "measurements",
        "cost",
        "environment",
        "artifact",
    } <= set(data)
    assert set(data["measurements"][0]) >= {"metric", "value", "unit", "on", "better", "interval"}
    assert to_json(failed(record("gptq", 4)))["failure"] == {
        "stage": "compress", "reason": "out of memory: 3.1 GB asked, 2.0 GB free"
    }  # fmt: skip


def test_find_takes_metric_and_on_exactly():
    run = record("gptq", 4, batches=(1, 4))
    assert run.find("perplexity").on == QUICK
    assert run.find("perplexity", QUICK[:-1]) is None
    assert run.value("decode_tokens_per_second", "batch 4, prompt 128, 32 new") > run.value("decode_tokens_per_second")
    assert run.value("absent") is None


@pytest.mark.parametrize("schema", [SCHEMA + 1, None, "1"])
def test_another_schema_is_refused_by_name(schema):
    with pytest.raises(ValueError, match=f"schema {schema}.*schema {SCHEMA}"):
        from_json({**to_json(record("gptq", 4)), "schema": schema})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": 1}',
        '{"schema": 1, "measurements": [1]}',
        '{"schema": 1, "measurements": [{}]}',
    ],
)
def test_what_is_no_record_is_named(text, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.json is not a record"):
        read_record(path)


def test_an_unfinished_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_record(record("gptq", 4), path)
    before = path.read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_record(record("awq", 4), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_drafts_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    for name in (".a[1].json.0f.partial", ".b.json.0f.partial", "a[1].json", ".a1.json.0f.partial"):
        (tmp_path / name).touch()
    remove_drafts(tmp_path, "a[1].json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a1.json.0f.partial",
        ".b.json.0f.partial",
        "a[1].json",
    ]
    remove_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].json"]


def test_what_json_cannot_say_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json_atomically({"x": object()}, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_records_are_read_in_order_of_their_path(tmp_path):
    for k, run in enumerate(sweep()):
        write_record(run, tmp_path / "records" / "model" / f"{9 - k}.json")
    assert [run for _, run in read_records(tmp_path)] == sweep()[::-1]


def test_a_written_file_may_be_read_by_whom_the_system_lets_read_files(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_json_atomically({}, tmp_path / "x.json")
    assert (tmp_path / "x.json").stat().st_mode == plain.stat().st_mode


def test_percentile_intervals_of_older_records_become_as_wide_as_they_are_now():
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.4, size=16 * 50)
    means = statistics.block_means(losses, 50, 4000, rng)
    old = np.exp(np.quantile(means, [0.025, 0.975]))
    row = record("gptq", 4)
    on = "made-up text, gptq-512, 16 windows"
    perplexity = Measurement("perplexity", float(np.exp(losses.mean())), "ppl", on, "lower", tuple(map(float, old)))
    agreement = Measurement("top1_agreement", 0.999, "share", on, "higher", (0.99, 1.0))
    accuracy = Measurement("accuracy", 0.5, "share", "arc_easy, 1000 questions", "higher", (0.47, 0.53))
    data = to_json(replace(row, measurements=[perplexity, agreement, accuracy]))
    read = from_json(data | {"schema": 1})
    now = np.exp(statistics.bootstrap_interval(means, 16))
    np.testing.assert_allclose(read.measurements[0].interval, now, atol=0.03 * (now[1] - now[0]))
    assert read.measurements[1].interval[0] < 0.99
    assert read.measurements[1].interval[1] == 1.0
    assert read.measurements[2] == accuracy
    assert from_json(data).measurements[0] == perplexity  # one of today
