"""AWQ: scale up the weight channels that meet large activations, then clip, then round (Lin et al. 2023).

https://arxiv.org/abs/2306.00978, Section 3.2; clipping and the details of the search as in the authors' code. A block
is searched on what enters it in the uncompressed model: nothing compressed is propagated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError
from methods.blocks import Block, decoder_blocks, plain_linears
from methods.curvature import Moments, observed_blocks, quadratic_form, tensor_cores
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import pack_linear
from methods.quantization.smoothing import Folding, find_foldings, fold

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

log = logging.getLogger(__name__)

SMALLEST_SCALE = 1e-4
NOT_CLIPPED = ("q_", "k_", "query", "key", "qkv")  # errors there pass through the softmax; authors' code


@dataclass(frozen=True)
class AWQ:
    """Activation-aware rounding.

    search_points: exponents α = 0, 1/n, ... (n-1)/n that are tried for every folding; α = 0 is plain rounding.
    clip: shrink the range of each group where that lowers its output error.
    clip_points, max_shrink: shrink by 0, 1/n, 2/n, ... up to but not including max_shrink.
    search: "second_moments" takes the output error of the scaled linears from tr(ΔW H ΔWᵀ), without a forward pass;
        "block_output" is the paper's: the output error of the smallest module that holds them (attention, MLP).
    working_memory_gib: activations alive at once; a larger calibration set goes through in chunks.
    """

    computes_block_by_block: ClassVar[bool] = True
    grid: IntegerGrid
    search_points: int = 20
    clip: bool = True
    clip_points: int = 20
    max_shrink: float = 0.5
    search: Literal["second_moments", "block_output"] = "second_moments"
    working_memory_gib: float = 4.0

    def __post_init__(self) -> None:
        for name in ("search_points", "clip_points", "working_memory_gib"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be greater than 0")
        if not 0 < self.max_shrink < 1:
            raise ConfigError(f"method.max_shrink={self.max_shrink}: must lie between 0 and 1; clip=false for none")
        if self.search not in ("second_moments", "block_output"):
            raise ConfigError(f"method.search={self.search}: choose one of second_moments, block_output")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Search, scale, clip and round one block after the other."""
        for name, linear in plain_linears(base.module).items():
            self.grid.check(name, linear.in_features)
        observed = observed_blocks(
            base, bench, self.working_memory_gib, magnitudes=True, needs_hidden=self.search == "block_output"
        )
        for block, moments, hidden in bench.progress.track(observed, "AWQ", len(decoder_blocks(base.module)[1])):
            self._compress_block(block, hidden, moments, base.storage_dtype)
        return base

    def _compress_block(
        self, block: Block, hidden: list[Tensor], moments: dict[str, Moments], dtype: torch.dtype
    ) -> None:
        linears = block.linears()
        foldings, unscaled = find_foldings(block)
        log.info("%s: no folding leads into %s", block.name, ", ".join(unscaled) or "none of its linears (all scaled)")
        distinct = {id(found): found.second() for found in moments.values()}
        second = {name: distinct[id(found)] for name, found in moments.items()}
        scales = [self._best_scale(block, folding, hidden, moments, second, dtype) for folding in foldings]
        for folding, scale in zip(foldings, scales, strict=True):  # every search saw the block unscaled
            fold(block, folding, scale)
            scaled = moment_of_scaled(second[folding.readers[0]], scale)
            second |= dict.fromkeys(folding.readers, scaled)
        for name, linear in linears.items():
            weight = linear.weight.float()
            clipped = self.clip and not any(part in name.rpartition(".")[2] for part in NOT_CLIPPED)
            limit = self.best_limit(weight, second[name], dtype) if clipped else None
            fitted = self.grid.fit(weight, dtype, limit)
            block.replace(name, pack_linear(linear, self.grid.encode(weight, fitted), fitted, self.grid))

    def _best_scale(
        self,
        block: Block,
        folding: Folding,
        hidden: list[Tensor],
        moments: dict[str, Moments],
        second: dict[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        linears = [block.linears()[name] for name in folding.readers]
        weights = [linear.weight.float() for linear in linears]
        magnitude = moments[folding.readers[0]].mean_magnitude()
        container = folding.readers[0] if len(linears) == 1 else _common_parent(folding.readers)
        if self.search == "second_moments" or container in folding.readers:  # for one linear the two are the same
            loss = moment_loss(second[folding.readers[0]])
        else:
            loss = _output_loss(block, container, hidden, linears)
        return self.search_scale(weights, magnitude, loss, dtype)[0]

    def search_scale(
        self, weights: list[Tensor], magnitude: Tensor, loss: Callable, dtype: torch.dtype
    ) -> tuple[Tensor, list[float]]:
        """The best scale [C] for linears W_i [R_i, C] that share an input, and the loss of every candidate.

        magnitude: mean |x| [C]. loss(weights, rounded) -> output error. The first candidate is plain rounding.
        """
        scales = [channel_scale(magnitude, point / self.search_points) for point in range(self.search_points)]
        losses = [loss(weights, [self._rounded(weight, scale, dtype) for weight in weights]) for scale in scales]
        losses = [float(value) for value in losses]  # a GPU is waited for here, once
        return scales[losses.index(min(losses))], losses  # the first of equals: plain rounding if nothing beats it

    def _rounded(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """W [R, C] rounded while its columns are scaled, in its own units again."""
        scaled = weight * scale
        return self.grid.round(scaled, self.grid.fit(scaled, dtype)) / scale

    def best_limit(self, weight: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
        """Range limit [R, G] of each group of W [R, C] that gives the least error of the group's own output.

        That error is δ H_g δᵀ, δ the change of the group's weights and H_g its block on the diagonal of H [C, C].
        The first candidate is no clipping, so no group gets worse.
        """
        blocks = _diagonal_blocks(second, self.grid, weight.shape[1])  # [G, g, g]
        largest = self.grid.group_maximum(weight)
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(round(self.max_shrink * self.clip_points)):
            limit = largest * (1 - step / self.clip_points)
            change = self.grid.round(weight, self.grid.fit(weight, dtype, limit)) - weight
            errors = _group_errors(self.grid, change, blocks, second)
            better = errors < least
            best, least = torch.where(better, limit, best), torch.where(better, errors, least)
        return best


def channel_scale(magnitude: Tensor, exponent: float) -> Tensor:
    """s = mean|x|^α, centred so that its largest and smallest are inverse to each other. [C] -> [C]"""
    scale = magnitude.pow(exponent).clamp(min=SMALLEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def moment_of_scaled(second: Tensor, scale: Tensor) -> Tensor:
    """Mean of (x/s)(x/s)ᵀ, from H = mean of xxᵀ [C, C] and s [C]: what linears read once s is folded into them."""
    return second / torch.outer(scale, scale)


def moment_loss(second: Tensor) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    """loss(weights, rounded): mean squared output error summed over the linears, tr(ΔW H ΔWᵀ).

    On a GPU operands are cut to 11 bits (tf32): candidates differ by more than that changes.
    """

    def loss(weights: list[Tensor], rounded: list[Tensor]) -> Tensor:
        with tensor_cores():
            return quadratic_form(torch.cat(rounded).sub_(torch.cat(weights)), second)

    return loss


def _output_loss(
    block: Block, container: str, hidden: list[Tensor], linears: list[nn.Linear]
) -> Callable[[list[Tensor], list[Tensor]], float]:
    """loss(weights, rounded): squared error of the output of the module called `container`, over all windows."""
    calls = list(_calls_of(block, container, hidden))
    module = dict(block.module.named_modules(prefix=block.name))[container]

    def loss(weights: list[Tensor], rounded: list[Tensor]) -> float:
        for linear, weight in zip(linears, rounded, strict=True):
            linear.weight.copy_(weight)
        error = sum(
            (_tensor(module(*args, **kwargs)) - out).float().square().sum().item() for args, kwargs, out in calls
        )
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(weight)
        return error

    return loss


def _calls_of(block: Block, container: str, hidden: list[Tensor]) -> Iterator[tuple[tuple, dict[str, Any], Tensor]]:
    """What one module inside the block receives and returns for every chunk."""
    module = dict(block.module.named_modules(prefix=block.name))[container]
    for index, chunk in enumerate(hidden):
        seen: list[tuple] = []
        with ExitStack() as stack:
            hook = module.register_forward_hook(
                lambda _module, args, kwargs, out, seen=seen: seen.append((args, kwargs, _tensor(out))),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
            block.run(index, chunk)
        yield from seen


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _common_parent(names: tuple[str, ...]) -> str:
    """Dotted name of the smallest module that holds all of `names`."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    common = []
    for level in parts:
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _diagonal_blocks(second: Tensor, grid: IntegerGrid, columns: int) -> Tensor:
    """Blocks of H [C, C] that belong to one group each: [G, g, g]; a short last group is filled up with zeros."""
    width, groups = grid.width(columns), grid.groups(columns)
    missing = width * groups - columns
    padded = functional.pad(second, (0, missing, 0, missing)).view(groups, width, groups, width)
    return padded.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _group_errors(grid: IntegerGrid, change: Tensor, blocks: Tensor, second: Tensor) -> Tensor:
    """δ H_g δᵀ for every row and group of a change [R, C]: [R, G] ([1, 1] for a tensor-wide grid)."""
    if grid.group_size == "tensor":
        return quadratic_form(change, second).to(change.dtype).view(1, 1)
    width, groups = blocks.shape[1], blocks.shape[0]
    missing = width * groups - change.shape[1]
    by_group = functional.pad(change, (0, missing)).view(len(change), groups, width).transpose(0, 1)  # [G, R, g]
    return torch.sum(torch.bmm(by_group, blocks) * by_group, -1).T
