"""Scales that move between a linear and what feeds it, without changing what the block computes.

x Wᵀ = (x / s) (W s)ᵀ: input channel j of the readers is multiplied by s_j and the producer of that channel divided by
it. The producer is a norm, or a linear whose output reaches the reader through operations that a scale passes
through. Which foldings exist is not looked up by architecture: each candidate is tried on a copy of the block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from harness.errors import RunError
from methods.blocks import Block, gain_offset, input_groups, norm_readers

EXACT = 0.01  # a fold is exact when every token moves by less than this share of what half a fold moves it by
NOISE = 1e-5  # share of a token's output that float32 arithmetic may move
FOLD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # share of the largest output


@dataclass(frozen=True)
class Folding:
    """A place where scales can move: divided out of `producer`, multiplied into `readers`. Full dotted names."""

    producer: str
    readers: tuple[str, ...]


@torch.no_grad()
def find_foldings(block: Block) -> tuple[list[Folding], list[str]]:
    """The exact foldings of a block, and the linears that no folding leads into.

    Candidates: every norm with its readers; and for every other group of readers, each linear called before it that
    has as many output channels as they have inputs (v -> o where their shapes are equal, up -> down). A candidate
    counts if scaling both sides leaves the output of the block alone: so attention outputs of grouped queries,
    paths through GELU and norms that also feed a residual drop out.
    """
    trial = _Trial(block)
    linears = block.linears()
    groups = input_groups(block)
    found, reached = [], set()
    for norm, readers in norm_readers(block).items():
        if trial.is_exact(candidate := Folding(norm, tuple(readers))):
            found.append(candidate)
        reached.update(readers)  # what reads a norm is not fed by a linear
    called: list[str] = []
    for group in groups:
        if group[0] not in reached:
            width = linears[group[0]].in_features
            for producer in (name for name in called if linears[name].out_features == width):
                if trial.is_exact(candidate := Folding(producer, tuple(group))):
                    found.append(candidate)
                    break
        called.extend(group)
    folded = {name for folding in found for name in folding.readers}
    return found, [name for name in linears if name not in folded]


@torch.no_grad()
def fold(block: Block, folding: Folding, scale: Tensor) -> None:
    """Multiply the input channels of the readers by `scale` [C] and divide the producer by it, in place.

    Raises RunError when that changes the block's output beyond rounding.
    """
    before = block.trial()
    modules = dict(block.module.named_modules(prefix=block.name))
    _multiply_readers(modules, folding, scale)
    _divide_producer(modules[folding.producer], scale)
    _remember(block, folding, modules[folding.producer], scale)
    moved = (block.trial() - before).abs().max()
    bound = FOLD_TOLERANCE[before.dtype] * before.abs().max()
    if not moved <= bound:
        raise RunError(
            f"folding scales from {folding.producer} into {', '.join(folding.readers)} changed the block's output by "
            f"{moved:.2e}, more than {bound:.2e}; compress in float32 (hardware.scoring_dtype=float32), or use "
            "a method without scales (method=gptq)"
        )


def _remember(block: Block, folding: Folding, producer: nn.Module, scale: Tensor) -> None:
    """Note on the block what its linears were scaled by: their weights are in other units than the original's.

    `moved_scales`: full dotted name -> what input channels were multiplied by, what output channels were divided by.
    """
    moved = block.module.__dict__.setdefault("moved_scales", {})

    def times(known: Tensor | None) -> Tensor:
        return scale.float() if known is None else known * scale.float()

    for name in folding.readers:
        inputs, outputs = moved.get(name, (None, None))
        moved[name] = (times(inputs), outputs)
    if producer.weight.ndim == 2:
        inputs, outputs = moved.get(folding.producer, (None, None))
        moved[folding.producer] = (inputs, times(outputs))


def _multiply_readers(modules: dict[str, nn.Module], folding: Folding, scale: Tensor) -> None:
    for name in folding.readers:
        weight = modules[name].weight
        weight.copy_(weight.float() * scale)


def _divide_producer(producer: nn.Module, scale: Tensor) -> None:
    """Divide the output channels of a linear, or the gain and shift of a norm, by `scale`; computed in float32."""
    weight, bias = producer.weight, getattr(producer, "bias", None)
    if weight.ndim == 2:
        weight.copy_(weight.float() / scale[:, None])
    else:
        offset = gain_offset(producer)  # Gemma stores w and multiplies by 1 + w
        weight.copy_((weight.float() + offset) / scale - offset)
    if bias is not None:
        bias.copy_(bias.float() / scale)


class _Trial:
    """A float32 copy of a block on which foldings can be tried."""

    def __init__(self, block: Block) -> None:
        self.block = replace(block, calls=[]).copy_in_float32()
        self.modules = dict(self.block.module.named_modules(prefix=block.name))
        self.expected = self.block.trial()

    def is_exact(self, folding: Folding) -> bool:
        """Whether scaling both sides leaves the output alone, measured against scaling the readers only.

        Token by token: one with a massive activation passes through SiLU as through a straight line, and would
        outweigh all others.
        """
        producer = self.modules[folding.producer]
        if producer.weight.ndim == 1 and gain_offset(producer) is None:
            return False
        touched = [producer, *(self.modules[name] for name in folding.readers)]
        kept = [(p, p.clone()) for module in touched for p in module.parameters(recurse=False)]
        width = self.modules[folding.readers[0]].in_features
        scale = torch.exp2(torch.arange(width, device=self.expected.device).float().sin())  # 0.5 to 2, no period
        _multiply_readers(self.modules, folding, scale)
        half = self._moved()
        _divide_producer(producer, scale)
        whole = self._moved()
        for parameter, values in kept:
            parameter.copy_(values)
        return bool((whole <= EXACT * half + NOISE * self.expected.norm(dim=-1)).all() and (half > whole).any())

    def _moved(self) -> Tensor:
        """How far each token's output is from the unscaled one: [1, T]."""
        return (self.block.trial() - self.expected).norm(dim=-1)
