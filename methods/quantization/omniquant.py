"""OmniQuant: learn how far to clip each group and which scales to move out of the inputs (Shao et al. 2023).

https://arxiv.org/abs/2308.13137. Learnable weight clipping (Section 3.2) and learnable equivalent transformation
(Section 3.3) are trained block by block: the rounded block, on what rounded blocks hand on, should give what the
uncompressed block gives on what uncompressed blocks hand on. Weights themselves are not trained.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.block_training import BlockTensors, minimise
from methods.blocks import Block, input_groups, norm_readers, plain_linears, record_blocks
from methods.curvature import observe_block
from methods.quantization.fake_quantization import FakeQuantLinear, round_between
from methods.quantization.grids import IntegerGrid, require_integers
from methods.quantization.linear import pack_linear
from methods.quantization.smoothing import Folding, find_foldings, fold

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.activations import InputGrid

OPEN = 4.0  # where clipping starts: sigmoid(4) = 0.982 of the range; authors' code
SMALLEST_SCALE = 1e-2  # of the moved scales, while they are trained; authors' code
SMALLEST_STATISTIC = 1e-5


@dataclass(frozen=True)
class OmniQuant:
    """Rounding with learned clipping and learned scales.

    grid: integers.
    inputs: how the inputs of linears are quantized (a dynamic grid); None is weight-only.
    epochs: passes over the calibration windows for each block; 0 is plain rounding with ranges × 0.982.
    clipping_rate, scale_rate: AdamW's learning rates of the clipping and of the scales; 0 leaves either out.
    migration: α of SmoothQuant's formula, where the scales start.
    scales: where scales are learned: "with_inputs" only when inputs are quantized (the authors' scripts for Llama),
        "always", or "never".
    auxiliary_loss: add the distance to the uncompressed block on the rounded stream; authors' code for 2 bits and W4A4.
    """

    grid: IntegerGrid
    inputs: InputGrid | None = None
    epochs: int = 20
    clipping_rate: float = 1e-2
    scale_rate: float = 5e-3
    migration: float = 0.5
    scales: Literal["with_inputs", "always", "never"] = "with_inputs"
    auxiliary_loss: bool = False

    def __post_init__(self) -> None:
        require_integers(self.grid, "OmniQuant")
        if self.epochs < 0:
            raise ConfigError(f"method.epochs={self.epochs}: must be 0 (nothing is learned) or greater")
        for name in ("clipping_rate", "scale_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.migration <= 1:
            raise ConfigError(f"method.migration={self.migration}: must lie between 0 and 1")
        if self.scales not in ("with_inputs", "always", "never"):
            raise ConfigError(f"method.scales={self.scales}: choose one of with_inputs, always, never")
        if self.inputs is not None and self.inputs.static:
            raise ConfigError("method.inputs.static=true: OmniQuant needs a dynamic grid, as inputs=int_token")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Learn, fold and round one block after the other, with an uncompressed and a rounded stream."""
        for name, linear in plain_linears(base.module).items():
            self.grid.check(name, linear.in_features)
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        blocks, exact = record_blocks(base.module, windows, windows_per_chunk=1)
        rounded, kept = exact, BlockTensors(bench.scratch)
        for index, block in enumerate(bench.progress.track(blocks, "OmniQuant", len(blocks))):
            targets = block(exact)
            student = _Student(self, block, base.storage_dtype)
            learned = kept.get(block.name)
            if learned is None:
                student.start(exact)
                self._train(student, rounded, targets, bench, index)
                kept.put(block.name, student.learned())
            else:
                student.restore(learned)
            bench.log.tokens += self.epochs * windows.numel()
            student.apply()
            rounded = block(rounded)
            exact = targets
        return base

    def _train(self, student: _Student, rounded: list[Tensor], targets: list[Tensor], bench: Bench, index: int) -> None:
        if not self.epochs:
            return
        block = student.block
        on_stream = block(rounded) if self.auxiliary_loss else None
        model = student.model()

        def loss(i: int) -> Tensor:
            output = model.run(i, rounded[i].float())
            distance = (output - targets[i]).square().mean()
            return distance if on_stream is None else distance + (output - on_stream[i]).square().mean()

        groups = [{"params": student.clippings(), "lr": self.clipping_rate}]
        if student.scales:
            groups.append({"params": list(student.scales.values()), "lr": self.scale_rate})
        with student.hooks(model):
            minimise(
                groups,
                loss,
                len(rounded),
                self.epochs,
                torch.Generator().manual_seed(bench.generator.initial_seed() + index),
                block.name,
                lambda step, value: bench.log.point(f"block loss {block.name}", step, value),
            )


@dataclass
class _Student:
    """What is learned for one block, and the block that rounds with it."""

    method: OmniQuant
    block: Block
    dtype: torch.dtype
    uppers: dict[str, Tensor] = field(default_factory=dict)  # of each linear, [R, G], before the sigmoid
    lowers: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)  # of each folding, by its producer, [C]
    foldings: list[Folding] = field(default_factory=list)

    def __post_init__(self) -> None:
        wanted = self.method.scales == "always" or (self.method.scales == "with_inputs" and self.method.inputs)
        if wanted and self.method.scale_rate:
            closing = set(
                input_groups(self.block)[-1]
            )  # the second feed-forward layer keeps its inputs, as in the paper
            norms = norm_readers(self.block)
            found, _ = find_foldings(self.block)
            self.foldings = [f for f in found if f.producer in norms or not closing.intersection(f.readers)]

    def start(self, exact: list[Tensor]) -> None:
        """Clipping nearly open; scales from SmoothQuant's formula on what enters the uncompressed block."""
        for name, linear in self.block.linears().items():
            shape = self.method.grid.group_maximum(linear.weight).shape
            for side in (self.uppers, self.lowers):
                side[name] = torch.full(shape, OPEN, device=linear.weight.device).requires_grad_(True)
        if self.foldings:
            moments, _ = observe_block(self.block, exact, magnitudes=True, matrix=False)
            linears = self.block.linears()
            for folding in self.foldings:
                inputs = moments[folding.readers[0]].largest().clamp(min=SMALLEST_STATISTIC)
                weights = torch.stack([linears[name].weight.abs().amax(0).float() for name in folding.readers])
                weights = weights.amax(0).clamp(min=SMALLEST_STATISTIC)
                alpha = self.method.migration
                scale = (inputs**alpha / weights ** (1 - alpha)).clamp(min=SMALLEST_SCALE)
                self.scales[folding.producer] = scale.requires_grad_(True)

    def clippings(self) -> list[Tensor]:
        """Everything that clips."""
        return [*self.uppers.values(), *self.lowers.values()]

    def learned(self) -> dict[str, Tensor]:
        """All of it, to be kept."""
        parts = {"upper": self.uppers, "lower": self.lowers, "scale": self.scales}
        return {f"{part}:{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def restore(self, learned: dict[str, Tensor]) -> None:
        """The inverse of `learned`."""
        parts = {"upper": self.uppers, "lower": self.lowers, "scale": self.scales}
        for key, tensor in learned.items():
            part, _, name = key.partition(":")
            parts[part][name] = tensor.to(self.block.trial_hidden.device)

    def model(self) -> Block:
        """The block as it computes with what is learned so far."""
        block = self.block.copy_in_float32()
        readers = {name: folding.producer for folding in self.foldings for name in folding.readers}
        for name, linear in block.linears().items():
            weigh = self._weigher(name, linear, readers.get(name))
            block.replace(name, FakeQuantLinear(linear, weigh, self.method.inputs))
        return block

    def hooks(self, model: Block) -> ExitStack:
        """While entered, what feeds the readers of a folding is divided by its scale."""
        stack = ExitStack()
        modules = dict(model.module.named_modules(prefix=model.name))
        for folding in self.foldings:

            def divide(_module: nn.Module, _args: tuple, output: Tensor, producer: str = folding.producer) -> Tensor:
                return output / self._scale(producer)

            stack.callback(modules[folding.producer].register_forward_hook(divide).remove)
        return stack

    def apply(self) -> None:
        """Fold the scales into the block, clip, round and pack."""
        for folding in self.foldings:
            fold(self.block, folding, self._scale(folding.producer).detach())
        grid = self.method.grid
        for name, linear in self.block.linears().items():
            weight = linear.weight.float()
            low, high = grid.group_range(weight)
            low, high = low * self.lowers[name].detach().sigmoid(), high * self.uppers[name].detach().sigmoid()
            fitted = grid.fit_range(low, high, self.dtype)
            self.block.replace(name, pack_linear(linear, grid.encode(weight, fitted), fitted, grid, self.method.inputs))

    def _scale(self, producer: str) -> Tensor:
        return self.scales[producer].clamp(min=SMALLEST_SCALE)

    def _weigher(self, name: str, linear: nn.Linear, producer: str | None):
        grid = self.method.grid

        def weigh() -> Tensor:
            weight = linear.weight.float()
            if producer is not None:
                weight = weight * self._scale(producer)
            low, high = grid.group_range(weight)
            clipped = low * self.lowers[name].sigmoid(), high * self.uppers[name].sigmoid()
            return round_between(grid, weight, *clipped, self.dtype)

        return weigh
