"""Perplexity by named protocols, and the divergence from the dense model on the same forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F

from harness import statistics
from harness.errors import ConfigError, RunError
from harness.probes.divergence import Reference, divergence_measurements, kl_divergence
from harness.records import Measurement

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

COLLAPSED = 10  # times the dense perplexity


@dataclass(frozen=True)
class Perplexity:
    """exp(mean token loss) over windows of the evaluation text, which is joined and tokenized once.

    Protocols:
      gptq     `gptq-<window>`: windows do not overlap; every token but a window's first is scored (GPTQ's code).
      sliding  `sliding-<window>-stride-<stride>`: windows start `stride` apart and score only the tokens that the
               window before did not reach; the first one scores all but its first token (transformers' guide).
    Both leave out the incomplete window at the end of the text, so sliding with stride = window is gptq; transformers'
    guide scores that rest, too. No beginning-of-text token is added beyond what the tokenizer itself adds.

    windows: only so many from the start of the text; None takes all.
    divergence: on the dense run, keep the reference; on every other run, compare with it, in the same forward pass.
    paired: without divergence, compare token losses with the dense run's: all that an engine without hidden states can.
    """

    protocol: Literal["gptq", "sliding"] = "gptq"
    window: int = 512
    stride: int | None = None
    windows: int | None = None
    batch: int = 4
    divergence: bool = True
    paired: bool = False

    stage: ClassVar[Stage] = "evaluate"

    def __post_init__(self) -> None:
        if self.protocol not in ("gptq", "sliding"):
            raise ConfigError(f"perplexity protocol={self.protocol}: choose gptq or sliding")
        for field, least in (("window", 2), ("batch", 1)):
            if getattr(self, field) < least:
                raise ConfigError(f"perplexity {field}={getattr(self, field)}: must be at least {least}")
        if self.windows is not None and self.windows < 1:
            raise ConfigError(f"perplexity windows={self.windows}: must be at least 1, or null for the whole text")
        if self.protocol == "sliding" and not 1 <= (self.stride or 0) <= self.window:
            raise ConfigError(f"perplexity stride={self.stride}: must be between 1 and the window of {self.window}")

    @property
    def compares(self) -> bool:
        """Whether the dense run must come first."""
        return self.divergence or self.paired

    @property
    def needs(self) -> frozenset[str]:
        """What the engine must give besides scores."""
        return frozenset({"hidden states"} if self.divergence else ())

    @property
    def name(self) -> str:
        """The protocol with its sizes."""
        if self.protocol == "gptq":
            return f"gptq-{self.window}"
        return f"sliding-{self.window}-stride-{self.stride}"

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Perplexity and bits per byte; against the dense run also their ratio and the divergence."""
        windows, scored = self._cut(context.corpus.evaluation_tokens(lm.tokenizer), context.corpus.evaluation_name)
        self._check_positions(lm)
        digest = Reference.digest(windows, self.name, context.hardware.scoring_dtype)
        reference = self._reference(context, digest)
        outcomes = self._outcomes(lm, context, windows, scored, reference, digest)

        context.samples.mkdir(parents=True, exist_ok=True)
        outcomes.to_parquet(context.samples / self._outcomes_file, index=False)
        on = f"{context.corpus.evaluation_name}, {self.name}, {len(windows)} windows"
        compared = self.compares and context.reference is not None
        dense = _losses(context.reference / self._outcomes_file, outcomes) if compared else None
        bytes_per_token = self._bytes_per_token(lm.tokenizer, windows)
        generator = np.random.default_rng(context.seed)
        block = round(len(outcomes) / len(windows))
        losses = outcomes["loss"].to_numpy(np.float64)
        yield from _perplexity_measurements(losses, dense, bytes_per_token, block, on, generator)
        if reference is not None:
            kl, agrees = outcomes["kl"].to_numpy(np.float64), outcomes["top1_agrees"].to_numpy()
            yield from divergence_measurements(kl, agrees, block, on, generator)

    def _cut(self, tokens: Tensor, text: str) -> tuple[Tensor, Tensor]:
        """Token ids [W, window] and which of their next tokens are scored, [W, window - 1]."""
        if len(tokens) < self.window:
            raise RunError(
                f"{text} has {len(tokens)} tokens, less than one window of {self.window}; "
                f"choose a window of at most {len(tokens)} or a longer text"
            )
        stride = self.window if self.protocol == "gptq" else self.stride
        windows = tokens.unfold(0, self.window, stride)[: self.windows].contiguous()
        scored = torch.ones(len(windows), self.window - 1, dtype=torch.bool)
        scored[1:, : max(0, self.window - 1 - stride)] = False
        return windows, scored

    def _check_positions(self, lm: LanguageModel) -> None:
        limit = getattr(lm.engine, "context_tokens", None)
        if limit is not None and self.window > limit:
            raise RunError(f"a window of {self.window} tokens exceeds the {limit} positions of this model; choose less")
        if self.divergence and not hasattr(lm.engine, "hidden"):
            raise RunError(
                f"{type(lm.engine).__name__} gives no hidden states to compare with the dense model's; "
                "evaluate without divergence"
            )

    @property
    def _outcomes_file(self) -> str:
        return f"perplexity-{self.name}.parquet"

    @property
    def _reference_file(self) -> str:
        return f"reference-{self.name}.safetensors"

    def _reference(self, context: Context, digest: str) -> Reference | None:
        """The dense run's reference, checked; None where this is the dense run or nothing is compared."""
        if not self.divergence or context.reference is None:
            return None
        reference = Reference(context.reference / self._reference_file)
        reference.check(digest)
        return reference

    def _outcomes(
        self,
        lm: LanguageModel,
        context: Context,
        windows: Tensor,
        scored: Tensor,
        reference: Reference | None,
        digest: str,
    ) -> pd.DataFrame:
        """One row per scored token: window, position, token, loss in nats (and kl, top1_agrees)."""
        import pandas as pd

        keep = self.divergence and context.reference is None
        head = None if reference is None else reference.head(lm.engine.head_device, lm.module.dtype)
        columns: list[dict[str, Tensor]] = []
        kept: list[Tensor] = []
        done = 0
        starts = range(0, len(windows), self.batch)
        for start in context.progress.track(starts, f"perplexity {self.name}", len(starts)):
            tokens, mask = windows[start : start + self.batch], scored[start : start + self.batch]
            if not self.divergence:
                columns.append({"loss": lm.engine.score(tokens).cpu()[mask]})
                continue
            hidden = lm.engine.hidden(tokens)[:, :-1]
            hidden = hidden[mask.to(hidden.device)]  # [n, H]
            targets = tokens[:, 1:][mask].to(hidden.device)
            rows = slice(done, done + len(hidden))
            done = rows.stop
            if keep:
                kept.append(hidden.cpu())
            dense = None if reference is None else reference.hidden(rows).to(hidden.device)
            columns.append(_compare(lm, hidden, targets, dense, head))
        if keep:
            Reference(context.samples / self._reference_file).write(
                torch.cat(kept), lm.module.get_output_embeddings(), lm.storage_dtype, digest
            )
        window, position = scored.nonzero(as_tuple=True)
        table = {"window": window, "position": position + 1, "token": windows[:, 1:][scored]}
        table |= {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
        return pd.DataFrame({name: values.numpy() for name, values in table.items()})

    def _bytes_per_token(self, tokenizer: PreTrainedTokenizerBase, windows: Tensor) -> float:
        """UTF-8 bytes of text per token, over all of the text that the windows cover; a mark before it is none."""
        fresh = self.window if self.protocol == "gptq" else self.stride
        marks = int(windows[0, 0] == tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0
        covered = torch.cat([windows[0, marks:], windows[1:, self.window - fresh :].flatten()])
        text = tokenizer.decode(covered, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8")) / len(covered)


@torch.inference_mode()
def _compare(
    lm: LanguageModel, hidden: Tensor, targets: Tensor, dense: Tensor | None, head: torch.nn.Linear | None
) -> dict[str, Tensor]:
    """Loss, and divergence from the dense model, of positions with hidden states [n, H] and next tokens [n]."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(hidden), lm.engine.logit_rows):
        rows = slice(start, start + lm.engine.logit_rows)
        ours = lm.engine.logits(hidden[rows]).log_softmax(-1)
        found = {"loss": F.nll_loss(ours, targets[rows], reduction="none")}
        if dense is not None:
            theirs = lm.engine.logits(dense[rows], head).log_softmax(-1)
            found["kl"] = kl_divergence(theirs, ours)
            found["top1_agrees"] = (theirs.argmax(-1) == ours.argmax(-1)).to(torch.uint8)
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(values).cpu() for name, values in parts.items()}  # once: every look at a GPU makes it wait


def _losses(path: Path, ours: pd.DataFrame) -> np.ndarray:
    """The dense run's losses of the very tokens that this run scored."""
    import pandas as pd

    if not path.is_file():
        raise RunError(f"{path.name}: the dense run left no token losses; run it again (method=dense force=true)")
    dense = pd.read_parquet(path, columns=["token", "loss"])
    if len(dense) != len(ours) or not np.array_equal(dense["token"], ours["token"]):
        raise RunError(
            f"{path}: the dense run scored {len(dense)} tokens, this one {len(ours)} or others (another text or "
            "tokenizer); run it again (method=dense force=true)"
        )
    return dense["loss"].to_numpy(np.float64)


def _perplexity_measurements(
    losses: np.ndarray,
    dense: np.ndarray | None,
    bytes_per_token: float,
    block: int,
    on: str,
    generator: np.random.Generator,
) -> Iterator[Measurement]:
    mean = float(losses.mean())
    if not np.isfinite(mean):
        yield Measurement("perplexity", None, "ppl", on, "lower", note="collapsed: losses are not finite")
        return
    gap = 0.0 if dense is None else mean - float(dense.mean())
    note = "collapsed" if gap > log(COLLAPSED) else ""
    interval = statistics.mean_interval(losses, block, generator)
    per_byte = 1 / (log(2) * bytes_per_token)
    perplexity_interval = (float(np.exp(interval[0])), float(np.exp(interval[1])))
    yield Measurement("perplexity", float(np.exp(mean)), "ppl", on, "lower", perplexity_interval, note)
    yield Measurement(
        "bits_per_byte",
        mean * per_byte,
        "bits/byte",
        on,
        "lower",
        (interval[0] * per_byte, interval[1] * per_byte),
        note,
    )
    if dense is not None:
        ratio = statistics.paired_perplexity_ratio_interval(losses, dense, block, generator)
        yield Measurement("perplexity_ratio", float(np.exp(gap)), "× dense", on, "lower", ratio, note)
