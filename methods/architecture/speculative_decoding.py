"""Speculative decoding: guess several tokens cheaply, check them in one pass of the model (Leviathan et al. 2023).

https://arxiv.org/abs/2211.17192. What comes out has the model's own distribution: greedy decoding gives the very
tokens that the model alone gives, sampling draws from what the model alone would draw from. Only time changes.

    a guess x drawn from q is accepted with probability min(1, p(x) / q(x))                        (Section 2.3)
    after the first rejection the next token is drawn from max(0, p - q), normalised
    when all are accepted one more is drawn from the model: each pass gives 1 to n + 1 tokens

A batch goes on at the pace of its slowest row: rows that were right for longer guess those tokens again. Tokens stay
exact, since every token is the model's, whenever it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.engines.decoding import Counts
from harness.errors import ConfigError, RunError
from methods.architecture.drafts import NONE, Choose, Draft, Guesses

if TYPE_CHECKING:
    from transformers import Cache

    from harness.engines.transformers import TransformersEngine
    from harness.method import Bench, LanguageModel


# --------------------------------------------------------------------------------------------------------- formulas


def expected_tokens(acceptance: float, drafts: float) -> float:
    """Tokens of one pass of the target when each guess is right with this probability (Equation 1)."""
    if acceptance >= 1:
        return drafts + 1.0
    return (1 - acceptance ** (drafts + 1)) / (1 - acceptance)


def expected_speedup(acceptance: float, drafts: float, cost: float, check: float = 1.0) -> float:
    """Speed against the target alone (Theorem 3.8).

    cost: seconds of one guess over seconds of one step of the target. check: seconds of a pass over n + 1 tokens over
    seconds of one step; the theorem takes 1.
    """
    return expected_tokens(acceptance, drafts) / (drafts * cost + check)


def best_drafts(acceptance: float, cost: float, most: int = 64) -> int:
    """The number of guesses with the largest expected speed-up (Section 3.5)."""
    return max(range(most + 1), key=lambda drafts: expected_speedup(acceptance, drafts, cost))


# ----------------------------------------------------------------------------------------------------- distributions


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; the same for target and draft, which is what makes drafting exact.

    temperature: 0 is greedy. top_k: only so many of the likeliest; top_p: only the likeliest that make up this share.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities that tokens are drawn with: logits [..., V] -> [..., V] float32."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the share is reached before this token
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        return logits.softmax(-1)


def accept_greedy(best: Tensor, guesses: Tensor) -> tuple[Tensor, Tensor]:
    """How many guesses are the target's own, and the target's token after them.

    best: [B, n + 1] the target's likeliest token at each place; guesses: [B, n] -> [B], [B].
    """
    accepted = (best[:, :-1] == guesses).long().cumprod(1).sum(1)
    return accepted, best.gather(1, accepted[:, None])[:, 0]


def accept_sampled(
    target: Tensor, guesses: Tensor, draft: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """How many guesses are accepted, and the token after them (Algorithm 1).

    target: [B, n + 1, V] distributions of the target; guesses: [B, n], NONE is never accepted; draft: [B, n, V] that
    they were drawn from, None where each was certain. -> [B], [B].
    """
    rows, count = guesses.shape
    some = guesses != NONE
    places = guesses.clamp(min=0)[..., None]
    if draft is None:
        draft = torch.zeros_like(target[:, :-1]).scatter(-1, places, some[..., None].to(target.dtype))
    p, q = target[:, :-1].gather(-1, places)[..., 0], draft.gather(-1, places)[..., 0]
    chance = torch.rand(rows, count, generator=generator).to(p)
    right = some & (chance * q < p)
    accepted = right.long().cumprod(1).sum(1)
    # the residual after a rejection; after n accepted guesses the draft has nothing to take away
    at = accepted[:, None, None].expand(-1, 1, target.shape[-1])
    taken = torch.cat([draft, torch.zeros_like(target[:, :1])], dim=1).gather(1, at)[:, 0]
    here = target.gather(1, at)[:, 0]
    left = (here - taken).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    left = torch.where(total > 0, left / total.clamp(min=1e-30), here)  # p = q but for rounding
    return accepted, drawn(left, generator)


def drawn(distribution: Tensor, generator: torch.Generator) -> Tensor:
    """One token of each distribution [B, V] -> [B]. Drawn on the generator's device, so that seeds mean the same."""
    return torch.multinomial(distribution.to(generator.device), 1, generator=generator)[:, 0].to(distribution.device)


# ------------------------------------------------------------------------------------------------------------ engine


@dataclass(frozen=True)
class Speculation:
    """The engine's way to decode.

    draft: where guesses come from. drafts: how many at a time.
    """

    draft: Draft
    drafts: int
    counts: Counts = field(default_factory=Counts, compare=False, repr=False)  # since it was made
    clock: Callable[[], float] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """For the row."""
        return f"{self.drafts} guesses by {self.draft.name}"

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this way again."""
        kind = type(self.draft)
        return {
            "draft": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **self.draft.as_dict()},
            "drafts": self.drafts,
        }

    def counting(self, clock: Callable[[], float] | None) -> Speculation:
        """The same with counts of its own; with a clock it waits for the device between guessing and checking."""
        return Speculation(self.draft, self.drafts, Counts(), clock)

    def expected_speedup(self, counts: Counts, step_seconds: float) -> tuple[float, float]:
        """Theorem 3.8 with a check that costs one step, and with its cost as clocked.

        Tokens are those of Equation 1 for the guesses of each pass: where some passes have none, as with prompt lookup,
        those of the mean number of guesses would be too many.
        """
        passes = max(counts.passes, 1)
        tokens = sum(n * expected_tokens(counts.acceptance, guesses) for guesses, n in counts.passes_with.items())
        guessing = counts.guess_seconds / passes / step_seconds
        check = counts.check_seconds / passes / step_seconds
        return tokens / passes / (guessing + 1), tokens / passes / (guessing + check or 1)

    def generate(
        self,
        engine: TransformersEngine,
        prompt: Tensor,
        new_tokens: int,
        mask: Tensor | None = None,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The model's own tokens: ids [B, P] -> one tensor of ids [B] per token.

        sampling: None is greedy. The prompt's pass gives the first token; a later pass gives one token or several.
        """
        greedy = sampling is None or sampling.temperature == 0
        choose = _likeliest if greedy else _drawing(sampling, generator)
        drafter = self.draft.begin(engine, choose)
        captured = engine.checked(prompt, new_tokens, self.drafts + 1) if greedy and mask is None else None
        target = captured or _Plain(engine, prompt, mask, choose)
        # with a graph the host would wait for its own small operations on the text: it keeps the text itself
        text = torch.cat([prompt, target.first[:, None]], dim=1).to("cpu" if captured else prompt.device)
        yield target.first
        end = prompt.shape[1] + new_tokens
        while text.shape[1] < end:
            mask = None if mask is None else _grown(mask, text.shape[1])
            room = end - text.shape[1] - 1  # one token more comes from the target itself
            begun = self._now(engine)
            guesses = drafter.propose(text, min(self.drafts, room), mask) if room else _none(text)
            guessed = self._now(engine)
            tokens = guesses.tokens.to(text.device)
            count = tokens.shape[1]
            step = torch.cat([text[:, -1:], tokens.clamp(min=0)], dim=1)
            if greedy:
                accepted, following = accept_greedy(target.likeliest(step).to(text.device), tokens)
            else:
                distributions = sampling.distribution(target.logits(step))
                accepted, following = accept_sampled(distributions, tokens, guesses.distributions, generator)
            pace = int(accepted.min())
            last = following
            if pace < count:
                last = torch.where(accepted > pace, tokens[:, pace], following)
            target.keep(pace + 1)
            new = torch.cat([tokens[:, :pace], last[:, None]], dim=1)
            self._count(tokens, pace, guessed - begun, self._now(engine) - guessed)
            text = torch.cat([text, new], dim=1)
            yield from new.to(prompt.device).unbind(1)

    def _now(self, engine: TransformersEngine) -> float:
        if self.clock is None:
            return 0.0
        if engine.module.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    def _count(self, guesses: Tensor, pace: int, guess_seconds: float, check_seconds: float) -> None:
        count = guesses.shape[1]
        self.counts.passes += 1
        self.counts.tokens += pace + 1
        self.counts.guesses += count
        self.counts.passes_with[count] += 1
        self.counts.accepted += pace
        self.counts.examined += min(pace + 1, count)
        self.counts.guess_seconds += guess_seconds
        self.counts.check_seconds += check_seconds


class _Plain:
    """The target's passes in plain steps, with the cache of its engine.

    first: [B], what follows the prompt.
    """

    def __init__(self, engine: TransformersEngine, prompt: Tensor, mask: Tensor | None, choose: Choose) -> None:
        self._engine, self._mask = engine, mask
        self._cache: Cache = engine.new_cache()
        if not self._cache.is_croppable and self._cache.layers:
            raise RunError("this cache cannot take tokens back, which speculative decoding needs; choose another")
        self._cache.activate_past_recording()
        self.first = choose(engine.advance(prompt, self._cache, mask=mask)[:, -1])[0]
        self._held, self._read = prompt.shape[1], 0
        self._cache.crop(0)

    def logits(self, ids: Tensor) -> Tensor:
        """Of what follows each of the next tokens: ids [B, n] -> [B, n, V]."""
        self._read = ids.shape[1]
        mask = None if self._mask is None else _grown(self._mask, self._held + self._read)
        return self._engine.advance(ids, self._cache, keep=self._read, mask=mask)

    def likeliest(self, ids: Tensor) -> Tensor:
        """What follows each of the next tokens: ids [B, n] -> ids [B, n]."""
        return self.logits(ids).argmax(-1)

    def keep(self, count: int) -> None:
        """Of the tokens read last only the first `count` stay."""
        self._cache.crop(count - self._read)
        self._held += count


def _likeliest(logits: Tensor) -> tuple[Tensor, None]:
    return logits.argmax(-1), None


def _drawing(sampling: Sampling, generator: torch.Generator) -> Choose:
    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        distribution = sampling.distribution(logits)
        return drawn(distribution, generator), distribution

    return choose


def _none(text: Tensor) -> Guesses:
    return Guesses(text[:, :0])


def _grown(mask: Tensor, length: int) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], dim=1)


@dataclass(frozen=True)
class SpeculativeDecoding:
    """Leaves the weights alone and lets the engine guess ahead.

    draft: where guesses come from. drafts: how many at a time.
    """

    draft: Draft
    drafts: int

    def __post_init__(self) -> None:
        if not isinstance(self.drafts, int) or self.drafts < 1:
            raise ConfigError(f"method.drafts={self.drafts}: must be at least 1")

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The same model, decoded in another way."""
        base.engine = base.engine.changed(decoding=Speculation(self.draft.attached(base), self.drafts))
        return base
