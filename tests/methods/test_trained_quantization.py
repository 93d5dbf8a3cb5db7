"""PEQA, QLoRA, Q8BERT, Q-BERT: what stays frozen, what step 0 is, eigenvalues, budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from torch import nn

from harness.errors import ConfigError
from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods.blocks import block_linears
from methods.quantization.activations import InputGrid
from methods.quantization.aware_training import AwareTraining, HessianMixed, _Aware, allocate, largest_eigenvalue
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.grids import IntegerGrid
from methods.quantization.peqa import PEQA, _TrainedScale
from methods.quantization.qlora import QLoRA
from methods.quantization.round_to_nearest import RoundToNearest, rounded_linear
from methods.training import TrainingSettings, language_modeling_loss

GRID = IntegerGrid(3, group_size=16)
NF4 = CodebookGrid("nf4", 4, 16, double_quantization=True)
STATIC = InputGrid(8, scope="tensor", static=True)
NONE = TrainingSettings(steps=0, learning_rate=1e-3)
FEW = TrainingSettings(steps=6, learning_rate=1e-3)
SOME = TrainingSettings(steps=40, learning_rate=2e-2)
CALIBRATION = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))


class Windows:
    def calibration_windows(self, tokenizer, generator):
        return CALIBRATION


def compressed(method, scratch: Path, dtype=torch.float32):
    run = Bench(Windows(), torch.Generator().manual_seed(0), scratch, NoProgress())
    return method.compress(LanguageModel(tiny_model("llama").to(dtype), None, None, torch.float16), run).module


def loss(module) -> float:
    with torch.no_grad():
        return float(language_modeling_loss(module, CALIBRATION))


@pytest.mark.parametrize(
    "method",
    [
        PEQA(GRID, FEW),
        AwareTraining(EightBitGrid("int", "tensor"), STATIC, FEW),
        HessianMixed(GRID, InputGrid(8), FEW, data_chunks=1, iterations=1),
    ],
    ids=["peqa", "q8bert", "qbert"],
)
def test_a_model_in_sixteen_bits_is_trained_as_one_in_float32(method, tmp_path):
    """Steps are taken in float32: 16 bits would swallow small ones."""
    wide, narrow = (compressed(method, tmp_path / str(dtype), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert loss(narrow.float()) == pytest.approx(loss(wide), abs=2e-3)


# -------------------------------------------------------------------------------------------------------- PEQA


def test_peqa_without_steps_is_rounding(tmp_path):
    one, two = compressed(PEQA(GRID, NONE), tmp_path), compressed(RoundToNearest(GRID), tmp_path)
    assert all(
        torch.equal(a.dequantise(), b.dequantise())
        for a, b in zip(block_linears(one).values(), block_linears(two).values(), strict=True)
    )


def test_peqa_trains_scales_and_no_integers(tmp_path):
    before, after = compressed(RoundToNearest(GRID), tmp_path / "r"), compressed(PEQA(GRID, SOME), tmp_path / "p")
    for a, b in zip(block_linears(before).values(), block_linears(after).values(), strict=True):
        assert torch.equal(a.codes(), b.codes())
        assert torch.equal(a.scales().zero, b.scales().zero)
        assert not torch.equal(a.scales().scale, b.scales().scale)
        assert (b.scales().scale > 0).all()
    assert loss(after) < loss(before) - 0.05


def test_the_gradient_of_a_scale_is_the_sum_over_its_group():
    torch.manual_seed(0)
    layer = rounded_linear(nn.Linear(32, 4, bias=False), GRID, torch.float32)
    trained = _TrainedScale(layer)
    x = torch.randn(5, 32)
    trained(x).square().sum().backward()
    weight = layer.dequantise().detach().requires_grad_(True)
    (x @ weight.T).square().sum().backward()
    integers = layer.codes().float() - layer.scales().zero.repeat_interleave(16, 1)
    expected = (weight.grad * integers).view(4, 2, 16).sum(-1)
    torch.testing.assert_close(trained.factor.grad / trained.start, expected, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- QLoRA


def test_qlora_without_steps_is_its_base_to_the_bit(tmp_path):
    one, two = compressed(QLoRA(NF4, NONE, rank=4), tmp_path), compressed(RoundToNearest(NF4), tmp_path)
    with torch.no_grad():
        assert torch.equal(one(CALIBRATION).logits, two(CALIBRATION).logits)


def test_qlora_trains_adapters_and_leaves_the_base_alone(tmp_path):
    base = compressed(RoundToNearest(NF4), tmp_path / "b")
    done = compressed(QLoRA(NF4, SOME, rank=4), tmp_path / "q")
    for a, b in zip(block_linears(base).values(), block_linears(done).values(), strict=True):
        assert torch.equal(a.dequantise(), b.inner.dequantise())
        assert b.correction().abs().sum() > 0
        assert b.left.dtype == torch.float16
    assert loss(done) < loss(base) - 0.05


def test_a_rank_beyond_the_matrix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rank=999.*proj"):
        compressed(QLoRA(NF4, NONE, rank=999), tmp_path)


# ------------------------------------------------------------------------------------------------------ Q8BERT


def test_untrained_q8bert_has_the_thresholds_of_the_first_window(tmp_path):
    done = compressed(AwareTraining(EightBitGrid("int", "tensor"), STATIC, NONE), tmp_path)
    seen = {}
    module = tiny_model("llama")
    for name, linear in block_linears(module).items():
        linear.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0].abs().amax()}))
    # rounded weights run in that pass as well, so inputs of later linears differ a little
    with torch.no_grad():
        module(CALIBRATION[:1])
    for name, layer in block_linears(done).items():
        torch.testing.assert_close(layer.input_scale[0].float(), seen[name] / 127, rtol=0.05, atol=0)


def test_training_under_rounding_lowers_the_loss(tmp_path):
    method = AwareTraining(IntegerGrid(3, True, "tensor"), STATIC, SOME)
    untrained = compressed(replace(method, training=NONE), tmp_path / "0")
    assert loss(compressed(method, tmp_path / "1")) < loss(untrained) - 0.05


def test_what_is_trained_is_what_is_packed():
    torch.manual_seed(0)
    aware = _Aware(nn.Linear(32, 8), IntegerGrid(4, True, "tensor"), STATIC, torch.float16, 0.99)
    aware.threshold.fill_(2.0)
    aware.started = True
    x = torch.randn(5, 32)
    layer = aware.packed()
    expected = aware(x)
    assert layer.input_scale.dtype == torch.float16
    torch.testing.assert_close(layer(x), expected, atol=2e-2, rtol=1e-2)  # a 16-bit input scale


def test_the_moving_average_is_its_closed_form():
    aware = _Aware(nn.Linear(4, 4), IntegerGrid(8, True, "tensor"), STATIC, torch.float16, 0.5)
    aware.threshold.fill_(8.0)
    aware.started = aware.follows = True
    largest = [4.0, 2.0, 6.0, 1.0]
    expected = 8.0
    for update, value in enumerate(largest):
        aware(torch.full((1, 4), value).requires_grad_(True))
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert float(aware.threshold) == pytest.approx(expected)


def test_inputs_may_stay_as_they_are(tmp_path):
    """Without a step that is rounding of weights alone."""
    done = compressed(AwareTraining(GRID, None, NONE), tmp_path)
    rounded = compressed(RoundToNearest(GRID), tmp_path)
    with torch.no_grad():
        assert torch.equal(done(CALIBRATION).logits, rounded(CALIBRATION).logits)


def test_gradients_pass_straight_through_weights_and_inputs():
    aware = _Aware(nn.Linear(4, 3, bias=False), IntegerGrid(2, True, "tensor"), InputGrid(2), torch.float16, 0.9)
    x = torch.randn(2, 4, requires_grad=True)
    aware(x).sum().backward()
    rounded = aware.packed().dequantise()
    torch.testing.assert_close(x.grad, rounded.sum(0).expand(2, 4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(aware.linear.weight.grad, InputGrid(2).round(x).sum(0).expand(3, 4).detach())


# ------------------------------------------------------------------------------------------------------ Q-BERT


def test_power_iteration_finds_the_eigenvalue_of_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    found = largest_eigenvalue(lambda: x @ matrix @ x / 2, [x], 500, 1e-10, generator)
    values = torch.linalg.eigvalsh(matrix)
    assert found == pytest.approx(float(values[values.abs().argmax()]), rel=1e-4)


def test_parameters_are_taken_together():
    """Of a quadratic in two tensors the eigenvalue is that of the whole matrix."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.T
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True) for n in (2, 3))

    def quadratic():
        both = torch.cat([x, y])
        return both @ matrix @ both / 2

    found = largest_eigenvalue(quadratic, [x, y], 500, 1e-10, generator)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-4)


@pytest.mark.parametrize("blocks", [2, 5, 30])
@pytest.mark.parametrize("bits", [3, 4, 7])
def test_the_budget_is_met_exactly_and_steep_blocks_get_more(blocks, bits):
    steepness = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)).tolist()
    given = allocate(steepness, bits, 1)
    assert sum(given) == bits * blocks
    assert [b for _, b in sorted(zip(steepness, given, strict=True))] == sorted(given)


def test_q_bert_mixes_widths_around_the_average(tmp_path):
    method = HessianMixed(IntegerGrid(4, group_size=16), InputGrid(8), NONE, iterations=4, chunk_tokens=16)
    done = compressed(method, tmp_path)
    widths = {name: layer.grid.bits for name, layer in block_linears(done).items()}
    assert set(widths.values()) == {3, 4, 5}  # three blocks
    assert sum(widths.values()) == 4 * len(widths)
    assert done.config._attn_implementation == tiny_model("llama").config._attn_implementation


@pytest.mark.parametrize("bits", [2, 8])
def test_at_the_ends_q_bert_is_uniform(bits, tmp_path):
    method = HessianMixed(IntegerGrid(bits, group_size=16), InputGrid(8), NONE)
    assert {layer.grid.bits for layer in block_linears(compressed(method, tmp_path)).values()} == {bits}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AwareTraining(GRID, STATIC, NONE, average_decay=1.0), "average_decay=1"),
        (lambda: HessianMixed(GRID, STATIC, NONE, data_chunks=0), "data_chunks=0"),
        (lambda: HessianMixed(GRID, STATIC, NONE, chunk_tokens=1), "chunk_tokens=1"),
        (lambda: PEQA(NF4, NONE), "integer grids"),
        (lambda: QLoRA(NF4, NONE, rank=0), "rank=0"),
        (lambda: QLoRA(NF4, NONE, alpha=0), "alpha=0"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
