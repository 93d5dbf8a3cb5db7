"""Quantization-aware training: the model is tuned while it computes with rounded weights and rounded inputs.

Q8BERT (Zafrir et al. 2019, https://arxiv.org/abs/1910.06188): one scale for each matrix, found anew at every step, and
input thresholds by exponential moving average. Q-BERT (Shen et al. 2020, https://arxiv.org/abs/1909.05840): groups with
ranges of their own, and more bits for blocks whose loss surface is steep, by the largest eigenvalue of their Hessian.
Gradients go straight through every rounding.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.errors import ConfigError
from methods.blocks import decoder_blocks, in_float32, linears_in, plain_linears, replace_module
from methods.quantization.activations import InputGrid, straight_through
from methods.quantization.fake_quantization import rounded_straight_through
from methods.quantization.grids import Grid, IntegerGrid
from methods.quantization.linear import pack_linear
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AwareTraining:
    """Training of all weights of the blocks' linears under rounding, uniform in width: Q8BERT.

    grid: of the weights, fitted anew at every step.
    inputs: of what they multiply, None for not; a static grid follows an exponential moving average of the largest
        magnitude.
    average_decay: of that average; it starts faster, as (1 + t) / (10 + t), so that a short run gets anywhere.
    """

    grid: Grid
    inputs: InputGrid | None
    training: TrainingSettings
    average_decay: float = 0.9999

    def __post_init__(self) -> None:
        _check_decay(self.average_decay)

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Train, then round and pack."""
        linears = plain_linears(base.module)
        for name, linear in linears.items():
            self.grid.check(name, linear.in_features)
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        grids = dict.fromkeys(linears, self.grid)
        return _train_rounded(base, bench, windows, grids, self.inputs, self.training, self.average_decay)


@dataclass(frozen=True)
class HessianMixed:
    """Training under rounding with more bits for the blocks that need them: Q-BERT.

    grid: of the weights; its bits are the average over the blocks.
    inputs: as of AwareTraining.
    spread: steep blocks get `bits + spread`, flat ones `bits - spread`; as many of either, and the grid's 2 to 8 bits
        bound it. 0 is uniform.
    data_chunks: subsets of the calibration text on each of which the eigenvalue is found; their mean and spread count.
    chunk_tokens: tokens of a subset. iterations, tolerance: of the power iteration.
    """

    grid: IntegerGrid
    inputs: InputGrid | None
    training: TrainingSettings
    spread: int = 1
    data_chunks: int = 2
    chunk_tokens: int = 64
    iterations: int = 8
    tolerance: float = 1e-2
    average_decay: float = 0.9999

    def __post_init__(self) -> None:
        _check_decay(self.average_decay)
        for name in ("data_chunks", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        if self.chunk_tokens < 2:
            raise ConfigError(f"method.chunk_tokens={self.chunk_tokens}: must be at least 2, to predict one token")
        if self.spread < 0 or self.tolerance <= 0:
            raise ConfigError("method.spread must not be negative, and method.tolerance must be greater than 0")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Find the bits of each block, train, then round and pack."""
        for name, linear in plain_linears(base.module).items():
            self.grid.check(name, linear.in_features)
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        bits = self._bits(base, bench, windows)
        prefix, blocks = decoder_blocks(base.module)
        grids = {}
        for index, block in enumerate(blocks):
            own = replace(self.grid, bits=bits[index])
            grids |= dict.fromkeys(linears_in(block, f"{prefix}.{index}"), own)
        return _train_rounded(base, bench, windows, grids, self.inputs, self.training, self.average_decay)

    def _bits(self, base: LanguageModel, bench: Bench, windows: Tensor) -> list[int]:
        count = len(decoder_blocks(base.module)[1])
        spread = min(self.spread, self.grid.bits - 2, 8 - self.grid.bits)
        if spread == 0:
            return [self.grid.bits] * count
        if len(windows) < self.data_chunks:
            raise ConfigError(
                f"method.data_chunks={self.data_chunks}: there are {len(windows)} calibration windows; raise "
                "calibration.samples"
            )
        with in_float32(base.module):
            steepness = self._steepness(base.module, bench, windows)
        for index, value in enumerate(steepness):
            bench.log.point("hessian steepness by block", index, value)
        return allocate(steepness, self.grid.bits, spread)

    def _steepness(self, module: nn.Module, bench: Bench, windows: Tensor) -> list[float]:
        """|mean| + standard deviation over the subsets of each block's largest Hessian eigenvalue."""
        attention = module.config._attn_implementation
        module.set_attn_implementation("eager")  # fused attention has no second derivative
        generator = torch.Generator().manual_seed(bench.generator.initial_seed())
        _, blocks = decoder_blocks(module)
        chunks = windows[: self.data_chunks, : self.chunk_tokens].to(next(module.parameters()).device)
        found = []
        for block in bench.progress.track(blocks, "Hessian eigenvalues", len(blocks)):
            parameters = [child.weight for child in block.modules() if isinstance(child, nn.Linear)]
            for parameter in parameters:
                parameter.requires_grad_(True)
            values = [
                largest_eigenvalue(
                    lambda tokens=chunk[None]: language_modeling_loss(module, tokens),
                    parameters,
                    self.iterations,
                    self.tolerance,
                    generator,
                )
                for chunk in chunks
            ]
            for parameter in parameters:
                parameter.requires_grad_(False)
            values = torch.tensor(values)
            found.append(float(values.mean().abs() + values.std(correction=0)))
        module.set_attn_implementation(attention)
        return found


def allocate(steepness: list[float], bits: int, spread: int) -> list[int]:
    """Bits of each block: the steepest half gets `bits + spread`, the flattest `bits - spread`; the average is exact.

    The middle one of an odd number of blocks gets `bits`.
    """
    order = sorted(range(len(steepness)), key=lambda index: -steepness[index])
    half = len(order) // 2
    given = dict.fromkeys(order[:half], bits + spread) | dict.fromkeys(order[len(order) - half :], bits - spread)
    return [given.get(index, bits) for index in range(len(steepness))]


def largest_eigenvalue(
    loss, parameters: list[Tensor], iterations: int, tolerance: float, generator: torch.Generator
) -> float:
    """The eigenvalue of largest magnitude of the Hessian of `loss()` in `parameters`, by power iteration.

    Hessian-vector products by differentiating the gradient: H v = ∇(∇L · v). Stops when the eigenvalue changes by less
    than the share `tolerance`.
    """
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
        vector = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
        value = 0.0
        for _ in range(iterations):
            norm = torch.stack([v.norm() for v in vector]).norm()
            if norm == 0:
                return 0.0
            vector = [v / norm for v in vector]
            product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
            before, value = value, float(sum((p * v).sum() for p, v in zip(product, vector, strict=True)))
            vector = [p.detach() for p in product]
            if abs(value - before) <= tolerance * abs(value):
                break
    return value


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ConfigError(f"method.average_decay={decay}: must lie between 0 and 1")


def _train_rounded(
    base: LanguageModel,
    bench: Bench,
    windows: Tensor,
    grids: dict[str, Grid],
    inputs: InputGrid | None,
    settings: TrainingSettings,
    decay: float,
) -> LanguageModel:
    layers = {
        name: _Aware(linear, grids[name], inputs, base.storage_dtype, decay)
        for name, linear in plain_linears(base.module).items()
    }
    for name, layer in layers.items():
        replace_module(base.module, name, layer)
    if inputs is not None and inputs.static:
        _first_thresholds(base.module, windows[:1], layers)
    parameters = [layer.linear.weight for layer in layers.values()]
    for layer in layers.values():
        layer.follows = True
    state = [tensor for layer in layers.values() for tensor in (layer.threshold, layer.updates)]
    what = "quantization-aware training"
    train(base.module, parameters, windows, language_modeling_loss, settings, bench, what, state=state)
    for name, layer in layers.items():
        replace_module(base.module, name, layer.packed())
    return base


def _first_thresholds(module: nn.Module, windows: Tensor, layers: dict[str, _Aware]) -> None:
    """Input thresholds from a first batch, exact inputs: what the average starts from."""
    module(input_ids=windows.to(next(module.parameters()).device), use_cache=False)
    for layer in layers.values():
        layer.started = True


class _Aware(nn.Module):
    """A linear that rounds its weight and its inputs at every call, and follows how large its inputs are."""

    def __init__(
        self, linear: nn.Linear, grid: Grid, inputs: InputGrid | None, dtype: torch.dtype, decay: float
    ) -> None:
        super().__init__()
        self.linear, self.grid, self.inputs, self.dtype, self.decay = linear, grid, inputs, dtype, decay
        linear.weight.data = linear.weight.data.float()  # trained: 16 bits would swallow small steps
        self.threshold = torch.zeros((), device=linear.weight.device)
        self.updates = torch.zeros((), device=linear.weight.device)
        self.static = inputs is not None and inputs.static
        self.started = self.follows = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.static:
            self._observe(x.detach().abs().amax().float())
        if self.inputs is not None and (self.started or not self.static):
            scale = self.inputs.scale_of(self.threshold) if self.static else None
            x = straight_through(x, self.inputs.round(x, scale))
        weight = rounded_straight_through(self.linear.weight, self.grid, self.dtype)
        return functional.linear(x, weight.to(x.dtype), self.linear.bias)

    def packed(self) -> nn.Module:
        """The packed layer with what was learned."""
        weight = self.linear.weight.detach().float()
        scales = self.grid.fit(weight, self.dtype)
        scale = self.inputs.scale_of(self.threshold) if self.static else None
        return pack_linear(self.linear, self.grid.encode(weight, scales), scales, self.grid, self.inputs, scale)

    def _observe(self, largest: Tensor) -> None:
        if not self.started:
            self.threshold.copy_(torch.maximum(self.threshold, largest))
        elif self.follows and torch.is_grad_enabled():
            decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
            self.threshold.lerp_(largest, 1 - decay)
            self.updates += 1
