"""Everything behind a row is in its text, and nothing in it can drive a terminal."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from fake_records import failed, record

from harness import show
from harness.records import write_record
from harness.show import report

NAMES = [f"model.layers.{b}.{k}" for b in range(3) for k in ("self_attn.q_proj", "mlp.experts.7.down_proj")]


def with_errors(run):
    errors = {name: 0.01 * (k + 1) for k, name in enumerate(NAMES)}
    return replace(run, layer_errors=errors, layer_output_errors={n: e / 10 for n, e in errors.items()})


def test_every_number_and_every_setting_is_shown():
    run = with_errors(record("gptq", 4, loss=0.03))
    text = report(run)
    assert all(m.metric in text and m.unit in text for m in run.measurements)
    for words in ("grid.group_size=64", "samples=16", "AMD EPYC 9B14", "torch=2.13.0", "8192 calibration tokens"):
        assert words in text
    assert "95 %: " in text
    assert max(map(len, text.splitlines())) <= 100


def test_errors_of_layers_stand_by_block_and_kind():
    lines = report(with_errors(record("gptq", 4))).splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("  block"))
    rows = [line.split() for line in lines[start : start + 5]]
    assert rows[0] == ["block", "attn.q", "mlp.experts.7.down"]
    assert rows[1:4] == [["0", "0.001", "0.002"], ["1", "0.003", "0.004"], ["2", "0.005", "0.006"]]
    assert rows[4] == ["median", "0.003", "0.004"]
    weights = report(with_errors(record("gptq", 4)), errors="weights")
    assert "0.06" in weights
    assert "median of outputs: 0.0035" in weights


def test_what_has_no_errors_of_layers_says_why():
    assert "it is what others are compared with" in report(record("dense"))
    run = record("gptq", 4)
    run.environment["no_layer_errors"] = "no weight changed"
    assert "  no weight changed" in report(run)


def test_a_failure_stands_at_the_top():
    assert "failed in compress: out of memory" in "\n".join(report(failed(record("gptq", 4))).splitlines()[:6])


def test_a_hostile_record_cannot_drive_the_terminal():
    hostile = "evil\x1b[31m\u202e\nname"
    run = failed(record("x", 4, model=hostile, card={"title": hostile, "notes": [hostile]}), hostile)
    run.environment["versions"] = {"torch": hostile}
    text = report(replace(run, layer_errors={hostile: 1.0}, layer_output_errors={hostile: 1.0}))
    assert not {"\x1b", "\u202e"} & set(text)


def test_command_finds_a_record_and_answers_what_is_typed_wrong(tmp_path, capsys):
    run = record("gptq", 4)
    write_record(run, tmp_path / "records" / "m" / f"gptq-w4-{run.id}.json")
    assert show.main([run.id[:6], f"paths.results={tmp_path}"]) == 0
    assert "GPTQ, 4 bits" in capsys.readouterr().out
    for arguments, words in (
        ([], ""),
        (["nosuch", f"paths.results={tmp_path}"], "no record"),
        (["a", "errors=x"], "errors"),
    ):
        assert show.main(arguments) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("module", ["harness.show", "harness.noise_floor"])
def test_help_needs_no_torch(module):
    code = f"import sys, {module}; assert not {{'torch', 'pandas', 'transformers', 'hydra'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
