"""Torn, flipped and hostile files: each is read as what it says, or refused with our own error.

The same checks run longer under `make fuzz` (HARNESS_FUZZ_SECONDS for each of them).
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_records import failed, record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import models, records, wheels
from harness.errors import ConfigError, RunError
from harness.gguf_header import check_gguf
from harness.json_lines import json_rows
from harness.models import LocalModel
from harness.records import SCHEMA, from_json, read_record, to_json

SECONDS = float(os.environ.get("HARNESS_FUZZ_SECONDS", "0"))
CPU = ("cpu", torch.float32)
POSITIONS = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(st.tuples(POSITIONS, st.integers(0, 255)), max_size=6)
NUMBERS = [0, -1, 1, 3, 10**6, 10**12, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf")]
HOSTILE = st.sampled_from([*NUMBERS, True, None, "", "x", "../../x", [], {}, [[]]])


def fuzz(strategy, check) -> None:
    """A few examples; as many as there is time for under `make fuzz`."""
    many = settings(
        max_examples=500 if SECONDS else 25,
        derandomize=not SECONDS,  # the tests of a change fail by that change alone
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    examples = many(given(strategy)(check))
    end = time.monotonic() + SECONDS
    examples()
    while time.monotonic() < end:
        examples()


def edited(content: bytes, edits, length: float) -> bytes:
    """The file with some bytes replaced, cut off at a share of its length."""
    changed = bytearray(content)
    for place, value in edits:
        changed[int(place * len(changed))] = value
    return bytes(changed[: int(length * len(changed)) or len(changed)])


def read_or_refused(path: Path, read, *errors):
    """What `read` gives, or None where it raises one of our own errors, which must name the file."""
    try:
        return read()
    except errors as error:
        reason = str(error)
    assert path.name in reason
    return None


TORN = st.tuples(EDITS, st.one_of(st.just(0.0), POSITIONS))


# ------------------------------------------------------------------------------------------------------------- records


def places(value, path=()):
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def replaced(value, path, new):
    """A copy of JSON values with another value at one place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def check_record(path: Path) -> None:
    run = read_or_refused(path, lambda: read_record(path), ValueError)
    if run is not None:
        assert run.status in ("finished", "failed")
        assert to_json(run)["schema"] == SCHEMA  # it can be written again
        assert all(isinstance(m.metric, str) for m in run.measurements)


def test_a_record_with_any_bytes_changed_is_read_or_refused(tmp_path):
    content, path = json.dumps(to_json(record("gptq", 4))).encode(), tmp_path / "torn.json"

    def check(torn):
        path.write_bytes(edited(content, *torn))
        check_record(path)

    fuzz(TORN, check)


def test_a_record_with_any_value_replaced_is_read_or_refused(tmp_path):
    path, data = tmp_path / "other.json", to_json(failed(record("gptq", 4)))
    data |= {"measurements": to_json(record("gptq", 4))["measurements"]}
    where = sorted(places(data), key=str)

    def check(change):
        path.write_text(json.dumps(replaced(data, *change)))
        check_record(path)

    fuzz(st.tuples(st.sampled_from(where), HOSTILE), check)


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 10**6)
    with pytest.raises(ValueError, match=r"deep\.json"):
        read_record(tmp_path / "deep.json")


def test_an_older_record_is_brought_up_to_date_step_by_step(monkeypatch):
    def second(data):
        return {key: value for key, value in data.items() if key != "name_of_model"} | {"model": data["name_of_model"]}

    monkeypatch.setattr(records, "SCHEMA", 3)
    monkeypatch.setattr(records, "MIGRATIONS", {1: lambda data: data | {"status": "finished"}, 2: second})
    data = to_json(record("gptq", 4)) | {"schema": 1, "status": "done", "name_of_model": "m"}
    del data["model"]
    run = from_json(data)
    assert (run.schema, run.status, run.model) == (3, "finished", "m")


def test_a_newer_record_is_refused_with_both_versions():
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}; this version reads schema {SCHEMA}.*newer version"):
        from_json(to_json(record("gptq", 4)) | {"schema": SCHEMA + 1})


def test_lines_that_are_no_json_are_refused_or_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    content = b"".join(json.dumps({"question": f"{n} + {n}", "answer": 2 * n}).encode() + b"\n" for n in range(20))

    def check(torn):
        path.write_bytes(edited(content, *torn))
        read_or_refused(path, lambda: list(json_rows(path)), RunError)
        rows = read_or_refused(path, lambda: list(json_rows(path, "skip", say=lambda _: None)), RunError)
        assert all(isinstance(row, dict) for row in rows or [])

    fuzz(TORN, check)


# -------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def folder(trained_folder, tmp_path_factory) -> Path:
    copy = shutil.copytree(trained_folder, tmp_path_factory.mktemp("hostile") / "model")
    (copy / "harness.json").unlink()
    return copy


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    """A small file with what real ones have: numbers, texts, arrays of both, tensors of two types."""
    from gguf import GGMLQuantizationType, GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_token_list(["a", "b", "<end>"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_tensor("token_embd.weight", np.ones((3, 32), dtype=np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((2, 34), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def check_model(folder: Path) -> None:
    read_or_refused(folder, lambda: LocalModel(str(folder)).load(folder, *CPU), RunError, ConfigError)


def test_a_gguf_file_with_any_bytes_changed_is_read_or_refused_in_no_time(gguf, tmp_path):
    from gguf import GGUFReader

    path = tmp_path / "torn.gguf"

    def read():
        check_gguf(path)
        with models._reading(path, "a GGUF model"):
            return GGUFReader(path)

    def check(torn):
        path.write_bytes(edited(gguf, *torn))
        started = time.monotonic()
        read_or_refused(path, read, RunError)
        assert time.monotonic() - started < 5

    path.write_bytes(gguf)
    check_gguf(path)
    fuzz(TORN, check)


@pytest.mark.parametrize("place", ["tensors", "entries", "text", "array"])
def test_a_gguf_file_that_announces_more_than_it_has_is_refused_before_a_library_believes_it(place, gguf, tmp_path):
    at = {"tensors": 8, "entries": 16, "text": 24, "array": gguf.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4}[place]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(gguf[:at] + (2**63 - 1).to_bytes(8, "little") + gguf[at + 8 :])
    with pytest.raises(RunError, match=r"hostile\.gguf.*announced"):
        LocalModel(str(path)).load(tmp_path, *CPU)


def test_weights_with_any_bytes_of_their_header_changed_are_read_or_refused(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    def check(torn):
        edits, length = torn
        weights.write_bytes(edited(content[:header], edits, 0) + edited(content[header:], [], length))
        check_model(model)

    fuzz(TORN, check)


def test_a_configuration_with_any_value_replaced_loads_or_is_refused(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())

    def check(change):
        (model / "config.json").write_text(json.dumps(replaced(config, *change)))
        check_model(model)

    fuzz(st.tuples(st.sampled_from(sorted(places(config), key=str)), HOSTILE), check)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "without weights are .*layers.2"),
        ({"num_hidden_layers": 1}, "left out would be .*layers.1"),
        ({"num_hidden_layers": 10**9}, "1000000000 blocks"),
        ({"hidden_size": 10**12}, "sizes"),
        ({"rms_norm_eps": float("nan")}, "NaN"),
        ({"num_attention_heads": 0}, "could not be read as a model"),
    ],
)
def test_a_configuration_of_another_model_never_becomes_random_weights(changes, message, folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(RunError, match=message):
        LocalModel(str(model)).load(tmp_path, *CPU)


def test_code_of_a_model_is_not_run_unless_asked_for(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    with pytest.raises(RunError, match="trust_remote_code"):
        LocalModel(str(model)).load(tmp_path, *CPU)
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------------------- wheels


def test_a_wheel_with_any_bytes_changed_is_read_or_refused(tmp_path):
    wheel = tmp_path / "torn.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/data.bin", b"data" * 50)
    content = wheel.read_bytes()

    def check(torn):
        wheel.write_bytes(edited(content, *torn))
        read_or_refused(
            wheel, lambda: wheels.extract(wheel, "package/data.bin", tmp_path / "data.bin", limit=1000), RunError
        )

    fuzz(TORN, check)


def test_a_bomb_stops_at_its_limit_and_no_name_decides_where_it_goes(tmp_path):
    wheel, target = tmp_path / "bomb.whl", tmp_path / "inside" / "data.bin"
    target.parent.mkdir()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.bin", bytes(50 << 20))
    with pytest.raises(RunError, match="more than 1 MB"):
        wheels.extract(wheel, "../../outside.bin", target, limit=10**6)
    assert target.stat().st_size <= 10**6
    wheels.extract(wheel, "../../outside.bin", target, limit=10**9)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["bomb.whl", "data.bin"]
