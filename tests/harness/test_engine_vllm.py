"""The vLLM engine: everything but vLLM itself, through a server that answers with transformers; and vLLM where it is.

VLLM_PYTHON=…/bin/python python -m pytest tests/harness/test_engine_vllm.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import context

from harness import artifact, run
from harness.engines import choice, vllm
from harness.engines.served import frames
from harness.engines.vllm import VLLM
from harness.environment import Hardware, _cpu_flags
from harness.errors import ConfigError, RunError
from harness.evaluation import run_probes
from harness.method import Bench
from harness.probes.footprint import Footprint, loaded_bytes
from harness.probes.load import Load
from harness.probes.perplexity import Perplexity
from harness.probes.speed import Speed
from harness.progress import NoProgress
from harness.records import read_records
from harness.tables import blocks_of, comparable
from harness.taxonomy import TABLES
from methods.pruning.magnitude import Magnitude
from methods.quantization.activations import InputGrid
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.grids import IntegerGrid
from methods.quantization.round_to_nearest import RoundToNearest
from tests.test_conf import resolved

SCRIPT = Path(__file__).with_name("vllm_stand_in.py")
FAKE = VLLM(
    kv_cache_bytes=1 << 20,
    maximum_length=128,
    batched_tokens=256,
    seconds_limit=240,
    dtype="float32",
    script=str(SCRIPT),
)
HARDWARE = Hardware("cpu", threads=1, decoding_dtype="float32")
TOKENS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(5))
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@contextmanager
def running(folder, tmp_path, server, engine=FAKE, file=""):
    """The engine on an artifact, behind a stand-in that behaves like this: "parrots", or goes wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_TEST_SERVER", server)
        patch.setenv("HARNESS_TEST_FILE", str(file))
        with engine.running(folder, HARDWARE, "decoding", tmp_path / "vllm.txt") as lm:
            yield lm


@pytest.fixture(scope="module")
def served(trained_folder, tmp_path_factory):
    """The trained tiny model behind a server that answers with transformers."""
    with FAKE.running(trained_folder, HARDWARE, "decoding", tmp_path_factory.mktemp("served") / "vllm.txt") as lm:
        yield lm


def ends_soon(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has asked after, within seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------------------------------- frames


def test_frames_carry_words_and_numbers_whole():
    ours, theirs = socket.socketpair()
    arrays = {
        "ids": np.arange(6).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
        "times": np.array([0.1, np.nan, np.inf]),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    frames.send(ours, {"do": "score", "what": "é"}, **arrays)
    frames.send(ours, {"next": True})
    message, found = frames.receive(theirs)
    assert message == {"do": "score", "what": "é"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert frames.receive(theirs) == ({"next": True}, {})
    ours.close()
    with pytest.raises(EOFError):
        frames.receive(theirs)


@pytest.mark.parametrize(
    ("arrays", "payload"),
    [
        ([["a", "float32", [3]]], b"\0" * 8),
        ([["a", "float32", [1]]], b"\0" * 8),
        ([["a", "object", [1]]], b"\0" * 8),
        ([["a", "float32", [-1]]], b"\0" * 8),
    ],
)
def test_what_is_no_frame_is_refused(arrays, payload):
    ours, theirs = socket.socketpair()
    header = json.dumps({"message": {}, "arrays": arrays}).encode()
    ours.sendall(struct.pack("<IQ", len(header), len(payload)) + header + payload)
    with pytest.raises(ValueError, match="not a frame"):
        frames.receive(theirs)


def test_only_numbers_are_sent():
    ours, _theirs = socket.socketpair()
    with pytest.raises(TypeError, match="object"):
        frames.send(ours, {}, a=np.array([print]))


# ---------------------------------------------------------------------------------- the engine, through the messages


def test_scores_and_tokens_are_those_of_the_same_artifact_in_process(served, trained):
    torch.testing.assert_close(served.engine.score(TOKENS), trained.engine.score(TOKENS), rtol=1e-5, atol=1e-5)
    padded = torch.arange(20)[None].expand(3, -1) >= torch.tensor([[0], [5], [9]])
    for mask in (None, padded):
        theirs = torch.stack(list(served.engine.generate(TOKENS, 6, mask)), 1)
        assert torch.equal(theirs, torch.stack(list(trained.engine.generate(TOKENS, 6, mask)), 1))


def test_an_answer_that_nobody_listens_to_any_more_is_given_up(served):
    expected = torch.stack(list(served.engine.generate(TOKENS, 3)), 1)
    for steps in (0, 1, 3):
        answer = served.engine.generate(TOKENS[:1], 40)
        for _ in range(steps):
            next(answer)
        answer.close()
    assert torch.equal(torch.stack(list(served.engine.generate(TOKENS, 3)), 1), expected)


def test_stamps_of_a_batch_are_when_every_row_was_there(trained_folder, tmp_path):
    """The parrot's row r has its k-th token after k/4 + r/8 seconds."""
    with running(trained_folder, tmp_path, "parrots") as lm:
        np.testing.assert_allclose(lm.engine.stamps(TOKENS, 3), [0, 0.5, 0.75, 1.0])
        stamps, _ = lm.engine.requests(TOKENS, 2, np.zeros(3))
        np.testing.assert_allclose(stamps, [[0, 0.25, 0.5], [0, 0.375, 0.625], [0, 0.5, 0.75]])


def test_requests_wait_for_their_arrival_and_for_each_other(served):
    """The stand-in serves one after the other: a request's first token comes after the one before it is finished."""
    arrivals = np.array([0.0, 0.3, 0.3])
    stamps, preemptions = served.engine.requests(TOKENS, 4, arrivals)
    assert stamps.shape == (3, 5)
    assert preemptions == 0
    assert (np.diff(stamps) > 0).all()
    finished = arrivals + stamps[:, -1]
    assert (arrivals[2] + stamps[2, 1]) > finished[1] > finished[0]


def test_the_module_is_a_shape_without_weights(served, trained):
    ours, dense = served.module, trained.module
    assert all(parameter.is_meta for parameter in ours.parameters())
    assert [tuple(p.shape) for p in ours.parameters()] == [tuple(p.shape) for p in dense.parameters()]
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in dense.buffers())
    assert served.engine.loaded_bytes == loaded_bytes(dense) - buffers


def test_probes_measure_through_it(served, trained, trained_folder, tmp_path):
    """Perplexity is that of the model in process; memory is what is needed beside what is reserved."""
    where = replace(context(tmp_path, TEXT, decoding_dtype="float32"), artifact=trained_folder)
    perplexity = Perplexity(window=32, windows=4, divergence=False)
    (expected, *_) = run_probes([perplexity], trained, where, "evaluate", tmp_path / "ours")
    timed = [
        Speed([2], 8, 4, warm_up=1, max_repeats=2, precision=0.03, seconds_limit=10),
        Footprint(8, 4),
        Load([20.0, None], requests=5, prompt_tokens=8, new_tokens=4, warm_up=1),
    ]
    found = run_probes([perplexity], served, where, "evaluate", tmp_path / "kept")
    found += run_probes(timed, served, where, "time", tmp_path / "kept")
    by_name = {m.metric: m for m in found}
    assert by_name["perplexity"].value == pytest.approx(expected.value, rel=1e-5)
    assert by_name["perplexity"].on == expected.on
    token = vllm.analytic_kv_bytes_per_token(trained.module, torch.float32)
    assert token == 512  # as the stand-in says of itself
    assert by_name["kv_cache_bytes_per_token"].value == token
    assert by_name["needed_bytes"].value == by_name["loaded_weight_bytes"].value + 12 * token
    assert by_name["reserved_bytes"].value == by_name["loaded_weight_bytes"].value + (1 << 20)
    assert "peak_memory_bytes" not in by_name
    assert all(m.value > 0 for m in found)
    assert "dense matmul (vLLM 0.0), sdpa attention, float32" in by_name["time_per_output_token_ms"].note
    loads = [m for m in found if m.metric == "requests_per_second"]
    assert [m.on.split(", ")[1] for m in loads] == ["Poisson 20/s", "all at once"]


def test_vllm_is_told_what_the_configuration_says(trained_folder, tmp_path):
    own = json.loads((trained_folder / "config.json").read_text())["max_position_embeddings"]
    with running(trained_folder, tmp_path, "parrots") as lm:
        told = lm.engine.facts["arguments"]
    expected = {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 128, "max_num_batched_tokens": 256}
    expected |= {"enforce_eager": True, "dtype": "float32", "tensor_parallel_size": 1}
    assert expected.items() <= told.items()
    with running(trained_folder, tmp_path, "parrots", replace(FAKE, maximum_length=10**6, enforce_eager=False)) as lm:
        assert lm.engine.context_tokens == own  # never beyond what the model was made for
        assert not lm.engine.facts["arguments"]["enforce_eager"]


def test_texts_beyond_its_positions_and_other_dtypes_are_refused(served):
    with pytest.raises(RunError, match="129 tokens exceed the 128 positions"):
        served.engine.score(torch.zeros(1, 128, dtype=torch.long))
    with pytest.raises(RunError, match="maximum_length"):
        list(served.engine.generate(torch.zeros(1, 100, dtype=torch.long), 29))
    served.engine.prepare("scoring", torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        served.engine.prepare("decoding", torch.bfloat16)


# ----------------------------------------------------------------------------------------------- when it goes wrong


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("crashes", r"ended \(exit status 7\): the last words"),
        ("fails", "RuntimeError: no such operator"),
        ("talks nonsense", "sent what is no answer"),
    ],
)
def test_a_server_that_goes_wrong_is_a_run_error(how, message, trained_folder, tmp_path):
    with running(trained_folder, tmp_path, how) as lm:
        with pytest.raises(RunError, match=message):
            lm.engine.score(TOKENS)
        pid = lm.engine.server._process.pid
    assert ends_soon(pid)
    with running(trained_folder, tmp_path, how) as lm, pytest.raises(RunError, match=message):
        list(lm.engine.generate(TOKENS, 3))


def test_a_server_that_hangs_is_ended_in_time(trained_folder, tmp_path):
    started = time.monotonic()
    with running(trained_folder, tmp_path, "hangs") as lm:
        lm.engine.server.patience = 1
        pid = lm.engine.server._process.pid
        with pytest.raises(RunError, match="gave no answer in 1 s"):
            lm.engine.score(TOKENS)
        assert ends_soon(pid)
    assert time.monotonic() - started < 60


def test_a_refusal_names_the_reason_what_the_artifact_holds_and_the_way_out(trained_folder, tmp_path):
    with (
        pytest.raises(RunError, match=r"kernel for 3 bits Reasons.*holds dense weights; engine=transformers"),
        running(trained_folder, tmp_path, "refuses"),
    ):
        pass


@pytest.mark.parametrize("end", ["close", "kill"])
def test_nothing_is_left_behind(end, trained_folder, tmp_path):
    """Neither the server nor what it started, whether the engine is closed or its owner is killed."""
    noted = tmp_path / "child"
    if end == "close":
        with running(trained_folder, tmp_path, "has a child", file=noted) as lm:
            pids = [lm.engine.server._process.pid, int(noted.read_text())]
            assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    else:
        code = (
            "import os, sys, time; from pathlib import Path; from harness.engines.served.client import Server\n"
            "server = Server('vLLM', None, Path(sys.argv[1]), dict(os.environ), Path(sys.argv[2]), 60)\n"
            "server.ask({'do': 'start', 'arguments': {'dtype': 'float32', 'max_model_len': 8}})\n"
            "print(server._process.pid, flush=True); time.sleep(600)"
        )
        command = [sys.executable, "-c", code, str(SCRIPT), str(tmp_path / "log")]
        environment = {"HARNESS_TEST_SERVER": "has a child", "HARNESS_TEST_FILE": str(noted)}
        environment |= {"PYTHONPATH": str(run.ROOT)}
        owner = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        pids = [int(owner.stdout.readline()), int(noted.read_text())]
        owner.kill()
        owner.wait()
    assert all(ends_soon(pid) for pid in pids)


# -------------------------------------------------------------------------------------------------------- artifacts


def saved(method, trained, tmp_path, generated_corpus) -> Path:
    bench = Bench(generated_corpus, torch.Generator().manual_seed(0), tmp_path, NoProgress())
    artifact.save(method.compress(trained, bench), tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (RoundToNearest(IntegerGrid(4, True, 32)), "pack-quantized (compressed-tensors) 4 bits"),
        (RoundToNearest(EightBitGrid("int"), InputGrid()), "int-quantized (compressed-tensors) 8 bits"),
        (RoundToNearest(EightBitGrid("e4m3"), InputGrid(kind="e4m3")), "float-quantized (compressed-tensors) 8 bits"),
    ],
    ids=["W4", "W8A8", "FP8"],
)
def test_compressed_tensors_are_loaded_as_they_are(method, words, trained, tmp_path, generated_corpus):
    folder = saved(method, trained, tmp_path, generated_corpus)
    assert vllm.servable(folder) == folder
    assert vllm.holding(folder) == f"the artifact holds {words}"
    stored = sum(artifact.tensor_bytes(folder).values())
    assert vllm.weight_bytes(folder, torch.bfloat16) == stored
    embedding = trained.module.get_input_embeddings().weight
    assert vllm.weight_bytes(folder, torch.float32) > stored + 2 * embedding.numel() - 1


def test_code_books_are_exported_once(trained, tmp_path, generated_corpus):
    folder = saved(RoundToNearest(CodebookGrid("nf4", 4, 64)), trained, tmp_path, generated_corpus)
    hashed = artifact.sha256(folder)
    target = vllm.servable(folder)
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    written = (target / "model.safetensors").stat().st_mtime_ns
    assert vllm.servable(folder) == target
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    assert artifact.sha256(folder) == hashed  # the artifact is still what was measured


def test_what_vllm_cannot_hold_is_named(trained, tmp_path, generated_corpus):
    folder = saved(Magnitude(0.5), trained, tmp_path, generated_corpus)
    with pytest.raises(RunError, match=r"holds SparseLinear.*bitsandbytes.*use engine=transformers"):
        vllm.servable(folder)


def test_an_artifact_with_an_engine_of_its_own_is_named(trained_folder, tmp_path):
    import shutil

    folder = tmp_path / "artifact"
    shutil.copytree(trained_folder, folder)
    description = artifact.read_description(folder)
    description["engine"] = {"cache": {"_target_": "methods.quantization.key_value_cache.QuantizedCache"}}
    (folder / artifact.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(RunError, match=r"engine of its own \(cache QuantizedCache\).*use engine=transformers"):
        vllm.servable(folder)


# ---------------------------------------------------------------------------------------------------- configuration


def test_the_default_engine_changes_no_digest_and_no_record():
    config = resolved("method=gptq", "bits=3")
    without = {key: value for key, value in config.items() if key != "engine"}
    assert run.identity(config) == run.identity(without)
    assert run.describe(config) == run.describe(without)
    assert "engine" not in run._sections(config)
    assert run.build(without).engine == run.build(config).engine == choice.Transformers()


def test_vllm_is_in_the_digest_the_name_and_the_record():
    config, other = (resolved("method=gptq", "bits=3", f"engine={name}") for name in ("vllm", "transformers"))
    wanted = run.identity(config)
    assert wanted["engine"]["name"] == "vllm"
    assert run.digest_of(wanted) != run.digest_of(run.identity(other | {"evaluation": config["evaluation"]}))
    assert "-vllm-cpu-" in run.record_path(wanted, "0", run.Paths(Path("r"), Path("c"))).name
    assert run.describe(config).endswith(", in vllm")
    assert run._sections(config)["engine"] == config["engine"]
    assert run.dense_twin(config)["engine"] == config["engine"]  # a row is compared with dense in its own engine
    # one artifact for both
    assert run.compression_identity(wanted) == run.compression_identity(run.identity(other))


def test_it_computes_in_its_own_dtype():
    parts = run.build(resolved("engine=vllm"))
    assert choice.hardware_with(parts.engine, parts.hardware).scoring_dtype == "bfloat16"
    assert parts.hardware.scoring_dtype == "float32"  # compression does not follow
    assert choice.hardware_with(choice.Transformers(), parts.hardware) == parts.hardware


def test_it_comes_with_an_evaluation_that_it_can_answer_and_others_are_refused():
    assert resolved("engine=vllm")["evaluation"]["name"] == "served"
    with pytest.raises(ConfigError, match=r"gives no hidden states, which perplexity, tasks, kernel asks for.*served"):
        run.build(resolved("engine=vllm", "evaluation=quick"))
    with pytest.raises(ConfigError, match="gives no requests, which load asks for; choose engine=vllm"):
        run.build(resolved("evaluation=served"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "engine.dtype=int8"),
        ({"tensor_parallel": 0}, "engine.tensor_parallel=0"),
        ({"kv_cache_bytes": 0}, "engine.kv_cache_bytes=0"),
        ({"seconds_limit": 0}, "engine.seconds_limit=0"),
    ],
)
def test_values_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(FAKE, **change)


def test_where_it_is_not_installed_one_line_says_how_to_get_it():
    missing = replace(FAKE, script=None)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ConfigError, match=r"vLLM is not installed here.*pip install vllm.*engine\.interpreter="):
            missing.check_available()
    with pytest.raises(ConfigError, match=r"engine\.interpreter=/nowhere/python is not a Python that can be run"):
        replace(missing, interpreter="/nowhere/python").check_available()


def test_versions_are_those_of_the_other_python():
    assert replace(FAKE, interpreter=sys.executable).versions()["torch"] == metadata.version("torch")


def small(engine: str, method: str) -> dict:
    """A run on the tiny model that measures perplexity alone; vLLM's place is taken by the stand-in."""
    windows = ("evaluation.probes.perplexity.window=64", "evaluation.probes.perplexity.windows=4")
    common = ("model=tiny", "hardware.threads=1", "tracker=none", "calibration=smoke", "evaluation=served")
    config = resolved(f"method={method}", f"engine={engine}", *common, *windows)
    config["evaluation"]["probes"] = {"perplexity": config["evaluation"]["probes"]["perplexity"]}
    if engine == "vllm":
        config["engine"] |= {"script": str(SCRIPT), "maximum_length": 128, "dtype": "float32"}
    return config


def test_a_whole_run_and_its_table_name_the_engine(tmp_path):
    """Configuration to record, dense twin included; an artifact that vLLM lacks is a failed row; engines never mix."""
    paths = run.Paths(tmp_path, tmp_path / "cache")
    failed = run.run(small("vllm", "magnitude"), paths, say=lambda _: None)
    assert failed.status == "failed"
    assert "this artifact holds SparseLinear" in failed.reason
    here = run.run(small("transformers", "magnitude"), paths, say=lambda _: None)
    assert here.status == "finished"
    records = [record for _, record in read_records(tmp_path)]
    dense = {
        (record.config.get("engine") or {}).get("name"): record for record in records if record.card["name"] == "dense"
    }
    assert set(dense) == {"vllm", None}
    assert dense["vllm"].environment["engine_versions"]["torch"] == metadata.version("torch")
    assert dense["vllm"].environment["scoring_dtype"] == "float32"
    assert dense["vllm"].value("perplexity") == pytest.approx(dense[None].value("perplexity"), rel=1e-5)
    (one, other) = sorted(comparable(records), key=lambda block: "engine" in block[0].config)
    assert [("engine" in record.config) for record in [*one, *other]] == [False, False, True, True]
    (plain, served) = sorted(blocks_of(TABLES[1], records), key=lambda block: "vllm" in block.title)
    assert "vllm" not in plain.title
    assert " · vllm · " in served.title
    assert any(line.startswith("Engine: vllm, in an interpreter of its own (torch") for line in served.protocol)


# -------------------------------------------------------------------------------------------------------- vLLM itself

PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
WINDOW, WINDOWS = 256, 4


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model, dense, in 8 and in 4 bits: its artifacts, and tokens of real text."""
    from harness.corpus import Corpus, WikipediaSample
    from harness.models import EmbeddedModel
    from harness.wheels import default_cache

    text = WikipediaSample()
    corpus = Corpus("wikipedia-sample", text, text, samples=1, window=64)
    root = tmp_path_factory.mktemp("embedded")
    methods = {
        "dense": None,
        "W8A8": RoundToNearest(EightBitGrid("int"), InputGrid()),
        "W4": RoundToNearest(IntegerGrid(4, False, 64)),
        "NF4": RoundToNearest(CodebookGrid("nf4", 4, 64)),
    }
    for name, method in methods.items():
        lm, _ = EmbeddedModel("smollm2-135m-gguf").load(default_cache(), "cpu", torch.float32)
        bench = Bench(corpus, torch.Generator().manual_seed(0), root, NoProgress())
        artifact.save(lm if method is None else method.compress(lm, bench), root / name)
    tokens = corpus.evaluation_tokens(lm.tokenizer)[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)
    return root, tokens


@pytest.mark.real_model
@pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed: VLLM_PYTHON=…/bin/python names a Python that has it")
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("dense", "float32", 1e-4),  # the same arithmetic in another order
        ("dense", "bfloat16", 0.01),  # every layer's outputs rounded to 8 bits of mantissa
        ("W4", "bfloat16", 0.01),
        ("NF4", "bfloat16", 0.01),  # by way of its export in the layout of bitsandbytes
        # inputs in 8 bits as well: a token's loss moves by 0.2 nats either way when one input rounds differently
        ("W8A8", "bfloat16", 0.03),
    ],
)
def test_the_same_artifact_has_the_same_perplexity_in_both_engines(name, dtype, tolerance, embedded, tmp_path):
    """transformers in float32 against vLLM in what it serves; relative to perplexity."""
    if name == "W4" and "avx512f" not in _cpu_flags():
        pytest.skip("vLLM's product with 4-bit weights needs AVX-512 on a processor")
    if name == "NF4" and "vllm-bnb-plugin" not in replace(FAKE, interpreter=PYTHON).versions():
        pytest.skip("vLLM reads bitsandbytes with vllm-bnb-plugin, which is not installed beside it")
    root, tokens = embedded
    ours = artifact.load(root / name, "cpu", torch.float32)
    ours.engine.prepare("scoring", torch.float32)
    expected = float(ours.engine.score(tokens).mean().exp())
    engine = replace(FAKE, script=None, interpreter=PYTHON, dtype=dtype, kv_cache_bytes=1 << 28, maximum_length=512)
    engine = replace(engine, batched_tokens=2048, seconds_limit=600)
    hardware = replace(HARDWARE, scoring_dtype=dtype, decoding_dtype=dtype)
    with engine.running(root / name, hardware, "scoring", tmp_path / "vllm.txt") as lm:
        found = float(lm.engine.score(tokens).mean().exp())
        assert found == pytest.approx(expected, rel=tolerance)
        assert lm.engine.kv_cache_bytes_per_token(getattr(torch, dtype)) == lm.engine.token_bytes
        next(lm.engine.generate(tokens[:1, :64], 200)).tolist()  # given up after its first token
        stamps = lm.engine.stamps(tokens[:2, :64], 4)
        assert stamps[0] == 0
        assert (np.diff(stamps) > 0).all()
        arrivals = np.array([0.0, 0.2, 0.4])
        stamps, _ = lm.engine.requests(tokens[:3, :32], 4, arrivals)
        assert (np.diff(stamps) > 0).all()
        if dtype == "float32":
            theirs = torch.stack(list(lm.engine.generate(tokens[:2, :64], 8)), 1)
            assert torch.equal(theirs, torch.stack(list(ours.engine.generate(tokens[:2, :64], 8)), 1))
        pid = lm.engine.server._process.pid
    assert ends_soon(pid)


@pytest.mark.parametrize(
    ("engine", "hardware", "message"),
    [
        ({}, {"devices": 2}, r"engine\.tensor_parallel=2"),
        ({"tensor_parallel": 2}, {"device": "cuda:1"}, "is one GPU"),
        ({"tensor_parallel": 4}, {}, "torch sees 2 GPUs"),
    ],
)
def test_gpus_that_share_layers_are_there_and_asked_for_by_one_option(engine, hardware, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        replace(FAKE, **engine).check_hardware(Hardware("h100", **({"device": "cuda"} | hardware)))
    replace(FAKE, tensor_parallel=2).check_hardware(Hardware("h100", "cuda"))
