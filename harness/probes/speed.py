"""Speed of answering: time to first token, time per output token, throughput, as a share of what the machine allows.

Definitions are those of vLLM's serving benchmark. For one batch of requests, with t0 when the prompt is handed in and
t1 … tn when each of n output tokens is there:

    time to first token    t1 - t0
    time per output token  (tn - t1) / (n - 1)
    inter-token latency    t2 - t1, t3 - t2, …      (its percentiles; its mean is not its median)
    decode tokens/s        batch × (n - 1) / (tn - t1)
    prefill tokens/s       batch × prompt tokens / (t1 - t0)

Inside the clock: the model's forward passes, choosing the most likely token, and synchronising the device after every
step. Outside: loading, tokenizing, preparing kernels, and the warm-up requests. Token counts are fixed; nothing stops
early.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from harness.ceilings import ceilings
from harness.engines.choice import shared_over
from harness.environment import ForeignLoad
from harness.errors import ConfigError, RunError
from harness.probes.footprint import loaded_bytes
from harness.records import Measurement
from harness.statistics import median_interval, relative_half_width

if TYPE_CHECKING:
    from torch import nn

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Speed:
    """Times of batches of requests.

    batch_sizes, prompt_tokens, new_tokens: the workload.
    warm_up: requests before the clock counts.
    precision, max_repeats, seconds_limit: requests are repeated until the 95 % interval of the median time per output
        token is within ± this share of it, or this many were made, or this long was spent on a batch size.
    prompts: "random" tokens, or consecutive passages of the evaluation "text", where speed depends on what is said.
    """

    batch_sizes: list[int]
    prompt_tokens: int
    new_tokens: int
    warm_up: int
    max_repeats: int
    precision: float
    seconds_limit: float
    prompts: Literal["random", "text"] = "random"
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"speed batch_sizes={self.batch_sizes}: give at least one size of 1 or more")
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("warm_up", 0), ("max_repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"speed {name}={getattr(self, name)}: must be at least {least}")
        if self.prompts not in ("random", "text"):
            raise ConfigError(f"speed prompts={self.prompts}: choose random or text")
        if not 0 < self.precision < 1:
            raise ConfigError(f"speed precision={self.precision}: must lie between 0 and 1")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """All times of every batch size, and how much of the machine's limit they reach."""
        dtype = context.hardware.resolved_decoding_dtype()
        limit = ceilings(context.hardware, dtype, context.cache)
        raw = []
        for batch in self.batch_sizes:
            stamps, foreign = self._requests(lm, batch, context)
            raw.append((batch, stamps))
            text = f" of {context.corpus.evaluation_name}" if self.prompts == "text" else ""
            on = f"batch {batch}, prompt {self.prompt_tokens}{text}, {self.new_tokens} new, {dtype}"
            note = "; ".join(filter(None, [lm.engine.kernels(), self._reached(stamps), foreign]))
            yield from self._measurements(stamps, batch, on, note)
            loaded = getattr(lm.engine, "loaded_bytes", None)  # of an engine that holds the weights elsewhere
            read = bytes_read_per_step(lm.module, loaded) + self._cache_bytes(lm, batch, dtype)
            together = shared_over(lm.engine, context.hardware)
            yield _roofline(stamps, read, together * limit.read_bytes_per_second, on)
        _write(context.samples / "speed.parquet", raw)

    def _requests(self, lm: LanguageModel, batch: int, context: Context) -> tuple[np.ndarray, str]:
        """Time stamps of every request [requests, 1 + new_tokens], from the hand-in on, and a note on foreign load."""
        prompt = self._prompt(lm, batch, context)
        for _ in range(self.warm_up):
            self._request(lm, prompt)
        stamps: list[np.ndarray] = []
        watch = ForeignLoad(context.hardware.thread_count)
        for _ in context.progress.track(range(self.max_repeats), f"speed, batch {batch}", self.max_repeats):
            stamps.append(self._request(lm, prompt))
            if self._precise(np.stack(stamps)) or sum(s[-1] for s in stamps) > self.seconds_limit:
                break
        return np.stack(stamps), watch.note()

    def _prompt(self, lm: LanguageModel, batch: int, context: Context) -> torch.Tensor:
        """Token ids [batch, prompt_tokens]."""
        if self.prompts == "text":
            text = context.corpus.evaluation_tokens(lm.tokenizer)
            if len(text) < batch * self.prompt_tokens:
                raise RunError(f"{context.corpus.evaluation_name} has only {len(text)} tokens for {batch} prompts")
            return text[: batch * self.prompt_tokens].view(batch, -1)
        generator = torch.Generator().manual_seed(context.seed)
        vocabulary = lm.module.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (batch, self.prompt_tokens), generator=generator)

    def _request(self, lm: LanguageModel, prompt: torch.Tensor) -> np.ndarray:
        """Seconds since the hand-in at which each token was there; the hand-in itself first, as 0.

        An engine in another process counts them there, so that no time of the way between is in them.
        """
        if hasattr(lm.engine, "stamps"):
            return lm.engine.stamps(prompt, self.new_tokens)
        stamps = [self.clock()]
        for tokens in lm.engine.generate(prompt, self.new_tokens):
            if tokens.is_cuda:
                torch.cuda.synchronize(tokens.device)
            stamps.append(self.clock())
        return np.array(stamps) - stamps[0]

    def _precise(self, stamps: np.ndarray) -> bool:
        per_token = _per_output_token(stamps)
        return relative_half_width(median(per_token), median_interval(per_token)) <= self.precision

    def _reached(self, stamps: np.ndarray) -> str:
        """What the repeats came to, where they did not reach the precision asked for."""
        if self._precise(stamps):
            return f"{len(stamps)} requests"
        return f"{len(stamps)} requests, interval wider than ±{self.precision:.0%}"

    def _measurements(self, stamps: np.ndarray, batch: int, on: str, note: str) -> Iterator[Measurement]:
        first, later = stamps[:, 1], _per_output_token(stamps)
        yield _median("time_to_first_token_ms", 1e3 * first, "ms", on, "lower", note)
        yield _median("time_per_output_token_ms", 1e3 * later, "ms", on, "lower", note)
        gaps = 1e3 * np.diff(stamps[:, 1:]).ravel()
        for percentile in PERCENTILES:
            name = f"inter_token_latency_p{percentile}_ms"
            yield Measurement(name, float(np.percentile(gaps, percentile)), "ms", on, "lower", note=note)
        yield _median("decode_tokens_per_second", batch / later, "tokens/s", on, "higher", note)
        yield _median("prefill_tokens_per_second", batch * self.prompt_tokens / first, "tokens/s", on, "higher", note)

    def _cache_bytes(self, lm: LanguageModel, batch: int, dtype: str) -> float:
        """Bytes of KV cache that a decoding step reads, at the middle of the answer."""
        context_tokens = self.prompt_tokens + self.new_tokens / 2
        return batch * context_tokens * lm.engine.kv_cache_bytes_per_token(getattr(torch, dtype))


def bytes_read_per_step(module: nn.Module, loaded: int | None = None) -> int:
    """Weight bytes that one decoding step must read: everything loaded but the rows of an untied input embedding.

    loaded: bytes of all weights, where they are not the module's.
    """
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
    untied = 0 if embedding is head else embedding.numel() * embedding.element_size()
    return (loaded_bytes(module) if loaded is None else loaded) - untied


def _per_output_token(stamps: np.ndarray) -> np.ndarray:
    """Seconds per token after the first, one value a request. Stamps [requests, 1 + n]."""
    return (stamps[:, -1] - stamps[:, 1]) / (stamps.shape[1] - 2)


def _roofline(stamps: np.ndarray, read: float, bandwidth: float, on: str) -> Measurement:
    """Share of the decoding speed that reading every byte once would allow."""
    least = read / bandwidth
    note = f"{read / 2**20:.0f} MiB a step at {bandwidth / 1e9:.1f} GB/s: at least {1e3 * least:.2f} ms"
    value = least / median(_per_output_token(stamps))
    return Measurement("decode_roofline_fraction", value, "share", on, "higher", note=note)


def _median(metric: str, values: np.ndarray, unit: str, on: str, better: str, note: str) -> Measurement:
    return Measurement(metric, float(np.median(values)), unit, on, better, median_interval(values), note)


def _write(path: Path, raw: list[tuple[int, np.ndarray]]) -> None:
    """Every time stamp: batch, request, token, seconds since the hand-in."""
    import pandas as pd

    frames = []
    for batch, stamps in raw:
        request, token = np.indices(stamps.shape)
        frames.append(
            pd.DataFrame(
                {"batch": batch, "request": request.ravel(), "token": token.ravel(), "seconds": stamps.ravel()}
            )
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).to_parquet(path, index=False)
