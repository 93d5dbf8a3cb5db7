"""Tables come from records only, never mix protocols or machines, and show everything that happened."""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from fake_records import DENSE_PERPLEXITY, EPYC, LONG, QUICK, XEON, collapsed, failed, record, sweep, write_all

from harness import columns, rows, tables
from harness.errors import ConfigError
from harness.records import Measurement, RunRecord
from harness.table_csv import to_csv
from harness.table_formats import to_html, to_latex, to_markdown
from harness.taxonomy import TABLES, table_named

TABLE_1 = table_named("table_1")
HOSTILE = "evil|`<script>alert(1)</script>` $x_1$ & 100% \\input{x} [a](javascript:x)\n# h \x1b[31m\u202e"


def blocks(records, **options):
    return tables.blocks_of(TABLE_1, records, **options)


def rows_of(block):
    """Label → {head: cell}."""
    return {
        f"{row.cells[0].value} {row.cells[1].value}".strip(): dict(zip(block.heads, row.cells, strict=True))
        for row in block.rows
        if row.cells
    }


def test_rows_follow_the_survey_with_dense_first_and_bits_downwards():
    (block,) = blocks(sweep()[::-1])
    assert list(rows_of(block)) == ["Dense", "RTN 4", "RTN 3", "GPTQ 4", "GPTQ 3", "AWQ 4", "AWQ 3"]


def test_rows_of_one_method_follow_their_settings_with_numbers_by_size():
    settings = [
        {"draft": {"_target_": kind, "layers": layers}, "drafts": drafts}
        for kind, layers in (("PromptLookup", None), ("TruncatedDraft", 8), ("TruncatedDraft", 16))
        for drafts in (1, 2, 4, 10)
    ]
    runs = [record("gptq", 4, method=method) for method in settings]
    for given in (runs, runs[::-1], sorted(runs, key=lambda run: run.id)):
        assert rows.in_print_order(given) == runs
    sparse = [record("wanda", method={"sparsity": sparsity}) for sparsity in (0.5, 0.75, "2of4", "2of16", "10of20")]
    assert rows.in_print_order(sparse[::-1]) == sparse


def test_every_number_is_the_records_own():
    (block,) = blocks(sweep())
    row = rows_of(block)["GPTQ 4"]
    run = next(r for r in sweep() if r.card["name"] == "gptq" and r.bits == 4)
    assert float(row["PPL"].value) == pytest.approx(run.value("perplexity"), rel=1e-3)
    assert float(row["top-1 %"].value) == pytest.approx(100 * run.value("top1_agreement"), abs=0.05)
    assert float(row["cloze %"].value) == pytest.approx(100 * run.value("accuracy"), abs=0.05)
    assert float(row["MB"].value) == pytest.approx(run.value("stored_bytes") / 1e6, abs=0.05)
    assert float(row["t/s b4"].value) == pytest.approx(
        run.value("decode_tokens_per_second", "batch 4, prompt 128, 32 new"), rel=5e-3
    )
    assert row["comp. s"].value == "61.4"


def test_a_missing_number_is_an_empty_cell_and_never_a_zero():
    lost = record("gptq", 4)
    lost = replace(
        lost,
        measurements=[
            replace(m, value=None, interval=None, note="no timer") if m.metric == "time_to_first_token_ms" else m
            for m in lost.measurements
        ],
    )
    (block,) = blocks([record("dense"), lost])
    cells = rows_of(block)
    assert cells["GPTQ 4"]["TTFT ms"].value == ""
    assert cells["Dense"]["KL nats"].value == cells["Dense"]["comp. s"].value == ""
    assert any("no timer" in note for note in block.notes)


def test_two_protocols_never_share_a_column():
    quick, long = sweep(), sweep(on=LONG, evaluation="standard")
    found = blocks(quick + long)
    assert len(found) == 2
    assert [sum(QUICK in line for line in b.protocol) for b in found] == [1, 0]
    assert [sum(LONG in line for line in b.protocol) for b in found] == [0, 1]


def test_two_texts_of_one_name_never_share_a_block():
    """A file may change and keep its name: what was scored is the text whose hash the record has."""

    def scored(runs, digest):
        text = {"evaluation": {"name": "own.txt", "sha256": digest}}
        return [replace(r, environment={**r.environment, "text": text}) if r.measurements else r for r in runs]

    before, after = scored(sweep(), "aa"), scored([record("dense"), record("awq", 4, loss=0.01)], "bb")
    assert len(blocks([*before, failed(record("gptq", 8))])) == 1, "a run that scored nothing joins"
    assert [len(group) for group in tables.comparable([*before, *after])] == [len(before), len(after)]
    with pytest.raises(ConfigError, match=r'text on "aa"; .* has text on "bb"'):
        blocks([*before, *after], strict=True)


def test_two_machines_never_share_a_block():
    found = blocks(sweep() + sweep(machine=XEON))
    assert len(found) == 2
    assert EPYC["processor"] in found[0].title
    assert XEON["processor"] in found[1].title


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"on": LONG}, (QUICK, LONG)),
        ({"machine": XEON}, (EPYC["processor"], XEON["processor"])),
    ],
)
def test_strict_names_both_sides(other, words):
    with pytest.raises(ConfigError) as error:
        blocks([record("gptq", 4), record("awq", 4, **other)], strict=True)
    assert all(word in str(error.value) for word in words)


def test_strict_accepts_what_compares():
    assert len(blocks(sweep(), strict=True)) == 1


def test_every_column_holds_one_workload():
    """Whatever the mixture, in each block all measurements behind a protocol's column have one `on`."""
    mixed = sweep() + sweep(on=LONG) + sweep(batches=(1, 8)) + sweep(machine=XEON) + [record("gptq", 4, model="other")]
    for group in tables.comparable(mixed):
        filled = columns.columns_of(group)
        for column, numbers in zip(filled, zip(*columns.measured(group, filled), strict=True), strict=True):
            found = [m for m in numbers if m]
            assert column.quantity.metric == "compress_seconds" or len({m.on for m in found}) == 1


def test_plain_and_captured_steps_are_never_set_side_by_side():
    """Records from before there was a choice decoded plainly: they stay beside those that say so."""

    def decoded(day: int, **hardware: str) -> RunRecord:
        one = record("rtn", 4, day=day)
        return replace(one, config={**one.config, "hardware": {"name": "h100", "device": "cuda", **hardware}})

    older, plain, captured = decoded(20), decoded(21, steps="plain"), decoded(22, steps="auto")
    blocks = tables.comparable([older, plain, captured])
    assert sorted(len(block) for block in blocks) == [1, 2]
    assert [captured] in blocks


def test_contexts_have_a_column_for_each_batch_at_the_longest_that_some_row_managed():
    def at(batch, length, value):
        on = f"batch {batch}, context {length}, 16 new, bfloat16"
        return Measurement("context_output_token_ms", value, "ms", on, "lower", note="" if value else "does not fit")

    cells = [at(1, 512, 5.0), at(1, 32768, 9.0), at(64, 512, 11.0), at(64, 32768, None)]
    wide = replace(record("gptq", 4), measurements=cells)
    heads = [column.head for column in columns.columns_of([wide])]
    assert [head for head in heads if "TPOT" in head] == ["TPOT ms b1 at 32768", "TPOT ms b64 at 512"]
    dense = replace(record("dense"), measurements=[at(1, 512, 5.0), at(1, 32768, None), at(64, 512, 9.0)])
    heads = [column.head for column in columns.columns_of([dense, wide])]
    assert [head for head in heads if "TPOT" in head] == ["TPOT ms b1 at 32768", "TPOT ms b64 at 512"]
    one = replace(record("gptq", 4), measurements=cells[:2])
    assert [head for head in (c.head for c in columns.columns_of([one])) if "TPOT" in head] == ["TPOT ms at 32768"]


def test_a_run_of_speed_alone_joins_the_block_of_the_same_workload():
    speed = record("awq", 4, evaluation="speed")
    speed = replace(speed, measurements=[m for m in speed.measurements if m.metric.startswith(("time", "decode"))])
    (block,) = blocks([record("dense"), record("gptq", 4), speed])
    assert rows_of(block)["AWQ 4"]["PPL"].value == ""
    assert rows_of(block)["AWQ 4"]["TPOT ms"].value != ""


def test_failures_are_rows_with_their_reason():
    (block,) = blocks(sweep())
    cell = rows_of(block)["AWQ 3"]
    assert cell["PPL"].value == "failed"
    (note,) = [block.notes[k - 1] for k in cell["Method"].notes if "out of memory" in block.notes[k - 1]]
    assert note.startswith("failed in compress")


def test_a_run_that_failed_late_keeps_what_it_measured():
    late = record("gptq", 4)
    late = replace(
        failed(late, "killed", "time"), measurements=[m for m in late.measurements if m.metric == "perplexity"]
    )
    (block,) = blocks([record("dense"), record("awq", 4), late])
    row = rows_of(block)["GPTQ 4"]
    assert row["PPL"].value
    assert row["KL nats"].value == "failed"


def test_a_table_of_failures_alone_still_names_them():
    (block,) = blocks([failed(record("gptq", 4))])
    assert list(rows_of(block)) == ["GPTQ, failed 4"]


def test_collapsed_rows_are_marked_and_never_best():
    worse, broken = record("gptq", 3, loss=0.3), collapsed(record("rtn", 3, loss=3))
    (block,) = blocks([record("dense"), worse, broken, record("awq", 3, loss=0.5)])
    rows = rows_of(block)
    assert rows["RTN 3"]["PPL"].sign == "✗"
    assert not any(cell.bold for cell in rows["RTN 3"].values())
    assert rows["GPTQ 3"]["PPL"].bold
    assert not rows["AWQ 3"]["PPL"].bold
    assert any("collapsed" in sign for sign in block.signs)


def test_best_is_judged_among_equal_bits_in_the_direction_of_the_metric():
    (block,) = blocks(sweep())
    rows = rows_of(block)
    for head, pick, ties in (("PPL", min, set()), ("KL nats", min, set()), ("cloze %", max, {"GPTQ 4"})):
        rivals = {label: float(row[head].value) for label, row in rows.items() if label.endswith("4")}
        assert {label for label in rivals if rows[label][head].bold} == {pick(rivals, key=rivals.get)} | ties
    assert not any(cell.bold for cell in rows["Dense"].values())
    assert not rows["GPTQ 3"]["PPL"].bold, "alone at its bits but for a collapsed and a failed run"


def test_speeds_within_each_others_interval_are_ties():
    (block,) = blocks(sweep())
    assert not any(row["TPOT ms"].bold for row in rows_of(block).values())


def test_the_sign_for_no_difference_follows_the_paired_interval():
    (block,) = blocks(sweep())
    signed = {label for label, row in rows_of(block).items() if "≈" in row["PPL"].sign}
    runs = {f"{rows.title_of(r)} {r.bits}": r.find("perplexity_ratio") for r in sweep()}
    contains = {label for label, m in runs.items() if m and m.interval[0] <= 1 <= m.interval[1]}
    assert signed == contains == {"AWQ 4"}
    signed = {label for label, row in rows_of(block).items() if "≈" in row["cloze %"].sign}
    runs = {f"{rows.title_of(r)} {r.bits}": r.find("accuracy_difference") for r in sweep()}
    assert signed == {label for label, m in runs.items() if m and m.interval[0] <= 0 <= m.interval[1]}
    assert any("not to be told from dense" in sign for sign in block.signs)


def test_a_baseline_that_is_no_reference_says_so():
    run = record("dense")
    odd = replace(
        run, measurements=[replace(run.measurements[0], note="outside its anchor of 27.65"), *run.measurements[1:]]
    )
    (block,) = blocks([odd, record("gptq", 4)])
    (number,) = rows_of(block)["Dense"]["Method"].notes
    assert block.notes[number - 1] == "perplexity outside its anchor of 27.65"


def test_seconds_that_are_not_all_of_them_say_so():
    run = record("gptq", 4)
    noted = [replace(m, note="of the second try") if m.metric == "compress_seconds" else m for m in run.measurements]
    (block,) = blocks([record("dense"), replace(run, measurements=noted)])
    assert "compress_seconds of the second try" in block.notes


def test_a_table_too_wide_is_cut_between_quality_and_speed():
    (block,) = blocks(sweep())
    heads = [line for line in to_markdown("", [block], width=130).splitlines() if "Method" in line]
    assert len(heads) == 2
    assert "top-1 %" in heads[0]
    assert heads[1].split("|")[3].strip() == "TTFT ms"


def test_one_task_judged_in_two_ways_has_two_columns():
    run = record("gptq", 4)
    extra = [
        Measurement("accuracy", v, "share", f"gsm8k v3, 5-shot, {f}", "higher")
        for f, v in (("strict", 0.1), ("flexible", 0.2))
    ]
    (block,) = blocks([replace(run, measurements=[*run.measurements, *extra])])
    row = rows_of(block)["GPTQ 4"]
    assert (row["gsm8k % strict"].value, row["gsm8k % flexible"].value) == ("10.0", "20.0")


def test_marks_of_one_task_asked_in_two_ways_stay_in_their_columns():
    def asked(run, zero, five):
        extra = [
            Measurement("accuracy", v, "share", f"arc_easy v1.0, {n}-shot, 200 of 2376 questions (sample 0)", "higher")
            for n, v in ((0, zero), (5, five))
        ]
        return replace(run, measurements=[*run.measurements, *extra])

    (block,) = blocks([asked(record("gptq", 4), 0.4, 0.5), asked(record("awq", 4), 0.3, 0.6)])
    gptq, awq = (rows_of(block)[name] for name in ("GPTQ 4", "AWQ 4"))
    assert (gptq["arc_easy % 0-shot"].value, gptq["arc_easy % 5-shot"].value) == ("40.0", "50.0")
    assert [gptq[f"arc_easy % {n}-shot"].bold for n in (0, 5)] == [True, False]
    assert [awq[f"arc_easy % {n}-shot"].bold for n in (0, 5)] == [False, True]


def test_a_dense_model_asked_in_several_ways_is_one_row_and_before_and_after_stand_in_one():
    on = "svamp, 100 of 300 questions (sample 0), exact match (number), asked as it is taught"

    def with_answers(run, **values):
        more = [Measurement(metric, value, "share", on, "higher") for metric, value in values.items()]
        return replace(run, measurements=[*run.measurements, *more])

    dense = [
        with_answers(record("dense", method={"way": way}), accuracy=share) for way, share in (("a", 0.02), ("b", 0.05))
    ]
    students = [
        with_answers(record(name), accuracy_before=before, accuracy=after)
        for name, before, after in (("fine_tune_cot", 0.02, 0.11), ("step_by_step", 0.05, 0.2))
    ]
    (block,) = tables.blocks_of(table_named("table_3"), [*dense, *students])
    rows = rows_of(block)
    assert [label for label in rows if label.startswith("Dense")] == ["Dense"]
    assert rows["Dense"]["svamp %"].value == ""  # what it answers depends on how it is asked: see each student's row
    assert (rows["Fine-tune-CoT"]["before %"].value, rows["Fine-tune-CoT"]["svamp %"].value) == ("2.0", "11.0")
    assert (rows["Step-by-step"]["before %"].value, rows["Step-by-step"]["svamp %"].value) == ("5.0", "20.0")


def test_without_speed_there_is_no_column_of_kernels():
    (block,) = blocks([record("gptq", 4, batches=())])
    assert "kernel" not in block.heads
    assert {len(row.cells) for row in block.rows if row.cells} == {len(block.heads)} == {len(block.arrows)}


def test_departures_are_footnotes_shared_by_rows():
    (block,) = blocks(sweep())
    rows = rows_of(block)
    number = rows["AWQ 4"]["Method"].notes[0]
    assert block.notes[number - 1] == "no clipping of query and key projections"
    assert number in rows["AWQ 3"]["Method"].notes


def test_rows_of_one_method_and_bits_say_what_sets_them_apart():
    (block,) = blocks([record("gptq", 4, method={"act_order": order}) for order in (True, False)])
    assert set(rows_of(block)) == {"GPTQ (act_order=True) 4", "GPTQ (act_order=False) 4"}


def test_sparsity_is_a_column_where_a_method_has_one():
    pruned = [record("wanda", method={"sparsity": s}) for s in (0.5, "2:4")]
    (block,) = tables.blocks_of(table_named("table_2"), pruned)
    assert [row.cells[2].value for row in block.rows if row.cells] == ["0.5", "2:4"]
    assert block.heads[2] == "sparsity"


def test_systems_without_a_record_are_listed_and_not_invented():
    (block,) = blocks(sweep())
    for system in TABLE_1.systems:
        assert (system.title in block.absent) != (system.name in ("rtn", "gptq", "awq"))


def test_methods_outside_the_survey_stand_after_it_in_the_group_of_their_card():
    peer = record("peer_torchao", 4, card={"title": "torchao", "taxonomy": "quantization/weight_only"})
    (block,) = blocks([peer, *sweep()])
    assert list(rows_of(block))[-1] == "torchao 4"


def test_each_record_is_in_the_table_of_its_family_alone():
    records = [*sweep(), record("wanda"), record("minillm")]
    shown = {
        table.name: {r.cells[0].value for b in tables.blocks_of(table, records) for r in b.rows if r.cells}
        for table in TABLES
    }
    assert shown["table_1"] == {"Dense", "RTN", "GPTQ", "AWQ"}
    assert shown["table_2"] == {"Dense", "Wanda"}
    assert shown["table_3"] == {"Dense", "MiniLLM"}
    assert shown["table_4"] == set()


def test_perplexity_per_word_has_a_column_with_its_protocol():
    on = "wikitext2-test evaluation, lm-eval-word, 62 pages, windows of 8192"
    run = record("gptq", 4)
    word = Measurement("word_perplexity", 28.56, "ppl/word", on, "lower", (27.0, 30.0))
    (block,) = blocks([replace(run, measurements=[*run.measurements, word])])
    assert [row["word PPL"].value for row in rows_of(block).values()] == ["28.56"]
    assert f"Perplexity per word: {on}" in block.protocol


def test_a_task_that_may_be_guessed_is_said_below_the_table_and_a_fall_to_guessing_is_marked():
    def noted(run, note):
        measured = [replace(m, note=note) if m.metric == "accuracy" else m for m in run.measurements]
        return replace(run, measurements=measured)

    dense, fallen = sweep()[0], record("gptq", 4)
    text = tables.summary_table([noted(dense, "not told from guessing (25 %)"), noted(fallen, "collapsed (25 %)")])
    task = next(m.on for m in fallen.measurements if m.metric == "accuracy").partition(" ")[0]
    assert f"not told from guessing: {task} (25 %)" in text
    (block,) = blocks([dense, noted(fallen, "collapsed (25 %)")])
    marked = [cell for row in block.rows for cell in row.cells if tables.COLLAPSED in cell.sign]
    assert len(marked) == 1


def test_a_kernel_keeps_its_whole_name_where_it_stands_alone():
    name = "int4 packed (Triton, matrix units)"
    run = record("gptq", 4)
    note = f"{name}, CUDA graph, bfloat16; 4 requests"
    noted = [replace(m, note=note) if m.metric == "time_per_output_token_ms" else m for m in run.measurements]
    (block,) = blocks([replace(run, measurements=noted)])
    assert [row["kernel"].value for row in rows_of(block).values()] == [name]


def test_kernels_are_named_and_what_all_share_is_said_once():
    (block,) = blocks(sweep())
    assert {row["kernel"].value for row in rows_of(block).values()} == {
        "dense matmul", "int4 packed (torch)", "dequantised", ""
    }  # fmt: skip
    assert sum("bfloat16" in line for line in block.protocol if line.startswith("Speed")) == 1


# ---- formats


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def hostile():
    reason = f"{HOSTILE} & <b>"
    runs = [
        record("dense", model=HOSTILE),
        record("gptq", 4, model=HOSTILE),
        failed(record("awq", 3, model=HOSTILE), reason),
    ]
    peer = record("x", 4, model=HOSTILE, card={"title": HOSTILE, "taxonomy": "quantization/weight_only"})
    return [*runs, peer]


def test_html_of_a_hostile_name_runs_nothing(hostile):
    reader = Reader()
    reader.feed(to_html("Table", blocks(hostile)))
    assert "script" not in reader.tags
    assert not reader.links
    assert any("<script>alert(1)</script>" in text for text in reader.text), "shown as text"


def test_markdown_of_a_hostile_name_keeps_its_table(hostile):
    text = to_markdown("Table", blocks(hostile), width=1000)
    assert not set(re.findall(r"[^\n\x20-\x7e]", text)) & {"\x1b", "\u202e"}
    assert "<script" not in text
    assert "](" not in text.replace("\\](", "")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines if "Method" in line or "GPTQ" in line} == {15}
    assert not re.search(r"^# h", text, re.MULTILINE)


def test_a_markdown_renderer_sees_a_table_and_nothing_else(hostile):
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    reader = Reader()
    reader.feed(renderer.render(to_markdown("Table", blocks(hostile), width=1000)))
    assert set(reader.tags) <= {"h2", "h3", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "em", "strong"}
    assert reader.tags.count("table") == 1
    assert reader.tags.count("th") == 14
    assert "".join(reader.text).count("<script>alert(1)</script>") >= 2, "shown as text"


def test_latex_of_a_hostile_name_has_no_live_command(hostile):
    text = to_latex("Table", blocks(hostile))
    assert "\\input" not in text
    assert "100\\%" in text
    assert not re.search(r"(?<!\\)%", text)
    assert text.replace("\\{", "").replace("\\}", "").count("{") == text.replace("\\{", "").replace("\\}", "").count(
        "}"
    )
    assert text.isascii()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(hostile, tmp_path):
    odd = record("gptq", 4, model='łódź "quoted" 模型 ÿþ~^^M')
    (tmp_path / "table.tex").write_text(to_latex("Table", blocks([*sweep(), *hostile, odd])), encoding="utf-8")
    page = "\\documentclass{article}\\begin{document}\\input{table}\\end{document}"
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "too large" not in done.stdout, "a float beyond the page loses its end"


def test_latex_floats_fit_a_page_and_lose_no_row():
    many = [record("rtn", 4, method={"seed": seed}) for seed in range(120)]
    text = to_latex("Table", blocks([record("dense"), *many]))
    floats = text.split("\\begin{table*}")[1:]
    assert len(floats) > 3
    assert all(part.count(" \\\\\n") <= 58 for part in floats)
    first = [part for part in floats if "PPL" in part]
    assert sum(len(re.findall(r"^\{RTN", part, re.MULTILINE)) for part in first) == 120
    assert all("Weight only" in part for part in floats), "each part names the group that it goes on with"


def test_a_perplexity_that_is_no_number_is_an_empty_cell_with_its_sign():
    run = record("rtn", 2)
    first, *rest = run.measurements
    lost = replace(first, value=None, interval=None, note="collapsed: losses are not finite")
    (block,) = blocks([record("dense"), replace(run, measurements=[lost, *rest])])
    cell = rows_of(block)["RTN 2"]["PPL"]
    assert (cell.value, cell.sign) == ("", "✗")


def test_csv_has_every_measurement_unrounded():
    records = sweep()
    read = pd.read_csv(io.StringIO(to_csv(records)))
    expected = [(r.id, m.metric, m.on, m.value) for r in records for m in r.measurements]
    found = read[read["metric"].notna()]
    assert [tuple(row) for row in found[["record", "metric", "on", "value"]].itertuples(index=False)] == expected
    assert read[read["status"] == "failed"]["failure_reason"].tolist() == ["out of memory: 3.1 GB asked, 2.0 GB free"]


def test_csv_gives_a_spreadsheet_no_formula():
    text = to_csv([record("gptq", 4, model="=HYPERLINK(1)")])
    assert not re.search(r"(^|,)\"?=", text, re.MULTILINE)


@pytest.mark.parametrize("width", [80, 120, 160, 400])
def test_wide_tables_are_split_and_lose_no_cell(width):
    found = blocks(sweep())
    text = to_markdown("", found, width=width)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= width
    heads = [cell.strip() for line in lines if "Method" in line for cell in line.strip("|").split("|")]
    assert [h for h in heads if h not in ("Method", "Bits")] == list(found[0].heads[2:])
    assert heads.count("Method") == (1 if width >= 160 else len(heads) - len(set(heads)) - heads.count("Bits") + 2)


def test_summary_shows_all_families_together():
    text = tables.summary_table([*sweep(), record("wanda", method={"sparsity": 0.5})])
    assert all(name in text for name in ("Dense", "GPTQ", "Wanda"))
    assert "not run here" not in text


def test_no_records_is_a_table_that_says_so():
    assert "not run here: RTN" in to_markdown("Table I", [], "RTN, GPTQ")
    assert tables.summary_table([]).strip() == ""


# ---- the command


def test_command_writes_four_formats_and_prints_markdown(tmp_path, capsys):
    write_all(sweep(), tmp_path)
    assert tables.main(["table_1", f"paths.results={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("## Table I: Quantization")
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {f"table_1.{s}" for s in ("md", "tex", "html", "csv")}


def test_tables_of_records_that_belong_to_others_go_elsewhere(tmp_path):
    write_all(sweep(), tmp_path / "theirs")
    assert tables.main(["table_1", f"paths.results={tmp_path / 'theirs'}", f"output={tmp_path / 'mine'}"]) == 0
    assert len(list((tmp_path / "mine").iterdir())) == 4
    assert not (tmp_path / "theirs" / "tables").exists()


def test_command_for_all_tables(tmp_path, capsys):
    write_all(sweep(), tmp_path)
    assert tables.main(["all", f"paths.results={tmp_path}"]) == 0
    assert len(list((tmp_path / "tables").iterdir())) == 16
    assert "Table III" in capsys.readouterr().out


def test_tables_are_the_same_bytes_when_made_again(tmp_path):
    write_all(sweep(), tmp_path)
    made = []
    for _ in range(2):
        tables.main(["table_1", f"paths.results={tmp_path}"])
        made.append({p.name: p.read_bytes() for p in (tmp_path / "tables").iterdir()})
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tabel_1"], ("table_1, table_2, table_3, table_4, all", "Did you mean table_1?")),
        (["table-1"], ("Did you mean table_1?",)),
        (["table_1", "path.results=x"], ("Did you mean paths.results?",)),
        (["table_1", "paths.results={tmp}", "model=smollm2-135m-ggu"], ("Did you mean smollm2-135m-gguf?",)),
        (["table_1", "paths.results={tmp}/absent"], ("no such folder",)),
        (["strict=true"], ("no table named",)),
        (["table_1", "strict=maybe"], ("strict 'maybe' is not one of true, false",)),
        (["table_1", "paths.results={tmp}", "output=/dev/null/x"], ("/dev/null/x: ", "output=DIR writes the tables")),
    ],
)
def test_what_is_typed_wrong_is_answered_with_the_way_out(arguments, words, tmp_path, capsys):
    write_all(sweep(), tmp_path)
    assert tables.main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_a_broken_record_is_named_and_the_rest_is_shown(tmp_path, capsys):
    write_all(sweep(), tmp_path)
    (tmp_path / "records" / "model" / "broken.json").write_text("{", encoding="utf-8")
    assert tables.main(["table_1", f"paths.results={tmp_path}"]) == 1
    streams = capsys.readouterr()
    assert "GPTQ" in streams.out
    assert "broken.json" in streams.err


def test_help_needs_neither_torch_nor_pandas():
    code = "import sys, harness.tables as t; t.main(['--help']); assert not {'torch', 'pandas'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(table.name in done.stdout for table in TABLES)


def test_units_of_percent_are_not_scaled_twice():
    run = record("gptq", 4)
    percent = [
        Measurement("accuracy", 41.5, "%", m.on, "higher") if m.metric == "accuracy" else m for m in run.measurements
    ]
    (block,) = blocks([replace(run, measurements=percent)])
    assert rows_of(block)["GPTQ 4"]["cloze %"].value == "41.5"


def test_the_model_s_note_and_calibration_in_the_domain_are_said_above_the_numbers():
    records = [replace(run, config={**run.config, "model": {"note": "rounded before"}}) for run in sweep()]
    text = {"calibration": {"name": "articles"}, "calibrated_in_domain": True}
    records = [replace(run, environment={**run.environment, "text": text}) for run in records]
    shown = tables.summary_table(records)
    assert "Model: rounded before" in shown
    assert "Calibration: articles" in shown
    assert "in the domain of the evaluation" in shown


# ------------------------------------------------------------------------------------------- cards say more than bits


def test_widths_name_what_is_quantized():
    cases = [
        ((4, None, None), "4"),
        ((4, 8, None), "W4A8"),
        ((None, None, 8), "KV8"),
        ((4, None, 8), "W4A16KV8"),
        ((8, 8, 8), "W8A8KV8"),
        ((None, None, None), ""),
    ]
    for (weights, inputs, cached), text in cases:
        card = {"activation_bits": inputs, "key_value_bits": cached}
        assert rows.widths(record("rtn", weights, card=card)) == text


def test_a_stack_says_what_its_steps_cost_alone_and_together():
    """Losses of 0.1 and 0.2 nats predict dense · exp(0.3); the footnote says so, and by how much it is off."""
    pruned, rounded = record("wanda", loss=0.1, method={"sparsity": 0.5}), record("gptq", 4, loss=0.2)
    steps = {"steps": [pruned.config["method"], rounded.config["method"]]}
    both = record("wanda+gptq", 4, loss=0.35, method=steps, card={"taxonomy": "pruning/unstructured"})
    text = tables.summary_table([record("dense"), pruned, rounded, both]).replace("\n  ", " ")
    predicted = f"{DENSE_PERPLEXITY * math.exp(0.3):.4g}"
    assert f"if their losses added up, {predicted}" in text
    assert "(+5.1%)" in text
    assert "added up" not in tables.summary_table([record("dense"), rounded, both])  # one step was never measured alone


def test_what_else_runs_a_row_and_what_its_author_must_say_are_footnotes():
    row = record("gptq", 4, card={"runtime": "vLLM", "notes": ["on this model a tie"]})
    text = tables.summary_table([record("dense"), row])
    assert "other runtimes: vLLM" in text
    assert "on this model a tie" in text


def test_rows_that_others_disturbed_alike_share_a_footnote():
    """Of a row the most that others took, to one digit and upwards; what one batch alone has stays its own."""

    def disturbed(run, percents):
        shares = iter(percents)
        loads = [
            replace(m, note=f"{m.note}; other processes used {next(shares)}% of the cores meanwhile")
            if m.metric == "time_per_output_token_ms"
            else m
            for m in run.measurements
        ]
        return replace(run, measurements=loads)

    runs = [
        disturbed(record("gptq", 4), (52, 49)),
        disturbed(record("rtn", 4), (31, 60)),
        disturbed(record("awq", 4), (61, 9)),
    ]
    (block,) = blocks([record("dense"), *runs])
    notes = {name: [block.notes[n - 1] for n in row["Method"].notes] for name, row in rows_of(block).items()}
    shared = "speed at batch 1, 4: other processes used up to 60 % of the cores meanwhile"
    assert shared in notes["GPTQ 4"]
    assert shared in notes["RTN 4"]
    assert "speed at batch 1, 4: other processes used up to 70 % of the cores meanwhile" in notes["AWQ 4"]
    assert not any("other processes" in note for note in notes["Dense"])
    wide = [
        replace(m, note=m.note + "; 3 requests, interval wider than ±3%") if "batch 4" in m.on else m
        for m in runs[0].measurements
    ]
    (block,) = blocks([replace(runs[0], measurements=wide)])
    assert {shared, "speed at batch 4: 3 requests, interval wider than ±3%"} <= set(block.notes)


def test_a_structured_row_says_what_was_removed_of_what_was_asked_for():
    share = "share of the blocks' weights removed"
    dense = record("dense")
    row = record("gum", method={"sparsity": 0.25}, card={"taxonomy": "pruning/structured"})
    row = replace(row, curves={share: [[0, 0.2]]})
    whole, left = (Measurement("parameters", count, "parameters", "all", "lower") for count in (1000, 800))
    dense = replace(dense, measurements=[*dense.measurements, whole])
    row = replace(row, measurements=[*row.measurements, left])
    text = tables.summary_table([dense, row]).replace("\n  ", " ")
    assert "20.0% of the blocks' weights removed, 0.25 asked for; 800 of 1,000 parameters left (-20.0%)" in text
    assert "removed" not in tables.summary_table([dense])


def test_a_stack_that_left_its_grid_says_so():
    row = replace(record("gptq", 4), curves={"linears whose weights left an earlier step's grid": [[0, 210]]})
    assert "210 linears left the grid of an earlier step" in tables.summary_table([record("dense"), row])


def test_zeros_that_no_kernel_skips_are_said_where_no_speed_says_so():
    note = "200 as a dense model; dense with zeros, no sparse kernel, bfloat16"
    loaded = Measurement("loaded_weight_bytes", 200, "bytes", "ready to decode", "lower", note=note)
    timed = record("wanda", method={"sparsity": 0.5})
    quality = [m for m in timed.measurements if not m.metric.startswith("time_per")]
    untimed = replace(timed, measurements=[*quality, loaded])
    assert "no sparse kernel: no faster than dense" in tables.summary_table([record("dense"), untimed])
    timed = replace(timed, measurements=[*timed.measurements, loaded])
    assert "no faster than dense" not in tables.summary_table([record("dense"), timed])
