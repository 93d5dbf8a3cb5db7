"""An exported folder says the same weights in bitsandbytes' words, decoded here by its documented layout."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from harness import artifact
from harness.errors import ConfigError
from harness.export import export
from methods.blocks import block_linears
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.grids import IntegerGrid
from methods.quantization.llm_int8 import LLMInt8
from methods.quantization.round_to_nearest import RoundToNearest

GRIDS = [CodebookGrid(kind, 4, 64, double_quantization=double) for kind in ("nf4", "fp4") for double in (False, True)]


def saved(method, trained, bench, folder):
    compressed = method.compress(trained, bench)
    weights = {name: layer.dequantise() for name, layer in block_linears(compressed.module).items()}
    artifact.save(compressed, folder)
    return weights


def four_bits(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The weight: high half of a byte first, value = table[code] · absmax of its block; absmax may be nested."""
    kind = next(key.rpartition("__")[2] for key in tensors if key.startswith(f"{name}.weight.quant_state"))
    state = json.loads(bytes(tensors[f"{name}.weight.quant_state.bitsandbytes__{kind}"].tolist()))
    packed = tensors[f"{name}.weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    scale = tensors[f"{name}.weight.absmax"]
    if "nested_offset" in state:
        second = tensors[f"{name}.weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scale)]
        scale = tensors[f"{name}.weight.nested_quant_map"][scale.long()] * second + state["nested_offset"]
    values = tensors[f"{name}.weight.quant_map"][codes] * scale.repeat_interleave(state["blocksize"])[: len(codes)]
    return values.view(state["shape"])


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.kind}{'-double' * g.double_quantization}")
def test_code_books_decode_to_the_same_weights(grid, trained, bench, tmp_path):
    weights = saved(RoundToNearest(grid), trained, bench, tmp_path / "model")
    config = export(tmp_path / "model", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(four_bits(tensors, name), weight, rtol=2e-6, atol=1e-7)
    assert config["bnb_4bit_quant_type"] == grid.kind
    assert config["bnb_4bit_use_double_quant"] == grid.double_quantization
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"] == config


def test_eight_bits_are_rows_of_codes_and_their_largest(trained, bench, tmp_path):
    weights = saved(LLMInt8(6.0, "int8"), trained, bench, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights.items():
        decoded = tensors[f"{name}.weight"].float() * tensors[f"{name}.SCB"][:, None] / 127
        torch.testing.assert_close(decoded, weight)


def test_what_is_not_compressed_is_the_same(trained, bench, tmp_path):
    saved(RoundToNearest(GRIDS[0]), trained, bench, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    shared = [name for name in before if "embed" in name or "norm" in name]
    assert shared
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_what_bitsandbytes_cannot_hold_is_refused(trained, bench, tmp_path):
    saved(RoundToNearest(IntegerGrid(4, group_size=16)), trained, bench, tmp_path / "model")
    with pytest.raises(ConfigError, match="QuantizedLinear of a kind that bitsandbytes cannot hold"):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(trained, bench, tmp_path):
    saved(RoundToNearest(GRIDS[0]), trained, bench, tmp_path / "model")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "harness.export", str(tmp_path / "model"), str(tmp_path / "out")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "is there already; name a new folder" in answer.stderr
