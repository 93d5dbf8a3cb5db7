"""Models or machines in one table: the same numbers as in a block of each, and no two protocols beside each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_records import LONG, XEON, record, sweep, write_all

from harness import tables
from harness.errors import ConfigError
from harness.taxonomy import table_named

TABLE_1 = table_named("table_1")
OTHER = {"model": "other-model"}


def across(records, kind):
    (block,) = tables.blocks_of(TABLE_1, records, across=kind)
    return block


def rows_of(block):
    return {
        f"{row.cells[0].value} {row.cells[1].value}".strip(): dict(zip(block.heads, row.cells, strict=True))
        for row in block.rows
        if row.cells
    }


@pytest.mark.parametrize(("kind", "settings"), [("model", OTHER), ("machine", {"machine": XEON})])
def test_every_number_is_that_of_its_own_block(kind, settings):
    both = [*sweep(), *sweep(**settings)]
    alone = [rows_of(block) for block in tables.blocks_of(TABLE_1, both)]
    names = [block.title for block in tables.blocks_of(TABLE_1, both)]
    assert len(names) == 2
    block = across(both, kind)
    assert block.heads[2:4] == ("PPL (1)", "PPL (2)"), "the same column stands together"
    for label, row in rows_of(block).items():
        for side, own in enumerate(alone, 1):
            for head in ("PPL", "KL nats", "t/s b1", "MB", "comp. s"):
                if "failed" not in label:
                    assert row[f"{head} ({side})"] == own[label][head]
    assert block.protocol[0].startswith("Side by side: (1)")


def test_rows_that_one_side_lacks_are_empty_there_and_keep_the_survey_s_order():
    few = [r for r in sweep(**OTHER) if r.card["name"] in ("dense", "awq")]
    block = across([*few, *sweep()], "model")
    labels = list(rows_of(block))
    assert [label.split()[0] for label in labels[:6]] == ["Dense", "RTN", "RTN", "GPTQ", "GPTQ", "AWQ"]
    assert rows_of(block)["GPTQ 4"]["PPL (1)"].value == ""
    assert rows_of(block)["GPTQ 4"]["PPL (2)"].value != ""


def test_two_protocols_are_refused_by_name():
    with pytest.raises(ConfigError) as error:
        across([*sweep(), *sweep(on=LONG, **OTHER)], "model")
    for words in ("smollm2-135m-gguf", "other-model", "gptq-512, 16 windows", "gptq-1024, 32 windows"):
        assert words in str(error.value)


def test_speed_of_one_side_alone_is_no_other_protocol_but_another_workload_is():
    silent = [
        replace(r, measurements=[m for m in r.measurements if not m.metric.endswith(("_ms", "_second"))])
        for r in sweep(**OTHER)
    ]
    assert "t/s b1 (1)" in across([*sweep(), *silent], "model").heads
    with pytest.raises(ConfigError, match="decode_tokens_per_second"):
        across([*sweep(), *sweep(batches=(8,), **OTHER)], "model")


def test_models_on_two_machines_and_one_model_alone_are_refused():
    with pytest.raises(ConfigError, match=r"AMD EPYC 9B14, 2 cores.*Intel\(R\) Xeon"):
        across([*sweep(), *sweep(machine=XEON, **OTHER)], "model")
    with pytest.raises(ConfigError, match="not two models"):
        across(sweep(), "model")
    served = record("gptq", 4)
    served.config["engine"] = {"name": "vllm"}
    with pytest.raises(ConfigError, match="smollm2-135m-gguf has records of two settings"):
        across([*sweep(), served], "model")


def test_command_sets_them_side_by_side(tmp_path, capsys):
    write_all([*sweep(), *sweep(**OTHER)], tmp_path)
    assert tables.main(["table_1", f"paths.results={tmp_path}", "across=model"]) == 0
    assert "PPL (2)" in capsys.readouterr().out
    assert tables.main(["table_1", f"paths.results={tmp_path}", "across=models"]) == 2
    assert "Did you mean model?" in capsys.readouterr().err
