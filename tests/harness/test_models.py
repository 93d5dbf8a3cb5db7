"""Where models come from: sources say what is wrong before they load, and what they loaded."""

from __future__ import annotations

import pytest
import torch

from harness import models
from harness.errors import ConfigError, RunError
from harness.models import HubModel, LocalModel, RandomModel, byte_tokenizer
from tests.conftest import SHAPE

CPU = ("cpu", torch.float32)


def test_random_weights_repeat_with_the_seed_and_fit_their_storage_type(tmp_path):
    first, again = (RandomModel("tiny", "llama", SHAPE).load(tmp_path, *CPU)[0].module for _ in range(2))
    other = RandomModel("tiny", "llama", SHAPE, seed=1).load(tmp_path, *CPU)[0].module
    weight = first.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, again.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(weight, weight.bfloat16().float())


def test_random_weights_leave_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    RandomModel("tiny", "llama", SHAPE).load(tmp_path, *CPU)
    assert torch.equal(torch.rand(3), expected)


def test_the_byte_tokenizer_is_lossless():
    text = "Ünïcode, tabs\tand\nlines: 中文 🙂"
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_local_folder_scores_as_the_model_that_was_saved(trained, trained_folder, tmp_path):
    lm, origin = LocalModel(str(trained_folder)).load(tmp_path, *CPU)
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(lm.engine.score(tokens), trained.engine.score(tokens))
    assert list(origin["sha256"]) == ["model.safetensors"]
    assert lm.storage_dtype == trained.storage_dtype


@pytest.mark.parametrize("content", ["nothing", "file", "folder"])
def test_what_is_not_a_model_is_refused_before_loading(tmp_path, content):
    path = tmp_path / "thing"
    if content == "file":
        path.write_text("text")
    if content == "folder":
        path.mkdir()
    with pytest.raises(ConfigError, match="thing"):
        LocalModel(str(path))


def test_a_torn_gguf_file_is_named(tmp_path):
    path = tmp_path / "torn.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 40)
    with pytest.raises(RunError, match=r"torn\.gguf"):
        LocalModel(str(path)).load(tmp_path, *CPU)


def test_an_unreachable_hub_is_said_with_the_way_out_and_does_not_block(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RunError, match=r"model=smollm2-135m-gguf"):
        HubModel("x", "nobody/nothing").load(tmp_path, *CPU)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_comes_from_the_hub_only_where_it_is_trusted(trusted, tmp_path, monkeypatch):
    asked = []

    def download(*_, allow_patterns, **__):
        asked.extend(allow_patterns)
        raise OSError("far enough")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(RunError):
        HubModel("x", "nobody/nothing", trust_remote_code=trusted).load(tmp_path, *CPU)
    assert ("*.py" in asked) is trusted
    assert not {"*.bin", "*.pt", "*.pth", "*.pkl"} & set(asked)


def test_a_model_larger_than_memory_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "available_memory_bytes", lambda: 1000)
    with pytest.raises(RunError, match=r"GiB.*free"):
        RandomModel("tiny", "llama", SHAPE).load(tmp_path, *CPU)


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_converted_model_that_changed_on_disk_is_named(changed, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_convert_gguf", lambda *_: trained)
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    LocalModel(str(file)).load(tmp_path, *CPU)
    (stored,) = tmp_path.glob(f"models/*/{changed}")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    with pytest.raises(RunError, match=rf"{changed} changed after it was converted from some\.gguf; delete"):
        LocalModel(str(file)).load(tmp_path, *CPU)
