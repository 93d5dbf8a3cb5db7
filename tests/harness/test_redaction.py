"""Secrets are masked wherever something is written, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_records import failed, record

from harness import run
from harness.cli import _report
from harness.records import read_record, to_json, write_record
from harness.redaction import MASK, redact, redacted, secrets
from harness.stages import StageFailure
from harness.sweep import remember
from harness.tracking import WandbTracker
from tests.test_conf import resolved

KEY = "planted-key-of-an-endpoint"


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


def test_secrets_are_values_of_variables_named_so():
    environment = {
        "HF_TOKEN": "a" * 9, "WANDB_API_KEY": "b" * 40, "AWS_SECRET": "c" * 20, "DATABASE_PASSWORD": "d" * 12,
        "PATH": "/usr/bin:/bin", "TOKENIZERS_PARALLELISM": "false" * 3, "OPENAI_API_KEY": "EMPTY",
        "KEYBOARD": "german!!",
    }  # fmt: skip
    assert secrets(environment) == ["b" * 40, "c" * 20, "d" * 12, "a" * 9]


def test_a_secret_inside_a_longer_one_does_not_leave_the_rest(monkeypatch):
    hidden = secrets({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-and-more"})
    assert redact("x abcdefgh-and-more abcdefgh", hidden) == f"x {MASK} {MASK}"


@pytest.mark.parametrize(
    "text",
    ["hf_abcdefghijklmnopqrstuvwxyz", "sk-proj-abcdefghijklmnop1234", "Authorization: Bearer abc.def-12345678"],
)
def test_well_known_shapes_are_masked(text):
    assert MASK in redact(text, [])
    assert "abc" not in redact(text, [])


def test_passwords_in_addresses_are_masked_and_the_rest_stays():
    assert redact("https://me:pass@host:80/v1?a=b", []) == f"https://{MASK}@host:80/v1?a=b"


@pytest.mark.parametrize(
    "text", ["https://host:8000/v1", "task-specific-instructions", "sk-learn", "a@b.org", "hf_model"]
)
def test_other_text_stays(text):
    assert redact(text, []) == text


def test_fields_made_for_secrets_are_masked_and_numbers_stay():
    values = {"api_key": "short", "key_variable": "OPENAI_API_KEY", "deep": [{"password": ""}, 1.5, None, True]}
    assert redacted(values, []) == {**values, "api_key": MASK}


def test_records_without_secrets_are_written_as_they_are(tmp_path):
    kept = record("gptq", 4)
    assert read_record(write_record(kept, tmp_path / "record.json")) == kept


def test_a_record_holds_no_secret(planted):
    run_record = failed(record("gptq", 4), f"status 401: wrong key {planted}")
    written = to_json(replace(run_record, config={"text_teacher": {"key_variable": planted}}))
    assert planted not in str(written)
    assert MASK in written["failure"]["reason"]


def test_an_endpoint_that_echoes_the_key_leaves_it_nowhere(planted, tmp_path, monkeypatch, capsys):
    """From the failing stage to the record, W&B's offline run, the terminal and what a sweep remembers."""

    def fail(*_args, **_kwargs):
        raise StageFailure("compress", "run", f"https://host: status 401: incorrect API key {planted}")

    monkeypatch.setattr(run.stages, "run_stage", fail)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = resolved("model=tiny", "method=rtn", "evaluation=smoke", "hardware.threads=1")
    results = tmp_path / "results"
    places = []
    outcome = run.run(
        config,
        run.Paths(results, tmp_path / "cache"),
        say=print,
        track=lambda each: places.append(WandbTracker("project").log(each, results)),
    )
    _report(outcome)
    remember(outcome, results / "scratch" / "job")
    assert "401" in outcome.reason
    assert places
    assert all(places)
    printed = capsys.readouterr()
    assert MASK in printed.err
    assert planted not in printed.out + printed.err
    files = [file for file in results.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert not [file for file in files if planted.encode() in file.read_bytes()]
