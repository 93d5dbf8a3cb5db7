"""Texts written by a model, many at a time: greedily or drawn, until a stop sequence, an end mark or enough tokens.

Students are asked through a `Decoding`, before they are taught and after, so that both are asked in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from harness.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from harness.method import LanguageModel, Progress
    from harness.problems import Problem

POSITIONS_UNLIMITED = 2048  # context of models whose configuration names no limit
BYTES_A_CHARACTER = 4

Stops = tuple[Sequence[str], int]  # stop sequences, most new tokens


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    text: without the stop sequence and the end mark. ended: by one of them, not by the limit.
    ids: the tokens of the text as they were chosen, those of the stop sequence included, the end mark not.
    top: for each of them, its likeliest alternatives as (ids, log-probabilities), where they were asked for.
    """

    text: str
    ended: bool
    ids: tuple[int, ...]
    top: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...] = ()


@torch.inference_mode()
def complete_ids(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Stops],
    limit: int,
    choose: Callable[[Tensor, int], Tensor] | None = None,
    top: int = 0,
) -> list[Completion]:
    """One batch: prompts as ids, each with its own stop sequences and most tokens -> what the model wrote.

    limit: steps of the batch. choose: (logits [B, V], step) -> ids [B]; greedy without one.
    top: keep so many of the likeliest tokens of every step, with their log-probabilities.
    """
    ids, mask = padded(prompts, left=True)
    seen: list[tuple[list, list]] = []

    def pick(logits: Tensor, step: int) -> Tensor:
        if top:
            best = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]))
            seen.append((best.indices.tolist(), best.values.tolist()))
        return logits.argmax(-1) if choose is None else choose(logits, step)

    rows: list[list[int]] = [[] for _ in prompts]
    finished: dict[int, tuple[str, bool]] = {}
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    more = {"ended": ended} if choose is None and not top else {"choose": pick}
    for step in lm.engine.generate(ids, limit, None if mask.all() else mask, **more):
        for row, token in enumerate(step.tolist()):
            if row in finished:
                continue
            own, most = stops[row]
            if token == lm.tokenizer.eos_token_id:
                finished[row] = (lm.tokenizer.decode(rows[row]), True)
                continue
            rows[row].append(token)
            text = _stopped(lm, rows[row], own)
            if text is not None:
                finished[row] = (text, True)
            elif len(rows[row]) == most:
                finished[row] = (lm.tokenizer.decode(rows[row]), False)
        ended[[*finished]] = True
        if len(finished) == len(prompts):
            break
    found = []
    for row, chosen in enumerate(rows):
        text, ended = finished.get(row) or (lm.tokenizer.decode(chosen), False)
        kept = tuple((tuple(i[row]), tuple(v[row])) for i, v in seen[: len(chosen)])
        found.append(Completion(text, ended, tuple(chosen), kept))
    return found


def _stopped(lm: LanguageModel, ids: list[int], stops: Sequence[str]) -> str | None:
    """The text up to its first stop sequence; None where it has none."""
    if not stops:
        return None
    tail = ids[-BYTES_A_CHARACTER * max(map(len, stops)) - BYTES_A_CHARACTER :]  # a stop ends with the newest token
    written = lm.tokenizer.decode(tail)
    if not any(stop in written for stop in stops):
        return None
    text = lm.tokenizer.decode(ids)
    return min((text.partition(stop)[0] for stop in stops), key=len)


def complete(
    lm: LanguageModel,
    prompts: Sequence[str],
    new_tokens: int,
    stop: Sequence[str],
    batch: int,
    progress: Progress,
    what: str = "answers",
) -> list[str]:
    """Greedy texts after prompts, in their order; prompts of similar length run together.

    Raises RunError for a prompt that leaves no room for `new_tokens` in the model's context.
    """
    encoded = [encode(lm, prompt, new_tokens) for prompt in prompts]
    texts = [""] * len(prompts)
    for some in batches([len(ids) for ids in encoded], batch, progress, what):
        written = complete_ids(lm, [encoded[i] for i in some], [(stop, new_tokens)] * len(some), new_tokens)
        for index, completion in zip(some, written, strict=True):
            texts[index] = completion.text
    return texts


def encode(lm: LanguageModel, prompt: str, new_tokens: int, chat: bool = False) -> list[int]:
    """Ids of a prompt; with `chat`, as a user's message in the model's template.

    Raises RunError when it and `new_tokens` do not fit into the model's context.
    """
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = lm.tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]  # a template has its own
    if not ids:
        raise RunError("a prompt without a token cannot be continued; give it a word")
    room = (getattr(lm.engine, "context_tokens", None) or POSITIONS_UNLIMITED) - new_tokens
    if len(ids) > room:
        raise RunError(
            f"a prompt of {len(ids)} tokens and {new_tokens} new ones exceed the {room + new_tokens} positions of this "
            f"model; ask for fewer new tokens or use shorter prompts (this one begins {prompt[:60]!r})"
        )
    return ids


def batches(lengths: Sequence[int], size: int, progress: Progress, what: str) -> Iterator[list[int]]:
    """Indices of similar length together, the longest first: memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cut = [order[start : start + size] for start in range(0, len(order), size)]
    return progress.track(cut, what, len(cut))


def padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, T], padded with 0 at the left or right, and where they are real, [B, T]."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = True
    return ids, mask


# ---- how a student is asked


class Decoding(Protocol):
    """How questions are put to a student and what it answers is read.

    calculator: the answers are also read as they are when a calculator redoes their arithmetic.
    """

    calculator: bool

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """A text for every problem, in which its answer is looked for."""

    def describe(self) -> str:
        """In a few words, for the protocol of a measurement: "greedy, at most 128 tokens"."""


@dataclass(frozen=True)
class Plain:
    """One prompt a question, answered greedily.

    prompt: names fields of the problem, {question} at least. stop: where an answer ends besides the end mark.
    calculator: also read the answers as they are when a calculator redoes their arithmetic.
    """

    prompt: str = "Q: {question}\nA:"
    new_tokens: int = 128
    stop: tuple[str, ...] = ("\nQ:",)
    batch: int = 32
    calculator: bool = False

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise ConfigError(f"decoding.prompt={self.prompt!r}: must hold {{question}}")
        for name in ("new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoding.{name}={getattr(self, name)}: must be at least 1")

    def decode(self, lm: LanguageModel, problems: Sequence[Problem], progress: Progress) -> list[str]:
        """See Decoding."""
        prompts = [self.prompt.format(**problem.fields()) for problem in problems]
        return complete(lm, prompts, self.new_tokens, self.stop, self.batch, progress)

    def describe(self) -> str:
        """See Decoding."""
        return f"greedy, at most {self.new_tokens} tokens"
