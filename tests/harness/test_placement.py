"""A model over several devices: what lies where against brute force, and the same numbers as on one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from harness import artifact
from harness.engines import placement
from harness.engines.choice import Transformers
from harness.engines.transformers import TransformersEngine
from harness.environment import Hardware, label, telling
from harness.errors import ConfigError, RunError
from harness.evaluation import Context
from harness.probes.footprint import Footprint, loaded_by_device, loaded_bytes
from harness.progress import NoProgress
from methods.architecture.attention_sinks import AttentionSinks
from methods.blocks import decoder_blocks
from methods.quantization.grids import IntegerGrid
from methods.quantization.round_to_nearest import RoundToNearest
from tests.methods.architectures import ARCHITECTURES, tiny_model, tiny_tokens

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
ROOM = 10**9


def on_meta(name: str):
    kind, fields = ARCHITECTURES[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)


def packed(trained, bench, folder):
    artifact.save(RoundToNearest(IntegerGrid(4, True, 32)).compress(trained, bench), folder)
    return folder


@pytest.fixture
def two_places(monkeypatch):
    """Two devices that are one: every step between devices is taken, and values can be compared on a processor."""
    monkeypatch.setattr(placement, "free_bytes", lambda devices: [ROOM] * len(devices))
    return ["cpu", "cpu"]


# ---- what lies where


@pytest.mark.parametrize("room", [[40, 40, 40], [20, 60, 30], [100, 1, 45]])
def test_the_fullest_device_is_as_empty_as_any_division_in_order_leaves_it(room):
    generator = torch.Generator().manual_seed(sum(room))
    for _ in range(20):
        sizes = torch.randint(1, 12, (7,), generator=generator).tolist()

        def fullest(cuts, sizes=sizes):
            shares = [sum(sizes[a:b]) for a, b in itertools.pairwise([0, *cuts, len(sizes)])]
            return max(share / place for share, place in zip(shares, room, strict=True))

        least = min(map(fullest, itertools.combinations_with_replacement(range(len(sizes) + 1), len(room) - 1)))
        placed = placement.divide(sizes, room)
        assert placed == sorted(placed)
        held = [
            sum(size for size, at in zip(sizes, placed, strict=True) if at == device) for device in range(len(room))
        ]
        assert max(h / r for h, r in zip(held, room, strict=True)) == pytest.approx(least)


def test_what_does_not_fit_is_refused_with_sizes_and_ways_out():
    gib = placement.GIB
    assert placement.divide([3 * gib] * 4, [6 * gib] * 2) == [0, 0, 1, 1]
    with pytest.raises(RunError, match=r"need 12\.0 GiB and 2 devices have 11\.0 GiB.*hardware\.devices=N"):
        placement.divide([3 * gib] * 4, [6 * gib, 5 * gib])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_hold_every_tensor_once_and_blocks_follow_each_other(name):
    module = on_meta(name)
    parts = placement.parts(module)
    for tensor, _ in [*module.named_parameters(), *module.named_buffers()]:
        assert sum(tensor.startswith(f"{part}.") for part in parts) == 1
    prefix, blocks = decoder_blocks(module)
    numbers = [int(part.rpartition(".")[2]) for part in parts if part.startswith(f"{prefix}.")]
    assert numbers == list(range(len(blocks)))
    places = placement.device_map(module, ["cuda:0", "cuda:1"], [ROOM] * 2, "decoding", torch.float32)
    assert list(places.values()) == sorted(places.values())  # no way back
    assert set(places.values()) == {"cuda:0", "cuda:1"}
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert places["lm_head"] == ("cuda:0" if tied else "cuda:1")


def test_a_model_with_tensors_beside_its_parts_is_refused():
    module = on_meta("llama")
    module.model.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(RunError, match=r"model\.scale"):
        placement.parts(module)


def test_scoring_needs_room_for_dense_copies_of_packed_weights(trained, bench, tmp_path):
    module = artifact.load(packed(trained, bench, tmp_path / "rtn"), "cpu", torch.float32).module
    block = module.model.layers[0]
    weights = sum(layer.weight_count for layer in block.modules() if hasattr(layer, "weight_count"))
    stored = placement.ready_bytes("model.layers.0", block, "decoding", torch.float32)
    assert stored == loaded_bytes(block)
    assert placement.ready_bytes("model.layers.0", block, "scoring", torch.float32) == stored + 4 * weights


@pytest.mark.parametrize("kept", ["cpu", "meta"])
def test_where_gpus_hold_tensors_only_these_are_the_devices(kept):
    """A number kept on the host, or a part that waits on disk, is no device whose peak can be read."""
    with FakeTensorMode():
        first, second = (torch.nn.LayerNorm(3, device=f"cuda:{index}") for index in (1, 0))
        first.register_buffer("shape", torch.empty(1, device="cpu"))
        waiting = torch.nn.LayerNorm(3, device=kept)
    gpus = [torch.device("cuda:1"), torch.device("cuda:0")]
    assert placement.devices_of(torch.nn.Sequential(waiting, first, second)) == gpus
    assert placement.devices_of(waiting) == [torch.device(kept)]


# ---- the same numbers


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bloom"])
def test_blocks_that_wait_on_disk_compute_what_they_do_in_memory(name, tmp_path):
    tokens = tiny_tokens(2, 9)
    whole = TransformersEngine(tiny_model(name))
    module = tiny_model(name)
    prefix, _ = decoder_blocks(module)
    parts = placement.parts(module)
    waiting = {part for part in parts if part.startswith(f"{prefix}.")} - {f"{prefix}.0"}
    placement.dispatch(module, {part: "disk" if part in waiting else "cpu" for part in parts}, str(tmp_path))
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu", "meta"}
    divided = TransformersEngine(module)
    assert torch.equal(divided.score(tokens), whole.score(tokens))
    assert torch.equal(torch.stack([*divided.generate(tokens, 4)]), torch.stack([*whole.generate(tokens, 4)]))


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mode", ["scoring", "decoding"])
def test_a_saved_model_loads_part_by_part(compressed, mode, trained, trained_folder, two_places, bench, tmp_path):
    folder = packed(trained, bench, tmp_path / "rtn") if compressed else trained_folder
    answers = []
    for places in ("cpu", two_places):
        lm = artifact.load(folder, places, torch.float32, mode)
        lm.engine.prepare(mode, torch.float32)
        scores = lm.engine.score(TOKENS) if mode == "scoring" else torch.stack([*lm.engine.generate(TOKENS, 5)])
        answers.append(scores)
        assert lm.module.lm_head.weight is lm.module.model.embed_tokens.weight
    assert torch.equal(*answers)


def test_within_a_part_nothing_looks_for_devices(trained_folder, two_places):
    module = artifact.load(trained_folder, two_places, torch.float32).module
    hooked = {name for name, child in module.named_modules() if hasattr(child, "_hf_hook")}
    assert hooked == {"", *placement.parts(module)}


def test_a_part_leaves_the_current_gpu_as_it_found_it(monkeypatch):
    """Also when it fails: what runs next, another model perhaps, launches its kernels there."""
    current, seen = [0], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: current.__setitem__(0, place))

    class Part(torch.nn.Module):
        def forward(self, x):
            seen.append(current[0])
            if x < 0:
                raise RunError("fails")
            return x if x == 0 else self(x - 1)

    part = Part()
    placement.run_on("cuda:1", part)
    assert part(1) == 0
    with pytest.raises(RunError, match="fails"):
        part(-1)
    assert seen == ["cuda:1"] * 3
    assert current == [0]


# ---- what cannot


def test_a_model_run_in_a_way_of_its_own_is_refused_before_its_weights_are_read(trained, two_places, bench, tmp_path):
    folder = tmp_path / "sinks"
    artifact.save(AttentionSinks(sinks=2, window=8, chunk=4).compress(trained, bench), folder)
    for file in artifact.weight_files(folder):
        file.unlink()
    with pytest.raises(RunError, match=r"cache of its own.*hardware\.devices=1"):
        artifact.load(folder, two_places, torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "at least 1"),
        ({"device": "cpu"}, "hardware.device=cuda"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"steps": "captured"}, "a CUDA graph belongs to one GPU"),
        ({"steps": "compiled"}, "hardware.steps=plain"),
    ],
)
def test_what_several_devices_cannot_do_is_said_before_anything_runs(settings, message):
    with pytest.raises(ConfigError, match=message):
        Hardware("h100", **({"device": "cuda", "devices": 2} | settings))


def test_several_processes_that_train_have_one_device_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"hardware\.sharded=true"):
        Hardware("h100", "cuda", devices=2)
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda \("):
        Hardware("h100", "cuda:1")


def test_devices_that_are_not_there_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="torch sees 1"):
        Hardware("h100", "cuda", devices=2).check_device()


def test_two_devices_have_records_of_their_own_and_one_has_those_it_had():
    one = {"name": "h100", "device": "cuda"}
    assert label(one) == label(one | {"devices": 1}) == "h100"
    assert telling(one | {"devices": 1}) == one
    assert label(one | {"devices": 2}) == "h100_x2"
    assert telling(one | {"devices": 2}) != one
    assert Hardware("h100", "cuda", devices=2).places == ["cuda:0", "cuda:1"]
    assert Hardware("h100", "cuda:1").places == ["cuda:1"]


# ---- on two GPUs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "packed"])
def test_two_gpus_give_the_numbers_of_one(compressed, trained, trained_folder, bench, tmp_path):
    folder = packed(trained, bench, tmp_path / "rtn") if compressed else trained_folder
    two = Hardware("gpu", "cuda", devices=2, steps="auto", decoding_dtype="bfloat16")
    scores, answers = [], []
    for hardware in (replace(two, devices=1, steps="plain"), two):
        with Transformers().running(folder, hardware, "scoring", tmp_path / "log") as lm:
            assert placement.is_divided(lm.module) == (hardware.devices == 2)
            lm.engine.prepare("scoring", torch.float32)
            scores.append(lm.engine.score(TOKENS).cpu())
        with Transformers().running(folder, hardware, "decoding", tmp_path / "log") as lm:
            lm.engine.prepare("decoding", torch.bfloat16)
            answers.append(torch.stack([*lm.engine.generate(TOKENS, 8)]).cpu())
            held = loaded_by_device(lm.module)
            assert sum(held.values()) == loaded_bytes(lm.module)
            context = Context(None, hardware, folder, tmp_path, None, tmp_path, 0, NoProgress())
            measured = [*Footprint(prompt_tokens=16, new_tokens=4).measure(lm, context)]
    assert torch.equal(*scores)
    assert torch.equal(*answers)
    assert {device.index for device in held} == {0, 1}
    weights = [m for m in measured if m.metric == "device_weight_bytes"]
    assert {m.on.split(",")[0]: m.value for m in weights} == {str(device): size for device, size in held.items()}
    assert sum(m.metric == "device_peak_bytes" for m in measured) == 4
