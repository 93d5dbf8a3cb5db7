"""Perplexity over a text longer than the model was made for, read as one stream, by place in the text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.records import Measurement

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

BLOCK = 512  # tokens that the bootstrap draws together


@dataclass(frozen=True)
class StreamPerplexity:
    """exp(mean token loss) of one stream, in parts of one window each, and what the stream costs.

    The reference is the dense model with full attention in windows of the trained length (transformers' sliding
    window: every token but those of the first window is read with at least window - stride tokens before it). Its
    losses are paired with those of the stream token by token, so that a hard passage is no loss of the stream.

    tokens: of the stream, from the start of the evaluation text.
    window: the trained length; None takes the positions that the model was made for.
    stride: of the reference's windows; None is half a window.
    everything: whether a model that keeps every token reads the whole stream too, past what it was made for. Its time
        grows with the square of the stream.
    """

    tokens: int
    window: int | None = None
    stride: int | None = None
    everything: bool = True

    stage: ClassVar[Stage] = "evaluate"
    compares: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"caches"})

    def __post_init__(self) -> None:
        if self.window is not None and not 2 <= self.window <= self.tokens:
            raise ConfigError(f"stream window={self.window}: must be between 2 and the {self.tokens} tokens")
        if self.stride is not None and (self.window is None or not 1 <= self.stride < self.window):
            raise ConfigError(f"stream stride={self.stride}: must be at least 1 and less than a window that is given")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Perplexity by part of the stream; past the first window also the ratio to the reference."""
        text = context.corpus.evaluation_tokens(lm.tokenizer)[: self.tokens]
        window = self.window or lm.engine.trained_tokens
        if window is None:
            raise RunError("this model does not say how long its texts may be; set a window for the stream probe")
        if len(text) < max(self.tokens, window + 1):
            raise RunError(
                f"{context.corpus.evaluation_name} has {len(text)} tokens: too few for a stream of {self.tokens}"
            )
        stride = self.stride or window // 2
        protocol = f"{context.corpus.evaluation_name}, stream-{self.tokens}"
        reference = self._reference(lm, context, text, window, stride)
        if context.reference is None and not self.everything:
            return
        losses = lm.engine.score(text[None])[0].double().cpu().numpy()  # of tokens 1, 2, …
        context.samples.mkdir(parents=True, exist_ok=True)
        np.save(context.samples / f"stream-{self.tokens}.npy", losses)
        generator = np.random.default_rng(context.seed)
        yield from self._parts(losses, window, protocol, lm.engine.kernels(), generator)
        past = slice(window - 1, None)  # the first window is not past anything
        on = f"{protocol}, past {window}, against full attention in windows of {window} with stride {stride}"
        ratio = statistics.paired_perplexity_ratio_interval(losses[past], reference[past], BLOCK, generator)
        value = float(np.exp((losses[past] - reference[past]).mean()))
        yield Measurement("stream_perplexity_ratio", value, "× dense in windows", on, "lower", ratio)

    def _parts(
        self, losses: np.ndarray, window: int, protocol: str, note: str, generator: np.random.Generator
    ) -> Iterator[Measurement]:
        for start in range(0, self.tokens, window):
            part = losses[max(start - 1, 0) : start + window - 1]
            if len(part) < 2:
                continue
            on = f"{protocol}, tokens {max(start, 1)} to {min(start + window, self.tokens) - 1}"
            interval = statistics.perplexity_interval(part, min(BLOCK, len(part)), generator)
            yield Measurement("stream_perplexity", float(np.exp(part.mean())), "ppl", on, "lower", interval, note)

    def _reference(self, lm: LanguageModel, context: Context, text: Tensor, window: int, stride: int) -> np.ndarray:
        """Losses [tokens - 1] of the dense model in windows: scored and kept by the dense run, read by the others."""
        file = f"stream-{self.tokens}-windows-{window}-{stride}.npy"
        if context.reference is not None:
            return _read(context.reference / file, len(text) - 1)
        losses = torch.empty(len(text) - 1, dtype=torch.float64)
        starts = range(0, len(text) - 1, stride)
        done = 0
        for start in context.progress.track(starts, "stream reference", len(starts)):
            end = min(start + window, len(text))
            found = lm.engine.score(text[None, start:end])[0].double().cpu()
            fresh = end - 1 - done
            losses[done : end - 1] = found[len(found) - fresh :]
            done = end - 1
            if done == len(losses):
                break
        context.samples.mkdir(parents=True, exist_ok=True)
        np.save(context.samples / file, losses.numpy())
        return losses.numpy()


def _read(path: Path, count: int) -> np.ndarray:
    if not path.is_file():
        raise RunError(f"{path.name}: the dense run left no reference; run it again (method=dense force=true)")
    losses = np.load(path)
    if len(losses) != count:
        raise RunError(f"{path}: the dense run scored {len(losses)} tokens, this one {count}; run it again")
    return losses
