from __future__ import annotations

import copy
from math import exp, log

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCABULARY, causal_model, context, language_model

from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError, RunError
from harness.method import LanguageModel
from harness.probes.divergence import KernelDivergence, Reference, kl_divergence
from harness.probes.perplexity import Perplexity

TEXT = "The tide came in twice that day, and nobody on the pier had thought to move the boats. " * 8
GPTQ = Perplexity(window=64, batch=3)


def measured(probe, lm, ctx) -> dict:
    return {m.metric: m for m in probe.measure(lm, ctx)}


def copied(lm: LanguageModel) -> LanguageModel:
    module = copy.deepcopy(lm.module)
    return LanguageModel(module, lm.tokenizer, TransformersEngine(module), lm.storage_dtype)


def disturbed(lm: LanguageModel, size: float) -> LanguageModel:
    other = copied(lm)
    for parameter in other.module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return other


def test_uniform_logits_have_the_vocabulary_as_perplexity(tmp_path):
    lm = language_model()
    lm.module.get_output_embeddings().weight.data.zero_()
    found = measured(GPTQ, lm, context(tmp_path, TEXT))
    assert found["perplexity"].value == pytest.approx(VOCABULARY, rel=1e-5)
    assert found["bits_per_byte"].value == pytest.approx(log(VOCABULARY) / log(2), rel=1e-5)  # one byte per token
    assert found["perplexity"].interval == pytest.approx((VOCABULARY, VOCABULARY), rel=1e-5)


def test_a_mark_before_the_text_has_no_bytes(tmp_path):
    lm = language_model()
    lm.module.get_output_embeddings().weight.data.zero_()
    lm.tokenizer.bos_token = "<end>"  # of five bytes, if it were text
    ctx = context(tmp_path, TEXT)
    plain = ctx.corpus.evaluation_tokens
    ctx.corpus.evaluation_tokens = lambda tokenizer: torch.cat([torch.tensor([256]), plain(tokenizer)])
    found = measured(Perplexity(window=64, windows=1), lm, ctx)["bits_per_byte"]
    assert found.value == pytest.approx(log(VOCABULARY) / log(2), rel=1e-5)  # one byte per token


def test_losses_are_paired_with_those_of_the_same_tokens_alone(tmp_path):
    lm, probe = language_model(), Perplexity(window=64, divergence=False, paired=True)
    dense, other = context(tmp_path / "dense", TEXT), TEXT.swapcase()  # as many tokens, others
    list(probe.measure(lm, dense))
    assert measured(probe, lm, context(tmp_path / "same", TEXT, dense=dense.samples))["perplexity_ratio"].value == 1
    with pytest.raises(RunError, match="or others"):
        list(probe.measure(lm, context(tmp_path / "other", other, dense=dense.samples)))


def test_gptq_protocol_is_a_plain_loop_over_windows(tmp_path):
    lm, ctx = language_model(), context(tmp_path, TEXT)
    tokens = ctx.corpus.evaluation_tokens(lm.tokenizer)
    losses = []
    for start in range(0, len(tokens) - 63, 64):
        window = tokens[None, start : start + 64]
        with torch.no_grad():
            losses.append(F.cross_entropy(lm.module(input_ids=window).logits[0, :-1], window[0, 1:]).item())
    found = measured(GPTQ, lm, ctx)["perplexity"]
    assert found.value == pytest.approx(exp(np.mean(losses)), rel=1e-5)
    assert found.on == f"made-up text, gptq-64, {len(losses)} windows"
    assert found.interval[0] < found.value < found.interval[1]


def test_batch_size_and_the_way_of_scoring_do_not_change_the_score(tmp_path):
    lm = language_model()
    values = [
        measured(Perplexity(window=64, batch=batch, divergence=divergence), lm, context(tmp_path, TEXT))["perplexity"]
        for batch, divergence in ((1, True), (5, True), (4, False))
    ]
    assert values[1].value == pytest.approx(values[0].value, rel=1e-4)
    assert values[2].value == pytest.approx(values[0].value, rel=1e-4)


def test_sliding_with_stride_equal_to_the_window_is_gptq(tmp_path):
    lm = language_model()
    sliding = Perplexity("sliding", window=64, stride=64)
    gptq = measured(GPTQ, lm, context(tmp_path, TEXT))
    assert measured(sliding, lm, context(tmp_path, TEXT))["perplexity"].value == pytest.approx(gptq["perplexity"].value)


def test_sliding_scores_every_covered_token_once_with_the_context_of_the_guides_loop(tmp_path):
    lm, ctx = language_model(), context(tmp_path, TEXT)
    measured(Perplexity("sliding", window=48, stride=20), lm, ctx)
    table = pd.read_parquet(ctx.samples / "perplexity-sliding-48-stride-20.parquet")
    tokens = ctx.corpus.evaluation_tokens(lm.tokenizer)
    assert table["token"].tolist() == tokens[1 : 1 + len(table)].tolist()
    previous_end, expected = 0, []
    for begin in range(0, len(tokens), 20):  # https://huggingface.co/docs/transformers/perplexity
        end = min(begin + 48, len(tokens))
        if end - begin < 48:
            break
        ids = tokens[None, begin:end]
        labels = ids.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            losses = F.cross_entropy(lm.module(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="none")
        expected += losses[labels[0, 1:] != -100].tolist()
        previous_end = end
    np.testing.assert_allclose(table["loss"], expected, rtol=1e-4, atol=1e-4)


def test_divergence_is_exactly_zero_from_itself_and_the_brute_force_sum_from_another(tmp_path):
    dense, dense_context = language_model(), context(tmp_path / "dense", TEXT)
    measured(GPTQ, dense, dense_context)
    same = measured(GPTQ, copied(dense), context(tmp_path / "same", TEXT, dense_context.samples))
    assert same["kl_divergence"].value == 0.0
    assert same["kl_divergence_p99"].value == 0.0
    assert same["top1_agreement"].value == 1.0
    assert same["perplexity_ratio"].value == 1.0

    other = disturbed(dense, 0.02)
    found = measured(GPTQ, other, context(tmp_path / "other", TEXT, dense_context.samples))
    tokens = dense_context.corpus.evaluation_tokens(dense.tokenizer).unfold(0, 64, 64)
    with torch.no_grad():
        p, q = (m.module(input_ids=tokens).logits[:, :-1].double().softmax(-1) for m in (dense, other))
    kl = (p * (p / q).log()).sum(-1)
    assert found["kl_divergence"].value == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found["kl_divergence_p99"].value == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["top1_agreement"].value == pytest.approx(float(agree), abs=2e-3)
    low, high = found["perplexity_ratio"].interval
    assert low <= found["perplexity_ratio"].value <= high


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_divergence_from_itself_is_zero_where_logits_are_capped_or_scaled(tmp_path, kind):
    module = causal_model(kind, **({"head_dim": 8} if kind == "gemma2" else {}))
    lm = LanguageModel(module, language_model().tokenizer, TransformersEngine(module))
    ctx = context(tmp_path / "dense", TEXT)
    measured(GPTQ, lm, ctx)
    assert measured(GPTQ, lm, context(tmp_path / "same", TEXT, ctx.samples))["kl_divergence"].value == 0.0


def test_divergence_grows_with_the_disturbance_and_a_ruined_model_is_collapsed(tmp_path):
    dense, ctx = language_model(), context(tmp_path / "dense", TEXT)
    measured(GPTQ, dense, ctx)
    divergences = [
        measured(GPTQ, disturbed(dense, size), context(tmp_path / str(size), TEXT, ctx.samples))["kl_divergence"].value
        for size in (0.001, 0.01, 0.1)
    ]
    assert divergences == sorted(divergences)
    ruined = copied(dense)
    ruined.module.get_output_embeddings().weight.data.mul_(20)
    found = measured(GPTQ, ruined, context(tmp_path / "ruined", TEXT, ctx.samples))
    assert found["perplexity_ratio"].value > 10
    assert found["perplexity"].note == "collapsed"


def test_losses_that_are_not_numbers_are_no_number(tmp_path):
    lm = language_model()
    lm.module.get_output_embeddings().weight.data.fill_(float("nan"))
    found = measured(Perplexity(window=64, divergence=False), lm, context(tmp_path, TEXT))["perplexity"]
    assert found.value is None
    assert "collapsed" in found.note


def test_a_missing_or_foreign_reference_says_what_to_do(tmp_path):
    lm, ctx = language_model(), context(tmp_path / "dense", TEXT)
    with pytest.raises(RunError, match="method=dense force=true"):
        measured(GPTQ, lm, context(tmp_path / "ours", TEXT, ctx.samples))
    measured(GPTQ, lm, ctx)
    with pytest.raises(RunError, match="other windows"):
        measured(GPTQ, lm, context(tmp_path / "ours", TEXT.upper(), ctx.samples))


def test_short_text_long_windows_and_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(RunError, match=r"has 10 tokens.* window of 64"):
        measured(GPTQ, language_model(), context(tmp_path, "ten bytes!"))
    with pytest.raises(RunError, match="512 positions"):
        measured(Perplexity(window=600), language_model(), context(tmp_path, TEXT))
    for wrong in ({"window": 1}, {"windows": 0}, {"protocol": "sliding"}, {"protocol": "word"}):
        with pytest.raises(ConfigError):
            Perplexity(**wrong)


def test_the_reference_keeps_a_sixteen_bit_head_in_sixteen_bits(tmp_path):
    head = torch.nn.Linear(8, 30).half().float()
    reference = Reference(tmp_path / "reference.safetensors")
    reference.write(torch.randn(5, 8), head, torch.float16, "digest")
    again = reference.head(torch.device("cpu"), torch.float32)
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)
    assert reference.path.stat().st_size < 30 * 8 * 2 + 30 * 4 + 5 * 8 * 4 + 500


def test_kl_divergence_is_gibbs_positive_and_asymmetric():
    p, q = (torch.randn(40, 9, generator=torch.Generator().manual_seed(s)).log_softmax(-1) for s in (0, 1))
    assert (kl_divergence(p, q) > 0).all()
    assert not torch.allclose(kl_divergence(p, q), kl_divergence(q, p))


def test_a_dense_model_has_no_kernel_divergence(tmp_path):
    found = measured(KernelDivergence(), language_model(), context(tmp_path, TEXT, decoding_dtype="bfloat16"))
    assert found["kernel_divergence"].value == 0.0
    assert found["kernel_divergence"].note == "dense matmul, sdpa attention, bfloat16"


def test_both_perplexities_of_a_kernel_are_those_of_scoring(tmp_path):
    """Of the same tokens in the decoding type; without a kernel both are one number."""
    ctx = context(tmp_path, TEXT, decoding_dtype="bfloat16")
    lm = language_model()
    found = measured(KernelDivergence(), lm, ctx)["kernel_perplexity"]
    ids = ctx.corpus.evaluation_tokens(lm.tokenizer)[None, :48]
    assert found.value == pytest.approx(float(lm.engine.score(ids).mean().exp()), rel=1e-4)
    assert float(found.note.partition(" ")[0]) == pytest.approx(found.value, rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_kernels_compute_what_the_weights_say_and_a_wrong_one_shows(tmp_path, bits):
    from methods.quantization.grids import IntegerGrid
    from methods.quantization.round_to_nearest import rounded_linear

    grid = IntegerGrid(bits=bits, symmetric=True, group_size=32 if bits == 4 else None)

    def quantized() -> LanguageModel:
        lm = language_model(hidden_size=64, intermediate_size=128)
        for block in lm.module.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        setattr(part, name, rounded_linear(child, grid, torch.float16))
        return lm

    ctx = context(tmp_path, TEXT, decoding_dtype="bfloat16")
    sound = measured(KernelDivergence(), quantized(), ctx)["kernel_divergence"]
    faulty_model = quantized()
    layer = faulty_model.module.model.layers[0].mlp.down_proj
    whole = type(layer).forward
    decoding = []

    def forward(x):
        return whole(layer, x) * (1.5 if decoding else 1.0)

    prepare = type(layer).prepare

    def watched(mode, dtype):
        prepare(layer, mode, dtype)
        decoding[:] = [mode] if mode == "decoding" else []

    layer.forward, layer.prepare = forward, watched
    faulty = measured(KernelDivergence(), faulty_model, ctx)["kernel_divergence"]
    assert 0 <= sound.value < 0.1 * faulty.value
    assert "bfloat16" in sound.note
