"""What a long text costs: time of the next token, cache and peak memory, against the length of what was read."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from harness.engines.placement import devices_of, free_bytes, largest_share
from harness.environment import available_memory_bytes
from harness.errors import ConfigError
from harness.probes.footprint import analytic_kv_bytes_per_token, peak_bytes
from harness.records import Measurement
from harness.statistics import student_interval

if TYPE_CHECKING:
    from torch import nn

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel


GIB = 1 << 30
MARGIN_BYTES = GIB  # logits, work space of libraries, what the allocator rounds up
WARM_TOKENS = 4096  # of a request, up to which memory that is taken for the first time shows in its first token


@dataclass(frozen=True)
class ContextCost:
    """Sequences of random tokens at each length, then `new_tokens` more.

    Where memory or time grow as a power of the length, the exponents of the longer half of the lengths are given:
    about 1 where attention keeps no matrix of scores, up to 2 where it does.

    lengths: tokens read. A length that the model or its memory cannot take is an empty value with the reason.
    batch_sizes: sequences side by side, each of that length.
    read_tokens: requests of more tokens than this, all sequences together, are not read: they begin with a cache of
        random numbers and have no first token. What a request needs is computed before it is made, and one that does
        not fit says so. None reads everything.
    """

    lengths: list[int]
    new_tokens: int
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    read_tokens: int | None = None
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"caches"})

    def __post_init__(self) -> None:
        for name in ("lengths", "batch_sizes"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"context {name}={getattr(self, name)}: give at least one of 1 or more")
        if self.new_tokens < 2:
            raise ConfigError(f"context new_tokens={self.new_tokens}: must be at least 2")
        if self.read_tokens is not None and self.read_tokens < 0:
            raise ConfigError(f"context read_tokens={self.read_tokens}: must not be negative; null reads everything")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Four numbers a batch size and length, and two exponents for each batch size of which all is read."""
        generator = torch.Generator().manual_seed(context.seed)
        cells = [(batch, length) for batch in sorted(self.batch_sizes) for length in sorted(self.lengths)]
        seconds: dict[tuple[int, int], float] = {}
        peaks: dict[tuple[int, int], float] = {}
        for batch, length in context.progress.track(cells, "contexts", len(cells)):
            found = list(self._cell(lm, batch, length, context.hardware.resolved_decoding_dtype(), generator))
            yield from found
            first, peak = found[0].value, found[-1].value
            if self.read_tokens is None and first is not None:
                seconds[batch, length] = first
                if peak:
                    peaks[batch, length] = peak
        for batch in sorted(self.batch_sizes):
            yield from _exponent("context_peak_exponent", peaks, batch)
            yield from _exponent("context_first_token_exponent", seconds, batch)

    def _cell(
        self, lm: LanguageModel, batch: int, length: int, dtype_name: str, generator: torch.Generator
    ) -> Iterator[Measurement]:
        """The four numbers of one batch size and length."""
        on = f"batch {batch}, context {length}, {self.new_tokens} new, {dtype_name}"
        dtype, limit = getattr(torch, dtype_name), lm.engine.context_tokens
        if limit is not None and length + self.new_tokens > limit:
            yield from _empty(on, f"the model was made for {limit} tokens")
            return
        vocabulary = lm.module.get_input_embeddings().num_embeddings
        prompt = torch.randint(vocabulary, (batch, length), generator=generator)
        try:
            if self.read_tokens is None:
                yield from self._read(lm, prompt, dtype, on)
            else:
                yield from self._predicted(lm, prompt, dtype, on)
        except torch.OutOfMemoryError:
            yield from _empty(on, "out of memory")

    def _read(self, lm: LanguageModel, prompt: torch.Tensor, dtype: torch.dtype, on: str) -> list[Measurement]:
        stamps: list[np.ndarray] = []
        # warm-up at this very length: on a GPU the first request pays for memory the allocator never held,
        # at every step of a growing cache (19 ms a token became 81 at 2,048 tokens on an H100)
        self._request(lm, prompt)
        kept = lm.engine.forget_requests()

        def work() -> None:
            if kept:  # a static cache and a graph belong to the peak, and making them to no time
                self._request(lm, prompt)
            stamps.append(self._request(lm, prompt))

        peak = peak_bytes(work, *devices_of(lm.module))
        held = len(prompt) * lm.engine.kv_cache_bytes(dtype, prompt.shape[1])
        return list(self._measurements(stamps[0], peak, held, on, lm.engine.kernels()))

    def _predicted(self, lm: LanguageModel, prompt: torch.Tensor, dtype: torch.dtype, on: str) -> list[Measurement]:
        """The same, or why not, for a request whose memory is computed first; read only where it is small enough."""
        batch, length = prompt.shape
        reads = batch * length <= self.read_tokens
        lm.engine.forget_requests()
        cache = batch * (length + self.new_tokens) * analytic_kv_bytes_per_token(lm.module, dtype)
        needed = cache * largest_share(lm.module)  # on the device with most blocks
        needed += work_bytes(lm.module, dtype, cache, prompt if reads else prompt[:, :1])
        free = least_free_bytes(devices_of(lm.module))
        if free is not None and needed > free:
            reason = f"does not fit: {needed / GIB:.1f} GiB needed, {cache / GIB:.1f} of them for keys and values"
            return list(_empty(on, f"{reason}; {free / GIB:.1f} GiB free beside the weights"))
        stamps: list[np.ndarray] = []

        def work() -> None:
            self._stamped(lm.engine.generate_after_noise(batch, length, self.new_tokens))  # makes cache and graph
            if reads and batch * length <= WARM_TOKENS:
                self._request(lm, prompt)
            again = lm.engine.generate_after_noise(batch, length, self.new_tokens)
            stamps.append(self._request(lm, prompt) if reads else self._stamped(again))

        peak = peak_bytes(work, *devices_of(lm.module))
        held = batch * length * analytic_kv_bytes_per_token(lm.module, dtype)
        found = list(self._measurements(stamps[0], peak, held, on, lm.engine.kernels()))
        lm.engine.forget_requests()
        return found if reads else [*_empty(on, "not read: its cache began as noise")][:1] + found[1:]

    def _request(self, lm: LanguageModel, prompt: torch.Tensor) -> np.ndarray:
        """Seconds at which each token was there since the hand-in, which stands first as 0."""
        return self._stamped(lm.engine.generate(prompt, self.new_tokens))

    def _stamped(self, steps: Iterator[torch.Tensor]) -> np.ndarray:
        stamps = [self.clock()]
        for tokens in steps:
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
        interval = student_interval(gaps) if gaps.min() > 0.2 * mean else None
        yield Measurement("context_output_token_ms", mean, "ms", on, "lower", interval, note)
        yield Measurement("context_cache_bytes", held, "bytes", on, "lower")
        peak_note = note if peak is not None else "this system does not say"
        yield Measurement("context_peak_bytes", peak, "bytes", f"{on}, above idle", "lower", note=peak_note)


def _empty(on: str, reason: str) -> Iterator[Measurement]:
    for metric, unit in (("context_first_token_ms", "ms"), ("context_output_token_ms", "ms")):
        yield Measurement(metric, None, unit, on, "lower", note=reason)
    yield Measurement("context_cache_bytes", None, "bytes", on, "lower", note=reason)
    yield Measurement("context_peak_bytes", None, "bytes", f"{on}, above idle", "lower", note=reason)


def work_bytes(module: nn.Module, dtype: torch.dtype, cache: int, prompt: torch.Tensor) -> int:
    """Memory beside weights and cache, from the model's shape: a layer's own keys and values, once more for every
    query head that shares them, and what reading `prompt` [B, T] takes at once.

    cache: bytes of all keys and values. A reader keeps three feed-forward activations, two float32 norms with their
    input, and a mask over the squared length in one byte and in `dtype`.
    """
    config = module.config.get_text_config()
    heads = config.num_attention_heads
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    layer = cache // config.num_hidden_layers
    batch, length = prompt.shape
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    reading = batch * length * (3 * inner * dtype.itemsize + 12 * config.hidden_size)
    masks = batch * length**2 * (1 + dtype.itemsize) if length > 1 else 0
    return layer * (1 + (shared if shared > 1 else 0)) + reading + masks + MARGIN_BYTES


def least_free_bytes(devices: Sequence[torch.device]) -> int | None:
    """Memory that new tensors can take, on the device with least of it; None where the system does not say."""
    if devices[0].type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return min(free_bytes(devices))
    return available_memory_bytes()


def _exponent(metric: str, found: dict[tuple[int, int], float], batch: int = 1) -> Iterator[Measurement]:
    """Slope of log value against log length, over the longer half of the lengths of a batch size."""
    values = {length: value for (rows, length), value in found.items() if rows == batch}
    longer = sorted(values)[len(values) // 2 :]
    if len(longer) < 2:
        return
    slope = np.polyfit(np.log(longer), np.log([values[length] for length in longer]), 1)[0]
    on = f"contexts {longer[0]} to {longer[-1]}"
    on = on if batch == 1 else f"batch {batch}, {on}"
    yield Measurement(metric, float(slope), "power of length", on, "lower")
