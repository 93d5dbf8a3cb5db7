"""The range of an integer grid by search: every shrunken range with every zero point, as OWQ's grids are found.

Positions are measured in units of a group's own range, where all groups share one list of candidate grids. So the
error of every candidate is a product of two matrices: how often values occur at each position, and what each candidate
makes of that position. The few best candidates of a group are then compared exactly, min-max among them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from methods.quantization.grids import IntegerGrid, Scales

NORM = 2.4  # exponent of the error; authors' code of GPTQ and OWQ
POSITIONS = 1024  # of the histogram, from minus the range to plus the range
FINALISTS = 8  # candidates that are compared exactly
GROUPS_AT_ONCE = 4096
ZERO_POINTS = 16  # above 4 bits, zero points are tried in steps that leave this many


def searched_scales(grid: IntegerGrid, weight: Tensor, dtype: torch.dtype, points: int = 100) -> Scales:
    """The grid of every group of `weight` [R, C] with the least mean |w - q(w)|^2.4, scales in `dtype`.

    points: the range of a group is tried in this many equal steps from nothing to all of it, each with every zero
        point (symmetric grids have one). A weight that is exactly 0 never counts: every candidate holds zero.
    """
    rows, columns = weight.shape
    width = grid.width(columns)
    missing = grid.groups(columns) * width - columns
    groups = functional.pad(weight, (0, missing)).view(-1, width)  # [R G, g]
    found = [_search(grid, part, dtype, points) for part in groups.split(GROUPS_AT_ONCE)]
    scale, zero = (torch.cat(parts).view(rows, -1) for parts in zip(*found, strict=True))
    return Scales(scale, zero)


def _search(grid: IntegerGrid, groups: Tensor, dtype: torch.dtype, points: int) -> tuple[Tensor, Tensor]:
    """Scale [N] and zero point [N] of groups [N, g]."""
    plain = IntegerGrid(grid.bits, grid.symmetric, None)
    shapes, table = _candidates(grid.bits, grid.symmetric, points)
    steps, zeros, errors = (tensor.to(groups.device) for tensor in (*shapes, table))
    span = _range(groups, grid.symmetric)
    finalists = (_histogram(groups, span) @ errors).topk(min(FINALISTS, len(steps)), largest=False).indices  # [N, F]
    best = plain.fit(groups, dtype)
    loss = _loss(plain, groups, best)
    kind = torch.finfo(dtype)
    for choice in finalists.unbind(1):
        scale = (steps[choice] * span).to(dtype).clamp(min=kind.smallest_normal * kind.eps)
        candidate = Scales(scale[:, None], zeros[choice][:, None])
        own = _loss(plain, groups, candidate)
        better = (own < loss)[:, None]
        loss = torch.minimum(own, loss)
        best = Scales(torch.where(better, candidate.scale, best.scale), torch.where(better, candidate.zero, best.zero))
    return best.scale[:, 0], best.zero[:, 0]


def _range(groups: Tensor, symmetric: bool) -> Tensor:
    """What a min-max grid of groups [N, g] spans: [N]."""
    if symmetric:
        return 2 * groups.abs().amax(1)
    return groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)


def _loss(grid: IntegerGrid, groups: Tensor, scales: Scales) -> Tensor:
    """Mean |w - q(w)|^2.4 of groups [N, g]: [N]."""
    return (groups - grid.round(groups, scales)).abs_().pow_(NORM).mean(1)


def _histogram(groups: Tensor, span: Tensor) -> Tensor:
    """How often values w / span in [-1, 1] lie at each position: [N, POSITIONS], shared between two neighbours."""
    place = (groups / span.clamp(min=torch.finfo(groups.dtype).tiny)[:, None] + 1) * ((POSITIONS - 1) / 2)
    below = place.floor().clamp_(0, POSITIONS - 2)
    share = (place - below).float()
    counts = torch.zeros(len(groups), POSITIONS, device=groups.device)
    counts.scatter_add_(1, below.long(), 1 - share)
    counts.scatter_add_(1, below.long() + 1, share)
    return counts


@lru_cache(maxsize=4)
def _candidates(bits: int, symmetric: bool, points: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Every candidate's scale in units of the range [K] and zero point [K], and its error at each position [P, K]."""
    top = 2**bits - 1
    zeros = torch.tensor([2 ** (bits - 1)]) if symmetric else torch.arange(0, top + 1, max(1, 2**bits // ZERO_POINTS))
    steps = torch.arange(1, points + 1) / (points * top)
    step, zero = steps.repeat_interleave(len(zeros)), zeros.repeat(len(steps))
    position = torch.linspace(-1, 1, POSITIONS)[:, None]
    near = (position / step).round().clamp(-zero, top - zero) * step
    return (step, zero.to(torch.int32)), (position - near).abs().pow(NORM)
