"""What a long text costs: time of the next token, cache and peak memory, against the length of what was read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from harness.errors import ConfigError
from harness.probes.footprint import peak_bytes
from harness.records import Measurement
from harness.statistics import median_interval

if TYPE_CHECKING:
    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel


@dataclass(frozen=True)
class ContextCost:
    """One sequence of random tokens at each length, then `new_tokens` more.

    Where memory or time grow as a power of the length, the exponents of the longer half of the lengths are given:
    about 1 where attention keeps no matrix of scores, up to 2 where it does.

    lengths: tokens read. A length that the model or its memory cannot take is an empty value with the reason.
    """

    lengths: list[int]
    new_tokens: int
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"caches"})

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"context lengths={self.lengths}: give at least one length of 1 or more")
        if self.new_tokens < 2:
            raise ConfigError(f"context new_tokens={self.new_tokens}: must be at least 2")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Four numbers a length, and two exponents."""
        dtype = context.hardware.resolved_decoding_dtype()
        limit = lm.engine.context_tokens
        generator = torch.Generator().manual_seed(context.seed)
        vocabulary = lm.module.get_input_embeddings().num_embeddings
        seconds: dict[int, float] = {}
        peaks: dict[int, float] = {}
        for length in context.progress.track(sorted(self.lengths), "contexts", len(self.lengths)):
            on = f"batch 1, context {length}, {self.new_tokens} new, {dtype}"
            if limit is not None and length + self.new_tokens > limit:
                yield from _empty(on, f"the model was made for {limit} tokens")
                continue
            prompt = torch.randint(vocabulary, (1, length), generator=generator)
            stamps: list[np.ndarray] = []
            try:
                # warm-up at this very length: on a GPU the first request pays for memory the allocator never held,
                # at every step of a growing cache (19 ms a token became 81 at 2,048 tokens on an H100)
                self._request(lm, prompt)
                peak = peak_bytes(lambda p=prompt, s=stamps: s.append(self._request(lm, p)), lm.module.device)
                held = lm.engine.kv_cache_bytes(getattr(torch, dtype), length)
            except torch.OutOfMemoryError:
                yield from _empty(on, "out of memory")
                continue
            seconds[length] = float(stamps[0][1])
            if peak:
                peaks[length] = peak
            yield from self._measurements(stamps[0], peak, held, on, lm.engine.kernels())
        yield from _exponent("context_peak_exponent", peaks)
        yield from _exponent("context_first_token_exponent", seconds)

    def _request(self, lm: LanguageModel, prompt: torch.Tensor) -> np.ndarray:
        """Seconds at which each token was there since the hand-in, which stands first as 0."""
        stamps = [self.clock()]
        for tokens in lm.engine.generate(prompt, self.new_tokens):
            if tokens.is_cuda:
                torch.cuda.synchronize(tokens.device)
            stamps.append(self.clock())
        return np.array(stamps) - stamps[0]

    def _measurements(
        self, stamps: np.ndarray, peak: int | None, held: int, on: str, note: str
    ) -> Iterator[Measurement]:
        gaps = 1e3 * np.diff(stamps[1:])
        yield Measurement("context_first_token_ms", 1e3 * float(stamps[1]), "ms", on, "lower", note=note)
        mean = float(gaps.mean())  # several tokens may come at once: their median gap would be nothing
        interval = median_interval(gaps) if gaps.min() > 0.2 * mean else None
        yield Measurement("context_output_token_ms", mean, "ms", on, "lower", interval, note)
        yield Measurement("context_cache_bytes", held, "bytes", on, "lower")
        peak_note = note if peak is not None else "this system does not say"
        yield Measurement("context_peak_bytes", peak, "bytes", f"{on}, above idle", "lower", note=peak_note)


def _empty(on: str, reason: str) -> Iterator[Measurement]:
    for metric, unit in (("context_first_token_ms", "ms"), ("context_output_token_ms", "ms")):
        yield Measurement(metric, None, unit, on, "lower", note=reason)
    yield Measurement("context_cache_bytes", None, "bytes", on, "lower", note=reason)
    yield Measurement("context_peak_bytes", None, "bytes", f"{on}, above idle", "lower", note=reason)


def _exponent(metric: str, found: dict[int, float]) -> Iterator[Measurement]:
    """Slope of log value against log length, over the longer half."""
    longer = sorted(found)[len(found) // 2 :]
    if len(longer) < 2:
        return
    slope = np.polyfit(np.log(longer), np.log([found[length] for length in longer]), 1)[0]
    yield Measurement(metric, float(slope), "power of length", f"contexts {longer[0]} to {longer[-1]}", "lower")
