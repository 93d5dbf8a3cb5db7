"""GPTQ, AWQ or SmoothQuant of llm-compressor; leaves the checkpoint that it saves itself."""

from __future__ import annotations

from typing import Any

import torch
from handover import Handover, serve


def compress(request: Handover) -> None:
    """One call of `oneshot`."""
    from compressed_tensors.quantization import fake_quantize
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    model = request.load()
    windows = DataLoader(request.examples(), batch_size=1)
    samples, length = request.windows.shape
    with request.clock():
        oneshot(
            model=model,
            dataset=windows,
            recipe=recipe(request),
            num_calibration_samples=samples,
            max_seq_length=length,
        )
    modules = dict(model.named_modules())
    for name in request.linears:
        linear = modules[name]
        zero = getattr(linear, "weight_zero_point", None)
        request.witness(
            name, fake_quantize(linear.weight, linear.weight_scale, zero, linear.quantization_scheme.weights)
        )
    with request.clock():
        model.save_pretrained(request.folder, save_compressed=True)
    request.finish("llmcompressor", "compressed-tensors")


def recipe(request: Handover) -> list[Any]:
    """The modifiers of an algorithm, on our grid; whatever is not asked for keeps the library's default."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    settings = request.settings
    target = {"config_groups": {"group_0": scheme(request)}, "ignore": request.others}
    if settings["algorithm"] == "gptq":
        order = "static" if settings["activation_order"] else None
        return [
            GPTQModifier(
                **target, dampening_frac=settings["damping"], block_size=settings["block_columns"], actorder=order
            )
        ]
    if settings["algorithm"] == "awq":
        search = AWQModifier(n_grid=settings["search_points"], duo_scaling=settings["weight_magnitudes"])
        return [search, QuantizationModifier(**target)]
    return [SmoothQuantModifier(smoothing_strength=settings["strength"]), QuantizationModifier(**target)]


def scheme(request: Handover) -> Any:
    """The grid as a compressed-tensors scheme; scales are rounded to the stored type before weights are."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grid = request.settings["grid"]
    weights = QuantizationArgs(
        num_bits=grid["bits"],
        symmetric=grid["symmetric"],
        strategy="channel" if grid["group_size"] is None else "group",
        group_size=grid["group_size"],
        scale_dtype=request.scale_dtype,
    )
    inputs = None
    if request.settings["input_bits"] is not None:
        inputs = QuantizationArgs(
            num_bits=request.settings["input_bits"], symmetric=True, strategy="token", dynamic=True
        )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    serve(compress)
