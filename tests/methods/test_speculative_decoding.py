"""Speculative decoding: the model's own tokens, its own distribution, and the paper's formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model, tiny_tokens

from harness import artifact
from harness.engines.decoding import Counts
from harness.engines.transformers import TransformersEngine
from harness.errors import ConfigError, RunError
from harness.method import LanguageModel
from methods.architecture.drafts import (
    NONE,
    Guesses,
    ModelDraft,
    PromptLookup,
    TruncatedDraft,
    continuations,
    first_layers,
)
from methods.architecture.speculative_decoding import (
    Sampling,
    Speculation,
    SpeculativeDecoding,
    accept_greedy,
    accept_sampled,
    best_drafts,
    drawn,
    expected_speedup,
    expected_tokens,
)
from methods.blocks import decoder_blocks

DRAFTS = [PromptLookup(3, 1), TruncatedDraft(2)]
WITHOUT_STATIC_CACHE = ("mistral", "gemma2", "gemma3", "falcon_alibi", "bloom")  # windows of their own, ALiBi
PROMPT = torch.cat([tiny_tokens(3, 8), tiny_tokens(3, 8)], dim=1)  # repeats itself, so that looking up finds something


def generated(engine: TransformersEngine, *arguments) -> torch.Tensor:
    return torch.stack(list(engine.generate(*arguments)), dim=1)


# -------------------------------------------------------------------------------------------------- greedy: equal


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: draft.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_decoding_gives_the_models_own_tokens(architecture, draft):
    module = tiny_model(architecture)
    plain, guessing = TransformersEngine(module), TransformersEngine(module, decoding=Speculation(draft, 4))
    for prompt in (PROMPT, PROMPT[:1]):
        assert torch.equal(generated(guessing, prompt, 24), generated(plain, prompt, 24))
    mask = torch.ones_like(PROMPT, dtype=torch.bool)
    mask[0, :5] = False
    assert torch.equal(generated(guessing, PROMPT, 12, mask), generated(plain, PROMPT, 12, mask))


@pytest.mark.parametrize("drafts", [1, 3, 7])
@pytest.mark.parametrize("new_tokens", [1, 2, 9])
def test_neither_the_number_of_guesses_nor_the_end_of_the_answer_changes_tokens(drafts, new_tokens):
    module = tiny_model("llama")
    guessing = TransformersEngine(module, decoding=Speculation(TruncatedDraft(2), drafts))
    assert torch.equal(
        generated(guessing, PROMPT, new_tokens), generated(TransformersEngine(module), PROMPT, new_tokens)
    )


@dataclass(frozen=True)
class Oracle:
    """Guesses what is given, right or wrong."""

    answer: torch.Tensor
    prompt_tokens: int
    name: str = "oracle"

    def begin(self, engine, choose):
        return self

    def propose(self, text, count, mask):
        done = text.shape[1] - self.prompt_tokens
        return Guesses(self.answer[:, done : done + count])


def test_right_guesses_are_all_taken_and_wrong_ones_cost_nothing_but_time():
    module = tiny_model("llama")
    answer = generated(TransformersEngine(module), PROMPT[:1], 21)
    for guesses, passes in ((answer, 4), ((answer + 1) % 97, 20)):
        decoding = Speculation(Oracle(guesses, PROMPT.shape[1]), 4)
        assert torch.equal(generated(TransformersEngine(module, decoding=decoding), PROMPT[:1], 21), answer)
        assert decoding.counts.passes == passes  # 1 token of the prompt's pass, then 5 a pass or 1
        assert decoding.counts.tokens == 20


# ------------------------------------------------------------------------------------------------- captured passes


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: draft.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_passes_give_the_models_own_tokens_in_as_many_passes(architecture, draft):
    """Models without a static cache take plain ones, and say so; so do rows with padding."""
    module = tiny_model(architecture)
    plain, counts, tokens = Speculation(draft, 4), [], []
    expected = [generated(TransformersEngine(module), prompt, 24) for prompt in (PROMPT, PROMPT[:1], PROMPT[1:2])]
    for steps in ("plain", "captured"):
        decoding = plain.counting(None)
        engine = TransformersEngine(module, decoding=decoding, steps=steps)
        tokens.append([generated(engine, prompt, 24) for prompt in (PROMPT, PROMPT[:1], PROMPT[1:2])])
        counts.append(decoding.counts)
    for found in tokens:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert counts[0] == counts[1]
    assert ("plain steps" in engine.kernels()) == (architecture in WITHOUT_STATIC_CACHE)
    mask = torch.ones_like(PROMPT, dtype=torch.bool)
    mask[0, :5] = False
    assert torch.equal(generated(engine, PROMPT, 12, mask), generated(TransformersEngine(module), PROMPT, 12, mask))


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
def test_a_captured_pass_is_warmed_up_within_its_cache_and_ends_where_the_answer_does(new_tokens, monkeypatch):
    """The graph's stand-in does the work that a graph is warmed up with, and then the same on the same memory."""
    module, warm = tiny_model("llama"), []

    def warmed(step, warm_up):
        warm.append(warm_up)
        for _ in range(warm_up):
            step()
        return step

    monkeypatch.setattr("harness.engines.captured._capture", warmed)
    monkeypatch.setattr("harness.engines.captured.GRAPHS_ON", ("cpu",))
    plain = TransformersEngine(module)
    for prompt in (PROMPT, PROMPT[:, :1], PROMPT[:1], PROMPT[1:2]):  # the last reuses what the third captured
        expected = generated(plain, prompt, new_tokens)
        engine = TransformersEngine(module, decoding=Speculation(PromptLookup(3, 1), 7), steps="captured")
        for _ in range(2):
            assert torch.equal(generated(engine, prompt, new_tokens), expected)
    assert "prompts too" in engine.kernels()
    assert min(warm) >= 1


def test_guesses_behind_the_last_position_are_not_read():
    """A pass of fixed width would read them: learned positions end there."""
    module = tiny_model("opt")
    most = TransformersEngine(module).trained_tokens
    prompt = PROMPT[:1].repeat(1, most // PROMPT.shape[1] + 1)[:, : most - 8]
    engine = TransformersEngine(module, decoding=Speculation(PromptLookup(3, 1), 4), steps="captured")
    assert torch.equal(generated(engine, prompt, 4), generated(TransformersEngine(module), prompt, 4))
    assert "plain steps" not in engine.kernels()
    assert torch.equal(generated(engine, prompt, 8), generated(TransformersEngine(module), prompt, 8))
    assert "plain steps" in engine.kernels()


def test_rejected_guesses_leave_nothing_in_a_static_cache():
    module = tiny_model("llama")
    answer = generated(TransformersEngine(module), PROMPT, 21)
    for right in (0, 2, 4):  # of each pass's guesses, in turn with none
        guesses = answer.clone()
        guesses[:, right::5] = (guesses[:, right::5] + 1) % 97
        decoding = Speculation(Oracle(guesses, PROMPT.shape[1]), 4)
        assert torch.equal(
            generated(TransformersEngine(module, decoding=decoding, steps="captured"), PROMPT, 21), answer
        )


def test_the_cache_after_a_pass_is_that_of_the_text_alone():
    module, text = tiny_model("llama"), PROMPT[:1]
    engine = TransformersEngine(module)
    cache, fresh = engine.new_cache(), engine.new_cache()
    engine.advance(text[:, :9], cache)
    engine.advance(text[:, 11:15], cache)  # guesses that are rejected
    cache.crop(-4)
    engine.advance(text[:, :9], fresh)
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys)
    torch.testing.assert_close(engine.advance(text[:, 9:], cache), engine.advance(text[:, 9:], fresh))


def test_accepting_by_hand():
    best = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4], [9, 9, 9, 9]])
    guesses = torch.tensor([[5, 6, 7], [1, 0, 3], [NONE, 9, 9]])
    accepted, following = accept_greedy(best, guesses)
    assert accepted.tolist() == [3, 1, 0]
    assert following.tolist() == [8, 2, 9]


# -------------------------------------------------------------------------------------- sampling: one distribution


def chi_square_p(observed: Counter, expected: dict, runs: int) -> float:
    from scipy.stats import chi2

    cells = [(observed.get(key, 0), runs * share) for key, share in expected.items() if share > 0]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def test_three_tokens_of_a_markov_chain_have_the_targets_joint_distribution():
    """Target and draft are two chains over 4 words; 20,000 runs at once, as rows that do not wait for each other."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(4, 4, generator=generator).add(0.05)
    draft = torch.rand(4, 4, generator=generator).add(0.05)
    target, draft = target / target.sum(-1, keepdim=True), draft / draft.sum(-1, keepdim=True)
    runs = 20_000
    texts = torch.zeros(runs, 1, dtype=torch.long)
    last, guesses, drawn_from = texts[:, 0], [], []
    for _ in range(2):
        drawn_from.append(draft[last])
        last = drawn(draft[last], generator)
        guesses.append(last)
    guesses = torch.stack(guesses, 1)
    read = torch.cat([texts, guesses], 1)
    accepted, following = accept_sampled(target[read], guesses, torch.stack(drawn_from, 1), generator)
    tokens = torch.full((runs, 4), NONE)
    tokens[:, :2] = guesses
    tokens.scatter_(1, accepted[:, None], following[:, None])
    beyond = torch.arange(4) > accepted[:, None]
    tokens[beyond] = NONE
    for place in (1, 2):  # rows that stopped early go on with the target alone
        short = tokens[:, place] == NONE
        tokens[short, place] = drawn(target[tokens[short, place - 1]], generator)
    observed = Counter(map(tuple, tokens[:, :3].tolist()))
    expected = {
        (a, b, c): float(target[0, a] * target[a, b] * target[b, c])
        for a in range(4)
        for b in range(4)
        for c in range(4)
    }
    assert chi_square_p(observed, expected, runs) > 0.01
    overlap = float(torch.minimum(target[0], draft[0]).sum())  # 1 - total variation
    assert float((accepted > 0).float().mean()) == pytest.approx(overlap, abs=4 * (0.25 / runs) ** 0.5)


def test_certain_guesses_are_accepted_with_the_targets_probability_and_leave_its_distribution():
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    runs = 20_000
    target = p.expand(runs, 2, 4)
    guesses = torch.full((runs, 1), 1)
    guesses[: runs // 2] = NONE
    accepted, following = accept_sampled(target, guesses, None, generator)
    first = torch.where(accepted > 0, 1, following)
    assert int(accepted[: runs // 2].sum()) == 0
    for half in (first[: runs // 2], first[runs // 2 :]):
        assert chi_square_p(Counter(half.tolist()), dict(enumerate(p.tolist())), runs // 2) > 0.01
    assert float(accepted[runs // 2 :].float().mean()) == pytest.approx(0.3, abs=0.02)


def test_equal_distributions_accept_all_and_disjoint_ones_nothing():
    generator = torch.Generator().manual_seed(2)
    p = torch.rand(1, 3, 6, generator=generator).softmax(-1).expand(500, 3, 6)
    guesses = torch.stack([drawn(p[:, k], generator) for k in range(2)], 1)
    assert accept_sampled(p, guesses, p[:, :2], generator)[0].eq(2).all()
    q = torch.eye(6)[5].expand(500, 2, 6)
    none = torch.cat([p[..., :5] / p[..., :5].sum(-1, keepdim=True), torch.zeros(500, 3, 1)], -1)
    accepted, following = accept_sampled(none, torch.full((500, 2), 5), q, generator)
    assert accepted.eq(0).all()
    assert following.ne(5).all()


@pytest.mark.parametrize("draft", DRAFTS, ids=lambda draft: draft.name)
def test_a_models_second_token_is_drawn_from_its_own_distribution(draft):
    """Temperature, top-k and top-p hold for both sides. The second token is the first that may be a guess."""
    module = tiny_model("llama")
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.9)
    rows = 600
    prompt = PROMPT[:1].expand(rows, -1)
    engine, generator = TransformersEngine(module), torch.Generator().manual_seed(3)
    drawing = Speculation(draft, 2).generate(engine, prompt, 2, None, sampling, generator)
    pairs = Counter(map(tuple, torch.stack(list(drawing), 1).tolist()))
    first = sampling.distribution(engine.advance(PROMPT[:1], engine.new_cache())[0, -1])
    expected = {}
    for a in first.nonzero()[:, 0].tolist():
        text = torch.cat([PROMPT[:1], torch.tensor([[a]])], 1)
        second = sampling.distribution(engine.advance(text, engine.new_cache())[0, -1])
        expected |= {(a, b): float(first[a] * second[b]) for b in second.nonzero()[:, 0].tolist()}
    assert set(pairs) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    assert chi_square_p(pairs, expected, rows) > 0.001


def test_distributions_keep_what_they_should():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert Sampling(1.0).distribution(logits).allclose(logits.softmax(-1))
    assert (Sampling(1.0, top_k=2).distribution(logits) > 0).tolist() == [True, True, False, False]
    assert (Sampling(1.0, top_p=0.7).distribution(logits) > 0).tolist() == [True, True, False, False]
    assert (Sampling(1.0, top_p=0.6).distribution(logits) > 0).tolist() == [True, False, False, False]


# ---------------------------------------------------------------------------------------------------- the formulas


def test_tokens_per_pass_are_those_of_the_closed_form():
    """Guesses that are right with one probability, 20,000 passes."""
    generator = torch.Generator().manual_seed(4)
    for acceptance, drafts in ((0.8, 3), (0.5, 5), (0.9, 8)):
        right = torch.rand(20_000, drafts, generator=generator) < acceptance
        mean = float(right.long().cumprod(1).sum(1).add(1).float().mean())
        assert mean == pytest.approx(expected_tokens(acceptance, drafts), rel=0.02)
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1


@pytest.mark.parametrize(
    ("acceptance", "cost", "drafts", "speedup"),
    [(0.8, 0.05, 8, 3.09), (0.6, 0.05, 4, 1.92), (0.9, 0.02, 19, 6.37), (0.5, 0.1, 2, 1.46)],
)
def test_the_best_number_of_guesses(acceptance, cost, drafts, speedup):
    assert best_drafts(acceptance, cost) == drafts
    assert expected_speedup(acceptance, drafts, cost) == pytest.approx(speedup, abs=0.005)


def test_guessing_pays_when_acceptance_exceeds_cost():
    """The paper's Corollary 3.9: then at least by (1 + acceptance) / (1 + cost)."""
    assert expected_speedup(0.3, 1, 0.2) == pytest.approx(1.3 / 1.2)
    assert best_drafts(0.2, 0.3) == 0


def test_theory_takes_each_pass_by_its_own_number_of_guesses():
    """Half of the passes without a guess: the mean of two is not two guesses in each."""
    counts = Counts(10, 0, 20, 5, 10, guess_seconds=2.0, check_seconds=15.0, passes_with=Counter({0: 5, 4: 5}))
    tokens = (1 + expected_tokens(0.5, 4)) / 2
    assert tokens < expected_tokens(0.5, 2)
    expected = Speculation(PromptLookup(), 4).expected_speedup(counts, 1.0)
    assert expected == pytest.approx((tokens / (0.2 + 1), tokens / (0.2 + 1.5)))
    steady = replace(counts, passes_with=Counter({2: 10}))  # the same number in every pass: the theorem itself
    assert Speculation(PromptLookup(), 2).expected_speedup(steady, 1.0)[0] == pytest.approx(
        expected_speedup(0.5, 2, 0.1)
    )


def test_passes_are_counted_by_their_guesses():
    decoding = Speculation(PromptLookup(), 3)
    list(TransformersEngine(tiny_model("llama"), decoding=decoding).generate(PROMPT[:1], 24))
    counts = decoding.counts
    assert counts.passes_with.total() == counts.passes
    assert sum(guesses * passes for guesses, passes in counts.passes_with.items()) == counts.guesses > 0


# ----------------------------------------------------------------------------------------------------------- drafts


def test_what_followed_before_is_guessed():
    text = torch.tensor([[1, 2, 3, 4, 9, 1, 2, 3], [5, 6, 7, 8, 9, 10, 11, 12], [7, 1, 7, 2, 7, 3, 7, 7]])
    assert continuations(text, 2, 3, 1).tolist() == [[4, 9], [NONE, NONE], [7, 7]]
    assert continuations(text[1:2], 2, 3, 1).shape == (1, 0)
    loop = torch.tensor([[4, 5, 6, 5, 6]])
    assert continuations(loop, 5, 2, 1).tolist() == [[5, 6, 5, 6, 5]]
    newest = torch.tensor([[1, 2, 8, 1, 2, 9, 1, 2]])
    assert continuations(newest, 1, 2, 1).tolist() == [[9]]
    padded = torch.tensor([[0, 0, 1, 2, 3, 0]])
    assert continuations(padded, 1, 1, 1, torch.tensor([[0, 0, 1, 1, 1, 1]])).shape == (1, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_layers_are_a_model_and_leave_the_other_as_it_was(architecture):
    module, whole = tiny_model(architecture), tiny_model(architecture)
    before = module(PROMPT).logits
    short = first_layers(module, 1)
    parameters = {id(p) for p in module.parameters()}
    assert all(id(p) in parameters for p in short.parameters())
    assert not torch.allclose(short(PROMPT).logits, before)
    assert torch.equal(module(PROMPT).logits, before)
    assert torch.equal(first_layers(whole, 3)(PROMPT).logits, before)


class Small:
    """A source of a tiny model."""

    name = "small"

    def __init__(self, lm) -> None:
        self._lm = lm

    def load(self, cache, device, dtype):
        for parameter in self._lm.module.parameters():
            parameter.data = parameter.data.to(dtype)  # buffers stay: rotary frequencies are no weights
        return self._lm, {}


def test_a_small_models_weights_are_saved_loaded_and_counted(trained, trained_folder, bench, tmp_path):
    from tests.conftest import tiny_llama

    artifact.save(trained, tmp_path / "alone")
    small = tiny_llama()
    own = sum(p.numel() for p in small.module.parameters())
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = generated(trained.engine, tokens, 12)
    method = SpeculativeDecoding(ModelDraft(Small(small)), 3)
    artifact.save(method.compress(trained, bench), tmp_path / "both")
    assert artifact.stored_bytes(tmp_path / "both") == pytest.approx(
        artifact.stored_bytes(tmp_path / "alone") + 2 * own, abs=4000
    )
    loaded = artifact.load(tmp_path / "both", "cpu", torch.float32)
    loaded.engine.prepare("decoding", torch.float32)
    assert torch.equal(generated(loaded.engine, tokens, 12), plain)
    assert loaded.engine.decoding.counts.guesses > 0
    assert "3 guesses by draft small" in loaded.engine.kernels()
    assert decoder_blocks(loaded.module)[0] == "model.layers"  # whatever the size of the small model's
    small.engine.prepare("decoding", torch.float32)
    assert torch.equal(loaded.module.draft.model(tokens).logits, small.module(tokens).logits)


@pytest.mark.parametrize("draft", [*DRAFTS[:1], TruncatedDraft(1)], ids=lambda draft: draft.name)
def test_a_saved_model_comes_back_with_its_draft(draft, trained, bench, tmp_path):
    compressed = SpeculativeDecoding(draft, 5).compress(trained, bench)
    artifact.save(compressed, tmp_path / "model")
    loaded = artifact.load(tmp_path / "model", "cpu", torch.float32)
    assert loaded.engine.decoding == Speculation(draft, 5)


def test_what_cannot_be_is_refused(trained, bench):
    with pytest.raises(ConfigError, match="drafts=0"):
        SpeculativeDecoding(PromptLookup(), 0)
    with pytest.raises(ConfigError, match="shortest=3, longest=2"):
        PromptLookup(2, 3)
    module = tiny_model("llama")
    with pytest.raises(ConfigError, match="this model has 3"):
        SpeculativeDecoding(TruncatedDraft(3), 4).compress(
            LanguageModel(module, None, TransformersEngine(module)), bench
        )
    from tests.harness.tiny_models import byte_tokenizer

    other = LanguageModel(trained.module, byte_tokenizer(), trained.engine)
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(RunError, match="another vocabulary"):
        SpeculativeDecoding(ModelDraft(Small(other)), 4).compress(trained, bench)
