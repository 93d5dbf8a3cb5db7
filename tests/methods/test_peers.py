"""Peers: what they store is loaded to the bit, what they say of themselves is checked, and how they fail is one line.

Without their libraries, their formats are made here by hand. With them, every peer runs for real:

    PEERS="llmcompressor=…/bin/python bitsandbytes=…/bin/python" python -m pytest tests/methods/test_peers.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness import artifact, run
from harness.cli import options
from harness.errors import ConfigError, RunError
from harness.progress import NoProgress
from harness.taxonomy import placement
from methods.blocks import plain_linears
from methods.peers import bits_and_bytes, exchange, layers
from methods.peers.exchange import Answer, Library, digest
from methods.quantization.activations import InputGrid
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.grids import IntegerGrid
from methods.quantization.llm_int8 import VectorwiseInt8Linear
from methods.quantization.packing import pack
from methods.quantization.round_to_nearest import RoundToNearest, rounded_linear
from tests.test_conf import resolved

PEERS = [name for name in options("method") if name.startswith("peer_")]
TOKENS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))
INTERPRETERS = dict(pair.split("=", 1) for pair in os.environ.get("PEERS", "").split())
MISSING = Library("Nothing", "no_such_library", "no-such-library", "none.py")

HANDOVER = exchange.SCRIPTS / "handover.py"
SPECIFICATION = importlib.util.spec_from_file_location("handover", HANDOVER)
handover = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(handover)


def weight(rows=64, columns=128, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def linear_of(w, bias=False):
    linear = nn.Linear(w.shape[1], w.shape[0], bias=bias)
    linear.weight = nn.Parameter(w.clone(), requires_grad=False)
    return linear.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [64, None])
def test_pack_quantized_buffers_are_ours(bits, symmetric, size):
    """A compressed-tensors checkpoint holds our own layer's buffers, with scales in a wider type that says the same."""
    grid = IntegerGrid(bits, symmetric, size)
    linear = linear_of(weight())
    ours = rounded_linear(linear, grid, torch.float16)
    parts = {name: t.float() if t.is_floating_point() else t for name, t in ours.state_dict().items()}
    made = layers.pack_quantized_layer(linear, parts, grid, torch.float16)
    assert torch.equal(made.dequantise(), ours.dequantise())
    assert {k: v.dtype for k, v in made.state_dict().items()} == {k: v.dtype for k, v in ours.state_dict().items()}


def test_another_layout_is_refused():
    """Ten 3-bit codes a word, as compressed-tensors before 0.19 packed them, are more words than a dense stream."""
    grid, linear = IntegerGrid(3, True, 64), linear_of(weight())
    parts = dict(rounded_linear(linear, grid, torch.float16).state_dict())
    parts["weight_packed"] = torch.zeros(64, -(-128 // 10), dtype=torch.int32)
    with pytest.raises(RunError, match="weight_packed"):
        layers.pack_quantized_layer(linear, parts, grid, torch.float16)


def test_scales_that_the_stored_type_does_not_hold_are_refused():
    assert torch.equal(layers.narrowed(torch.tensor([0.5]), torch.float16), torch.tensor([0.5], dtype=torch.float16))
    with pytest.raises(RunError, match="float16"):
        layers.narrowed(torch.tensor([0.1]), torch.float16)


def test_int_quantized_rows_mean_integer_times_scale():
    """Also -128, which our own grids do not use, and in the real integer product."""
    integers = torch.randint(-128, 128, (16, 32), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = torch.rand(16, 1, generator=torch.Generator().manual_seed(1))
    made = layers.int_quantized_layer(
        linear_of(weight(16, 32)), {"weight": integers, "weight_scale": scale}, InputGrid()
    )
    assert (integers == -128).any()
    assert torch.equal(made.dequantise(), integers.float() * scale)
    x = weight(40, 32, seed=2)
    simulated = made(x)
    made.prepare("decoding", torch.float32)
    assert torch.allclose(made(x), simulated, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_s_bit_stream_is_read_as_it_is_packed(bits):
    """Codes of inputs lie along the rows of `qweight`ᵀ: the dense little-endian stream that `pack` writes."""
    codes = torch.randint(0, 2**bits, (8, 96), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert torch.equal(handover.gptq_codes(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_gptq_layer_comes_through_as_scale_times_code_minus_zero(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (64, 128), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (64, 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(64, 2, generator=generator).half()
    parts = {"qweight": pack(codes, bits).T, "qzeros": pack(zeros.T.contiguous(), bits), "scales": scale.T}
    parts["g_idx"] = torch.arange(128) // 64
    kept = SimpleNamespace(tensors={})
    kept.give_integers = lambda *given: handover.Handover.give_integers(kept, *given)
    handover.give_gptq_layer(kept, "x", parts, bits)
    made = layers.integer_layer(linear_of(weight()), Answer(kept.tensors).parts("x"), IntegerGrid(bits, False, 64))
    meant = (codes.float() - zeros.float().repeat_interleave(64, 1)) * scale.float().repeat_interleave(64, 1)
    assert torch.equal(made.dequantise(), meant)
    with pytest.raises(ValueError, match="scattered"):
        handover.give_gptq_layer(kept, "x", parts | {"g_idx": parts["g_idx"].flip(0)}, bits)


def test_a_symmetric_grid_with_other_zero_points_is_refused():
    parts = {"codes": torch.zeros(4, 8, dtype=torch.uint8), "scale": torch.ones(4, 1), "zero": torch.zeros(4, 1)}
    with pytest.raises(RunError, match="middle"):
        layers.integer_layer(linear_of(weight(4, 8)), parts, IntegerGrid(4, True, None))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_four_bits_are_its_table_times_its_scales(kind):
    """Two codes to a byte, the first in its high half; blocks of 64 in reading order; its own table."""
    table = CodebookGrid(kind, 4).book()
    table = torch.cat([table, table[:1]])[:16]  # any 16 values will do, in any order
    codes = torch.randint(0, 16, (48 * 80,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    absmax = torch.rand(60, generator=torch.Generator().manual_seed(1))
    parts = {"packed": (codes[::2] << 4) | codes[1::2], "absmax": absmax, "code": table}
    made = bits_and_bytes.four_bit_layer(linear_of(weight(48, 80)), parts)
    assert torch.equal(made.dequantise().flatten(), (table[codes.long()].view(-1, 64) * absmax[:, None]).flatten())


def test_bitsandbytes_eight_bits_are_the_layer_of_our_llm_int8():
    linear = linear_of(weight(), bias=True)
    ours = VectorwiseInt8Linear.from_linear(linear, 6.0, False, torch.float16)
    parts = {"weight": ours.weight, "SCB": ours.SCB}
    made = bits_and_bytes.eight_bit_layer(linear, parts, 6.0, "float16")
    x = weight(5, 128, seed=1) * 40
    assert torch.equal(made(x), ours(x))


# ------------------------------------------------------------------------------------------------ back in the model


def compressed_answer(lm, grid):
    """What a peer that rounds to nearest and doubles every norm would leave."""
    tensors, digests = {}, {}
    for name, linear in plain_linears(lm.module).items():
        layer = rounded_linear(linear, grid, torch.float16)
        scales = layer.scales()
        tensors |= {f"{name}.codes": layer.codes(), f"{name}.scale": scales.scale, f"{name}.zero": scales.zero}
        digests[name] = digest(layer.dequantise())
    norms = {name: 2 * t for name, t in lm.module.state_dict().items() if "norm" in name}
    return Answer(tensors | norms, digests)


def test_what_a_peer_changed_besides_the_linears_is_taken_over(trained, trained_folder, bench):
    grid = IntegerGrid(4, False, 64)
    answer = compressed_answer(trained, grid)
    made = layers.put_back(trained, answer, lambda linear, parts: layers.integer_layer(linear, parts, grid))
    ours = artifact.load(trained_folder, "cpu", torch.float32)
    with torch.no_grad():
        for name, parameter in ours.module.named_parameters():
            if "norm" in name:
                parameter.mul_(2)
    expected = RoundToNearest(grid).compress(replace(ours, storage_dtype=torch.float16), bench)
    assert torch.equal(made.engine.score(TOKENS), expected.engine.score(TOKENS))


def test_weights_that_mean_something_else_than_the_peer_says_are_refused(trained):
    grid = IntegerGrid(4, False, 64)
    answer = compressed_answer(trained, grid)
    name = next(iter(plain_linears(trained.module)))
    answer.tensors[f"{name}.scale"][0, 0] *= 2
    with pytest.raises(RunError, match=name):
        layers.put_back(trained, answer, lambda linear, parts: layers.integer_layer(linear, parts, grid))


def test_a_linear_that_did_not_come_back_is_named(trained):
    grid = IntegerGrid(4, False, 64)
    answer = compressed_answer(trained, grid)
    name = list(plain_linears(trained.module))[-1]
    kept = Answer({key: t for key, t in answer.tensors.items() if not key.startswith(name)})
    with pytest.raises(RunError, match=name):
        layers.put_back(trained, kept, lambda linear, parts: layers.integer_layer(linear, parts, grid))


def test_a_tensor_that_the_model_does_not_have_is_refused(trained):
    answer = Answer({"model.layers.0.extra": torch.zeros(3)})
    with pytest.raises(RunError, match="extra"):
        layers.take_other_tensors(trained, answer, set())


# ------------------------------------------------------------------------------------------------- running a peer


def script_of(tmp_path, monkeypatch, body):
    """A peer made of `body`, which sees `request`, a Handover."""
    monkeypatch.setattr(exchange, "SCRIPTS", tmp_path)
    (tmp_path / "handover.py").write_text(HANDOVER.read_text(encoding="utf-8"))
    lines = ["import sys, time", "from handover import serve", "def compress(request):"]
    lines += [f"    {line}" for line in body.splitlines()] + ["serve(compress)"]
    (tmp_path / "peer.py").write_text("\n".join(lines))
    return Library("A peer", "json", "json", "peer.py")


ROUND_TO_NEAREST = """
import torch
modules = dict(request.load().named_modules())
with request.clock():
    for name in request.linears:
        w = modules[name].weight.float()
        scale = (w.abs().amax(1, keepdim=True) / 127).half()
        codes = (w / scale.float()).round().clamp(-128, 127)
        request.give_integers(name, codes + 128, scale, torch.full_like(scale, 128))
        request.witness(name, codes * scale.float())
request.tensors["windows"] = request.windows
print("a line")
request.finish("safetensors")
"""


def test_a_peer_gets_the_model_and_exactly_the_windows_of_the_run(trained, bench, tmp_path, monkeypatch):
    library = script_of(tmp_path, monkeypatch, ROUND_TO_NEAREST)
    windows = bench.corpus.calibration_windows(trained.tokenizer, torch.Generator().manual_seed(0))
    weights = {name: linear.weight.clone() for name, linear in plain_linears(trained.module).items()}
    answer = exchange.ask(library, None, trained, bench, {}, calibrates=True)
    assert torch.equal(answer.tensors.pop("windows"), windows)
    grid = IntegerGrid(8, True, None)
    made = layers.put_back(trained, answer, lambda linear, parts: layers.integer_layer(linear, parts, grid))
    for name, w in weights.items():
        half_a_step = w.abs().amax(1, keepdim=True) / 127 * 0.51
        assert ((made.module.get_submodule(name).dequantise() - w).abs() <= half_a_step).all()
    assert answer.seconds > 0
    assert {"safetensors", "torch"} <= set(answer.versions)
    assert not list(bench.scratch.glob("peer"))  # a dense model is not left on the disk


def test_a_peer_s_exception_is_the_reason(trained, bench, tmp_path, monkeypatch):
    library = script_of(tmp_path, monkeypatch, 'raise KeyError("no such layer")')
    with pytest.raises(RunError, match=r"A peer failed: KeyError: 'no such layer' \(its output is in .*output.txt"):
        exchange.ask(library, None, trained, bench, {}, calibrates=False)
    assert "Traceback" in (bench.scratch / "peer" / "output.txt").read_text()


def test_a_peer_that_dies_without_a_word_has_its_last_line_as_reason(trained, bench, tmp_path, monkeypatch):
    library = script_of(tmp_path, monkeypatch, 'print("half way", flush=True)\nimport os\nos._exit(7)')
    with pytest.raises(RunError, match="exit status 7: half way"):
        exchange.ask(library, None, trained, bench, {}, calibrates=False)


def test_a_peer_ends_with_the_process_that_asked(tmp_path, monkeypatch):
    script_of(tmp_path, monkeypatch, "time.sleep(60)")
    request = {"answer": str(tmp_path), "windows": None, "threads": 1, "seed": 0, "model": "", "device": "cpu"}
    request |= {"linears": [], "others": [], "dtype": "float32", "scale_dtype": "float16", "settings": {}}
    (tmp_path / "request.json").write_text(json.dumps(request))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "peer.py"), str(tmp_path / "request.json")], stdin=subprocess.PIPE
    )
    process.stdin.close()
    started = time.monotonic()
    assert process.wait(timeout=50) == 1
    assert time.monotonic() - started < 50


def test_the_environment_of_a_peer_has_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert "PYTHONPATH" not in exchange.environment("/elsewhere/python")
    assert exchange.environment(None)["PYTHONPATH"] == "/ours"


# ------------------------------------------------------------------------------------------------ what users meet


def test_a_missing_library_is_one_line_with_the_way_to_get_it():
    with pytest.raises(ConfigError, match=r"pip install no-such-library, then method.interpreter=") as caught:
        MISSING.require(None)
    assert "\n" not in str(caught.value)


def test_an_interpreter_without_the_library_is_told_to_install_it():
    with pytest.raises(ConfigError, match=rf"{sys.executable} -m pip install no-such-library"):
        MISSING.require(sys.executable)
    replace(MISSING, module="json").require(sys.executable)


def test_an_interpreter_that_is_none_is_named(tmp_path):
    plain = tmp_path / "notes.txt"
    plain.write_text("not a program")
    for path in ("/nowhere/bin/python", str(plain), str(tmp_path)):
        with pytest.raises(ConfigError, match=path):
            MISSING.require(path)


def test_a_program_that_is_no_python_is_refused(tmp_path):
    liar = tmp_path / "liar"
    liar.write_text("#!/bin/sh\nexit 3\n")
    liar.chmod(liar.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ConfigError, match="liar"):
        MISSING.require(str(liar))


def test_a_relative_path_is_from_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert exchange.executable("bin/python") == str(tmp_path / "bin" / "python")
    assert exchange.executable("python3") == "python3"


@pytest.mark.parametrize("name", PEERS)
def test_peers_stand_in_a_group_of_the_survey_and_are_marked(name):
    card = resolved(f"method={name}")["card"]
    assert placement(name, card["taxonomy"]) is not None
    assert card["title"].endswith(")")
    assert name.startswith("peer_")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=peer_llmcompressor_gptq", "method.damping=0"], "damping=0"),
        (["method=peer_llmcompressor_gptq", "grid@method.grid=int_tensor"], "int_group64"),
        (["method=peer_llmcompressor_awq", "method.search_points=0"], "search_points=0"),
        (["method=peer_llmcompressor_smoothquant", "method.strength=2"], "strength=2"),
        (["method=peer_bitsandbytes_nf4", "method.quant_type=nf5"], "nf5"),
        (["method=peer_bitsandbytes_int8", "method.threshold=0"], "threshold=0"),
        (["method=peer_autoround", "bits=5"], "bits=5"),
        (["method=peer_autoround", "method.batch=0"], "batch=0"),
        (["method=peer_gptqmodel", "method.damping=1"], "damping=1"),
    ],
)
def test_bad_values_are_refused_with_the_value(overrides, message):
    with pytest.raises(ConfigError, match=message):
        run.build(resolved(*overrides))


# ------------------------------------------------------------------------------------------------- the real thing


@pytest.mark.parametrize("name", PEERS)
def test_a_real_peer_meets_the_contract(name, trained_folder, generated_corpus, tmp_path):
    """Scores, from disk bit for bit, the same twice; `confirm` compares weights with the peer's own on the way."""
    from harness.method import Bench

    module = importlib.import_module(resolved(f"method={name}")["method"]["_target_"].rpartition(".")[0])
    interpreter = INTERPRETERS.get(module.LIBRARY.module)
    if interpreter is None:
        pytest.skip(f"PEERS names no interpreter with {module.LIBRARY.module}")
    if name == "peer_llmcompressor_awq" and not torch.cuda.is_available():
        pytest.skip("llm-compressor's AWQ stops on machines without an accelerator")
    quick = ["method.iterations=2"] if name == "peer_autoround" else []
    scores = []
    for number in range(2):
        method = run.make(resolved(f"method={name}", f"method.interpreter={interpreter}", *quick)["method"], "method")
        lm = artifact.load(trained_folder, "cpu", torch.float32)
        bench = Bench(generated_corpus, torch.Generator().manual_seed(7), tmp_path, NoProgress())
        compressed = method.compress(lm, bench)
        head = compressed.module.get_output_embeddings()
        assert head.weight is compressed.module.get_input_embeddings().weight
        artifact.save(compressed, tmp_path / str(number))
        again = artifact.load(tmp_path / str(number), "cpu", torch.float32)
        scores.append(again.engine.score(TOKENS))
    assert scores[0].isfinite().all()
    assert torch.equal(*scores)
