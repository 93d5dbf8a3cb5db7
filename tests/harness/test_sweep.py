"""The end of a sweep says what happened to every run and where to look next."""

from __future__ import annotations

from fake_records import failed, record, write_all

from harness.sweep import results_of, summary, table_of


def entry(status, title, reason=""):
    return {"status": status, "title": title, "reason": reason, "records": []}


def test_every_run_is_counted_and_what_did_not_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    write_all([record("dense"), record("gptq", 4, loss=0.03)], tmp_path)
    paths = sorted(tmp_path.glob("records/*/*.json"))
    entries = [
        entry("finished", "GPTQ, 4 bits, on m"),
        entry("skipped", "RTN, 4 bits, on m"),
        entry("skipped", "RTN, 4 bits, on m"),
        entry("failed", "AWQ, 3 bits, on m", "out of memory: " + "3.1 GB asked " * 12),
        entry("refused", "RTN, 9 bits, on m", "bits=9: an integer grid has 2 to 8 bits"),
    ]
    text = summary(entries, paths)
    assert text.startswith("5 runs: 1 finished, 2 already recorded, 1 failed, 1 refused")
    assert "AWQ, 3 bits, on m: failed: out of memory" in text
    assert "RTN, 9 bits, on m: refused: bits=9" in text
    assert text.count("RTN, 4 bits, on m") == 1
    assert results_of(paths[0]) == tmp_path
    for command in ("harness.show", "harness.tables all", "harness.advise", "harness.report"):
        assert command in text
    assert all(len(line) <= 100 for line in text.splitlines() if str(tmp_path) not in line)


def test_the_table_at_the_end_is_short_and_keeps_failures(tmp_path):
    runs = [record("dense"), record("awq", 4, loss=0.03), failed(record("gptq", 3))]
    write_all(runs, tmp_path)
    paths = sorted(tmp_path.glob("records/*/*.json"))
    short, whole = table_of(paths, short=True), table_of(paths)
    assert "failed" in short
    assert "no clipping of query" in whole
    assert "no clipping of query" not in short
    assert "TTFT" not in short
    assert table_of([]) == ""
