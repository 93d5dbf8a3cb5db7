"""What guessing ahead gains: decoding as the engine does it beside one token after the other, on the same text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.records import Measurement

if TYPE_CHECKING:
    from harness.engines.transformers import TransformersEngine
    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel


@dataclass(frozen=True)
class DecodingGain:
    """Both ways on passages of the evaluation text, in turn, so that a slow moment hits both alike.

    Inside the clock: everything after the first token. Nothing is measured where the engine decodes token by token.

    passages: of the evaluation text, at even distances. prompt_tokens, new_tokens: of each.
    """

    passages: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 64
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"caches"})

    def __post_init__(self) -> None:
        for name, least in (("passages", 1), ("prompt_tokens", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"decoding {name}={getattr(self, name)}: must be at least {least}")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Speed-up with what theory expects, acceptance, tokens a pass, and whether both gave the same tokens."""
        decoding = lm.engine.decoding
        if decoding is None:
            return
        text = context.corpus.evaluation_tokens(lm.tokenizer)
        step = (len(text) - self.prompt_tokens) // self.passages
        if step < 1:
            raise RunError(f"{context.corpus.evaluation_name} is too short for {self.passages} passages")
        prompts = [text[None, start : start + self.prompt_tokens] for start in range(0, self.passages * step, step)]
        plain = lm.engine.decoding_by(None)
        for engine in (plain, lm.engine.decoding_by(decoding.counting(None))):
            self._request(engine, prompts[0])  # warm-up
        counted = decoding.counting(None)
        guessing = lm.engine.decoding_by(counted)
        times, same = np.empty((len(prompts), 2)), []
        for index, prompt in enumerate(context.progress.track(prompts, "guessing and not", len(prompts))):
            order = ((0, plain), (1, guessing)) if index % 2 else ((1, guessing), (0, plain))
            answers = {}
            for column, engine in order:
                answers[column], times[index, column] = self._request(engine, prompt)
            same.append(_agreement(answers[0], answers[1]))
        clocked = decoding.counting(self.clock)
        clocking = lm.engine.decoding_by(clocked)  # one engine: what it captures serves all requests
        for prompt in prompts[: max(1, len(prompts) // 2)]:
            self._request(clocking, prompt)

        dtype = context.hardware.resolved_decoding_dtype()
        on = (
            f"{context.corpus.evaluation_name}, {len(prompts)} passages, batch 1, prompt {self.prompt_tokens}, "
            f"{self.new_tokens} new, {dtype}"
        )
        per_step = float(times[:, 0].sum()) / (len(prompts) * (self.new_tokens - 1))
        theory, costs = decoding.expected_speedup(clocked.counts, per_step)
        gain, interval = _ratio(times, np.random.default_rng(context.seed))
        note = (
            f"expected {theory:.2f} if a check cost one step, {costs:.2f} with its measured cost; "
            f"{1e3 * per_step:.1f} ms a step alone; {guessing.kernels()}"
        )
        yield Measurement("decoding_speedup", gain, "× token by token", on, "higher", interval, note)
        counts = counted.counts
        share = statistics.wilson_interval(counts.accepted, counts.examined) if counts.examined else None
        made = f"{counts.guesses} guesses, {counts.accepted} accepted, {counts.examined} looked at"
        accepted = counts.acceptance if counts.examined else None  # of no guess there is no share
        yield Measurement("guess_acceptance", accepted, "share", on, "higher", share, made)
        mean = counts.tokens / max(counts.passes, 1)
        yield Measurement("tokens_per_pass", mean, "tokens", on, "higher", note=f"{counts.passes} passes")
        yield Measurement(
            "decoding_agreement", float(np.mean(same)), "share", on, "higher", note="tokens before the first difference"
        )

    def _request(self, engine: TransformersEngine, prompt: torch.Tensor) -> tuple[list[int], float]:
        """The tokens, and seconds from the first to the last."""
        tokens, first = [], 0.0
        for step in engine.generate(prompt, self.new_tokens):
            tokens.append(int(step[0]))  # waits for the device
            if len(tokens) == 1:
                first = self.clock()
        return tokens, self.clock() - first


def _agreement(one: list[int], other: list[int]) -> float:
    """Share of the tokens before the first that differs."""
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    return next(differing, len(one)) / len(one)


def _ratio(times: np.ndarray, generator: np.random.Generator) -> tuple[float, statistics.Interval | None]:
    """Total of the first column over total of the second, and its interval over passages."""
    gain = float(times[:, 0].sum() / times[:, 1].sum())
    if len(times) < 6:
        return gain, None
    drawn = times[generator.integers(len(times), size=(statistics.RESAMPLES, len(times)))].sum(1)
    return gain, statistics.bootstrap_interval(drawn[:, 0] / drawn[:, 1], len(times))
