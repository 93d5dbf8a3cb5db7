"""Products whose weights lie as the matrix units read them; the kernels themselves need a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

pytest.importorskip("triton", reason="the kernels are written in Triton")

from harness.engines.joined import JoinedPart, join_linears
from methods.quantization import fragment_product as fragments
from methods.quantization import fused_blocks, linear
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import QuantizedLinear
from methods.quantization.round_to_nearest import rounded_linear

GENERATOR = torch.Generator().manual_seed(0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="instructions of a GPU")


def on_matrix_units(monkeypatch):
    """Layers of 4 bits that fit take the operand of the matrix units, whose products a CPU computes in plain torch."""
    monkeypatch.setattr(linear, "decoding_kernel", lambda *_: linear.MATRIX_UNITS)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def draw_codes(*shape: int) -> torch.Tensor:
    return torch.randint(16, shape, generator=GENERATOR, dtype=torch.uint8)


def test_words_are_the_registers_of_the_instruction():
    """m16n8k16 written out, thread by thread: what a warp multiplies are the weights and the inputs as they lie."""
    codes, x = draw_codes(32, 256), draw(8, 256)
    words, lanes = fragments.fragments(codes), torch.arange(32)
    row, quarter = lanes // 4, lanes % 4
    pairs = x.view(8, 128, 2)
    found = torch.zeros(32, 8)
    for block, chunk, j, k in itertools.product(range(2), range(2), range(4), (0, 2)):
        a, b = torch.zeros(16, 16), torch.zeros(16, 8)
        for one, beyond in itertools.product(range(2), range(2)):  # numbers of a register; registers of columns 8 on
            for half in range(2):
                code = (words[block, chunk, half, :, j] >> (4 * (k + beyond) + 16 * one)) & 15
                a[row + 8 * half, 2 * quarter + one + 8 * beyond] = code.float()
            place = 64 * chunk + 16 * j + 4 * quarter + k + beyond
            b[2 * quarter + one + 8 * beyond, row] = pairs[row, place, one]
        found[16 * block : 16 * block + 16] += a @ b
    torch.testing.assert_close(found.t(), x @ codes.float().t(), rtol=1e-4, atol=1e-3)
    assert torch.equal(fragments.codes_of(words), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_word_holds_a_scale_and_its_zero_point(dtype):
    scale, zero = (draw(32, 3) * 1e-3).to(dtype), torch.randint(256, (32, 3), generator=GENERATOR)
    words = fragments.scale_words(scale, zero).transpose(1, 2).reshape(32, 3)
    assert torch.equal((words & -256).view(torch.float32), scale.float())
    assert torch.equal(words & 255, zero)


def test_paired_blocks_hold_a_gate_above_what_it_opens():
    gate, up = draw_codes(32, 256), draw_codes(32, 256)
    both = fragments.paired(*(fragments.fragments(codes) for codes in (gate, up)))
    expected = torch.stack([gate.view(4, 8, 256), up.view(4, 8, 256)], 1).flatten(0, 2)
    assert torch.equal(fragments.codes_of(both), expected)
    scales = [(draw(32, 2).bfloat16(), torch.zeros(32, 2)) for _ in range(2)]
    words = fragments.paired(*(fragments.scale_words(*pair) for pair in scales))
    expected = torch.stack([scale.view(4, 8, 2) for scale, _ in scales], 1).flatten(0, 2)
    assert torch.equal(words, fragments.scale_words(expected, torch.zeros(64, 2)))


def decoded(codes, scale, zero):
    """Weights in float32: codes [N, K], scale and zero [N, G]."""
    width = codes.shape[1] // scale.shape[1]
    wide_zero, wide_scale = (t.float().repeat_interleave(width, 1) for t in (zero, scale))
    return (codes - wide_zero) * wide_scale


DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 30])
def test_a_norm_around_a_product_is_the_norm_before_it(device, rows):
    """What one product leaves, the next one divides by: together they are the layers written out."""
    first, second = ((draw_codes(256, 128), draw(256, 1).abs().bfloat16(), draw_codes(256, 1)) for _ in range(2))
    second = (draw_codes(48, 256), draw(48, 2).abs().bfloat16(), draw_codes(48, 2))
    x, added, gain = draw(rows, 128).bfloat16(), 30 * draw(rows, 256).bfloat16(), draw(256).bfloat16()
    words = [(fragments.fragments(c).to(device), fragments.scale_words(s, z).to(device)) for c, s, z in (first, second)]
    on = [t.to(device) for t in (added, gain)]
    y, scaled, squares = fragments.fragment_product_before_norm(x.to(device), *words[0], *on)
    expected = x.double() @ decoded(*first).double().t() + added.double()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2, atol=0.3)
    exact = y.cpu().double()
    torch.testing.assert_close(squares.cpu().double().sum(1), exact.square().sum(1), rtol=1e-5, atol=0)
    normed = torch.nn.functional.rms_norm(exact, (256,), gain.double(), 1e-5)
    expected = normed @ decoded(*second).double().t()
    found = fragments.fragment_product(scaled, *words[1], False, squares, 1e-5, None).cpu().double()
    assert float((found - expected).norm() / expected.norm()) < 6e-3


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "columns", "width"),
    [(16, 128, 128), (48, 1024, 512), (64, 512, 64), (16, 384, 32), (2816, 1024, 128), (32, 11008, 128)],
)
@pytest.mark.parametrize("rows", [1, 3, 9, 30, 127, 128])
def test_products_are_those_of_the_decoded_weights(dtype, outputs, columns, width, rows):
    codes, zero = draw_codes(outputs, columns), draw_codes(outputs, columns // width)
    scale, x = (draw(outputs, columns // width).abs() + 0.1).to(dtype), draw(rows, columns).to(dtype)
    weight = decoded(codes, scale, zero)
    operands = (fragments.fragments(codes).cuda(), fragments.scale_words(scale, zero).cuda())
    assert torch.equal(fragments.decoded_fragments(*operands, torch.float32).cpu(), weight)
    expected = x.double() @ weight.double().t()
    found = fragments.multiplied(x.cuda(), *operands).cpu().double()
    assert float((found - expected).norm() / expected.norm()) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 5, 12, 200])
def test_a_gated_layer_is_its_three_products(rows):
    gate, up = (packed(torch.nn.Linear(256, 512, bias=False)) for _ in range(2))
    down = packed(torch.nn.Linear(512, 48))
    x = draw(rows, 256).to("cuda", torch.bfloat16)
    expected = down(torch.nn.functional.silu(gate(x)) * up(x)).float()
    made = gate.gated(up, down)
    assert float((made(x[None])[0].float() - expected).norm() / expected.norm()) < 1e-2
    assert down.gated(up, gate) is None
    assert gate.gated(packed(torch.nn.Linear(256, 512)), down) is None  # a bias


def packed(linear: torch.nn.Linear) -> QuantizedLinear:
    layer = rounded_linear(linear, IntegerGrid(4, False, 128), torch.bfloat16).cuda()
    layer.prepare("decoding", torch.bfloat16)
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_fused_blocks_compute_what_the_model_does(monkeypatch, device, bias):
    """Prompt and steps with a cache, whole graphs of the compiler, too: the same logits up to rounding."""
    on_matrix_units(monkeypatch)
    module = tiny(bias).to(device)
    ids = torch.randint(64, (2, 70), generator=GENERATOR).to(device)
    plain = logits_in_parts(module, module, ids)
    groups = join_linears(module)
    assert len(groups) == 2 * len(module.model.layers)
    assert all("forward" in vars(block) for block in module.model.layers)
    assert isinstance(module.model.layers[0].self_attn.k_proj, JoinedPart)
    fused = logits_in_parts(module, module, ids)
    assert float((fused - plain).norm() / plain.norm()) < 2e-2
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_in_parts(module, compiled, ids), fused, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("length", [5, 70])
def test_a_pass_that_failed_leaves_nothing_that_the_next_one_reads(monkeypatch, length):
    on_matrix_units(monkeypatch)
    module = tiny(False)
    join_linears(module)
    ids = torch.randint(64, (1, length), generator=GENERATOR)
    expected = module(ids).logits
    for name, calls in itertools.product(("fragment_product", "fragment_product_before_norm"), range(5)):
        with monkeypatch.context() as patch:
            patch.setattr(fused_blocks, name, failing_after(calls, getattr(fused_blocks, name)))
            with pytest.raises(MemoryError):
                module(torch.randint(64, (1, 3), generator=GENERATOR))
        assert torch.equal(module(ids).logits, expected)


def failing_after(calls, product):
    """The product, which runs out of memory after so many calls."""
    left = itertools.count(calls, -1)

    def wrapped(*arguments):
        if next(left) == 0:
            raise MemoryError
        return product(*arguments)

    return wrapped


def test_blocks_of_another_build_stay_as_they_are(monkeypatch):
    on_matrix_units(monkeypatch)
    module = tiny(False)
    for block in module.model.layers:
        block.mlp.act_fn = torch.nn.GELU()
    join_linears(module)
    assert not any("forward" in vars(block) for block in module.model.layers)


def test_a_shorter_way_to_something_else_is_not_taken(monkeypatch):
    on_matrix_units(monkeypatch)
    module = tiny(False)
    for block in module.model.layers:  # adds twice what went around the attention
        block.forward = lambda hidden_states, own=block.forward, **options: (
            own(hidden_states, **options) + hidden_states
        )
    before = module(torch.arange(8)[None]).logits
    join_linears(module)
    torch.testing.assert_close(module(torch.arange(8)[None]).logits, before, rtol=2e-2, atol=2e-2)


@torch.inference_mode()
def logits_in_parts(module, reader, ids):
    """Logits [B, T, V] of a prompt of all but the last three tokens and of each of these."""
    cache = transformers.DynamicCache(config=module.config)
    parts = [ids[:, :-3], *ids[:, -3:].split(1, 1)]
    return torch.cat([reader(input_ids=part, past_key_values=cache).logits for part in parts], 1).float()


def tiny(bias):
    """Llama's build, of packed linears that are prepared for decoding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=False,
    )  # fmt: skip
    if bias:  # of queries, keys and values, as Qwen 2 has
        config = transformers.Qwen2Config(**{k: config.to_dict()[k] for k in SHAPE})
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for block in module.model.layers:
        torch.nn.init.normal_(block.input_layernorm.weight, 1.0, 0.2)
        torch.nn.init.normal_(block.post_attention_layernorm.weight, 1.0, 0.2)
        for name, child in list(block.named_modules()):
            if isinstance(child, torch.nn.Linear):
                if child.bias is not None:
                    torch.nn.init.normal_(child.bias)
                layer = rounded_linear(child, IntegerGrid(4, False, 128), torch.bfloat16)
                layer.prepare("decoding", torch.bfloat16)
                block.set_submodule(name, layer)
    return module


SHAPE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
]
