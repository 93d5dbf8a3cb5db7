"""A number is verified when it differs by no more than its noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_records import failed, record

from harness import environment, verify
from harness.errors import ConfigError, RunError
from harness.noise_floor import NoiseFloor
from harness.records import Measurement, write_record
from harness.verify import compare, find_record, report


def run_with(*measurements):
    return replace(record("gptq", 4), measurements=list(measurements))


def number(metric, value, unit="", interval=None):
    return Measurement(metric, value, unit, "workload", "lower", interval)


def within(old, new):
    (verdict,) = compare(run_with(old), run_with(new))
    return verdict.within


def test_a_record_agrees_with_itself():
    run = record("gptq", 4, loss=0.03)
    verdicts = compare(run, run)
    assert [(v.metric, v.on) for v in verdicts] == [(m.metric, m.on) for m in run.measurements]
    assert all(v.within and v.difference == 0 for v in verdicts)


@pytest.mark.parametrize(
    ("metric", "unit", "old", "edge"),
    [
        ("perplexity", "ppl", 20.0, 20.0 * 1e-4),
        ("kl_divergence", "nats/token", 0.0, 1e-6),
        ("accuracy", "share", 0.4, 0.4e-4),
        ("time_per_output_token_ms", "ms", 10.0, 1.0),
        ("decode_tokens_per_second", "tokens/s", 100.0, 10.0),
        ("compress_seconds", "s", 60.0, 18.0),
        ("peak_memory_bytes", "bytes", 1e9, 1e8),
        ("context_peak_bytes", "bytes", 1e9, 1e8),
        ("context_peak_exponent", "power of length", 2.0, 0.2),
        ("energy_per_output_token_joules", "J/token", 3.0, 0.3),
        ("decoding_speedup", "× token by token", 1.5, 0.15),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_edge_of_the_noise(metric, unit, old, edge, sign):
    assert within(number(metric, old, unit), number(metric, old + sign * edge * 0.999, unit))
    assert not within(number(metric, old, unit), number(metric, old + sign * edge * 1.001, unit))


def test_a_noise_floor_takes_the_place_of_fixed_tolerances():
    spreads = {"time_per_output_token_ms": {"workload": 0.25}, "perplexity": {"workload": 1e-7}}
    floor = NoiseFloor({}, "cpu", 2, 5, "GPTQ", "", spreads)

    def verdict(metric, old, new):
        (found,) = compare(run_with(number(metric, old)), run_with(number(metric, new)), floor)
        return found

    assert verdict("time_per_output_token_ms", 10.0, 12.4).within
    assert not verdict("time_per_output_token_ms", 10.0, 12.6).within
    assert "noise floor, 25.00%" in verdict("time_per_output_token_ms", 10.0, 12.6).rule
    assert verdict("perplexity", 20.0, 20.001).within, "scores of another method may round otherwise"


@pytest.mark.parametrize(("metric", "unit"), [("stored_bytes", "bytes"), ("effective_bits_per_weight", "bits")])
def test_sizes_are_exact(metric, unit):
    assert within(number(metric, 4.25, unit), number(metric, 4.25, unit))
    assert not within(number(metric, 4.25, unit), number(metric, 4.25 + 1e-9, unit))


@pytest.mark.parametrize("wide_one", ["old", "new"])
def test_speed_is_as_noisy_as_the_wider_interval(wide_one):
    wide, narrow = (10.0, 16.0), (12.9, 13.1)
    old = number("time_per_output_token_ms", 13.0, "ms", wide if wide_one == "old" else narrow)
    new = number("time_per_output_token_ms", 15.9, "ms", wide if wide_one == "new" else narrow)
    assert within(old, new)
    assert not within(old, replace(new, value=16.1))


def test_a_number_of_one_run_only_is_not_within():
    both, more = run_with(number("perplexity", 20.0)), run_with(number("perplexity", 20.0), number("accuracy", 0.4))
    for pair in ((both, more), (more, both)):
        assert [v.within for v in compare(*pair)] == [True, False]


def test_what_neither_run_could_measure_is_no_difference():
    missing = number("energy_joules", None)
    assert within(missing, missing)
    assert not within(number("energy_joules", 1.0), missing)


def test_what_follows_from_judged_numbers_is_not_judged_again():
    assert within(number("break_even_requests", 1000.0, "requests"), number("break_even_requests", None, "requests"))
    assert within(number("break_even_requests", 1000.0, "requests"), number("break_even_requests", 9000.0, "requests"))


def test_other_machine_and_versions_are_said():
    run = record("gptq", 4)
    machine, versions = run.environment["machine"], run.environment["versions"]
    assert verify.circumstances(run, machine, versions) == []
    lines = verify.circumstances(run, {**machine, "processor": "M9", "memory_bytes": 1}, {**versions, "torch": "3.0"})
    assert len(lines) == 2
    assert "EPYC" in lines[0]
    assert "M9" in lines[0]
    assert "torch was 2.13.0, is 3.0" in lines[1]


def test_report_has_old_new_difference_and_tolerance_of_each():
    text = report(compare(run_with(number("perplexity", 20.0, "ppl")), run_with(number("perplexity", 21.5, "ppl"))))
    (line,) = text.splitlines()[1:]
    assert line.split()[0] == "NO"
    assert {"20", "21.5", "+1.5", "0.002"} <= set(line.split())


def test_a_record_is_found_by_path_and_by_the_start_of_its_id(tmp_path):
    one, two = record("gptq", 4), record("awq", 4)
    paths = [write_record(r, tmp_path / "records" / "m" / f"{r.card['name']}-w4-cpu-{r.id}.json") for r in (one, two)]
    assert find_record(str(paths[0]), tmp_path) == paths[0]
    assert find_record(two.id[:6], tmp_path) == paths[1]
    with pytest.raises(ConfigError, match="2 records"):
        find_record("", tmp_path)


# ---- the command


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A record made on this machine, and `rerun` replaced by what the test decides."""
    run = record("gptq", 4, loss=0.03)
    run = replace(run, environment={"machine": environment.machine(), "versions": environment.versions()})
    path = write_record(run, tmp_path / "records" / "m" / f"gptq-w4-cpu-{run.id}.json")
    seen = []

    def answer(again):
        def rerun(asked, results, cache=None):
            seen.append((asked, results))
            if isinstance(again, Exception):
                raise again
            return again

        monkeypatch.setattr("harness.run.rerun", rerun)

    return run, path, answer, seen


def test_command_says_zero_when_all_is_within(here, capsys):
    run, path, answer, seen = here
    answer(run)
    assert verify.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "not as recorded" not in printed
    assert f"{len(run.measurements)} of {len(run.measurements)}" in printed
    assert seen[0][0] == run
    assert not seen[0][1].exists(), "the temporary results folder is gone"


def test_command_says_one_when_a_number_moved(here, capsys):
    run, path, answer, _ = here
    first, *rest = run.measurements
    answer(replace(run, measurements=[replace(first, value=first.value * 1.01), *rest]))
    assert verify.main([str(path)]) == 1
    assert "NO" in capsys.readouterr().out


def test_command_says_one_when_the_run_fails(here, capsys):
    _, path, answer, _ = here
    answer(RunError("no memory"))
    assert verify.main([str(path)]) == 1
    assert "no memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["a", "b"], ["absent.json"], ["abc", "paths.results={tmp}"], ["x", "bits=3"]]
)
def test_command_says_two_for_bad_input(arguments, tmp_path, capsys):
    assert verify.main([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2


def test_a_failed_or_broken_record_cannot_be_verified(tmp_path, capsys):
    path = write_record(failed(record("gptq", 4)), tmp_path / "failed.json")
    assert verify.main([str(path)]) == 2
    assert "failed run: out of memory" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("[]", encoding="utf-8")
    assert verify.main([str(tmp_path / "broken.json")]) == 2
