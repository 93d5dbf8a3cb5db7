"""The scaling plot: what is drawn is what the records say, one protocol at a time."""

from __future__ import annotations

import math

import pytest
from fake_records import LONG, XEON, record

from harness.errors import ConfigError
from harness.records import write_record
from harness.scaling_plot import draw, main, points_of

CARD = {"taxonomy": "quantization/data_types"}


def sweep():
    runs = [record("dense")]
    for name in ("kbit_int", "kbit_float"):
        for bits in (3, 4, 8):
            for size in (64, 1024):
                grid = {"grid": {"bits": bits, "group_size": size}}
                runs.append(record(name, bits, loss=2.0**-bits, method=grid, card=CARD))
    return runs


def test_every_run_is_a_point_with_the_bits_of_the_stored_model():
    runs = sweep()
    types, dense, _, others = points_of(runs, "perplexity")
    assert len(types) == 12
    assert len(dense) == 1
    assert not others
    assert {p.line for p in types} == {
        f"{title}, blocks of {size}" for title in ("k-bit integer", "k-bit float") for size in (64, 1024)
    }
    assert {p.bits for p in types} == {8 * r.value("stored_bytes") for r in runs[1:]}
    assert {p.value for p in types} == {r.value("perplexity") for r in runs[1:]}


def test_lines_hold_the_points_in_order():
    types, dense, protocol, _ = points_of(sweep(), "perplexity")
    axes = draw(types, dense, "perplexity", protocol).axes[0]
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    assert len(lines) == 4
    for line in lines:
        own = {p.bits: p.value for p in types if p.line == line.get_label()}
        assert list(line.get_xdata()) == sorted(own)
        assert list(line.get_ydata()) == [own[x] for x in sorted(own)]
    assert axes.get_xscale() == "log"
    assert protocol in axes.get_title()


def test_another_protocol_is_named_and_not_drawn():
    runs = [*sweep(), record("kbit_int", 4, on=LONG, card=CARD)]
    types, _, _, others = points_of(runs, "perplexity")
    assert len(types) == 12
    assert others == [LONG]


def test_another_machine_is_named_and_not_drawn():
    runs = [*sweep(), record("kbit_int", 4, machine=XEON, card=CARD), record("dense", machine=XEON)]
    types, dense, _, others = points_of(runs, "perplexity")
    assert (len(types), len(dense)) == (12, 1)
    assert len(others) == 1
    assert XEON["processor"] in others[0]


def test_divergence_has_no_dense_point():
    types, dense, _, _ = points_of(sweep(), "kl_divergence")
    assert types
    assert not dense
    assert all(math.isfinite(p.value) for p in types)


def test_nothing_to_draw_says_what_to_run():
    with pytest.raises(ConfigError, match="experiment=bits_scaling"):
        points_of([record("dense"), record("gptq", 4)], "perplexity")


def test_files_are_written(tmp_path, capsys):
    for run in sweep():
        write_record(run, tmp_path / "records" / run.model / f"{run.id}.json")
    assert main([f"paths.results={tmp_path}", "metric=kl_divergence"]) == 0
    assert (tmp_path / "plots" / "bits_scaling_kl_divergence.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plots" / "bits_scaling_kl_divergence.svg").read_text()
    assert "12 runs" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["metric=speed", "results=x", "svg"])
def test_what_is_typed_wrong_is_named(argument, capsys):
    assert main([argument]) == 2
    assert argument.partition("=")[2] in capsys.readouterr().err
