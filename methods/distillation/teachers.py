"""What a student's next-token distributions are compared with: a teacher in memory, or what is kept of one on disk.

Two models in memory is what white-box distillation costs (the survey, Section III-C). Kept on disk are the `top`
likeliest tokens of every prediction, with their log-probabilities and the mass of all others; comparing by these
classes instead of by tokens can only make a divergence smaller (data processing inequality).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.records import write_json_atomically
from methods.distillation.divergences import Divergence, by_positions, log_probabilities
from methods.examples import Batch, Data, collated
from methods.training import logits_of

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

BATCH = 4  # texts that a teacher reads at a time


class Reference(Protocol):
    """A teacher that is ready to be compared with.

    words: how many logits a prediction of `logits(batch)` has; None for a teacher that has no logits to give.
    """

    words: int | None

    def divergence(self, logits: Tensor, batch: Batch, divergence: Divergence) -> Tensor:
        """How far a student's predictions are from the teacher's: logits [B, T, V] of the batch -> [B, T-1], nats."""


class Teacher(Protocol):
    """How the teacher's predictions are had."""

    def opened(self, base: LanguageModel, data: Data, bench: Bench) -> Reference:
        """The reference for training on `data`; `base` may be emptied when it is needed no more (see `release`)."""

    def check(self, divergence: Divergence) -> None:
        """Raise ConfigError for a divergence that cannot be had in this way."""

    @property
    def stays(self) -> bool:
        """Whether the teacher itself stays in memory."""


@dataclass(frozen=True)
class InMemory:
    """The whole teacher beside the student: every divergence, exactly."""

    def opened(self, base: LanguageModel, data: Data, bench: Bench) -> Reference:
        """See Teacher."""
        return LiveReference(base.module)

    def check(self, divergence: Divergence) -> None:
        """Any will do."""

    @property
    def stays(self) -> bool:
        """See Teacher."""
        return True


@dataclass(frozen=True)
class LiveReference:
    """A teacher that reads every batch itself."""

    module: nn.Module

    def divergence(self, logits: Tensor, batch: Batch, divergence: Divergence) -> Tensor:
        """See Reference."""
        return divergence(logits[:, :-1], self.logits(batch)[:, :-1])

    @property
    def words(self) -> int:
        """How many logits a prediction has."""
        return words(self.module)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The teacher's own, [B, T, V]."""
        return logits_of(self.module, batch)


@dataclass(frozen=True)
class OnDisk:
    """The teacher reads the texts once; its likeliest tokens are kept, and it leaves memory.

    top: how many tokens of each prediction. What is kept is shared by the runs of a sweep on the same model and text.
    """

    top: int = 64

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"teacher.top={self.top}: must be at least 1")

    def check(self, divergence: Divergence) -> None:
        """Raise ConfigError for a temperature: of the mass of many tokens, only the one at 1 is known."""
        if divergence.temperature != 1:
            raise ConfigError(
                f"method.divergence.temperature={divergence.temperature}: kept log-probabilities are those at "
                "temperature 1; use teacher@method.teacher=in_memory"
            )

    @property
    def stays(self) -> bool:
        """See Teacher."""
        return False

    @torch.no_grad()
    def opened(self, base: LanguageModel, data: Data, bench: Bench) -> Reference:
        """See Teacher."""
        top = min(self.top, base.module.get_input_embeddings().num_embeddings - 1)
        offsets = np.cumsum([0, *(_length(data, row) - 1 for row in range(len(data)))])
        folder = (bench.statistics or bench.scratch) / f"teacher-{top}-{_digest(data)}"
        if not (folder / "done.json").exists():
            self._read_all(base.module, data, top, offsets, folder, bench)
        kept = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        bench.log.point(f"teacher mass outside its {top} likeliest tokens", 0, kept["mass_left_out"])
        return KeptReference(folder, offsets, top)

    def _read_all(
        self, module: nn.Module, data: Data, top: int, offsets: np.ndarray, folder: Path, bench: Bench
    ) -> None:
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        total = int(offsets[-1])
        shapes = {"ids": ((total, top), "int32"), "values": ((total, top), "float32"), "rest": ((total,), "float32")}
        files = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", kind, shape)
            for name, (shape, kind) in shapes.items()
        }
        device = next(module.parameters()).device
        starts = range(0, len(data), BATCH)
        for start in bench.progress.track(starts, "the teacher reads", len(starts)):
            rows = range(start, min(start + BATCH, len(data)))
            batch = collated(data, rows, 0).to(device)
            found = likeliest(logits_of(module, batch)[:, :-1], top)
            for index, row in enumerate(rows):
                span = slice(offsets[row], offsets[row + 1])
                for name, tensor in zip(files, found, strict=True):
                    files[name][span] = tensor[index, : _length(data, row) - 1].cpu().numpy()
        for file in files.values():
            file.flush()
        mass = float(np.exp(files["rest"].astype("float64")).mean())
        write_json_atomically({"mass_left_out": mass, "predictions": total}, partial / "done.json")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


@dataclass(frozen=True)
class KeptReference:
    """The likeliest tokens of every prediction in a data set, read from disk as they are needed.

    offsets: where the predictions of each text begin in the files.
    """

    folder: Path
    offsets: np.ndarray
    top: int
    words: None = None  # its logits are not known

    def classes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids [B, T-1, top] and log-probabilities [B, T-1, top + 1] of a batch, the last of all other tokens.

        Predictions on padding are zeros.
        """
        rows, width = batch.rows.tolist(), batch.tokens.shape[1] - 1
        ids = torch.zeros(len(rows), width, self.top, dtype=torch.long)
        values = torch.zeros(len(rows), width, self.top + 1)
        files = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("ids", "values", "rest")}
        for index, row in enumerate(rows):
            span = slice(self.offsets[row], self.offsets[row + 1])
            length = span.stop - span.start
            ids[index, :length] = torch.from_numpy(files["ids"][span].astype("int64"))
            values[index, :length, :-1] = torch.from_numpy(files["values"][span].copy())
            values[index, :length, -1] = torch.from_numpy(files["rest"][span].copy())
        return ids.to(batch.tokens.device), values.to(batch.tokens.device)

    def divergence(self, logits: Tensor, batch: Batch, divergence: Divergence) -> Tensor:
        """See Reference. Log-probabilities are logits too: of as many classes as were kept, and one for the rest."""
        ids, theirs = self.classes(batch)

        def of_classes(logits: Tensor, ids: Tensor, theirs: Tensor) -> Tensor:
            return divergence(with_rest(log_probabilities(logits), ids), theirs)

        return by_positions(of_classes, logits[:, :-1], ids, theirs)


def words(module: nn.Module) -> int:
    """How many logits a model's prediction has."""
    return module.get_output_embeddings().weight.shape[0]


def likeliest(logits: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `top` likeliest tokens of logits [..., V]: ids and log-probabilities [..., top], log of the mass left out."""
    scores = log_probabilities(logits)
    values, ids = scores.topk(top, dim=-1)
    return ids, values, with_rest(scores, ids)[..., -1]


def with_rest(scores: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [..., V] of some tokens [..., k] and of all others together, [..., k + 1]."""
    rest = scores.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scores.gather(-1, ids), rest], -1)


def release(base: LanguageModel) -> None:
    """Let go of a model's weights; what has its own copies of them stays as it is."""
    base.module.to("meta")


def _length(data: Data, row: int) -> int:
    return data.shape[1] if isinstance(data, Tensor) else len(data[row])


def _digest(data: Data) -> str:
    """Names the texts of a data set, in their order."""
    found = hashlib.sha256()
    for row in range(len(data)):
        batch = collated(data, [row], 0)
        found.update(batch.tokens.numpy().tobytes())
    return found.hexdigest()[:12]
