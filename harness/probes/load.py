"""Requests that arrive one by one while others are served: requests per second, and latency under load.

Arrivals are a Poisson process at the offered rate (gaps between them are exponential), drawn once per seed: the same
for every model. Nothing waits for an answer before the next request comes (an open loop), so a server that is too slow
builds up a queue, and its times say so. With a request's arrival at 0 and its n output tokens there at t1 … tn:

    time to first token    t1                    (waiting in the queue included)
    time per output token  (tn - t1) / (n - 1)
    inter-token latency    t2 - t1, t3 - t2, …   of all requests
    request latency        tn
    requests/s             requests / (last token of all - first arrival)

Definitions are those of vLLM's serving benchmark. Token counts are fixed; nothing stops early.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from harness.environment import ForeignLoad
from harness.errors import ConfigError
from harness.probes.speed import PERCENTILES
from harness.records import Measurement
from harness.statistics import median_interval

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

QUEUE = 0.5  # share of all requests that may be unfinished when the last one comes before a row says so


def poisson_arrivals(rate: float | None, requests: int, generator: np.random.Generator) -> NDArray:
    """Arrival times in seconds [requests] of a Poisson process with `rate` requests/s, the first at 0.

    None: all at once.
    """
    if rate is None:
        return np.zeros(requests)
    return np.concatenate([[0.0], generator.exponential(1 / rate, requests - 1).cumsum()])


@dataclass(frozen=True)
class Latencies:
    """Seconds of requests: first token, per later token and the whole of each [R]; every gap between tokens."""

    first: NDArray
    per_token: NDArray
    whole: NDArray
    gaps: NDArray


def latencies(stamps: NDArray) -> Latencies:
    """Out of seconds since its arrival at which each request had each token [R, 1 + n], the arrival first, as 0."""
    gaps = np.diff(stamps[:, 1:])
    return Latencies(stamps[:, 1], gaps.mean(axis=1), stamps[:, -1], gaps.ravel())


def served_per_second(stamps: NDArray, arrivals: NDArray) -> float:
    """Requests finished per second, from the first arrival to the last token."""
    return len(stamps) / float((arrivals + stamps[:, -1]).max() - arrivals.min())


@dataclass(frozen=True)
class Load:
    """Rates of requests with random prompts.

    rates: requests per second offered, None for all at once, one after the other. requests: of each rate.
    warm_up: requests before the clock counts.
    """

    rates: list[float | None]
    requests: int
    prompt_tokens: int
    new_tokens: int
    warm_up: int

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"requests"})

    def __post_init__(self) -> None:
        if not self.rates or any(rate is not None and rate <= 0 for rate in self.rates):
            raise ConfigError(f"load rates={self.rates}: give at least one rate above 0, or null for all at once")
        for name, least in (("requests", 2), ("prompt_tokens", 1), ("new_tokens", 2), ("warm_up", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"load {name}={getattr(self, name)}: must be at least {least}")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """All figures of every rate."""
        dtype = context.hardware.resolved_decoding_dtype()
        vocabulary = lm.module.get_input_embeddings().num_embeddings
        prompt = torch.Generator().manual_seed(context.seed)
        shape = (self.requests, self.prompt_tokens)
        prompts = torch.randint(vocabulary, shape, generator=prompt)
        if self.warm_up:
            lm.engine.requests(prompts[: self.warm_up], self.new_tokens, np.zeros(min(self.warm_up, self.requests)))
        raw = []
        for rate in context.progress.track(self.rates, "load", len(self.rates)):
            arrivals = poisson_arrivals(rate, self.requests, np.random.default_rng(context.seed))
            watch = ForeignLoad(context.hardware.thread_count)
            stamps, preempted = lm.engine.requests(prompts, self.new_tokens, arrivals)
            raw.append((rate, arrivals, stamps))
            offered = "all at once" if rate is None else f"Poisson {rate:g}/s"
            on = f"{self.requests} requests, {offered}, prompt {self.prompt_tokens}, {self.new_tokens} new, {dtype}"
            notes = [lm.engine.kernels(), _queue(rate, stamps, arrivals), _put_back(preempted), watch.note()]
            yield from self._measurements(stamps, arrivals, on, "; ".join(filter(None, notes)))
        _write(context.samples / "load.parquet", raw)

    def _measurements(self, stamps: NDArray, arrivals: NDArray, on: str, note: str) -> Iterator[Measurement]:
        rate = served_per_second(stamps, arrivals)
        yield Measurement("requests_per_second", rate, "requests/s", on, "higher", note=note)
        yield Measurement("output_tokens_per_second", rate * self.new_tokens, "tokens/s", on, "higher", note=note)
        times = latencies(stamps)
        for name, values in (
            ("time_to_first_token", times.first),
            ("time_per_output_token", times.per_token),
            ("inter_token_latency", times.gaps),
            ("request_latency", times.whole),
        ):
            for percentile in PERCENTILES:
                value = 1e3 * float(np.percentile(values, percentile))
                interval = median_interval(1e3 * values) if percentile == 50 and name != "inter_token_latency" else None
                yield Measurement(f"{name}_p{percentile}_ms", value, "ms", on, "lower", interval, note)


def _queue(rate: float | None, stamps: NDArray, arrivals: NDArray) -> str:
    """What a row must say where the server did not keep up: its times then grow with the number of requests."""
    unfinished = int((arrivals + stamps[:, -1] > arrivals.max()).sum())
    if rate is None or unfinished <= QUEUE * len(arrivals):
        return ""
    return f"{unfinished} requests were unfinished when the last one came: more was offered than is served"


def _put_back(preempted: int) -> str:
    return f"{preempted} requests put back, the cache was full" if preempted else ""


def _write(path: Path, raw: list[tuple[float | None, NDArray, NDArray]]) -> None:
    """Every time stamp: rate, request, its arrival, token, seconds since the arrival."""
    import pandas as pd

    frames = []
    for rate, arrivals, stamps in raw:
        request, token = np.indices(stamps.shape)
        columns = {"request": request.ravel(), "arrival": arrivals[request].ravel()}
        frames.append(pd.DataFrame({"rate": rate, **columns, "token": token.ravel(), "seconds": stamps.ravel()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat([frame.astype({"rate": "float64"}) for frame in frames]).to_parquet(path, index=False)
