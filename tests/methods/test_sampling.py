"""Sampling: the distribution is the model's, rows do not see each other, and mixtures carry the right weights."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model

from harness.errors import ConfigError, RunError
from methods.distillation.sampling import Sampling, distribution, draw, end_marks, sample, uniform_numbers

ENDS = (1, 2)
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15], [16]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_vocabulary(seed: int, vocabulary: int = 3) -> torch.nn.Module:
    """A model small enough to write down every text it can write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
            max_position_embeddings=32,
        )
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def chances_of(module: torch.nn.Module, prompt: list[int], texts: torch.Tensor) -> torch.Tensor:
    """log q of every token of every text [S, N] after a prompt, without a cache."""
    tokens = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts], 1)
    logits = module(input_ids=tokens).logits[:, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(2, texts[..., None])[..., 0]


def shares(tokens: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """How often each text was written."""
    return (tokens[:, None] == texts[None]).all(-1).double().mean(0)


@pytest.mark.parametrize(("share", "seed"), [(0.0, 0), (0.3, 1), (1.0, 2)])
def test_texts_are_drawn_from_the_mixture_exactly(share, seed):
    """Every text of three tokens by its probability, the product of mixtures: χ² of 26 degrees, and the weights."""
    student, teacher = tiny_vocabulary(1), tiny_vocabulary(2)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    q, p = chances_of(student, [0, 1], texts).exp(), chances_of(teacher, [0, 1], texts).exp()
    mixed = share * p + (1 - share) * q
    settings, rows = Sampling(3), 20_000
    found = sample(
        student, [[0, 1]] * rows, settings, (), uniform_numbers(rows, settings, generator(seed)), teacher, share
    )
    expected = mixed.prod(1).double()
    statistic = rows * ((shares(found.tokens, texts) - expected).square() / expected).sum()
    assert statistic < 54.1  # exceeded once in a thousand
    index = found.tokens @ torch.tensor([9, 3, 1])
    torch.testing.assert_close(found.importance, (q / mixed)[index], atol=1e-5, rtol=1e-5)
    assert (found.importance <= 1 / (1 - share) * (1 + 1e-5) if share < 1 else found.importance > 0).all()


def test_weights_turn_means_over_the_mixture_into_means_over_the_student():
    """Σ p̃(y) w(y) f(y) = Σ q(y) f(y) for one step, summed exactly through the sampler's own intervals."""
    student, teacher = tiny_vocabulary(1), tiny_vocabulary(2)
    tokens = torch.arange(3)[:, None]
    q, p = (chances_of(module, [0, 1], tokens).exp()[:, 0] for module in (student, teacher))
    mixed = 0.2 * p + 0.8 * q
    middles = (mixed.cumsum(0) - mixed / 2)[:, None]  # a number in the interval of each token
    found = sample(student, [[0, 1]] * 3, Sampling(1), (), middles.double(), teacher, 0.2)
    assert found.tokens[:, 0].tolist() == [0, 1, 2]
    values = torch.tensor([2.0, -1.0, 5.0])
    torch.testing.assert_close((mixed * found.importance[:, 0] * values).sum(), (q * values).sum())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_is_written_alike_whatever_stands_beside_it(name):
    """Left padding, the cache and the neighbours change nothing; nor does writing without a cache."""
    module, settings = tiny_model(name), Sampling(6)
    numbers = uniform_numbers(len(PROMPTS), settings, generator())
    together = sample(module, PROMPTS, settings, ENDS, numbers)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(module, [prompt], settings, ENDS, numbers[row : row + 1])
        assert together.lists()[row] == alone.lists()[0]
        text = list(prompt)
        for number in numbers[row]:
            logits = module(input_ids=torch.tensor([text])).logits[:, -1]
            text.append(int(draw(logits.softmax(-1), number[None])))
            if text[-1] in ENDS:
                break
        assert together.lists()[row] == text[len(prompt) :]


def test_two_writers_of_different_depth_write_alike_beside_others():
    student, teacher, settings = tiny_model("llama"), tiny_model("qwen3"), Sampling(6)
    numbers = uniform_numbers(len(PROMPTS), settings, generator())
    together = sample(student, PROMPTS, settings, ENDS, numbers, teacher, 0.5)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(student, [prompt], settings, ENDS, numbers[row : row + 1], teacher, 0.5)
        assert together.lists()[row] == alone.lists()[0]
        kept = alone.mask[0]
        torch.testing.assert_close(together.importance[row][: len(kept)][kept], alone.importance[0][kept])


def test_without_a_share_the_teacher_is_not_asked():
    student, settings = tiny_vocabulary(1), Sampling(4)
    numbers = uniform_numbers(3, settings, generator())
    found = sample(student, [[0]] * 3, settings, (), numbers, teacher=torch.nn.Linear(1, 1), teacher_share=0.0)
    assert torch.equal(found.tokens, sample(student, [[0]] * 3, settings, (), numbers).tokens)
    assert torch.equal(found.importance, torch.ones(3, 4))


def test_greedy_writing_is_that_of_the_engine_and_of_transformers():
    from harness.engines.transformers import TransformersEngine

    module = tiny_model("llama")
    prompt = [5, 6, 7, 8]
    numbers = uniform_numbers(1, Sampling(8), generator())
    found = sample(module, [prompt], Sampling(8, temperature=0.0), (), numbers).lists()[0]
    wanted = [int(step) for step in TransformersEngine(module).generate(torch.tensor([prompt]), 8)]
    assert found == wanted
    generated = module.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found == generated[0, len(prompt) :].tolist()


def test_a_response_ends_with_its_first_end_mark():
    settings = Sampling(12)
    module = tiny_vocabulary(1)
    found = sample(module, [[0]] * 64, settings, (2,), uniform_numbers(64, settings, generator()))
    for row, kept in zip(found.tokens.tolist(), found.mask.tolist(), strict=True):
        length = row.index(2) + 1 if 2 in row else len(row)
        assert kept == [column < length for column in range(len(row))]
    assert {row[-1] for row in found.lists() if len(row) < 12} == {2}
    assert (found.importance[~found.mask] == 1).all()


def test_writing_stops_when_all_have_ended():
    module = tiny_vocabulary(1)
    settings = Sampling(30)
    numbers = uniform_numbers(4, settings, generator())
    found = sample(module, [[0]] * 4, settings, (0, 1, 2), numbers)
    assert found.tokens.shape == (4, 1)
    assert found.mask.all()


def test_top_p_keeps_the_fewest_tokens_that_have_it():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = distribution(logits, Sampling(1, top_p=0.6))
    torch.testing.assert_close(kept, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    torch.testing.assert_close(distribution(logits, Sampling(1, top_p=0.01)), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(distribution(logits, Sampling(1)), logits.exp())


def test_temperature_sharpens():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    squared = logits.exp().square()
    torch.testing.assert_close(distribution(logits, Sampling(1, temperature=0.5)), squared / squared.sum())


def test_drawing_takes_the_interval_a_number_falls_into():
    chances = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]]).expand(6, -1)
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.999999999], dtype=torch.float64)
    assert draw(chances, numbers).tolist() == [1, 1, 3, 3, 4, 4]


def test_the_numbers_do_not_depend_on_when_responses_end():
    settings = Sampling(5)
    one = generator(3)
    first = uniform_numbers(2, settings, one)
    after = torch.rand(1, generator=one)
    two = generator(3)
    torch.rand(2, 5, dtype=torch.float64, generator=two)
    assert torch.equal(after, torch.rand(1, generator=two))
    assert first.shape == (2, 5)


def test_end_marks_of_tokenizer_and_model_are_joined():
    def model(configured, tokenizer=2):
        module = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
        return SimpleNamespace(module=module, tokenizer=SimpleNamespace(eos_token_id=tokenizer))

    assert end_marks(model([9, 7])) == (2, 7, 9)
    assert end_marks(model(2)) == (2,)
    assert end_marks(model(None, None)) == ()


def test_what_cannot_be_written_is_refused():
    module, settings = tiny_vocabulary(1), Sampling(4)
    numbers = uniform_numbers(2, settings, generator())
    with pytest.raises(RunError, match="a prompt without tokens"):
        sample(module, [[0], []], settings, (), numbers)
    with pytest.raises(RunError, match="34 tokens of prompt and response exceed the 32 positions"):
        sample(module, [[0] * 30, [0]], settings, (), numbers)
    for values, message in (
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"new_tokens": 1, "temperature": -1.0}, "temperature=-1"),
        ({"new_tokens": 1, "top_p": 0.0}, "top_p=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sampling(**values)
