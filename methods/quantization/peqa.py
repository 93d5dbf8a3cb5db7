"""PEQA: quantize, then fine-tune nothing but the scales (Kim et al. 2023).

https://arxiv.org/abs/2305.14152, Equation 2: W = (s0 + Δs) · (round(W0 / s0) + z0 - z0) with integers and zero points
frozen. The result is the file that round to nearest writes, with other scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from methods.blocks import block_linears, replace_module
from methods.quantization.grids import require_integers
from methods.quantization.round_to_nearest import RoundToNearest
from methods.training import TrainingSettings, language_modeling_loss, train

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.grids import IntegerGrid
    from methods.quantization.linear import QuantizedLinear


SMALLEST_FACTOR = 1e-2


@dataclass(frozen=True)
class PEQA:
    """Rounding, then training of the scales by the language-modelling loss on the calibration text."""

    grid: IntegerGrid
    training: TrainingSettings

    def __post_init__(self) -> None:
        require_integers(self.grid, "PEQA")

    @torch.no_grad()
    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Round to nearest, train the scales in float32, store them in 16 bits."""
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        rounded = RoundToNearest(self.grid).compress(base, bench)
        layers = {name: _TrainedScale(layer) for name, layer in block_linears(rounded.module).items()}
        for name, layer in layers.items():
            replace_module(rounded.module, name, layer)
        parameters = [layer.factor for layer in layers.values()]

        def keep_positive() -> None:
            for parameter in parameters:
                parameter.clamp_(min=SMALLEST_FACTOR)  # a scale that crossed zero would mirror its group

        train(rounded.module, parameters, windows, language_modeling_loss, self.training, bench, "PEQA", keep_positive)
        for name, layer in layers.items():
            replace_module(rounded.module, name, layer.settled())
        return rounded


class _TrainedScale(nn.Module):
    """A QuantizedLinear with constant integers, whose scales [R, G] are what they were times a float32 parameter.

    Factors make one learning rate fit every width: a scale at 8 bits is a sixteenth of that at 4.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: not a submodule, nothing of it is trained
        scales = layer.scales()
        self.factor = nn.Parameter(torch.ones_like(scales.scale, dtype=torch.float32))
        self.register_buffer("start", scales.scale.float(), persistent=False)
        centred = layer.grid.grouped(layer.codes()).to(torch.int16) - scales.zero[..., None]  # [R, G, g]
        self.register_buffer("centred", centred.to(torch.int16), persistent=False)

    @property
    def scale(self) -> Tensor:
        """The present scales [R, G]."""
        return self.start * self.factor

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        layer = self.layer[0]
        shape = torch.Size((layer.out_features, layer.in_features))
        weight = layer.grid.ungrouped(self.centred * self.scale[..., None], shape).to(x.dtype)
        return functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))

    def settled(self) -> QuantizedLinear:
        """The layer with the trained scales, in the type that it stores them in."""
        layer = self.layer[0]
        layer.weight_scale = self.scale.detach().to(layer.scale_dtype).reshape(layer.weight_scale.shape)
        return layer
