"""Which weights are taken out: exactly so many of the lowest scores, in a comparison group or in every N of M.

A mask is True where a weight is removed. It is kept as such, never read back from zeros: a weight may be zero by
chance, and a removed one must not come back. Counts are exact, ties go to the lowest index; the authors' scripts of
Wanda and SparseGPT take one weight more per group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError

Scope = Literal["layer", "row"]
SCOPES = ("layer", "row")


@dataclass(frozen=True)
class Pattern:
    """How much is removed: a share of every comparison group, or all but `keep` of each `of` consecutive inputs."""

    share: float
    keep: int | None = None
    of: int | None = None

    @classmethod
    def parse(cls, sparsity: float | str) -> Pattern:
        """0.5 → half of the weights; "2:4" → two of every four are kept.

        Raises ConfigError for a share outside (0, 1) or an N:M that keeps nothing or everything.
        """
        text = str(sparsity).strip()
        structured = re.fullmatch(r"(\d+):(\d+)", text)
        if structured:
            keep, of = map(int, structured.groups())
            if not 0 < keep < of:
                raise ConfigError(f"sparsity={text}: N:M keeps N of every M weights, with 0 < N < M, as in 2:4")
            return cls(1 - keep / of, keep, of)
        try:
            share = float(text)
        except ValueError:
            share = float("nan")
        if not 0 < share < 1:
            raise ConfigError(f"sparsity={text}: must lie between 0 and 1, or be N:M as in 2:4; 0 is method=dense")
        return cls(share)

    def check(self, name: str, columns: int) -> None:
        """Raise ConfigError unless `columns` input channels split into runs of M."""
        if self.of is not None and columns % self.of:
            raise ConfigError(f"{name}: {columns} input channels do not split into runs of {self.of}; give a share")

    def __str__(self) -> str:
        return f"{self.share:g}" if self.of is None else f"{self.keep}:{self.of}"


def lowest(scores: Tensor, pattern: Pattern, scope: Scope) -> Tensor:
    """The mask [R, C] of what `pattern` removes of weights with these scores [R, C].

    A share removes ⌊share · n⌋ of the n weights of the layer, or of each row; N:M looks at M neighbours in a row.
    """
    rows, columns = scores.shape
    if pattern.of is not None:
        runs = scores.reshape(-1, pattern.of)
        return _lowest_of_each_row(runs, pattern.of - pattern.keep).view(rows, columns)
    groups = scores.reshape(1, -1) if scope == "layer" else scores
    return _lowest_of_each_row(groups, removed_of(groups.shape[1], pattern.share)).view(rows, columns)


def removed_of(count: int, share: float) -> int:
    """⌊share · count⌋, for the decimal that was written: 0.3 of 10 is 3 although 0.3 · 10 < 3 in binary."""
    return int(count * share + 1e-9 * count)


def _lowest_of_each_row(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of every row [N, K], the first of equals before the others."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cuda" and len(scores) == 1:  # torch selects from one row with one block of threads
        first = scores[0].sort(stable=True).indices[:count]
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(1, first, value=True)
    limit = _order_statistic(scores, count)
    below = scores < limit
    equal = scores == limit
    room = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1) <= room))


def _order_statistic(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of every row [N, K] -> [N, 1]."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.kthvalue(count, dim=1, keepdim=True).values
    import numpy as np  # its partition is vectorised, torch's is not: a fifth of the time

    return torch.from_numpy(np.partition(scores.detach().numpy(), count - 1, axis=1)[:, count - 1 : count])


class MaskedLinear(nn.Linear):
    """A linear between two methods of a stack: numbers for the second one, and what the first one removed.

    removed: bool [out, in], or None where nothing is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, removed: Tensor | None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self.register_buffer("removed", removed, persistent=False)


def removed_before(linears: list[nn.Linear]) -> Tensor | None:
    """What an earlier method removed from stacked linears, bool [R, C]; None where none of them is masked."""
    masks = [getattr(linear, "removed", None) for linear in linears]
    if all(mask is None for mask in masks):
        return None
    pairs = zip(linears, masks, strict=True)
    return torch.cat([torch.zeros_like(o.weight, dtype=torch.bool) if mask is None else mask for o, mask in pairs])
