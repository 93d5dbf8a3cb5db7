"""ZeroQuant: group-wise weights, token-wise inputs, every block distilled from its uncompressed self (Yao et al. 2022).

https://arxiv.org/abs/2206.01861, Sections 4.1 and 4.3. Layer-by-layer distillation needs no labels and one block in
memory: the teacher's hidden states enter both blocks, the student minimises the squared distance of what leaves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from methods.block_training import BlockTensors, minimise
from methods.blocks import Block, in_float32, plain_linears, record_blocks
from methods.quantization.fake_quantization import FakeQuantLinear, rounded_straight_through
from methods.quantization.round_to_nearest import rounded_linear

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.activations import InputGrid
    from methods.quantization.grids import Grid


@dataclass(frozen=True)
class ZeroQuant:
    """Rounding with layer-by-layer distillation.

    inputs: how the inputs of linears are quantized (a dynamic grid), None for not.
    epochs: passes over the calibration windows for each block; 0 is plain rounding.
    learning_rate, weight_decay: of AdamW; weight decay leaves norms and biases alone.
    """

    grid: Grid
    inputs: InputGrid | None = None
    epochs: int = 2
    learning_rate: float = 5e-6
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ConfigError(f"method.epochs={self.epochs}: must be 0 (no distillation) or greater")
        if self.learning_rate < 0 or self.weight_decay < 0:
            raise ConfigError("method.learning_rate and method.weight_decay must not be negative")
        if self.inputs is not None and self.inputs.static:
            raise ConfigError("method.inputs.static=true: ZeroQuant needs a dynamic grid, as inputs=int8_token")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Distil, then round, one block after the other; the teacher's hidden states go on."""
        for name, linear in plain_linears(base.module).items():
            self.grid.check(name, linear.in_features)
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        blocks, hidden = record_blocks(base.module, windows, windows_per_chunk=1)
        kept = BlockTensors(bench.scratch)
        for index, block in enumerate(bench.progress.track(blocks, "ZeroQuant", len(blocks))):
            targets = block(hidden)
            with in_float32(block.module):
                if self.epochs:
                    learned = kept.get(block.name)
                    if learned is None:
                        learned = self._distil(block, hidden, targets, base.storage_dtype, bench, index)
                        kept.put(block.name, learned)
                    block.module.load_state_dict(learned)
                    bench.log.tokens += self.epochs * windows.numel()
                for name, linear in block.linears().items():
                    block.replace(name, rounded_linear(linear, self.grid, base.storage_dtype, self.inputs))
            hidden = targets
        return base

    def _distil(
        self,
        block: Block,
        hidden: list[Tensor],
        targets: list[Tensor],
        dtype: torch.dtype,
        bench: Bench,
        index: int,
    ) -> dict[str, Tensor]:
        """Parameters of the block in float32, trained so that the rounded block does what the block did."""
        student = block.copy_in_float32()
        plain = student.linears()
        trained = {id(parameter): parameter.requires_grad_(True) for parameter in student.module.parameters()}
        for name, linear in plain.items():
            student.replace(name, FakeQuantLinear(linear, _weigher(linear, self.grid, dtype), self.inputs))
        decayed = [p for p in trained.values() if p.ndim > 1]
        others = [p for p in trained.values() if p.ndim == 1]
        groups = [{"params": decayed, "lr": self.learning_rate, "weight_decay": self.weight_decay}]
        groups += [{"params": others, "lr": self.learning_rate}] if others else []
        minimise(
            groups,
            lambda i: (student.run(i, hidden[i].float()) - targets[i]).square().mean(),
            len(hidden),
            self.epochs,
            torch.Generator().manual_seed(bench.generator.initial_seed() + index),
            block.name,
            lambda step, value: bench.log.point(f"distillation loss {block.name}", step, value),
        )
        for name, linear in plain.items():
            student.replace(name, linear)
        return {name: tensor.detach() for name, tensor in student.module.state_dict().items()}


def _weigher(linear: nn.Linear, grid: Grid, dtype: torch.dtype):
    return lambda: rounded_straight_through(linear.weight, grid, dtype)
