"""The index is never seen: what it gives is what the files say, whatever happened to either."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from fake_records import failed, sweep, write_all

from harness import record_index
from harness.record_index import read_all, read_packed
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
    before = {file: file.stat().st_mtime_ns for file in index_files(tmp_path)}
    read_all(results)
    assert {file: file.stat().st_mtime_ns for file in index_files(tmp_path)} == before, "nothing new, nothing written"
    bare = read_packed(results).records.items()
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


def test_a_record_that_changed_in_place_is_read_again_whatever_its_size_and_time(results):
    read_all(results)
    path, run = next(read_records(results))
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"lower"', b'"LOWER"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = dict(read_all(results)[0])[path]
    assert found != run
    assert found == dict(read_records(results))[path]


def test_errors_of_layers_are_read_from_their_files_where_the_index_has_only_older_ones(results, tmp_path):
    """Two processes wrote one file of the index each: of the records the newer, of the errors the older."""
    read_all(results)
    (older,) = (file for file in index_files(tmp_path) if file.name.endswith("-layers"))
    kept = older.read_bytes()
    path, run = list(read_records(results))[1]
    write_record(replace(run, layer_errors={"0.q": 0.75, "0.k": None}), path)
    read_packed(results)
    older.write_bytes(kept)
    assert dict(read_all(results)[0])[path].layer_errors == {"0.q": 0.75, "0.k": None}
    assert read_all(results) == (list(read_records(results)), [])


def test_processes_that_read_at_once_find_the_same_and_leave_a_whole_index(results):
    said = list(read_records(results))
    with ThreadPoolExecutor(4) as pool:
        for records, broken in pool.map(lambda _: read_all(results), range(12)):
            assert (records, broken) == (said, [])


def test_a_torn_index_and_an_unwritable_cache_are_no_failure(results, tmp_path, monkeypatch):
    said = read_all(results)
    for file in index_files(tmp_path):
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
