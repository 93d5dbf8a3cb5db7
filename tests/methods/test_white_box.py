"""Word-level distillation, kept teachers and truncated models: closed forms, limits, and what training must bring."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from architectures import tiny_model, tiny_tokens

from harness.errors import ConfigError
from harness.method import Bench, TrainingLog
from harness.progress import NoProgress
from methods.blocks import decoder_blocks
from methods.distillation.compressed_llm import CompressedLLM, Matching, nested
from methods.distillation.divergences import Divergence
from methods.distillation.students import Fresh, Truncated, kept_blocks
from methods.distillation.teachers import InMemory, LiveReference, OnDisk, likeliest, release
from methods.distillation.word_kd import WordKD
from methods.examples import Batch, Example, Windows
from methods.training import TrainingSettings, language_modeling_loss, logits_of, weighted_mean

FORWARD = Divergence("forward_kl")
SETTINGS = TrainingSettings(steps=12, learning_rate=3e-3, batch_size=2, validation_steps=6)
SOURCE = Windows(samples=24, window=48, held_out=4)
ALL = Truncated(1.0)


def run_bench(corpus, folder, **more) -> Bench:
    return Bench(corpus, torch.Generator().manual_seed(0), folder, NoProgress(), TrainingLog(), **more)


def examples() -> list[Example]:
    ids = torch.randint(3, 97, (5, 20), generator=torch.Generator().manual_seed(1)).tolist()
    return [Example(row[:4], row[4 : 9 + 2 * index], 1.0 + index) for index, row in enumerate(ids)]


class Opened:
    """A model as `opened` wants it."""

    def __init__(self, module) -> None:
        self.module = module


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_both_parts_in_one_kernel_are_the_two_parts(share, monkeypatch):
    pytest.importorskip("triton", reason="the kernel is written in Triton")
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    student.requires_grad_(True)
    batch = Batch.of_examples(examples())
    loss = WordKD(ALL, InMemory(), SOURCE, FORWARD, SETTINGS, share).loss(LiveReference(teacher))
    found = []
    for kernel in (False, True):
        for place in ("methods.training", "methods.distillation.word_kd"):
            monkeypatch.setattr(f"{place}.has_kernel", lambda logits, kernel=kernel: kernel)
        value = loss(student, batch)
        found.append((value.detach(), torch.autograd.grad(value, student.lm_head.weight)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ kept teachers


def test_everything_kept_is_the_teacher_in_memory(tmp_path, generated_corpus):
    """With all tokens but one kept, the classes are the tokens: the same divergence, of every kind."""
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    kept = OnDisk(top=96).opened(Opened(teacher), examples(), run_bench(generated_corpus, tmp_path))
    batch = Batch.of_examples(examples()[1:4], rows=[1, 2, 3])
    logits = logits_of(student, batch)
    for divergence in (FORWARD, Divergence("reverse_kl"), Divergence("jensen_shannon", 0.3)):
        exact = LiveReference(teacher).divergence(logits, batch, divergence)
        got = kept.divergence(logits, batch, divergence)
        torch.testing.assert_close(got[batch.response], exact[batch.response], atol=1e-5, rtol=1e-4)


def test_fewer_classes_can_only_make_the_divergence_smaller(tmp_path, generated_corpus):
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    batch = Batch.of_examples(examples())
    logits = logits_of(student, batch)
    found = [LiveReference(teacher).divergence(logits, batch, FORWARD)[batch.response]]
    for top in (48, 16, 4, 1):
        kept = OnDisk(top).opened(Opened(teacher), examples(), run_bench(generated_corpus, tmp_path))
        found.append(kept.divergence(logits, batch, FORWARD)[batch.response])
    for finer, coarser in itertools.pairwise(found):
        assert (coarser <= finer + 1e-5).all()
    assert (found[-1] >= -1e-6).all()


def test_what_is_left_out_is_the_rest_of_the_mass():
    logits = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0)) * 3
    ids, values, rest = likeliest(logits, 5)
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(values.exp(), probabilities.gather(-1, ids))
    torch.testing.assert_close(rest.exp(), 1 - values.exp().sum(-1), atol=1e-6, rtol=1e-5)
    assert (values[..., :-1] >= values[..., 1:]).all()


def test_a_teacher_is_read_once_and_its_mass_left_out_is_noted(tmp_path, generated_corpus):
    teacher = tiny_model("llama")
    runs = [run_bench(generated_corpus, tmp_path / str(i), statistics=tmp_path / "shared") for i in range(2)]
    first = OnDisk(8).opened(Opened(teacher), examples(), runs[0])
    teacher.to("meta")  # cannot be read again
    second = OnDisk(8).opened(Opened(teacher), examples(), runs[1])
    assert first.folder == second.folder
    curves = [run.log.curves["teacher mass outside its 8 likeliest tokens"][0] for run in runs]
    assert curves[0] == curves[1]
    batch = Batch.of_examples(examples())
    outside = LiveReference(tiny_model("llama")).module(batch.tokens, attention_mask=batch.attention).logits
    expected = likeliest(outside[:, :-1], 8)[2][batch.attention[:, 1:].bool()].exp().mean()
    assert curves[0] == pytest.approx(float(expected), rel=1e-4)


def test_another_text_is_another_file(tmp_path, generated_corpus):
    run = run_bench(generated_corpus, tmp_path)
    teacher = Opened(tiny_model("llama"))
    assert OnDisk(8).opened(teacher, examples(), run).folder != OnDisk(8).opened(teacher, examples()[:3], run).folder


def test_a_released_teacher_holds_no_weights():
    lm = Opened(tiny_model("llama"))
    release(lm)
    assert all(parameter.is_meta for parameter in lm.module.parameters())


# ------------------------------------------------------------------------------------------------------ word-level KD


def word_kd(**values) -> WordKD:
    base = {"student": Truncated(0.5), "teacher": InMemory(), "examples": SOURCE, "divergence": FORWARD}
    return WordKD(**{**base, "training": SETTINGS, **values})


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    """KL is 0 and so is its gradient."""
    module = tiny_model("llama")
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    loss = word_kd(share=1.0).loss(LiveReference(tiny_model("llama")))(module, Batch.of_examples(examples()))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None) < 1e-5


def test_no_share_of_the_teacher_is_language_modelling():
    module, batch = tiny_model("llama", seed=1), Batch.of_examples(examples())
    loss = word_kd(share=0.0).loss(LiveReference(tiny_model("llama")))
    assert float(loss(module, batch)) == pytest.approx(float(language_modeling_loss(module, batch)))


def test_half_and_half_is_the_mean_of_both():
    module, batch = tiny_model("llama", seed=1), Batch.of_examples(examples())
    reference = LiveReference(tiny_model("llama"))
    parts = [float(word_kd(share=share).loss(reference)(module, batch)) for share in (0.0, 0.5, 1.0)]
    assert parts[1] == pytest.approx((parts[0] + parts[2]) / 2, rel=1e-5)
    by_hand = weighted_mean(reference.divergence(logits_of(module, batch), batch, FORWARD), batch)
    assert parts[2] == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("teacher", [InMemory(), OnDisk(32)])
def test_a_student_learns(teacher, trained, bench):
    """Held-out loss falls below that of the student it began as, with the teacher in memory or on disk."""
    log = TrainingLog()
    settings = replace(SETTINGS, steps=30, validation_steps=15)
    method = word_kd(student=Fresh({"num_hidden_layers": 1}), teacher=teacher, training=settings)
    student = method.compress(trained, replace(bench, log=log))
    curve = log.curves["validation loss"]
    assert list(curve) == [0, 15, 30]
    assert curve[30] < curve[15] < curve[0] - 0.5
    assert len(decoder_blocks(student.module)[1]) == 1
    for parameter in student.module.parameters():
        assert torch.equal(parameter, parameter.to(student.storage_dtype).float())


def test_a_temperature_needs_the_teacher_itself():
    with pytest.raises(ConfigError, match="teacher=in_memory"):
        word_kd(teacher=OnDisk(8), divergence=Divergence("forward_kl", temperature=2.0))


def test_a_share_outside_its_bounds_is_refused():
    with pytest.raises(ConfigError, match=r"method.share=1.5"):
        word_kd(share=1.5)


# ------------------------------------------------------------------------------------------------- (Compressed) LLM


def test_all_blocks_kept_and_no_steps_is_the_identity(trained, bench):
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    before = trained.engine.score(tokens)
    method = CompressedLLM(SOURCE, replace(SETTINGS, steps=0), keep=1.0)
    assert torch.equal(method.compress(trained, bench).engine.score(tokens), before)


@pytest.mark.parametrize("rungs", [1, 2, 3, 5])
def test_rungs_are_nested_and_end_where_one_go_ends(rungs):
    kept = kept_blocks(24, 10, "middle")
    steps = nested(24, kept, rungs)
    assert len(steps) == rungs
    assert steps[-1] == kept
    sizes = [24, *(len(step) for step in steps)]
    assert max(a - b for a, b in itertools.pairwise(sizes)) <= -(-14 // rungs)
    for finer, coarser in itertools.pairwise(steps):
        assert set(coarser) < set(finer)


def test_rungs_train_all_the_steps_together(trained, bench):
    log = TrainingLog()
    method = CompressedLLM(SOURCE, replace(SETTINGS, validation_steps=0), keep=1.0, rungs=3)
    method.compress(trained, replace(bench, log=log))
    assert list(log.curves["training loss"]) == list(range(1, 13))
    assert list(log.curves["validation loss"]) == [0, 4, 8, 12]


def test_matching_a_student_that_is_its_teacher_leaves_language_modelling():
    """Every difference is zero, so the objective is the loss of the text."""
    batch = Batch.of_examples(examples())
    for matched in (["logits"], ["hidden"], ["attention"], ["embedding"], ["logits", "hidden", "attention"]):
        student, teacher = tiny_model("llama"), tiny_model("llama")
        expected = float(language_modeling_loss(student, batch))
        got = float(Matching(student, teacher, [0, 1, 2], matched).loss(student, batch).detach())
        assert got == pytest.approx(expected, rel=1e-4), matched


def test_matched_terms_are_the_formula():
    """Against sums written out, for a student of blocks 0 and 2."""
    student, teacher, batch = tiny_model("llama", 1), tiny_model("llama"), Batch.of_windows(tiny_tokens(2, 12))
    student.model.layers = torch.nn.ModuleList([student.model.layers[0], student.model.layers[2]])
    student.model.layers[1].self_attn.layer_idx = 1
    student.config.num_hidden_layers = 2
    for module in (student, teacher):
        module.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    ours, theirs = (module(batch.tokens, **asked) for module in (student, teacher))
    plain = float(language_modeling_loss(student, batch))
    pairs = ((0, 0), (1, 2))
    squared = {
        "hidden": sum((ours.hidden_states[i + 1] - theirs.hidden_states[k + 1]).square().mean() for i, k in pairs),
        "attention": sum((ours.attentions[i] - theirs.attentions[k]).square().mean() for i, k in pairs),
        "embedding": (ours.hidden_states[0] - theirs.hidden_states[0]).square().mean(),
    }
    for name, value in squared.items():
        got = Matching(student, teacher, [0, 2], [name]).loss(student, batch)
        assert float(got.detach()) - plain == pytest.approx(float(value), rel=1e-3), name


def test_the_distillation_objective_trains_too(trained, bench):
    log = TrainingLog()
    settings = replace(SETTINGS, steps=6, validation_steps=0)
    CompressedLLM(SOURCE, settings, objective="kd", keep=1.0).compress(trained, replace(bench, log=log))
    assert log.curves["training loss"][6] == log.curves["training loss"][6]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objective": "both"}, "objective=both"),
        ({"matched": ["values"]}, "matched="),
        ({"rungs": 0}, "rungs=0"),
        ({"rungs": 5}, "do not divide"),
        ({"keep": 2.0}, "keep=2"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        CompressedLLM(SOURCE, SETTINGS, **values)
