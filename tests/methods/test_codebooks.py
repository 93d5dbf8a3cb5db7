"""Code books: published tables, closed forms, nearest values, storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ConfigError
from methods.quantization import codebooks
from methods.quantization.codebooks import CodebookGrid, fixed_book
from methods.quantization.linear import pack_linear

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 96, generator=GENERATOR)
FIXED = [("int", b) for b in (2, 3, 4, 8)] + [("float", b) for b in (2, 3, 4, 6, 8)] + [("nf4", 4), ("fp4", 4)]
FIXED += [("dynamic", b) for b in (2, 3, 4, 8)]
ALL = [*FIXED, *(("quantile", b) for b in (2, 3, 4, 8))]


def test_nf4_is_the_published_table():
    published = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
    torch.testing.assert_close(fixed_book("nf4", 4), torch.tensor(published), atol=6e-5, rtol=0)


def test_dynamic_is_the_published_table_of_four_bits():
    magnitudes = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = sorted([*magnitudes, *(-m for m in magnitudes), 0.0, 1.0])
    torch.testing.assert_close(fixed_book("dynamic", 4), torch.tensor(expected))
    assert float(fixed_book("dynamic", 8).min()) == pytest.approx(-0.99297, abs=1e-5)


def test_four_bit_floats_are_e2m1():
    magnitudes = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    expected = torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])
    torch.testing.assert_close(fixed_book("float", 4), expected)


def test_eight_bit_floats_with_four_exponent_bits_hold_torch_s_e4m3_values():
    """E4M3FN gives its largest code to NaN, so its values are all of ours but the largest."""
    ours = fixed_book("float", 8) * 480
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    theirs = theirs[theirs.isfinite()].unique()
    torch.testing.assert_close(ours[1:-1], theirs)


@pytest.mark.parametrize(("kind", "bits"), ALL)
def test_books_are_ascending_hold_zero_and_stay_within_one(kind, bits):
    book = CodebookGrid(kind, bits).book(WEIGHT)
    assert len(book) <= 2**bits
    assert (book.diff() >= 0).all()
    assert (book == 0).any()
    assert float(book.abs().max()) == 1


@pytest.mark.parametrize(("kind", "bits"), ALL)
@pytest.mark.parametrize("size", [32, 64, 4096])
def test_every_weight_goes_to_the_nearest_value(kind, bits, size):
    grid = CodebookGrid(kind, bits, size)
    scales = grid.fit(WEIGHT, torch.float16)
    flat = WEIGHT.flatten()
    scale = scales.scale.reshape(-1).float().repeat_interleave(size)[: len(flat)]
    book = scales.stored.get("weight_book", grid.book(WEIGHT)).float()
    distance = (flat[:, None] - scale[:, None] * book).abs()
    rounded = grid.round(WEIGHT, scales).flatten()
    torch.testing.assert_close((rounded - flat).abs(), distance.amin(1), atol=1e-6, rtol=1e-5)
    assert torch.equal(grid.decode(grid.encode(WEIGHT, scales), scales).flatten(), rounded)


@pytest.mark.parametrize("kind", ["int", "float", "dynamic", "nf4", "fp4", "quantile"])
def test_scaling_weights_scales_their_values(kind):
    grid = CodebookGrid(kind, 4)
    one, four = (grid.round(w, grid.fit(w, torch.float32)) for w in (WEIGHT, 4 * WEIGHT))
    torch.testing.assert_close(4 * one, four)


def test_integers_agree_with_the_uniform_formula():
    grid = CodebookGrid("int", 4, 32)
    blocks = WEIGHT.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(
        grid.round(WEIGHT, grid.fit(WEIGHT, torch.float32)).view(-1, 32), (blocks / scale).round() * scale
    )


def test_blocks_cross_rows_where_rows_do_not_divide():
    weight = torch.arange(1.0, 31).view(3, 10)
    assert torch.equal(CodebookGrid("int", 8, 4).fit(weight, torch.float32).scale[0, :3], torch.tensor([4.0, 8, 12]))


def test_for_normal_weights_nf4_errs_less_than_integers_and_floats():
    weight = torch.randn(512, 512, generator=GENERATOR)
    errors = {}
    for kind in ("nf4", "fp4", "int"):
        grid = CodebookGrid(kind, 4)
        errors[kind] = float((grid.round(weight, grid.fit(weight, torch.float32)) - weight).square().mean().sqrt())
    assert errors["nf4"] == pytest.approx(0.0921, abs=0.001)  # known for blocks of 64
    assert errors["fp4"] == pytest.approx(0.1221, abs=0.001)
    assert errors["nf4"] < errors["int"] < errors["fp4"]


def test_quantile_codes_are_used_equally_often():
    weight = torch.randn(256, 256, generator=GENERATOR)
    grid = CodebookGrid("quantile", 4)
    used = grid.encode(weight, grid.fit(weight, torch.float32)).flatten().long().bincount(minlength=16) / weight.numel()
    assert used.max() < 2.2 / 16
    assert used.min() > 0.3 / 16


def test_double_quantization_costs_next_to_nothing():
    weight = torch.randn(512, 512, generator=GENERATOR)
    plain, double = (CodebookGrid("nf4", 4, double_quantization=d) for d in (False, True))
    errors = [(g.round(weight, g.fit(weight, torch.float32)) - weight).square().mean().sqrt() for g in (plain, double)]
    assert errors[1] == pytest.approx(float(errors[0]), rel=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int", 3), ("quantile", 3), ("float", 6)])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_stores_every_byte_and_comes_back(kind, bits, double):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40)
    grid = CodebookGrid(kind, bits, 64, double_quantization=double)
    weight = linear.weight.detach()
    scales = grid.fit(weight, torch.float16)
    layer = pack_linear(linear, grid.encode(weight, scales), scales, grid)
    assert torch.equal(layer.dequantise(), grid.round(weight, scales))
    again = type(layer)(**layer.spec())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.dequantise(), layer.dequantise())
    stored = sum(b.numel() * b.element_size() for name, b in layer.named_buffers() if name != "bias")
    blocks = 96 * 40 // 64
    scale_bytes = blocks + 4 + 4 if double else 2 * blocks
    assert stored == 96 * 40 * bits // 8 + scale_bytes + (2 * 2**bits if kind == "quantile" else 0)


def test_a_matrix_of_zeros_stays_one():
    for kind in ("int", "float", "dynamic", "nf4", "fp4", "quantile"):
        grid = CodebookGrid(kind, 4)
        zeros = torch.zeros(4, 64)
        assert not grid.round(zeros, grid.fit(zeros, torch.float16)).any()


def test_rounding_by_given_scales_is_rounding():
    grid = CodebookGrid("float", 4, 32)
    scales = grid.fit(WEIGHT, torch.float32)
    column = grid.round_scaled(WEIGHT[:, :32], scales.scale[:, :1])
    assert torch.equal(column, grid.round(WEIGHT, scales)[:, :32])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nf5", 4), "kind=nf5"),
        (("int", 9), "bits=9"),
        (("nf4", 3), "bits=3"),
        (("int", 4, 1), "group_size=1"),
        (("float", 4, 64, 4), "exponent_bits=4"),
        (("int", 4, 64, 2), "exponent_bits=2"),
    ],
)
def test_books_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CodebookGrid(*arguments)


@pytest.mark.parametrize("rule", ["power_of_two", "row_power_of_two"])
def test_power_of_two_scales_are_and_never_clip_and_stay_within_an_octave(rule):
    free, ruled = CodebookGrid("float", 4, 32), CodebookGrid("float", 4, 32, scale_rule=rule)
    before, after = (grid.fit(WEIGHT, torch.float16).scale.float() for grid in (free, ruled))
    assert (after >= before * (1 - 1e-3)).all()  # 16-bit scales are rounded
    assert (after < 2.01 * before).all()
    unit = after / 6 if rule == "power_of_two" else after / after.amax(1, keepdim=True)
    assert torch.equal(unit.log2(), unit.log2().round())
    if rule == "row_power_of_two":
        torch.testing.assert_close(after.amax(1), before.amax(1))


def test_with_powers_of_two_every_four_bit_value_is_an_eight_bit_float():
    grid = CodebookGrid("float", 4, 32, scale_rule="power_of_two")
    values = grid.round(WEIGHT, grid.fit(WEIGHT, torch.float16))
    assert torch.equal(values.to(torch.float8_e5m2).float(), values)
    free = CodebookGrid("float", 4, 32)
    values = free.round(WEIGHT, free.fit(WEIGHT, torch.float16))
    assert not torch.equal(values.to(torch.float8_e5m2).float(), values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_multiplies_the_same_weights(kind, double, monkeypatch):
    """On a GPU with its own kernel; elsewhere the layer is told that there is one, and bitsandbytes decodes."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="extra `peers`: pip install bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(codebooks, "_bitsandbytes_multiplies", lambda *_: True)
    grid, linear = CodebookGrid(kind, 4, 64, double_quantization=double), nn.Linear(128, 48, bias=True)
    linear.weight.data = torch.randn(48, 128, generator=GENERATOR)
    scales = grid.fit(linear.weight.data, torch.float16)
    layer = pack_linear(linear, grid.encode(linear.weight.data, scales), scales, grid).to(device)
    dense, bias = layer.dequantise(), linear.bias.detach().half().float()
    layer.prepare("decoding", torch.bfloat16)
    assert layer.kernel == f"{kind} packed (bitsandbytes)"
    assert layer.weight_packed is None
    decoded = functional.dequantize_4bit(layer.operand, layer.bitsandbytes_state(torch.float32))
    torch.testing.assert_close(decoded, dense, rtol=1e-6, atol=1e-7)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 128, generator=GENERATOR).to(device, torch.bfloat16)
        expected = x.double() @ dense.double().t() + bias.to(device).double()
        found = layer(x).double()
        assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_bitsandbytes_is_asked_on_a_gpu_alone_and_for_what_it_has():
    nf4 = CodebookGrid("nf4", 4, 64)

    def asked(device="cuda", dtype=torch.bfloat16, columns=128, grid=nf4):
        return codebooks._bitsandbytes_multiplies(device, dtype, columns, grid)

    assert asked() == (codebooks.find_spec("bitsandbytes") is not None)
    assert not asked("cpu")
    assert not asked(dtype=torch.float32)
    assert not asked(columns=96)
    assert not asked(grid=CodebookGrid("quantile", 4, 64))
    assert not asked(grid=CodebookGrid("nf4", 4, 48))
