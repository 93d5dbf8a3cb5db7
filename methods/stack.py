"""Methods one after the other on the same model: prune, then quantize, then shrink the cache.

Between two steps a layer that the first one packed is opened again: its weights become numbers, what it knows about
them (which are removed, which grid they lie on) is kept beside. After the second step both must still hold, and the
layer is stored by both: removed weights stay removed, and what was on a grid stays there if the step left it there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import ConfigError, RunError
from harness.records import OFF_GRID
from methods.blocks import block_linears, replace_module
from methods.pruning.masks import MaskedLinear
from methods.pruning.sparse_linear import SparseLinear
from methods.quantization.grids import IntegerGrid, Scales
from methods.quantization.linear import PackedLinear, QuantizedLinear, pack_linear

if TYPE_CHECKING:
    from harness.decoding import Decoding
    from harness.method import Bench, LanguageModel, Method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stack:
    """Methods in the order in which they are applied.

    names: what each is called, for messages and scratch folders. decoding: how the last student among them is asked; a
    probe reads it.
    """

    steps: Sequence[Method]
    names: Sequence[str]
    decoding: Decoding | None = None

    def __post_init__(self) -> None:
        if len(self.steps) < 2 or len(self.steps) != len(self.names):
            raise ConfigError(f"a stack of {len(self.steps)} methods: name at least two, as in method=[sparsegpt,gptq]")

    def check_available(self) -> None:
        """Raise ConfigError when a step runs another project that is not installed."""
        for step in self.steps:
            getattr(step, "check_available", lambda: None)()

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Every step on what the steps before it made."""
        known: dict[str, Known] = {}
        for index, (name, step) in enumerate(zip(self.names, self.steps, strict=True)):
            if index:
                known = open_layers(base.module)
            scratch = bench.scratch / f"{index}-{name}"
            scratch.mkdir(parents=True, exist_ok=True)
            # statistics kept by a sweep are those of the uncompressed model
            own = replace(bench, scratch=scratch, statistics=None if index else bench.statistics)
            base = step.compress(base, own)
            left = close_layers(base, known, name)
            if left:
                bench.log.point(OFF_GRID, 0, left)
                log.warning(
                    "%s moved the weights of %d linears off the grid of an earlier step, so each is stored in 16 bits; "
                    "put %s first to keep few bits",
                    *(name, left, name),
                )
        return base


@dataclass(frozen=True)
class Known:
    """What a packed layer said about its weights before it was opened."""

    layer: PackedLinear
    opened: nn.Linear
    removed: Tensor | None  # bool [out, in]
    pattern: str
    grid: IntegerGrid | None
    scales: Scales | None


@torch.no_grad()
def open_layers(module: nn.Module) -> dict[str, Known]:
    """Make linears of layers that integers or masks describe; others stay, and a step that needs them says so."""
    found = {}
    dtype = module.get_input_embeddings().weight.dtype
    for name, layer in block_linears(module).items():
        sparse = isinstance(layer, SparseLinear)
        if (not sparse and not isinstance(layer, QuantizedLinear)) or layer.inputs is not None:
            continue
        removed = layer.removed() if sparse else None
        opened = MaskedLinear(layer.dequantise(dtype), layer.bias, removed).train(layer.training)
        scales = None if layer.grid is None else layer.scales()
        found[name] = Known(layer, opened, removed, layer.pattern if sparse else "", layer.grid, scales)
        replace_module(module, name, opened)
    return found


@torch.no_grad()
def close_layers(base: LanguageModel, known: dict[str, Known], step: str) -> int:
    """Store every opened layer by what held before the step and what the step made of it.

    Returns how many had their weights on a grid and have no longer.
    """
    layers = block_linears(base.module)
    left = 0
    for name, before in known.items():
        layer = layers.get(name)
        if layer is None or (layer.out_features, layer.in_features) != (
            before.layer.out_features,
            before.layer.in_features,
        ):
            raise RunError(f"{name}: {step} changed the shape of a layer that was compressed before; put {step} first")
        weight = layer.dequantise() if hasattr(layer, "dequantise") else layer.weight.detach().float()
        if layer is before.opened and torch.equal(weight, before.layer.dequantise(layer.weight.dtype).float()):
            replace_module(base.module, name, before.layer)
            continue
        if before.removed is not None and bool(weight[before.removed].any()):
            raise RunError(f"{name}: {step} brought removed weights back; put it before the method that prunes")
        stored = _both(layer, weight, before, base.storage_dtype)
        left += before.grid is not None and isinstance(stored, SparseLinear) and stored.grid is None
        replace_module(base.module, name, stored)
    return left


def _both(layer: nn.Module, weight: Tensor, before: Known, dtype: torch.dtype) -> nn.Module:
    """The layer that stands for `layer`, with weights [out, in], and stores what is known of them from both steps."""
    sparse = isinstance(layer, SparseLinear)
    removed, pattern = (layer.removed(), layer.pattern) if sparse else (before.removed, before.pattern)
    if sparse and before.removed is not None:
        removed = removed | before.removed
    grid, scales = before.grid, before.scales
    if isinstance(layer, QuantizedLinear) or (sparse and layer.grid is not None):
        grid, scales = layer.grid, layer.scales()
    elif grid is not None and not _lies_on(grid, scales, weight, removed, dtype):
        grid = scales = None  # the step moved weights off their grid
    plain = sparse or isinstance(layer, nn.Linear | QuantizedLinear)
    if not plain or getattr(layer, "inputs", None) is not None:
        return layer  # a format of its own: zeros are stored like other numbers
    if removed is not None:
        return SparseLinear.from_mask(layer, weight, removed, pattern, dtype, grid, scales)
    if grid is None or isinstance(layer, QuantizedLinear):
        return layer
    return pack_linear(layer, grid.encode(weight, scales), scales, grid)


def _lies_on(grid: IntegerGrid, scales: Scales, weight: Tensor, removed: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether kept weights [out, in], as stored in 16 bits, are those that the grid's nearest codes mean."""
    nearest = grid.round(weight, scales)
    if removed is not None:
        nearest = nearest.masked_fill(removed, 0)
    return torch.equal(nearest.to(dtype), weight.to(dtype))
