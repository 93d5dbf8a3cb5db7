"""The index is never seen: what it gives is what the files say, whatever happened to either."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from fake_records import failed, sweep, write_all

from harness import record_index
from harness.record_index import read_all
from harness.records import read_records, write_record


@pytest.fixture(autouse=True)
def small_index(monkeypatch, tmp_path):
    monkeypatch.setattr(record_index, "FEWEST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def results(tmp_path):
    runs = [replace(r, layer_errors={"0.q": 0.125, "0.k": 0.1}, layer_output_errors={"0.q": 0.3}) for r in sweep()[1:3]]
    write_all([*sweep()[:1], *runs, failed(sweep()[3])], tmp_path / "results")
    return tmp_path / "results"


def index_files(tmp_path):
    return list((tmp_path / "cache" / "llm-inference-harness" / "indexes").glob("*"))


def test_first_and_later_readings_are_what_the_files_say(results, tmp_path):
    said = list(read_records(results))
    for _ in range(2):
        assert read_all(results) == (said, [])
    (file,) = index_files(tmp_path)
    before = file.stat().st_mtime_ns
    read_all(results)
    assert file.stat().st_mtime_ns == before, "nothing new, nothing written"
    bare = read_all(results, layer_errors=False)[0]
    assert [r for _, r in bare] == [replace(r, layer_errors={}, layer_output_errors={}) for _, r in said]


def test_a_record_that_changed_is_read_again_and_one_that_is_gone_is_forgotten(results):
    read_all(results)
    (first, run), (second, _), *_ = read_records(results)
    write_record(replace(run, command="made anew"), first)
    second.unlink()
    found = dict(read_all(results)[0])
    assert found[first].command == "made anew"
    assert second not in found
    assert dict(read_all(results)[0]) == found


def test_a_torn_index_and_an_unwritable_cache_are_no_failure(results, tmp_path, monkeypatch):
    said = read_all(results)
    (file,) = index_files(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    assert read_all(results) == said
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert read_all(results) == said


def test_a_file_that_is_no_record_is_named_every_time(results):
    broken = results / "records" / "model" / "broken.json"
    broken.write_text('{"schema": 1, "id": ', encoding="utf-8")
    (results / "records" / "model" / "list.json").write_text("[]", encoding="utf-8")
    for _ in range(2):
        records, reasons = read_all(results)
        assert len(records) == 4
        assert [reason.split()[0] for reason in reasons] == [str(broken), str(broken.with_name("list.json"))]
