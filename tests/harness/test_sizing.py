"""Sizes by formula are those of published records, and of the floors in docs/gpu.md."""

from __future__ import annotations

import pytest

from harness import sizing
from harness.records import read_records
from harness.run import ROOT

SMOLLM, LLAMA_7B, LLAMA_8B = sizing.MODELS[:3]
SMALL_DECODER = {"gptq", "awq", "rtn", "dense"}


def published() -> dict[tuple[str, float | None], float]:
    records = [record for _, record in read_records(ROOT / "results" / "published" / "h100")]
    return {(r.card["name"], r.bits): r.value("stored_bytes") for r in records if r.card["name"] in SMALL_DECODER}


def test_shapes_have_the_weights_of_their_models():
    assert pytest.approx(134_515_008) == SMOLLM.weights
    assert pytest.approx(6_738_415_616) == LLAMA_7B.weights
    assert pytest.approx(8_030_261_248) == LLAMA_8B.weights
    assert [round(shape.weights / 1e9, 1) for shape in sizing.MODELS[3:]] == [70.6, 405.9]


def test_bytes_on_disk_are_those_of_records():
    stored = published()
    assert sizing.stored_bytes(SMOLLM) == pytest.approx(stored["dense", None], rel=2e-3)
    for method in ("rtn", "gptq", "awq"):
        for bits in (3, 4, 8):
            computed = sizing.stored_bytes(SMOLLM, sizing.grouped_bits(bits))
            assert computed == pytest.approx(stored[method, bits], rel=2e-3), (method, bits)
    assert sizing.stored_bytes(SMOLLM, sizing.masked_bits(0.5)) == pytest.approx(176_186_368, rel=2e-3)


@pytest.mark.parametrize(
    ("method", "tera", "floor"),
    [("gptq", 316, 0.47), ("sparsegpt", 246, 0.38), ("awq", 178, 0.26), ("wanda", 197, 0.26)],
)
def test_operations_and_floors_of_a_block_are_those_of_the_page_on_gpus(method, tera, floor):
    assert sizing.work(LLAMA_7B, method).operations / 1e12 == pytest.approx(tera, rel=0.01)
    assert sizing.work(LLAMA_7B, method).floor_seconds == pytest.approx(floor, abs=0.006)


def test_all_blocks_and_their_memory_lie_near_what_was_measured():
    assert 0.8 < sizing.compress_seconds(LLAMA_7B, "gptq") / 38.3 < 1
    assert 0.9 < sizing.solver_device_bytes(LLAMA_7B, moment_copies=5) / sizing.GIB / 3.25 < 1
    assert 0.9 < sizing.solver_device_bytes(LLAMA_7B) / sizing.GIB / 2.37 < 1


def test_more_of_anything_needs_more():
    for size in (sizing.stored_bytes, sizing.host_bytes, sizing.solver_device_bytes):
        values = [size(shape) for shape in sizing.MODELS]
        assert values == sorted(values)
    needed = [sizing.devices_to_serve(sizing.MODELS[-1], bits) for bits in (16, 8, 4)]
    assert needed == sorted(needed, reverse=True)


def test_devices_that_divide_a_model_hold_its_weights_and_scoring_needs_no_fewer():
    room = sizing.USABLE * sizing.DEVICE_BYTES
    assert sizing.devices_to_hold(LLAMA_7B, 16, scoring=True) == 1
    assert sizing.devices_to_hold(sizing.MODELS[3], 16, scoring=False) == 2  # 141 of 144 GB
    for shape in sizing.MODELS:
        for bits in (4.31, 8.05, 16):
            decoding, scoring = (sizing.devices_to_hold(shape, bits, mode) for mode in (False, True))
            assert sizing.stored_bytes(shape, bits) <= decoding * room
            assert decoding <= scoring
            assert bits < 16 or decoding == scoring
