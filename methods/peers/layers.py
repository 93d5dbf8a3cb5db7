"""What peers store, as layers of this project: buffers are taken over bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.errors import RunError
from methods.blocks import plain_linears, replace_module
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.grids import IntegerGrid, Scales
from methods.quantization.linear import PackedLinear, QuantizedLinear, pack_linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from harness.method import LanguageModel
    from methods.peers.exchange import Answer
    from methods.quantization.activations import InputGrid

MakeLayer = Callable[["nn.Linear", dict[str, "Tensor"]], PackedLinear] if TYPE_CHECKING else object


def put_back(base: LanguageModel, answer: Answer, make: MakeLayer) -> LanguageModel:
    """Replace every linear of the blocks by `make(linear, its tensors)`; take over whatever else came back changed."""
    linears = plain_linears(base.module)
    for name, linear in linears.items():
        parts = answer.parts(name)
        if not parts:
            raise RunError(f"{name} did not come back compressed")
        if "bias" in parts:  # a scale may be folded into it, too
            linear.bias.data.copy_(parts.pop("bias"))
        layer = make(linear, parts)
        answer.confirm(name, layer)
        replace_module(base.module, name, layer)
    take_other_tensors(base, answer, set(linears))
    return base


@torch.no_grad()
def take_other_tensors(base: LanguageModel, answer: Answer, linears: set[str]) -> None:
    """Norms and whatever else a peer folds scales into. Raises RunError for a tensor that the model does not have."""
    own = base.module.state_dict()
    tied = set(getattr(base.module, "all_tied_weights_keys", None) or {})
    for name, tensor in answer.tensors.items():
        if name.rpartition(".")[0] in linears:
            continue
        if name not in own or own[name].shape != tensor.shape:
            raise RunError(f"{name}: came back, but the model has no tensor of that name and shape")
        if name in tied and not torch.equal(own[name], tensor.to(own[name].dtype)):
            raise RunError(f"{name}: came back changed, but is tied to another tensor")
        if not torch.equal(own[name], tensor.to(own[name].dtype)):
            base.module.scales_moved_elsewhere = True  # so weights are in units that only the peer knows
        own[name].copy_(tensor)


def integer_layer(
    linear: nn.Linear, parts: dict[str, Tensor], grid: IntegerGrid, inputs: InputGrid | None = None
) -> PackedLinear:
    """Weights scale * (code - zero): codes uint8 [out, in], scale [out, groups], zero int32 [out, groups]."""
    if grid.symmetric and not (parts["zero"] == 2 ** (grid.bits - 1)).all():
        raise RunError("a symmetric grid came back with zero points besides the middle code")
    return pack_linear(linear, parts["codes"], Scales(parts["scale"], parts["zero"]), grid, inputs)


def pack_quantized_layer(
    linear: nn.Linear, parts: dict[str, Tensor], grid: IntegerGrid, dtype: torch.dtype, inputs: InputGrid | None = None
) -> PackedLinear:
    """A linear of a compressed-tensors checkpoint in the format pack-quantized: its buffers are ours."""
    layer = QuantizedLinear(
        linear.in_features,
        linear.out_features,
        grid.bits,
        grid.symmetric,
        grid.group_size,
        bias=linear.bias is not None,
        scale_dtype=str(dtype).removeprefix("torch."),
        inputs=None if inputs is None else inputs.as_dict(),
    )
    layer.take_over(linear)
    expected = {name: buffer for name, buffer in layer.named_buffers() if name != "bias"}
    found = {name: narrowed(tensor, dtype) for name, tensor in parts.items()}
    if {name: t.shape for name, t in expected.items()} != {name: t.shape for name, t in found.items()}:
        raise RunError(
            f"a linear came back with {shapes(found)}, expected {shapes(expected)}: another version of the format; "
            "install compressed-tensors 0.19 or later beside the peer"
        )
    for name, tensor in found.items():
        setattr(layer, name, tensor)
    return layer


def int_quantized_layer(linear: nn.Linear, parts: dict[str, Tensor], inputs: InputGrid) -> PackedLinear:
    """A linear of a compressed-tensors checkpoint in the format int-quantized: int8 weights, a scale a row.

    -128, which llm-compressor's range includes and ours does not, is a code like any other here.
    """
    scales = Scales(parts["weight_scale"].float(), None)
    return pack_linear(linear, parts["weight"], scales, EightBitGrid("int", "channel"), inputs)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats in `dtype`, which must hold them exactly: a peer rounds scales to it, but keeps them in a wider type."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    if not torch.equal(narrow.to(tensor.dtype), tensor):
        raise RunError(f"scales came back in {tensor.dtype} and {dtype} does not hold them exactly")
    return narrow


def shapes(tensors: dict[str, Tensor]) -> str:
    """Names and shapes in words."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
