"""ZeroQuant, OmniQuant and low-rank compensation: limits in which they are plain rounding, closed forms, orders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import tiny_model, tiny_tokens

from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.block_training import BlockTensors
from methods.blocks import block_linears, record_blocks
from methods.low_rank import LowRankLinear
from methods.quantization.activations import InputGrid
from methods.quantization.awq import AWQ
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.fake_quantization import round_between, rounded_straight_through
from methods.quantization.gptq import GPTQ
from methods.quantization.grids import IntegerGrid
from methods.quantization.low_rank_compensation import LowRankCompensation, factors_of
from methods.quantization.omniquant import OmniQuant, _Student
from methods.quantization.round_to_nearest import RoundToNearest
from methods.quantization.zeroquant import ZeroQuant

GRID = IntegerGrid(3, group_size=16)
INPUTS = InputGrid(4)
CALIBRATION = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return CALIBRATION


def bench(scratch=Path("unused")):
    return Bench(Windows(), torch.Generator().manual_seed(0), scratch, NoProgress())


def compressed(method, scratch, name="llama"):
    return method.compress(LanguageModel(tiny_model(name), None, None, torch.float16), bench(scratch)).module


def weights(module):
    return {name: linear.dequantise() for name, linear in block_linears(module).items()}


def error(module, name="llama"):
    with torch.no_grad():
        return float((module(CALIBRATION).logits - tiny_model(name)(CALIBRATION).logits).square().mean())


# ------------------------------------------------------------------------------------------- fake quantization


@pytest.mark.parametrize("grid", [GRID, IntegerGrid(4, True, 8), IntegerGrid(2, group_size=None)])
def test_what_is_trained_rounds_as_what_is_packed(grid):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    expected = grid.round(weight, grid.fit(weight, torch.float16))
    assert torch.equal(round_between(grid, weight, *grid.group_range(weight), torch.float16), expected)
    assert torch.equal(rounded_straight_through(weight, grid, torch.float16), expected)


def test_gradients_reach_weights_and_ranges():
    weight = torch.randn(6, 32, requires_grad=True)
    low, high = (end.detach().requires_grad_(True) for end in GRID.group_range(weight))
    round_between(GRID, weight, low * 0.8, high * 0.8, torch.float16).square().sum().backward()
    for tensor in (weight, low, high):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------- ZeroQuant


def test_without_distillation_zeroquant_is_rounding(tmp_path):
    one = compressed(ZeroQuant(GRID, INPUTS, epochs=0), tmp_path)
    two = compressed(RoundToNearest(GRID, INPUTS), tmp_path)
    assert torch.equal(one(CALIBRATION).logits, two(CALIBRATION).logits)


def test_a_learning_rate_of_zero_is_rounding(tmp_path):
    one = compressed(ZeroQuant(GRID, INPUTS, epochs=2, learning_rate=0.0), tmp_path)
    two = compressed(RoundToNearest(GRID, INPUTS), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))


@pytest.mark.parametrize("inputs", [None, INPUTS])
def test_distillation_lowers_the_error_of_the_model(inputs, tmp_path):
    method = ZeroQuant(GRID, inputs, epochs=8, learning_rate=2e-3)
    log = bench(tmp_path)
    module = method.compress(LanguageModel(tiny_model("llama"), None, None, torch.float16), log).module
    assert error(module) < 0.8 * error(compressed(RoundToNearest(GRID, inputs), tmp_path))
    assert log.log.tokens == 3 * 8 * CALIBRATION.numel()  # blocks × epochs × tokens
    assert all(list(curve.values())[-1] < curve[0] for curve in log.log.curves.values())


def test_steps_that_sixteen_bits_would_swallow_count_where_the_model_has_sixteen(tmp_path):
    method, moved = ZeroQuant(GRID, epochs=1, learning_rate=1e-5), []
    for dtype in (torch.float32, torch.bfloat16):
        module = tiny_model("llama").bfloat16().to(dtype)
        start = module.model.layers[0].mlp.up_proj.weight.clone()
        scratch = tmp_path / str(dtype)
        module = method.compress(LanguageModel(module, None, None, torch.float16), bench(scratch)).module
        assert all(parameter.dtype == dtype for parameter in module.parameters())
        moved.append(BlockTensors(scratch).get("model.layers.0")["mlp.up_proj.weight"] - start)
    assert torch.cosine_similarity(*(change.flatten().float() for change in moved), dim=0) > 0.9


# --------------------------------------------------------------------------------------------------- OmniQuant


def test_open_ranges_are_plain_rounding(tmp_path):
    """σ(20) is 1 in float32: nothing is clipped."""
    module = tiny_model("llama")
    blocks, hidden = record_blocks(module, CALIBRATION)
    student = _Student(OmniQuant(GRID), blocks[0], torch.float16)
    student.start(hidden)
    for tensor in student.clippings():
        tensor.data.fill_(20.0)
    student.apply()
    expected = weights(compressed(RoundToNearest(GRID), tmp_path))
    for name, linear in blocks[0].linears().items():
        assert torch.equal(linear.dequantise(), expected[name])


def test_without_training_ranges_are_98_percent(tmp_path):
    share = float(torch.tensor(4.0).sigmoid())
    for name, weight in weights(compressed(OmniQuant(GRID, epochs=0), tmp_path)).items():
        original = block_linears(tiny_model("llama"))[name].weight
        low, high = GRID.group_range(original)
        assert torch.equal(weight, GRID.round(original, GRID.fit_range(low * share, high * share, torch.float16)))


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2"])
def test_learned_scales_leave_the_block_as_it_was_before_rounding(name):
    """At 8 bits with open ranges the folded, rounded block does what the block did."""
    module = tiny_model(name)
    blocks, hidden = record_blocks(module, CALIBRATION)
    expected = blocks[0](hidden)[0]
    student = _Student(OmniQuant(IntegerGrid(8, group_size=16), InputGrid(16)), blocks[0], torch.float32)
    student.start(hidden)
    assert student.scales
    for tensor in student.clippings():
        tensor.data.fill_(20.0)
    model = student.model()
    with student.hooks(model), torch.no_grad():
        while_training = model(hidden)[0]
    with torch.no_grad():
        student.apply()
        after = blocks[0](hidden)[0]
    spread = expected.std()
    assert (while_training - expected).abs().mean() < 0.02 * spread
    torch.testing.assert_close(after, while_training, atol=float(0.02 * spread), rtol=0.02)


@pytest.mark.parametrize("inputs", [None, INPUTS])
def test_learning_beats_plain_rounding(inputs, tmp_path):
    method = OmniQuant(GRID, inputs, epochs=24)  # after 8 the order of sums decides
    plain = compressed(RoundToNearest(GRID, inputs), tmp_path)
    assert error(compressed(method, tmp_path / "o")) < 0.9 * error(plain)


def test_a_model_in_sixteen_bits_learns_as_one_in_float32(tmp_path):
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        language_model = LanguageModel(tiny_model("llama").to(dtype), None, None, torch.float16)
        method = OmniQuant(GRID, epochs=2)
        errors.append(error(method.compress(language_model, bench(tmp_path / str(dtype))).module.float()))
    assert errors[1] < 1.1 * errors[0]


def test_weights_alone_move_no_scales(tmp_path):
    module = compressed(OmniQuant(GRID, epochs=1), tmp_path)
    before = dict(tiny_model("llama").named_parameters())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("method", [OmniQuant(GRID, INPUTS, epochs=2), ZeroQuant(GRID, INPUTS, 2, 1e-3)])
def test_a_killed_run_goes_on_to_the_same_result(method, tmp_path):
    """What is left after a kill in the second block: the first block's parameters."""
    whole = compressed(method, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    first = next(iter(sorted((tmp_path / "whole").glob("*.safetensors"))))
    (tmp_path / "killed" / first.name).write_bytes(first.read_bytes())
    again = compressed(method, tmp_path / "killed")
    with torch.no_grad():
        assert torch.equal(whole(CALIBRATION).logits, again(CALIBRATION).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OmniQuant(CodebookGrid("nf4", 4)), "integer grids"),
        (lambda: OmniQuant(GRID, epochs=-1), "epochs=-1"),
        (lambda: OmniQuant(GRID, migration=1.5), "migration=1.5"),
        (lambda: OmniQuant(GRID, scales="some"), "scales=some"),
        (lambda: OmniQuant(GRID, InputGrid(8, scope="tensor", static=True)), "static"),
        (lambda: ZeroQuant(GRID, epochs=-1), "epochs=-1"),
        (lambda: ZeroQuant(GRID, InputGrid(8, scope="tensor", static=True)), "static"),
        (lambda: LowRankCompensation(RoundToNearest(GRID), -1), "rank=-1"),
        (lambda: LowRankCompensation(RoundToNearest(GRID), factors="4bit"), "factors=4bit"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -------------------------------------------------------------------------------------- low-rank compensation


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_what_is_left_is_the_tail_of_the_singular_values(shape, rank):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = factors_of(matrix, rank)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
    torch.testing.assert_close((matrix - left @ right).square().sum(), tail, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(left.square().sum(0), right.square().sum(1))  # √Σ on either side


@pytest.mark.parametrize("seed", range(4))
def test_an_error_of_lower_rank_is_made_up_for_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    error = 1e-3 * torch.randn(12, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
    left, right = factors_of(error, 12)
    torch.testing.assert_close(left @ right, error, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("inner", [RoundToNearest(GRID), GPTQ(GRID), GPTQ(CodebookGrid("float", 4, 16))])
def test_compensation_lowers_the_error_of_every_weight_the_more_the_higher_its_rank(inner, tmp_path):
    original = {name: linear.weight for name, linear in block_linears(tiny_model("llama")).items()}
    errors = []
    for rank in (0, 2, 8):
        module = compressed(LowRankCompensation(inner, rank), tmp_path)
        linears = block_linears(module)
        served = {
            n: layer.inner.dequantise() + layer.correction() if isinstance(layer, LowRankLinear) else layer.dequantise()
            for n, layer in linears.items()
        }
        errors.append([float((original[name] - weight).square().sum()) for name, weight in served.items()])
    for nothing, some, more in zip(*errors, strict=True):
        assert nothing > some > more


def test_rank_zero_is_the_inner_method(tmp_path):
    one = weights(compressed(LowRankCompensation(GPTQ(GRID), 0), tmp_path))
    two = weights(compressed(GPTQ(GRID), tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_method_that_moves_scales_is_not_compensated(tmp_path):
    with pytest.raises(RunError, match=r"changed by AWQ"):
        compressed(LowRankCompensation(AWQ(GRID, search_points=4), 2), tmp_path)


def test_a_rank_beyond_the_matrix_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"rank=999.*proj"):
        compressed(LowRankCompensation(RoundToNearest(GRID), 999), tmp_path)


def test_inner_methods_keep_their_input_grid(tmp_path):
    module = compressed(LowRankCompensation(GPTQ(GRID, InputGrid(8)), 2), tmp_path)
    assert all(layer.inner.inputs == InputGrid(8) for layer in block_linears(module).values())
    assert replace(InputGrid(8), bits=4) == INPUTS
    with torch.no_grad():
        assert module(tiny_tokens(2, 9)).logits.isfinite().all()
