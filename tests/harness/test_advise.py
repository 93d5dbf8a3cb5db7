"""Advice follows from the records alone: bounds, what beats what, why each row lost, and what each method needs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from fake_records import LONG, XEON, collapsed, failed, record, sweep, write_all

from harness import advise as advice_module
from harness.advise import CRITERIA, HELP, advise, main, parse, practical, report
from harness.command import single_command
from harness.errors import ConfigError
from harness.records import Measurement
from harness.sanity import break_even_tokens

BATCH_4 = "batch 4, prompt 128, 32 new"


def weighed(run, gib=None):
    size = (gib or ((run.bits or 16) / 16)) * 2**30
    return replace(
        run, measurements=[*run.measurements, Measurement("loaded_weight_bytes", size, "bytes", "x", "lower")]
    )


def without_speed(run):
    return replace(run, measurements=[m for m in run.measurements if not m.metric.endswith(("_ms", "_per_second"))])


def rows():
    return [weighed(run) if run.status == "finished" else run for run in sweep()]


def called(candidates):
    return {f"{c.record.card['name']} {c.record.bits or ''}".strip(): c for c in candidates}


def test_a_bound_leaves_the_best_quality_and_every_loser_has_its_reason():
    found = advise(rows(), {"weight_gib": 0.3})
    assert called(found.best).keys() == {"awq 4", "gptq 3"}, "one is better, one smaller"
    assert found.recommended.record.card["name"] == "awq"
    lost = {name: c.lost for name, c in called(found.lost).items()}
    assert lost.keys() == {"dense", "rtn 4", "rtn 3", "gptq 4", "awq 3"}
    assert "weights GiB 1 > 0.3" in lost["dense"]
    assert "collapsed" in lost["rtn 3"]
    assert "failed in compress: out of memory" in lost["awq 3"]
    assert "beaten by AWQ 4" in lost["gptq 4"]
    assert "PPL +3.15 %" in lost["gptq 4"]


def test_a_bound_inside_an_interval_is_not_broken_but_said():
    loose = advise(rows(), {"perplexity_increase": 0.025, "weight_gib": 0.3})
    assert "gptq 4" in called(loose.lost)
    assert "beaten" in called(loose.lost)["gptq 4"].lost, "3.1 % ± 0.8 % does not break 2.5 %"
    alone = advise(
        [r for r in rows() if r.card["name"] in ("dense", "gptq")], {"perplexity_increase": 0.025, "weight_gib": 0.3}
    )
    assert called(alone.best)["gptq 4"].unsure == ("max_perplexity_increase",)
    assert "no row is sure" in alone.reason
    strict = advise(rows(), {"perplexity_increase": 0.02})
    assert "> 2 %" in called(strict.lost)["gptq 4"].lost


def test_the_model_as_it_is_wins_where_nothing_made_of_it_is_better():
    unlike = advise(rows(), {"perplexity_increase": 0.02})
    assert unlike.recommended.record.card["name"] == "awq", "not to be told from dense, and smaller"
    bounds = {"perplexity_increase": 0.02, "disk_gib": 1}
    found = advise(
        [without_speed(weighed(record("dense"))), without_speed(weighed(record("wanda", loss=0.001)))], bounds
    )
    assert found.recommended.record.card["name"] == "dense"
    assert "compressing buys nothing" in report(found, bounds)


def test_without_bounds_nothing_is_recommended_and_failures_are_no_reason_to_drop_a_count():
    found = advise(rows(), {})
    assert found.recommended is None
    assert {c.name for c in found.counts} == {"perplexity_increase", "weight_gib", "tokens_per_second"}
    assert {"dense", "awq 4", "gptq 3"} >= called(found.best).keys() >= {"awq 4"}


def test_a_number_that_was_not_measured_is_said_and_never_taken_for_good():
    bare = [replace(r, measurements=[m for m in r.measurements if "per_second" not in m.metric]) for r in rows()[:1]]
    found = advise([*bare, *rows()[1:]], {"tokens_per_second": 20})
    assert "tokens decoded per second was not measured" in called(found.lost)["dense"].lost


def test_sizes_within_one_percent_beat_nothing():
    close = [weighed(record("awq", 4), 0.2500), weighed(record("gptq", 4), 0.2501), weighed(record("rtn", 4), 0.26)]
    found = advise([without_speed(r) for r in [weighed(record("dense")), *close]], {"weight_gib": 1})
    assert {"awq 4", "gptq 4"} == called(found.best).keys() - {"dense"}


def test_rows_are_compared_on_one_workload_and_one_protocol_each():
    """A block may hold rows that measured a part of what others did: its first numbers are not theirs."""
    slow = weighed(record("gptq", 4, loss=0.031, batches=(4,)))  # 4 at once are more tokens/s than one alone
    arms = (("dense", None, 0.0), ("rtn", 4, 0.09), ("awq", 4, 0.004))
    twice = [weighed(record(name, bits, loss=loss, batches=(4, 1))) for name, bits, loss in arms]
    longer = [Measurement(metric, 1.5, "×", LONG, "lower") for metric in ("perplexity", "perplexity_ratio")]
    twice[1] = replace(twice[1], measurements=[*longer, *twice[1].measurements])
    found = advise([*twice, slow], {"tokens_per_second": 1})
    everyone = called([*found.best, *found.lost])
    for name in ("dense", "rtn 4", "awq 4"):
        own = everyone[name].record
        assert everyone[name].numbers["tokens_per_second"].value == own.value("decode_tokens_per_second", BATCH_4)
    assert everyone["rtn 4"].numbers["perplexity_increase"].value == pytest.approx(0.0942, abs=1e-3)
    assert everyone["gptq 4"].numbers["tokens_per_second"] is not None
    alone = advise(twice, {"tokens_per_second": 1})
    assert "batch 1," in alone.protocol, "the smallest, in whatever order they were measured"
    assert called([*alone.best, *alone.lost])["dense"].numbers["tokens_per_second"].value < 100


def test_tokens_until_compressing_is_paid_back_by_hand():
    def token(ms, half):
        return Measurement(
            "time_per_output_token_ms", ms, "ms", "batch 1, prompt 8, 8 new", "lower", (ms - half, ms + half)
        )

    assert break_even_tokens(60.0, token(8, 0.1), token(10, 0.1)) == pytest.approx(30_000)
    assert break_even_tokens(60.0, token(11, 0.1), token(10, 0.1)) is None
    assert break_even_tokens(60.0, token(9.9, 0.1), token(10, 0.1)) is None, "no faster beyond the intervals"


def test_each_method_says_what_it_needs():
    heads, *lines = practical(
        [
            record("dense"),
            replace(record("gptq", 4, card={"calibrates": True}), cost={"calibration_tokens": 8192}),
            record("rtn", 4, card={"calibrates": False}),
            record("gptq", 3, card={"calibrates": True}),
            replace(record("minillm", card={"calibrates": "text"}), cost={"training_tokens": 131072}),
        ]
    )
    found = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    assert found["GPTQ"]["calibration"] == "8.19k"
    assert found["GPTQ"]["kernel of decoding"] == "int4 packed (torch) / dequantised"
    assert found["GPTQ"]["paid back after"].endswith("never (1 of 2)"), "at 3 bits it is no faster"
    assert (found["RTN"]["calibration"], found["RTN"]["training"]) == ("no", "no")
    assert (found["MiniLLM"]["calibration"], found["MiniLLM"]["training"]) == ("trains on it", "131k")
    assert found["MiniLLM"]["compressing"] == "15.0 min"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["max_wieght_gib=4"], "Did you mean max_weight_gib?"),
        (["max_weight_gib=four"], "must be a number"),
        (["max_weight_gib=4%"], "is no share"),
        (["max_perplexity_increase=3"], "write 3% or 0.03"),
        (["batch=one"], "whole number"),
        (["a", "b"], "a folder is already named"),
    ],
)
def test_what_is_typed_wrong_is_answered_with_what_there_is(arguments, words):
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert words in str(error.value)


def test_shares_are_written_either_way():
    assert parse(["max_perplexity_increase=3%"])[0] == parse(["max_perplexity_increase=0.03"])[0]


def test_command_keeps_protocols_apart_and_fits_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    other = [weighed(r) for r in sweep(on=LONG, evaluation="standard") if r.status == "finished"]
    write_all([*rows(), *other], tmp_path)
    assert main([str(tmp_path), "max_weight_gib=0.3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Recommended: AWQ 4") == 2
    assert (
        max(len(line) for line in printed.splitlines() if "python -m" not in line and str(tmp_path) not in line) <= 100
    )
    assert main([str(tmp_path), "max_weight_gib=0.01"]) == 1
    assert "Nothing meets the bounds" in capsys.readouterr().out


def test_command_says_which_hardware_there_is_and_what_was_never_measured(tmp_path, capsys):
    write_all(rows(), tmp_path)
    assert main([str(tmp_path), "hardware=tpu"]) == 2
    assert "AMD EPYC 9B14" in capsys.readouterr().err
    assert main([str(tmp_path), "max_first_token_ms=50", "hardware=epyc"]) == 0
    assert main([str(tmp_path), "max_compress_gib=50"]) == 2
    assert "was not measured there" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "max_weight_gib=1"]) == 2


def test_a_hostile_name_cannot_drive_the_terminal(tmp_path, capsys):
    hostile = "evil\x1b[31m\u202e name"
    runs = [record("dense", model=hostile), record("x", 4, model=hostile, card={"title": hostile})]
    write_all([weighed(r) for r in [*runs, failed(record("awq", 3, model=hostile), hostile)]], tmp_path)
    main([str(tmp_path), "max_weight_gib=1"])
    assert not {"\x1b", "\u202e"} & set(capsys.readouterr().out)


def test_help_lists_every_bound_and_needs_no_torch():
    assert all(criterion.option in HELP for criterion in CRITERIA.values())
    code = "import sys, harness.advise; assert not {'torch', 'pandas', 'transformers', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_command_of_one_row_is_its_own_value_of_everything_that_was_swept():
    run = replace(
        record("gptq", 4),
        command="python -m harness -m method=awq,gptq bits=3,4 method.grid.group_size=32,64 hardware=cpu "
        "'calibration.text=a b' tracker=none paths.results=elsewhere",
    )
    run.config["bits"] = 4
    assert shlex.split(single_command(run)) == [
        *("python", "-m", "harness", "method=gptq", "bits=4", "model=smollm2-135m-gguf"),
        *("method.grid.group_size=64", "hardware=cpu", "calibration.text=a b"),
    ]
    stack = replace(run, card={**run.card, "name": "sparsegpt+gptq"}, command="python -m harness experiment=table_2")
    assert "method=[sparsegpt,gptq]" in shlex.split(single_command(stack))


def test_the_command_of_one_row_names_its_experiment_where_that_sets_more_than_the_sweep():
    run = record("gptq", 4)
    run.config["bits"] = 4
    of = lambda command: shlex.split(single_command(replace(run, command=f"python -m harness {command}")))  # noqa: E731
    large = of("experiment=large_shapes model=random-llama-7b")
    assert {"experiment=large_shapes", "method=gptq", "bits=4", "model=random-llama-7b"} <= set(large)
    assert of("experiment=table_1") == of("-m method=rtn,gptq bits=8,4,3")  # it only sweeps
    assert "experiment=of_my_own" in of("experiment=of_my_own")
    scaling = of("experiment=bits_scaling")
    size = run.config["method"]["grid"]["group_size"]
    assert f"method.grid.group_size={size}" in scaling
    assert not any("," in word for word in scaling)


def test_two_machines_are_never_one_advice():
    blocks = advice_module.comparable([*rows(), *[weighed(r) for r in sweep(machine=XEON) if r.status == "finished"]])
    assert len(blocks) == 2


def test_collapsed_rows_lose_whatever_their_bits():
    found = advise([weighed(record("dense")), collapsed(weighed(record("rtn", 2, loss=3)))], {"weight_gib": 2})
    assert "collapsed" in called(found.lost)["rtn 2"].lost
