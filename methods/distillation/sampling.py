"""Let models write: batches of prompts, a cache of keys and values, and randomness that is handed in.

A student writes what it is then trained on (GKD, MiniLLM), a teacher what its student copies. Each row has random
numbers of its own, one per token, so that it is written alike whatever stands beside it in the batch. Student and
teacher can write together, each token drawn from a mixture of both (Gu et al. 2023, https://arxiv.org/abs/2306.08543,
Section 2.2).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import ConfigError, RunError
from methods.distillation.divergences import log_probabilities, same_vocabulary

if TYPE_CHECKING:
    from harness.method import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How a response is written.

    new_tokens: most of a response, its end mark among them; one that is cut off here has none, and is kept.
    temperature: of softmax(logits / temperature); 0 takes the likeliest token.
    top_p: the likeliest tokens that together have this probability are drawn from; 1 keeps all.
    batch_size: prompts that are continued side by side where many are.
    """

    new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sampling.{name}={getattr(self, name)}: must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"sampling.temperature={self.temperature}: must be 0 (likeliest token) or greater")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p}: must be greater than 0 and at most 1")


@dataclass(frozen=True)
class Responses:
    """What was written after each prompt.

    tokens: ids [B, N], padded on the right. mask: [B, N], True up to the first end mark, itself included.
    importance: [B, N] float32, how much likelier the student alone would have written this token, at temperature 1,
        than what it was drawn from; 1 where the student wrote alone, and on padding.
    """

    tokens: Tensor
    mask: Tensor
    importance: Tensor

    def lists(self) -> list[list[int]]:
        """Every response as ids, without padding."""
        return [row[kept].tolist() for row, kept in zip(self.tokens, self.mask, strict=True)]


def end_marks(lm: LanguageModel) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's and those of the model's generation configuration, which may be several."""
    configured = getattr(getattr(lm.module, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list | tuple) else [configured]
    known = {lm.tokenizer.eos_token_id, *configured} - {None}
    return tuple(sorted(known))


def uniform_numbers(rows: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Randomness of `rows` responses, [rows, new_tokens]: as many numbers however soon the responses end."""
    return torch.rand(rows, sampling.new_tokens, dtype=torch.float64, generator=generator, device=generator.device)


@torch.no_grad()
def sample(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    ends: Sequence[int],
    uniforms: Tensor,
    teacher: nn.Module | None = None,
    teacher_share: float = 0.0,
) -> Responses:
    """Write a response to every prompt.

    ends: ids that end a response. uniforms: [B, new_tokens], numbers from 0 to 1.
    teacher_share: α of αp + (1-α)q, what tokens are drawn from with p the teacher's and q the module's distribution.
    Raises RunError for an empty prompt, and where prompt and response exceed the positions of a model.
    """
    writers = [module] if teacher is None or not teacher_share else [module, teacher]
    device = _device(module)
    tokens, mask = padded_on_the_left(prompts, ends[0] if ends else 0)
    for writer in writers:
        check_length(writer, tokens.shape[1] + sampling.new_tokens)
    readers = [Reader(writer, mask.to(_device(writer))) for writer in writers]
    uniforms, step = uniforms.to(device), tokens.to(device)
    stops = torch.tensor(list(ends), dtype=torch.long, device=device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    written, kept, importance = [], [], []
    for numbers in uniforms.unbind(1):
        logits = [reader.next(step.to(reader.device)).to(device) for reader in readers]
        chances = distribution(logits[0], sampling)
        alone = logits[0]
        if len(logits) > 1:
            alone, beside = same_vocabulary(*logits)
            chances = (1 - teacher_share) * distribution(alone, sampling) + teacher_share * distribution(
                beside, sampling
            )
        step = draw(chances, numbers)[:, None]  # [B, 1]
        if len(logits) > 1:
            ratio = log_probabilities(alone).gather(1, step).exp() / chances.gather(1, step)
            importance.append(torch.where(going, ratio[:, 0], 1.0))
        written.append(torch.where(going, step[:, 0], ends[0] if ends else 0))
        kept.append(going)
        going = going & ~torch.isin(step[:, 0], stops)
        if not going.any():
            break
    found = torch.stack(written, 1)
    weights = torch.stack(importance, 1) if importance else torch.ones(found.shape, device=device)
    return Responses(found, torch.stack(kept, 1), weights.float())


class Reader:
    """A model that reads tokens bit by bit, past a cache of keys and values, and says what comes next.

    mask: [B, P], False where a prompt is padded at its start.
    """

    def __init__(self, module: nn.Module, mask: Tensor) -> None:
        from transformers import DynamicCache

        self.module, self.mask = module, mask.long()
        self.padded = not bool(mask.all())
        self.known = inspect.signature(module.forward).parameters
        self.cache = DynamicCache(config=module.config)

    @property
    def device(self) -> torch.device:
        """Where it reads."""
        return self.mask.device

    def next(self, tokens: Tensor) -> Tensor:
        """Logits of the token that follows: ids [B, n], read after all that came before -> [B, V]."""
        told = {"logits_to_keep": 1} if "logits_to_keep" in self.known else {}
        if self.padded:
            told["attention_mask"] = self.mask
            if "position_ids" in self.known:
                told["position_ids"] = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.module(input_ids=tokens, past_key_values=self.cache, use_cache=True, **told)
        self.cache = output.past_key_values
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return output.logits[:, -1]


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What the next token is drawn from: logits [B, V] -> probabilities [B, V], float32."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter(1, logits.argmax(1, keepdim=True), 1.0)
    chances = log_probabilities(logits, sampling.temperature).exp()
    if sampling.top_p == 1:
        return chances
    ordered, order = chances.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # a token stays while those before it have not reached top_p
    ordered = ordered.masked_fill(before >= sampling.top_p, 0)
    chances = torch.zeros_like(chances).scatter(1, order, ordered)
    return chances / chances.sum(-1, keepdim=True)


def draw(chances: Tensor, numbers: Tensor) -> Tensor:
    """The token at which the sum of chances passes each number: [B, V], [B] in [0, 1) -> ids [B].

    Sums are taken in float64: those of float32 would lose rare tokens of a large vocabulary.
    """
    sums = chances.double().cumsum(-1)
    found = torch.searchsorted(sums, (numbers[:, None] * sums[:, -1:]), right=True)
    return found[:, 0].clamp(max=chances.shape[1] - 1)


def padded_on_the_left(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Ids [B, P] that all end in the last column, and a mask [B, P], False on what was filled.

    Raises RunError for an empty prompt: nothing would say what its first token is drawn from.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise RunError("a prompt without tokens cannot be continued; give every example a prompt, or one start token")
    longest = max(lengths)
    tokens = torch.tensor([[fill] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return tokens, mask


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def check_length(module: nn.Module, tokens: int) -> None:
    """Raise RunError where prompt and response, `tokens` together, exceed the positions of a model."""
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise RunError(
            f"{tokens} tokens of prompt and response exceed the {limit} positions of {type(module).__name__}; shorten "
            "the prompts or lower method.sampling.new_tokens"
        )
