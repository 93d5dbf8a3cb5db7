"""Training one decoder block at a time: a small loop, and results that survive a kill.

Methods that learn a few parameters per block (clipping, equivalent scales, a distilled block) hold one block's
optimizer state at a time. What was learned is kept per block; a run that is started again applies it and trains only
the blocks that are left, with the same outcome.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import RunError


@dataclass(frozen=True)
class Fitted:
    """Mean loss over all samples before and after training."""

    before: float
    after: float


def minimise(
    groups: list[dict[str, Any]],
    loss: Callable[[int], Tensor],
    samples: int,
    epochs: int,
    generator: torch.Generator,
    what: str,
    point: Callable[[int, float], None] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Fitted:
    """Train parameters with AdamW, one sample a step in shuffled order; leave them trained.

    groups: as of torch's optimizers: params, lr, weight_decay (0 where not given).
    loss: index of a sample -> scalar loss.
    point: called with (step, loss) after every epoch.
    Parameters that ended worse than they started (mean loss over all samples) are put back: training never harms.
    Raises RunError, naming `what`, when the loss stops being a number.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW([{"weight_decay": 0.0, **group} for group in groups], betas=betas)
    initial = [parameter.detach().clone() for parameter in parameters]
    before = _mean_loss(loss, samples)
    if point is not None:
        point(0, before)
    with torch.enable_grad():
        for epoch in range(epochs):
            total = 0.0
            for index in torch.randperm(samples, generator=generator).tolist():
                optimizer.zero_grad(set_to_none=True)
                value = loss(index)
                value.backward()
                optimizer.step()
                total += float(value.detach())
            if not math.isfinite(total):
                raise RunError(f"{what}: the training loss is {total} in epoch {epoch}; lower the learning rate")
            if point is not None:
                point((epoch + 1) * samples, total / samples)
    after = _mean_loss(loss, samples) if epochs else before
    if not after <= before:  # nor where the last step left no numbers
        with torch.no_grad():
            for parameter, value in zip(parameters, initial, strict=True):
                parameter.copy_(value)
        after = before
    return Fitted(before, after)


@torch.no_grad()
def _mean_loss(loss: Callable[[int], Tensor], samples: int) -> float:
    return sum(float(loss(index)) for index in range(samples)) / samples


@dataclass(frozen=True)
class BlockTensors:
    """Tensors kept for each block in a folder, whole or not at all: they outlive a killed run."""

    folder: Path

    def has(self, key: str) -> bool:
        """Whether something is kept under `key`."""
        return self._file(key).exists()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors kept under `key`, or None."""
        from safetensors.torch import load_file

        return load_file(self._file(key)) if self.has(key) else None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under `key`."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{key}.{os.getpid()}.partial"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
