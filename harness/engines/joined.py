"""Linears that read one tensor, multiplied as one: q, k and v of an attention, gate and up of a gated layer.

One decoding step at batch 1 is a chain of products of a few microseconds each. A product of few outputs ends before
the chip is busy, so one of three matrices takes less time than three. What is joined is seen, not listed: one token
goes through the model, and linears that are handed the same tensor one after the other stand side by side.

A layer takes part when it has a method `joined(others)` that returns the layer of all outputs, in order, or None.
Rows of a matrix do not meet in a product, so every output is the same number up to the order of a sum.

Where two linears that are read together, SiLU and a third make up a whole gated layer, one with a method
`gated(up, down)` may bring a layer for all of it, and one with `fused_blocks(blocks)` a shorter way through whole
decoder blocks.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.errors import RunError
from methods.blocks import decoder_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


class JoinedLayer(nn.Module):
    """The product of several linears; every one of its parts takes its own outputs from it.

    The first part that meets an input computes all of them, the others find theirs. Nothing is kept after the last.
    """

    def __init__(self, layer: nn.Module, widths: list[int]) -> None:
        super().__init__()
        self.layer, self.widths = layer, widths
        self._input: Tensor | None = None
        self._parts: tuple[Tensor | None, ...] | None = None  # both None between steps: a compiler guards on that

    def take(self, index: int, x: Tensor) -> Tensor:
        """Outputs of part `index`: [..., in] -> [..., width]."""
        if self._parts is None or self._input is not x or self._parts[index] is None:
            self._input, self._parts = x, self.layer(x).split(self.widths, -1)
        part = self._parts[index]
        waiting = tuple(None if other == index else held for other, held in enumerate(self._parts))
        if all(held is None for held in waiting):
            self._input = self._parts = None
        else:
            self._parts = waiting
        return part


class JoinedPart(nn.Module):
    """Stands where one of the joined linears stood."""

    def __init__(self, whole: JoinedLayer, index: int) -> None:
        super().__init__()
        self.whole, self.index = whole, index

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.whole.take(self.index, x)


@torch.inference_mode()
def join_linears(module: PreTrainedModel) -> list[list[str]]:
    """Put joined layers in the place of those that read one tensor; names of what was joined, group by group.

    A trial token must come out the same before and after. Raises RunError if it does not.
    """
    groups: list[list[str]] = []
    before = _trial(module)
    for names in list(_side_by_side(module)):
        if _gate(module, names):
            groups.append(names)
            continue
        first, *others = (module.get_submodule(name) for name in names)
        layer = first.joined(others)
        if layer is None:
            continue
        whole = JoinedLayer(layer, [linear.out_features for linear in (first, *others)])
        for index, name in enumerate(names):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, JoinedPart(whole, index))
        groups.append(names)
    if groups:
        if not _same(_trial(module), before):
            raise RunError(
                f"joining {' + '.join(groups[0])} and others changed what the model computes; run with "
                "hardware.steps=plain, which joins nothing"
            )
        _fuse(module, before)
    return groups


def _gate(module: PreTrainedModel, names: list[str]) -> bool:
    """Put one layer in the place of a gated one that computes the same; whether there is one."""
    place, _, _ = names[0].rpartition(".")
    parent = module.get_submodule(place)
    pair = [module.get_submodule(name) for name in names]
    others = [child for child in parent.children() if all(child is not one for one in pair)]
    linears = [child for child in others if hasattr(child, "gated")]
    if len(pair) != 2 or len(others) != 2 or len(linears) != 1 or not hasattr(pair[0], "gated"):
        return False
    activation = next(child for child in others if child is not linears[0])
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return False
    layer = pair[0].gated(pair[1], linears[0])
    if layer is None:
        return False
    x = torch.randn(1, 1, pair[0].in_features, dtype=module.dtype, device=module.device)
    if not _same(layer(x).float(), parent(x).float(), 0.02):  # the other of the two is the gate, say
        return False
    over, _, attribute = place.rpartition(".")
    setattr(module.get_submodule(over), attribute, layer)
    return True


def _fuse(module: PreTrainedModel, before: Tensor) -> None:
    """Let decoder blocks take a shorter way where their linears know one and a trial token comes out the same."""
    maker = next((child.fused_blocks for child in module.modules() if hasattr(child, "fused_blocks")), None)
    undo = None if maker is None else maker(list(decoder_blocks(module)[1]))
    if undo is not None and not _same(_trial(module), before):
        undo()


def _same(found: Tensor, expected: Tensor, tolerance: float = 0.05) -> bool:
    """Equal but for roundings. NaN of a ruined model passes: it stays one."""
    return not float((found - expected).norm()) > tolerance * float(expected.norm())


def _trial(module: PreTrainedModel) -> Tensor:
    """Final hidden states of one token, [H] in float32."""
    middle = module.get_input_embeddings().num_embeddings // 2  # the first may be padding, whose embedding is zero
    token = torch.full((1, 1), middle, device=module.device)
    return module.base_model(input_ids=token, use_cache=False).last_hidden_state.flatten().float()


def _side_by_side(module: PreTrainedModel) -> Iterator[list[str]]:
    """Names of linears of one parent that offer to be joined and are handed one tensor, in the order of their calls."""
    calls: list[tuple[str, Tensor]] = []  # tensors stay alive: a freed one's identity would be given to the next
    handles = []
    for name, child in module.named_modules():
        if hasattr(child, "joined"):

            def hook(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                calls.append((name, args[0]))

            handles.append(child.register_forward_pre_hook(hook))
    try:
        _trial(module)
    finally:
        for handle in handles:
            handle.remove()
    often = {name for name, count in Counter(name for name, _ in calls).items() if count > 1}
    for _, group in groupby(calls, key=lambda call: (id(call[1]), call[0].rpartition(".")[0])):
        names = [name for name, _ in group]
        if len(names) > 1 and often.isdisjoint(names):
            yield names
