"""MiniLLM, GKD and sequence-level distillation: gradients by enumeration, limits in which they meet, exact resume."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.corpus import Corpus, GeneratedText
from harness.errors import ConfigError, RunError
from harness.method import Bench, LanguageModel, TrainingLog
from harness.progress import NoProgress
from methods.distillation import minillm
from methods.distillation.divergences import Divergence
from methods.distillation.gkd import GKD, distillation_loss
from methods.distillation.minillm import (
    MiniLLM,
    OfficialUpdate,
    PaperUpdate,
    Read,
    ReadText,
    Teaching,
    advantages,
    clipped_policy,
    policy_gradient,
    remaining,
    reward_to_go,
    whitened,
)
from methods.distillation.on_policy import WarmStart, read_examples, warmed_up, with_responses
from methods.distillation.sampling import Sampling, sample, uniform_numbers
from methods.distillation.sequence_kd import SequenceKD
from methods.examples import Batch, Continuations, Example, Texts, Windows
from methods.training import TrainingSettings, held_out_loss, language_modeling_loss
from tests.harness.tiny_models import language_model

VOCABULARY, LENGTH = 3, 3
BOTH = ("forward_kl", "reverse_kl")
NONE = WarmStart(0.0, 0.0, 1)
SOME = TrainingSettings(steps=6, learning_rate=1e-3, batch_size=2, checkpoint_steps=2)


class Table(nn.Module):
    """Any distribution over texts of a tiny vocabulary: a row of float64 logits for each text so far."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rows = sum(VOCABULARY**length for length in range(LENGTH + 2))
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(rows, VOCABULARY, dtype=torch.float64, generator=generator))

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        row, rows = torch.zeros(len(input_ids), dtype=torch.long), []
        for column in input_ids.unbind(1):
            row = row * VOCABULARY + column + 1
            rows.append(row)
        return Output(self.logits[torch.stack(rows, 1).clamp(max=len(self.logits) - 1)])


@dataclass
class Output:
    logits: torch.Tensor


def texts(end: int | None) -> list[list[int]]:
    """Every response of at most LENGTH tokens, those that end sooner with the end mark `end`."""
    found = {
        tuple(text[: text.index(end) + 1] if end in text else text)
        for text in itertools.product(range(VOCABULARY), repeat=LENGTH)
    }
    return [list(text) for text in sorted(found)]


def batch_of(responses: Sequence[Sequence[int]], prompt: Sequence[int] = (0,), pad: int = 0) -> Batch:
    batch = Batch.of_examples([Example(list(prompt), list(text)) for text in responses], pad=pad)
    return replace(batch, more={"importance": torch.ones_like(batch.weights)})


def teaching(teacher: nn.Module, **changes) -> Teaching:
    method = MiniLLM(None, None, Sampling(LENGTH), SOME, NONE, ReadText(weight=0), **changes)
    return Teaching(method, teacher, [], (), None)


def reverse_kl_of_responses(student: nn.Module, teacher: nn.Module, batch: Batch) -> torch.Tensor:
    """Σ_y q(y) (log q(y) - log p(y)) by enumeration."""
    targets, mask = batch.tokens[:, 1:, None], batch.response
    log_q, log_p = (
        (module(batch.tokens).logits[:, :-1].log_softmax(-1).gather(2, targets)[..., 0] * mask).sum(1)
        for module in (student, teacher)
    )
    return (log_q.exp() * (log_q - log_p)).sum()


def probabilities(module: nn.Module, batch: Batch) -> torch.Tensor:
    """q(y) of every response of the batch."""
    log_q = module(batch.tokens).logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
    return (log_q * batch.response).sum(1).exp().detach()


def gradient(value: torch.Tensor, module: nn.Module) -> torch.Tensor:
    return torch.autograd.grad(value, module.logits)[0]


# --------------------------------------------------------------------------------------------- MiniLLM: the mathematics


@pytest.mark.parametrize("end", [None, 2])
def test_single_steps_and_long_term_are_the_gradient_of_reverse_kl(end):
    """T and V of 3: the expectation over all responses, exactly. With an end mark responses have several lengths."""
    student, teacher = Table(1), Table(2)
    batch = batch_of(texts(end))
    q = probabilities(student, batch)
    assert float(q.sum()) == pytest.approx(1)
    read = teaching(teacher).read(student, batch)
    values = policy_gradient(read, PaperUpdate(length_normalisation=False))
    found = gradient((q * (values * read.mask).sum(1)).sum(), student)
    wanted = gradient(reverse_kl_of_responses(student, teacher, batch), student)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-12)
    assert wanted.abs().max() > 0.01


def test_rewards_from_the_own_token_on_are_the_same_gradient_and_official_adds_a_single_step():
    """First pass of the authors' code, without discount, division and whitening: ∇KL plus one more single step."""
    student, teacher = Table(1), Table(2)
    batch = batch_of(texts(2))
    q = probabilities(student, batch)
    read = teaching(teacher).read(student, batch)
    clipped = clipped_policy(read, read.student.detach(), reward_to_go(read.rewards), 0.2)
    found = gradient((q * (clipped * read.mask).sum(1)).sum(), student)
    wanted = gradient(reverse_kl_of_responses(student, teacher, batch), student)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-12)


def test_without_the_long_term_only_single_steps_have_a_gradient():
    student, teacher = Table(1), Table(2)
    batch = batch_of(texts(2))
    read = teaching(teacher).read(student, batch)
    values = policy_gradient(read, PaperUpdate(long_term=False))
    assert torch.equal(values * read.mask, read.single * read.mask)
    whole = policy_gradient(read, PaperUpdate())
    torch.testing.assert_close(whole.detach() * read.mask, values.detach() * read.mask)  # what a curve shows


def test_responses_of_one_token_have_no_long_term():
    student, teacher = Table(1), Table(2)
    read = teaching(teacher).read(student, batch_of([[token] for token in range(VOCABULARY)]))
    assert not reward_to_go(read.rewards, include_own=False)[read.mask].any()
    with_long, without = (policy_gradient(read, PaperUpdate(long_term=long))[read.mask].sum() for long in (True, False))
    found = torch.autograd.grad(with_long, student.logits, retain_graph=True)[0]
    assert torch.equal(found, gradient(without, student))


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_student_that_is_its_teacher_is_left_alone(variant):
    student, teacher = Table(1), Table(1)
    batch = batch_of(texts(2))
    teach = teaching(teacher, variant=variant, official=OfficialUpdate(rollouts=2, epochs=1))
    read = teach.read(student, batch)
    torch.testing.assert_close(read.rewards, torch.zeros_like(read.rewards), atol=1e-14, rtol=0)
    if variant == "official":
        kept = {
            "old": read.student.detach()[:, :-1],
            "advantage": advantages(read.rewards, read.mask, OfficialUpdate()),
        }
        batch = replace(batch, more={**batch.more, "old": kept["old"], "advantage": kept["advantage"][:, :-1]})
        loss = teach.official_loss(student, batch)
    else:
        loss = teach.paper_loss(student, batch)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(gradient(loss, student), torch.zeros_like(student.logits), atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_padding_changes_nothing(variant):
    student, teacher = Table(1), Table(2)
    teach = teaching(teacher, variant=variant, official=OfficialUpdate(rollouts=2, epochs=1))
    generator = torch.Generator().manual_seed(0)
    responses = [[0, 1, 2], [2], [1, 2]]
    batch = batch_of(responses)
    more = {key: torch.rand(batch.weights.shape, generator=generator) for key in ("importance", "old", "advantage")}
    batch = replace(batch, more=more)
    wider = replace(
        batch,
        tokens=nn.functional.pad(batch.tokens, (0, 2), value=1),
        attention=nn.functional.pad(batch.attention, (0, 2)),
        weights=nn.functional.pad(batch.weights, (0, 2)),
        more={key: nn.functional.pad(value, (0, 2), value=7.0) for key, value in more.items()},
    )
    loss = teach.paper_loss if variant == "paper" else teach.official_loss
    one, two = loss(student, batch), loss(student, wider)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(gradient(one, student), gradient(two, student))


def test_rewards_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert reward_to_go(rewards).tolist() == [[15.0, 14.0, 12.0, 8.0]]
    assert reward_to_go(rewards, include_own=False).tolist() == [[14.0, 12.0, 8.0, 0.0]]
    assert reward_to_go(rewards, 0.5).tolist() == [[4.0, 6.0, 8.0, 8.0]]
    assert reward_to_go(rewards, 0.0).tolist() == rewards.tolist()
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert remaining(mask).tolist() == [[0, 3, 2, 1], [2, 1, 0, 0]]


def test_what_comes_later_is_averaged_over_the_tokens_left():
    """R_{t+1} = Σ_{t' > t} r_t' / (T-t-1), and one token from the end the one reward itself."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    log_q = torch.zeros(1, 4, requires_grad=True)
    log_p = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    read = Read(0, torch.zeros(1, 4), log_q, log_p, mask, torch.ones(1, 4))
    policy_gradient(read, PaperUpdate()).sum().backward()
    assert log_q.grad.tolist() == [[-14 / 2, -12 / 1, -8.0, 0.0]]


def test_importance_weighs_both_parts():
    student, teacher = Table(1), Table(2)
    batch = batch_of([[0, 1, 1]])
    twice = replace(batch, more={"importance": 2 * batch.more["importance"]})
    one, two = (
        gradient(policy_gradient(teaching(teacher).read(student, some), PaperUpdate()).sum(), student)
        for some in (batch, twice)
    )
    torch.testing.assert_close(2 * one, two)


def test_advantages_discount_by_distance_and_are_cut():
    mask = torch.tensor([[True, True, True, False]])
    update = OfficialUpdate(discount=0.5, reward_scale=0.5, reward_limit=10.0)
    found = advantages(torch.tensor([[1.0, 2.0, 100.0, 0.0]]), mask, update)  # doubled and cut: 2, 4, 10
    torch.testing.assert_close(found, torch.tensor([[(2 + 2 + 2.5) / 3, (4 + 5) / 2, 10.0, 0.0]]))


def test_whitening_looks_at_responses_alone():
    values = [torch.tensor([1.0, 2.0]), torch.tensor([6.0])]
    found = torch.cat(whitened(values))
    assert float(found.mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.var(correction=0)) == pytest.approx(1, abs=1e-6)


def test_ratios_are_clipped_with_their_importance():
    log_q = torch.tensor([[0.5, -0.5, 0.1]], requires_grad=True)
    read = Read(0, torch.zeros(1, 3), log_q, torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 3))
    values = clipped_policy(read, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]]), 0.2)
    torch.testing.assert_close(values.detach(), torch.tensor([[-1.2, 0.8, -(0.1 * torch.ones(())).exp().item()]]))
    values.sum().backward()
    assert log_q.grad[0, :2].tolist() == [0.0, 0.0]  # beyond the clip nothing pulls further
    assert log_q.grad[0, 2] < 0


# ------------------------------------------------------------------------------------------------------ where they meet


def test_on_policy_reverse_kl_is_the_single_step_term_of_minillm():
    """GKD with reverse KL, by tokens, on what the student wrote = MiniLLM without long term, α = 0 and no text."""
    student, teacher = language_model(1).module, language_model(2).module
    examples = [Example([5, 6, 7], [8, 9]), Example([10, 11], [12])]
    batch, settings = Batch.of_examples(examples), Sampling(6)
    numbers = uniform_numbers(2, settings, torch.Generator().manual_seed(0))
    written = with_responses(examples, batch, sample(student, [e.prompt for e in examples], settings, (256,), numbers))
    method = MiniLLM(
        None, None, settings, SOME, NONE, ReadText(weight=0), teacher_share=0, paper=PaperUpdate(long_term=False)
    )
    losses = [
        distillation_loss(teacher, Divergence("reverse_kl")),
        Teaching(method, teacher, examples, (256,), None).paper_loss,
    ]
    student.requires_grad_(True)
    gradients = []
    for loss in losses:
        student.zero_grad()
        loss(student, written).backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def gkd(**changes) -> GKD:
    return GKD(
        **{
            "student": None,
            "examples": None,
            "divergence": Divergence("forward_kl"),
            "sampling": Sampling(5),
            "training": SOME,
            "warm_start": NONE,
            **changes,
        }
    )


EXAMPLES = [Example([5, 6, 7], [8, 9, 10, 11]), Example([10, 11], [12]), Example([13], [14, 15, 16])]


def test_without_own_responses_it_is_supervised_distillation_token_for_token():
    student, teacher = language_model(1).module, language_model(2).module
    batch = Batch.of_examples(EXAMPLES)
    prepared = gkd(on_policy=0.0, reduction="token").prepare(EXAMPLES, (256,))(student, batch, torch.Generator())
    assert prepared is batch
    found = distillation_loss(teacher, Divergence("forward_kl"))(student, prepared)
    with torch.no_grad():
        log_q, log_p = (
            module(input_ids=batch.tokens, attention_mask=batch.attention).logits[:, :-1].log_softmax(-1)
            for module in (student, teacher)
        )
    by_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.detach(), by_token[batch.response].mean())


def test_a_sequence_counts_once_however_long():
    student, teacher = language_model(1).module, language_model(2).module
    loss = distillation_loss(teacher, Divergence("forward_kl"))
    rewrite = gkd(on_policy=0.0).prepare(EXAMPLES, (256,))
    together = loss(student, rewrite(student, Batch.of_examples(EXAMPLES), torch.Generator()))
    alone = [loss(student, Batch.of_examples([example])) for example in EXAMPLES]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_on_policy_the_responses_of_the_data_are_never_read():
    student = language_model(1).module
    others = [replace(example, response=[99, 98]) for example in EXAMPLES]
    rewrite = [gkd(on_policy=1.0).prepare(data, (256,)) for data in (EXAMPLES, others)]
    one, two = (
        function(student, Batch.of_examples(data), torch.Generator().manual_seed(3))
        for function, data in zip(rewrite, (EXAMPLES, others), strict=True)
    )
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.weights, two.weights)
    for row, example in enumerate(EXAMPLES):
        start = len(example.prompt)
        assert one.tokens[row, :start].tolist() == list(example.prompt)
        assert int(one.response[row].sum()) <= 5
        assert not one.response[row, : start - 1].any()
    torch.testing.assert_close(one.weights.sum(1), torch.ones(3))


def test_the_coin_falls_as_often_as_it_should():
    student = language_model(1).module
    batch = Batch.of_examples(EXAMPLES)
    rewrite = gkd(on_policy=0.3, reduction="token", sampling=Sampling(1)).prepare(EXAMPLES, (256,))
    own = sum(rewrite(student, batch, torch.Generator().manual_seed(seed)) is not batch for seed in range(200))
    assert abs(own / 200 - 0.3) < 0.1


def test_no_gradient_runs_through_the_writing():
    """The gradient is that of the divergence on these tokens, whoever wrote them."""
    student, teacher = language_model(1).module.requires_grad_(True), language_model(2).module
    with torch.no_grad():
        written = gkd(on_policy=1.0).prepare(EXAMPLES, (256,))(
            student, Batch.of_examples(EXAMPLES), torch.Generator().manual_seed(0)
        )
    fixed = [
        replace(example, response=written.tokens[row, 1:][written.response[row]].tolist())
        for row, example in enumerate(EXAMPLES)
    ]
    loss = distillation_loss(teacher, Divergence("jensen_shannon", 0.1))
    gradients = []
    for batch in (written, Batch.of_examples(fixed).with_sequence_means()):
        student.zero_grad()
        loss(student, batch).backward()
        gradients.append([parameter.grad.clone() for parameter in student.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["gkd", "sequence_kd"])
def test_neither_padding_nor_what_is_said_of_prompts_counts(name):
    """The width of a batch changes nothing, and nothing is learned from predictions inside a prompt."""
    student, teacher = Table(1), Table(2)
    loss = distillation_loss(teacher, Divergence("forward_kl"))
    if name == "sequence_kd":
        loss = SequenceKD(None, None, Sampling(4), SOME, NONE, "both").training_loss(teacher)
    batch = batch_of([[1], [2]], prompt=(0, 1))
    wider = replace(
        batch,
        tokens=nn.functional.pad(batch.tokens, (0, 2), value=1),
        attention=nn.functional.pad(batch.attention, (0, 2)),
        weights=nn.functional.pad(batch.weights, (0, 2)),
    )
    gradients = [gradient(loss(student, some), student) for some in (batch, wider)]
    torch.testing.assert_close(*gradients)
    moved = gradients[0].abs().sum(1).nonzero().flatten().tolist()
    assert moved == [(0 + 1) * VOCABULARY + 1 + 1]  # the row of the whole prompt (0, 1) alone


def test_the_losses_of_sequence_level_distillation():
    """nll is that of the text, kd that of the teacher's distribution, both is between; all see responses alone."""
    student, teacher = language_model(1).module, language_model(2).module
    batch = Batch.of_examples(EXAMPLES)
    losses = {
        name: SequenceKD(None, None, Sampling(4), SOME, NONE, name, 0.25).training_loss(teacher)(student, batch).item()
        for name in ("nll", "kd", "both")
    }
    assert losses["both"] == pytest.approx(0.75 * losses["nll"] + 0.25 * losses["kd"], rel=1e-5)
    assert losses["nll"] == pytest.approx(language_modeling_loss(student, batch).item(), rel=1e-5)
    with torch.no_grad():
        log_p = teacher(input_ids=batch.tokens, attention_mask=batch.attention).logits[:, :-1].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)[batch.response].mean()
    kl = distillation_loss(teacher, Divergence("forward_kl"))(student, batch).item()
    assert losses["kd"] == pytest.approx(kl + float(entropy), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- whole runs


@dataclass(frozen=True)
class Shaken:
    """A student of the teacher's shape whose weights were moved."""

    by: float = 0.3

    def make(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        from harness.engines.transformers import TransformersEngine

        module = copy.deepcopy(base.module).requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(self.by * parameter.std(correction=0) * noise)
        return LanguageModel(module, base.tokenizer, TransformersEngine(module), base.storage_dtype)


@dataclass(frozen=True)
class Given:
    """Examples of the tests, two of them held out."""

    texts: Sequence[Example] = tuple(Example([5 + row, 6, 7 + row][: 1 + row % 3], [20 + row, 30]) for row in range(9))

    def read(self, tokenizer, corpus, generator) -> Texts:
        return Texts(list(self.texts[:-2]), list(self.texts[-2:]))


def bench(scratch: Path) -> Bench:
    text = GeneratedText(sentences=200)
    corpus = Corpus("generated", text, text, samples=4, window=32)
    return Bench(corpus, torch.Generator().manual_seed(0), scratch, NoProgress(), TrainingLog())


def methods() -> dict[str, object]:
    common = {
        "student": Shaken(),
        "examples": Given(),
        "sampling": Sampling(5),
        "warm_start": WarmStart(1 / 3, 3e-3, 2, examples=Windows(6, 12, 2)),
    }
    text = ReadText(samples=8, tokens=16, kd_share=0.5)
    settings = replace(SOME, steps=9)
    rounds = OfficialUpdate(rollouts=4, epochs=2)  # four steps a round
    return {
        "sequence_kd": SequenceKD(**common, training=settings, loss="both"),
        "gkd": GKD(**common, training=settings, divergence=Divergence("jensen_shannon"), on_policy=0.5),
        "minillm": MiniLLM(**common, training=settings, text=text),
        "official": MiniLLM(**common, training=replace(SOME, steps=15), text=text, variant="official", official=rounds),
    }


def compressed(name: str, scratch: Path) -> tuple[list[torch.Tensor], TrainingLog]:
    run = bench(scratch)
    made = methods()[name].compress(language_model(2), run)
    return [parameter.detach().clone() for parameter in made.module.parameters()], run.log


class Killed(Exception):
    """Stands for a process that ends."""


@pytest.mark.parametrize("name", methods())
def test_a_run_that_ended_in_the_middle_goes_on_to_the_same_student(name, tmp_path, monkeypatch):
    """Killed after the warm start and some steps more: of the authors' code in the middle of the second round."""
    whole, log = compressed(name, tmp_path / "whole")
    original, stop = TrainingLog.point, 11 if name == "official" else 7

    def point(self, curve, step, value):
        original(self, curve, step, value)
        if curve == "training loss" and step == stop:
            raise Killed

    monkeypatch.setattr(TrainingLog, "point", point)
    with pytest.raises(Killed):
        compressed(name, tmp_path / "killed")
    monkeypatch.setattr(TrainingLog, "point", original)
    resumed, after = compressed(name, tmp_path / "killed")
    first = 10 if name == "official" else 6  # after the checkpoint before: at the end of a round, or of two steps
    assert next(iter(after.curves["training loss"])) == first
    assert all(after.curves["training loss"][step] == log.curves["training loss"][step] for step in range(first, 10))
    assert after.tokens == log.tokens
    assert all(torch.equal(one, two) for one, two in zip(resumed, whole, strict=True))
    start = list(Shaken().make(language_model(2), bench(tmp_path)).module.parameters())
    assert not all(torch.equal(one, two) for one, two in zip(start, whole, strict=True))


def test_a_round_is_written_once_and_every_response_is_read_as_often_as_said(tmp_path, monkeypatch):
    written, read = [], []
    begin, dealt = minillm.Rounds.begin, minillm.Rounds.dealt

    def count(self, module, number, generator):
        written.append(number)
        begin(self, module, number, generator)

    def look(self, chosen, device):
        read.append((self.number, tuple(chosen)))
        return dealt(self, chosen, device)

    monkeypatch.setattr(minillm.Rounds, "begin", count)
    monkeypatch.setattr(minillm.Rounds, "dealt", look)
    compressed("official", tmp_path)
    assert written == [0, 1, 2]
    for number in (0, 1):
        chosen = [index for round_, part in read if round_ == number for index in part]
        assert sorted(chosen) == sorted([*range(4)] * 2)


def test_the_first_pass_of_a_round_has_ratios_of_one(tmp_path, monkeypatch):
    """What was kept of each response lies at its tokens again, whatever it is dealt with."""
    seen = []
    original = minillm.clipped_policy

    def look(read, old, advantage, clip):
        seen.append(((read.student.detach() - old)[read.mask].abs().max(), advantage[~read.mask].abs().sum()))
        return original(read, old, advantage, clip)

    monkeypatch.setattr(minillm, "clipped_policy", look)
    compressed("official", tmp_path)
    for step in (0, 4, 8):  # the first of each round
        assert seen[step][0] < 1e-4
    assert all(outside == 0 for _, outside in seen)
    assert seen[3][0] > 1e-4


def test_what_the_teacher_wrote_is_read_again_after_a_kill(tmp_path, monkeypatch):
    from methods.distillation import sequence_kd

    asked = []
    original = sequence_kd.sample
    monkeypatch.setattr(sequence_kd, "sample", lambda *given: asked.append(1) or original(*given))
    examples = Given().read(None, None, None).train
    settings = Sampling(4, batch_size=3)
    first = sequence_kd.teacher_responses(language_model(2), examples, settings, bench(tmp_path))
    assert len(asked) == 3
    (tmp_path / "responses" / "3.safetensors").unlink()
    again = sequence_kd.teacher_responses(language_model(2), examples, settings, bench(tmp_path))
    assert len(asked) == 4
    assert first == again
    assert [example.prompt for example in first] == [example.prompt for example in examples]


def apart(student: nn.Module, teacher: nn.Module, corpus: Corpus, tokenizer) -> float:
    """KL(p‖q) + KL(q‖p) of the responses of held-out text, nats per token."""
    held_out = [Example(row[:8], row[8:]) for row in corpus.held_out_windows(tokenizer, 8, 32).tolist()]
    return sum(held_out_loss(student, held_out, distillation_loss(teacher, Divergence(kind))) for kind in BOTH)


@pytest.mark.parametrize("name", methods())
def test_a_student_comes_nearer_to_its_teacher(name, trained, generated_corpus, tmp_path):
    """Without a warm start: all that moves the student is the method."""
    made = replace(
        methods()[name],
        student=Shaken(0.7),
        examples=Continuations(32, prompt_tokens=8, response_tokens=24),
        sampling=Sampling(24),
        warm_start=NONE,
        training=TrainingSettings(steps=24, learning_rate=2e-3, batch_size=4, schedule="constant"),
    )
    run = replace(bench(tmp_path), corpus=generated_corpus)
    start = made.student.make(trained, run).module
    found = made.compress(trained, run)
    before, after = (
        apart(module, trained.module, generated_corpus, trained.tokenizer) for module in (start, found.module)
    )
    assert after < 0.7 * before
    assert len(run.log.curves["training loss"]) == 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", methods())
def test_it_runs_on_a_gpu_in_mixed_precision(name, tmp_path):
    base = language_model(2)
    base.module.cuda()
    method = methods()[name]
    run = bench(tmp_path)
    found = replace(method, training=replace(method.training, mixed_precision=True)).compress(base, run)
    assert found.module.device.type == "cuda"
    assert all(parameter.isfinite().all() for parameter in found.module.parameters())
    assert len(run.log.curves["training loss"]) == method.training.steps


def test_rewards_are_not_summed_in_half_precision():
    rewards = torch.full((1, 300), 1.001)
    with torch.autocast("cpu", torch.bfloat16):
        found = reward_to_go(rewards)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reward_to_go(rewards))


def test_a_sharded_student_cannot_write(tmp_path):
    for name in ("gkd", "minillm"):
        with pytest.raises(ConfigError, match="launch it data parallel"):
            methods()[name].compress(language_model(2), replace(bench(tmp_path), sharded=True))


def test_the_warm_start_is_a_share_of_the_steps(tmp_path):
    """Language modelling on texts of its own, in the first steps of all, and nothing else when nothing follows."""
    student, run = Shaken().make(language_model(2), bench(tmp_path)), bench(tmp_path)
    texts = Given().read(None, None, None)
    warm = WarmStart(0.25, 7e-4, 3, 2, Windows(4, 16, 2))
    settings = warm.settings(replace(SOME, steps=10))
    assert settings == replace(SOME, steps=2, learning_rate=7e-4, batch_size=3, gradient_accumulation=2)
    late = warmed_up(student, texts, warm, replace(SOME, steps=10), run, "test")
    assert late == replace(SOME, steps=8)
    assert run.log.tokens == 2 * 3 * 2 * 16
    assert warmed_up(student, texts, NONE, SOME, run, "test") == SOME


def test_examples_that_cannot_be_continued_are_refused_at_once(tmp_path):
    run, lm = bench(tmp_path), language_model(2)
    with pytest.raises(ConfigError, match=r"examples@method.examples=continuations"):
        read_examples(Windows(4, 16), lm, run, Sampling(5))
    with pytest.raises(RunError, match=r"516 tokens of prompt and response exceed the 512 positions"):
        read_examples(Continuations(4, 16, 16), lm, run, Sampling(500))
    with pytest.raises(RunError, match="a prompt without tokens"):
        read_examples(Given([Example([], [5, 6])] * 3), lm, run, Sampling(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gkd(on_policy=1.5), "on_policy=1.5"),
        (lambda: gkd(reduction="sum"), "reduction=sum"),
        (lambda: SequenceKD(None, None, Sampling(4), SOME, NONE, loss="mse"), "loss=mse"),
        (lambda: SequenceKD(None, None, Sampling(4), SOME, NONE, kd_share=2.0), "kd_share=2"),
        (lambda: MiniLLM(None, None, Sampling(4), SOME, NONE, ReadText(), variant="ppo"), "variant=ppo"),
        (lambda: MiniLLM(None, None, Sampling(4, top_p=0.9), SOME, NONE, ReadText()), "top_p=0.9"),
        (lambda: MiniLLM(None, None, Sampling(4), SOME, NONE, ReadText(), teacher_share=-1), "teacher_share=-1"),
        (
            lambda: MiniLLM(
                None, None, Sampling(4), SOME, NONE, ReadText(), "official", official=OfficialUpdate(rollouts=3)
            ),
            "rollouts=3: must be a multiple of the 2 responses",
        ),
        (lambda: WarmStart(1.0, 1e-3, 1), "warm_start.share=1"),
        (lambda: WarmStart(0.5, 1e-3, 0), "batch_size=0"),
        (lambda: ReadText(weight=-1.0), "text.weight=-1"),
        (lambda: ReadText(kd_share=2.0), "text.kd_share=2"),
        (lambda: OfficialUpdate(clip=1.5), "clip=1.5"),
        (lambda: OfficialUpdate(epochs=0), "epochs=0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
