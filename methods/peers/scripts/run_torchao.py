"""Weight-only round to nearest of torchao, on groups or on rows."""

from __future__ import annotations

import torch
from handover import Handover, serve


def compress(request: Handover) -> None:
    """`quantize_`, then codes and scales out of its tensor subclass."""
    from torchao.quantization import (
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
        quantize_,
    )

    grid = request.settings["grid"]
    if grid is None:
        bits, config = 8, Int8WeightOnlyConfig()
    else:
        bits, size = grid["bits"], grid["group_size"]
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerAxis(0) if size is None else PerGroup(size),
            mapping_type=MappingType.SYMMETRIC if grid["symmetric"] else MappingType.ASYMMETRIC,
            scale_dtype=request.scale_dtype,
        )
    model, wanted = request.load().to(request.device), set(request.linears)
    with request.clock():
        quantize_(model, config, filter_fn=lambda _, name: name in wanted)
    modules = dict(model.named_modules())
    for name in request.linears:
        weight, middle = modules[name].weight, 2 ** (bits - 1)
        zero = torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
        groups = (len(weight), -1)
        request.give_integers(
            name,
            weight.qdata.to(torch.int16) + middle,
            weight.scale.reshape(groups),
            zero.reshape(groups).to(torch.int32) + middle,
        )
        request.witness(name, weight.dequantize())
    request.finish("torchao")


if __name__ == "__main__":
    serve(compress)
