"""A model on disk is the model: same numbers, counted bytes, nothing torn, nothing trusted."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from harness import artifact
from harness.errors import RunError

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def test_a_model_loaded_again_scores_the_same(trained, tmp_path):
    artifact.save(trained, tmp_path / "again")
    again = artifact.load(tmp_path / "again", "cpu", torch.float32)
    assert torch.equal(again.engine.score(TOKENS), trained.engine.score(TOKENS))
    assert again.storage_dtype == trained.storage_dtype


def test_tied_embeddings_stay_tied_and_are_stored_once(trained, trained_folder):
    assert trained.module.lm_head.weight is trained.module.model.embed_tokens.weight
    assert "lm_head.weight" not in artifact.tensor_bytes(trained_folder)


def test_stored_bytes_are_two_per_parameter_of_a_dense_model(trained_folder):
    parameters = artifact.read_description(trained_folder)["parameters"]
    assert sum(artifact.tensor_bytes(trained_folder).values()) == 2 * parameters
    assert artifact.stored_bytes(trained_folder) >= 2 * parameters  # headers come on top


def test_description_names_every_linear_of_the_blocks_with_its_shape(trained, trained_folder):
    linears = artifact.read_description(trained_folder)["linears"]
    assert len(linears) == 2 * 7  # q, k, v, o, gate, up, down in two blocks
    assert linears["model.layers.0.mlp.down_proj"] == [64, 128]
    assert "lm_head" not in linears


def test_a_truncated_weight_file_is_named(trained_folder, tmp_path):
    broken = shutil.copytree(trained_folder, tmp_path / "broken")
    file = artifact.weight_files(broken)[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"model\.safetensors"):
        artifact.load(broken, "cpu", torch.float32)


def test_a_flipped_bit_changes_the_hash(trained_folder, tmp_path):
    changed = shutil.copytree(trained_folder, tmp_path / "changed")
    file = artifact.weight_files(changed)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert artifact.sha256(changed) != artifact.sha256(trained_folder)


def test_every_file_that_decides_a_number_is_watched(trained_folder, tmp_path):
    folder = shutil.copytree(trained_folder, tmp_path / "model")
    hashes = artifact.file_hashes(folder)
    assert {"config.json", "tokenizer.json", "model.safetensors", artifact.DESCRIPTION} <= hashes.keys()
    assert artifact.sha256(folder, hashes) == artifact.sha256(folder)
    assert artifact.changed_file(folder, hashes) == ""
    (folder / "stage.json").write_text("{}")  # written later, beside what is watched
    assert artifact.changed_file(folder, hashes) == ""
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("64", "65", 1))
    assert artifact.changed_file(folder, hashes) == "config.json"
    (folder / "config.json").unlink()
    assert artifact.changed_file(folder, hashes) == "config.json"


def test_a_missing_tensor_is_an_error_not_a_random_weight(trained_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(trained_folder, tmp_path / "missing")
    file = artifact.weight_files(broken)[0]
    state = load_file(file)
    state.pop("model.norm.weight")
    save_file(state, file)
    with pytest.raises(RunError, match=r"model\.norm\.weight"):
        artifact.load(broken, "cpu", torch.float32)


def test_a_description_may_only_name_code_of_this_project(trained_folder, tmp_path):
    hostile = shutil.copytree(trained_folder, tmp_path / "hostile")
    description = artifact.read_description(hostile)
    description["modules"]["model.layers.0.mlp.up_proj"] = {"_target_": "subprocess.Popen", "args": "true"}
    (hostile / artifact.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(RunError, match="not part of this project"):
        artifact.load(hostile, "cpu", torch.float32)


def test_a_full_disk_leaves_no_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(RunError, match="free space there"):
        artifact.save(trained, tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_an_interrupted_save_leaves_the_old_model(trained, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    artifact.save(trained, folder)
    before = artifact.sha256(folder)

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    with pytest.raises(RunError, match="No space left"):
        artifact.save(trained, folder)
    assert artifact.sha256(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_same_model_written_by_another_sweep_stays_where_it_is(trained, tmp_path):
    """Its files may be being read; another model takes the place."""
    artifact.save(trained, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    before = file.stat().st_ino
    (tmp_path / "model.1.partial").mkdir()  # another process is writing, too
    artifact.save(trained, tmp_path / "model")
    assert file.stat().st_ino == before
    with torch.no_grad():
        trained.module.get_input_embeddings().weight.mul_(2)
    artifact.save(trained, tmp_path / "model")
    assert file.stat().st_ino != before
    assert not list(tmp_path.glob(f"*.{os.getpid()}.partial"))
