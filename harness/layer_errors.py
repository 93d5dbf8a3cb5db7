"""How far the weights of each linear are from the original's, and what that does to what the linear puts out.

Measured after compressing, from the model that was stored and the original loaded once more; no method reports on
itself. Both numbers are relative energies, ‖error‖² / ‖original‖²: 0 is unchanged, 1 is as wrong as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

DIGITS = 3  # significant digits that are kept
TOKENS = 128  # of the passage, at most: one short forward pass
# One text for all: the numbers of two methods must not differ because they were calibrated on different ones.
PASSAGE = """\
The old harbour lies where the river meets the sea. In winter the wind comes from the north and few boats go out; in \
summer about forty of them leave before sunrise and return with the tide, seven hours later. Most people in the town \
have worked there, or know someone who has. When the lighthouse was built in 1871, its lamp burned oil and had to be \
filled every four hours. Today a small computer turns it on and off, and nobody has slept in the keeper's house for \
thirty years. Why, then, does the light still matter? Because instruments fail, and a captain who has lost two of them \
in a storm will trust what he can see."""


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors by the full name of the linear; `absent` says why there are none."""

    weights: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    absent: str = ""


def layer_errors(compressed: nn.Module, original: nn.Module, tokens: Tensor, stored: torch.dtype) -> LayerErrors:
    """Errors of the linears that both models have in the same shape.

    tokens: ids [1, T] that the original runs on; every linear is asked about what it reads there.
    stored: the type in which weights that are not packed are kept.
    weights: ‖Ŵ - W‖² / ‖W‖². outputs: ‖x(Ŵ - W)ᵀ‖² / ‖xWᵀ‖², so rounding of inputs is not in it, nor what the layers
    before did wrong. Scales that a method moved between layers are taken out of Ŵ first.
    """
    import torch

    from methods.blocks import block_linears, decoder_blocks, watching

    ours, theirs = decoder_blocks(compressed)[1], decoder_blocks(original)[1]
    if len(ours) != len(theirs):
        return LayerErrors(absent=f"{len(ours)} blocks of its own, {len(theirs)} in the original: no layer matches")
    if getattr(compressed, "scales_moved_elsewhere", False):
        return LayerErrors(absent="another program moved scales between layers: weights are in other units")
    scales = _moved_scales(compressed)
    originals = block_linears(original)
    layers = {
        name: layer
        for name, layer in block_linears(compressed).items()
        if name in originals and _shape(layer) == _shape(originals[name])
    }
    if not layers:
        return LayerErrors(absent="no linear has the shape that it has in the original")
    weights: dict[str, float] = {}
    outputs: dict[str, float] = {}

    def compare(name: str, x: Tensor | None) -> None:
        weight = originals[name].weight.float()
        layer = layers[name]
        home = next(chain(layer.parameters(), layer.buffers())).device
        kept = dense_weight(layer.to(weight.device), stored)  # a model compressed block by block is on the host,
        layer.to(home)  # where decoding its weights would take minutes
        change = _in_units_of_the_original(kept, scales.get(name)) - weight
        weights[name] = _share(change, weight)
        if x is not None:
            outputs[name] = _share(x.float() @ change.T, x.float() @ weight.T)

    with torch.no_grad(), watching({name: originals[name] for name in layers}, compare):
        getattr(original, "base_model", original)(input_ids=tokens, use_cache=False)
    with torch.no_grad():
        for name in layers.keys() - weights.keys():  # experts that no token of the passage reached
            compare(name, None)
    if not any(weights.values()):
        return LayerErrors(absent="no weight changed")
    order = [name for name in layers if name in weights]
    return LayerErrors({n: weights[n] for n in order}, {n: outputs[n] for n in order if n in outputs})


def passage_tokens(tokenizer: PreTrainedTokenizerBase, device: torch.device | str) -> Tensor:
    """The passage as ids [1, T]."""
    return tokenizer(PASSAGE, return_tensors="pt")["input_ids"][:, :TOKENS].to(device)


def dense_weight(layer: nn.Module, stored: torch.dtype) -> Tensor:
    """What a linear multiplies by [R, C], float32: decoded, with what stands beside it added."""
    if hasattr(layer, "dequantise"):
        return layer.dequantise()
    if hasattr(layer, "correction"):
        return dense_weight(layer.inner, stored) + layer.correction()
    return layer.weight.to(stored).float()


def _moved_scales(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Linear -> what its inputs were multiplied by, what its outputs were divided by."""
    return {name: scales for child in module.modules() for name, scales in getattr(child, "moved_scales", {}).items()}


def _in_units_of_the_original(weight: Tensor, scales: tuple[Tensor | None, Tensor | None] | None) -> Tensor:
    inputs, outputs = (None if scale is None else scale.to(weight.device) for scale in scales or (None, None))
    weight = weight if inputs is None else weight / inputs
    return weight if outputs is None else weight * outputs[:, None]


def _share(error: Tensor, whole: Tensor) -> float:
    """‖error‖² / ‖whole‖² in few digits; 0 where both are nothing."""
    energy = whole.double().square().sum()
    share = error.double().square().sum() / energy if energy else error.double().square().sum()
    return float(f"{share.item():.{DIGITS}g}")


def _shape(layer: nn.Module) -> tuple[int, int]:
    return layer.out_features, layer.in_features
