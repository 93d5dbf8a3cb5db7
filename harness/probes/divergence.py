"""How far a model's next-token distributions are from the dense model's.

The dense side is kept exactly and small: the final hidden states of every scored position (H numbers each, in the
scoring dtype) and one output head. Its logits (V numbers each; top-k of them would not give an exact divergence)
are recomputed from those a few hundred positions at a time, next to the logits they are compared with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from harness import statistics
from harness.errors import RunError
from harness.records import Measurement

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel


def kl_divergence(reference: Tensor, ours: Tensor) -> Tensor:
    """KL(reference || ours) per position in nats: log-probabilities [N, V] float32 -> [N] float32."""
    return F.kl_div(ours, reference, reduction="none", log_target=True).sum(-1)


def divergence_measurements(
    kl: NDArray, agrees: NDArray, block: int, on: str, generator: np.random.Generator
) -> Iterator[Measurement]:
    """Mean and tail of KL(dense || this), and how often both models' first choice is the same token.

    kl: [N] nats; agrees: [N] of 0 and 1; block: positions per window.
    """

    if not np.isfinite(kl).all():
        yield Measurement("kl_divergence", None, "nats/token", on, "lower", note="collapsed: not finite")
        return

    def mean(metric: str, values: NDArray, unit: str, better: str) -> Measurement:
        interval = statistics.mean_interval(values, block, generator)
        return Measurement(metric, float(values.mean()), unit, on, better, interval)

    yield mean("kl_divergence", kl, "nats/token", "lower")
    yield Measurement("kl_divergence_p99", float(np.quantile(kl, 0.99)), "nats/token", on, "lower")
    yield mean("top1_agreement", agrees.astype(np.float64), "share", "higher")


@dataclass(frozen=True)
class Reference:
    """The dense model's final hidden states and output head, on disk in one safetensors file."""

    path: Path

    @staticmethod
    def digest(windows: Tensor, protocol: str, dtype: str) -> str:
        """What a reference is valid for: the very token windows (so also text and tokenizer), protocol and dtype."""
        key = f"{protocol}|{dtype}|{tuple(windows.shape)}|".encode() + windows.cpu().numpy().tobytes()
        return hashlib.sha256(key).hexdigest()

    def write(self, hidden: Tensor, head: nn.Linear, storage_dtype: torch.dtype, digest: str) -> None:
        """Keep hidden states [N, H] and the head, atomically.

        The head is kept in its 16-bit storage dtype where that loses nothing.
        """
        from safetensors.torch import save_file

        narrow = head.weight.detach().to(storage_dtype)
        exact = torch.equal(narrow.to(head.weight.dtype), head.weight)
        tensors = {
            "hidden": hidden.contiguous(),
            "head.weight": (narrow if exact else head.weight.detach()).contiguous(),
        }
        if head.bias is not None:
            tensors["head.bias"] = head.bias.detach().contiguous()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, partial, metadata={"digest": digest})
        os.replace(partial, self.path)

    def check(self, digest: str) -> None:
        """Raise RunError where the reference is missing or belongs to other windows, another tokenizer or dtype."""
        from safetensors import safe_open

        way_out = "run the dense baseline again (method=dense force=true), or evaluate without divergence"
        if not self.path.is_file():
            raise RunError(f"{self.path.name}: the dense run left no reference in {self.path.parent}; {way_out}")
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("digest") != digest:
                raise RunError(
                    f"{self.path}: the dense run scored other windows (text, tokenizer, window or dtype differ); "
                    f"{way_out}"
                )

    def head(self, device: torch.device, dtype: torch.dtype) -> nn.Linear:
        """The dense model's output head."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            weight = file.get_tensor("head.weight")
            bias = file.get_tensor("head.bias") if "head.bias" in file.keys() else None  # noqa: SIM118 (no mapping)
        head = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
        # a copy has torch's own alignment, on which the last bit of a matrix product may depend
        head.weight = torch.nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)
        if bias is not None:
            head.bias = torch.nn.Parameter(bias.to(device, dtype, copy=True), requires_grad=False)
        return head

    def hidden(self, rows: slice) -> Tensor:
        """Hidden states of these scored positions, in reading order: [n, H]."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return file.get_slice("hidden")[rows].clone()


@dataclass(frozen=True)
class KernelDivergence:
    """Whether the platform's kernel computes what the weights say.

    Mean KL between the distributions through the simulation (dequantised weights, rounded inputs) and through the
    kernel that decoding runs, both in the decoding dtype, on one short stretch of the evaluation text; and the
    perplexity of either. Zero where no kernel exists. The model ends prepared for decoding, so this probe ends its
    stage.

    tokens: scored, at least 2; few enough for the kernel, since packed layers decode whole matrices for many.
    """

    tokens: int = 48

    stage: ClassVar[Stage] = "evaluate"
    compares: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"hidden states"})
    ends_stage: ClassVar[bool] = True

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """`kernel_divergence`, and `kernel_perplexity` with the simulation's in its note."""
        name = context.hardware.resolved_decoding_dtype()
        dtype = getattr(torch, name)
        ids = context.corpus.evaluation_tokens(lm.tokenizer)[None, : self.tokens]
        distributions = []
        for mode in ("scoring", "decoding"):
            lm.engine.prepare(mode, dtype)
            distributions.append(lm.engine.logits(lm.engine.hidden(ids)[0]).log_softmax(-1))
        value = float(kl_divergence(*distributions).mean())
        on = f"{context.corpus.evaluation_name}, first {ids.shape[1]} tokens, {name}"
        yield Measurement("kernel_divergence", value, "nats/token", on, "lower", note=lm.engine.kernels())
        following = ids[0, 1:, None].to(distributions[0].device)
        simulated, real = (float((-d[:-1].gather(-1, following)).mean().exp()) for d in distributions)
        note = f"{simulated:.6g} simulated; {lm.engine.kernels()}"
        yield Measurement("kernel_perplexity", real, "ppl", on, "lower", note=note)
