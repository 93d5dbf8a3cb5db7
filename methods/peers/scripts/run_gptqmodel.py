"""GPTQ of GPTQModel; leaves codes and scales out of the checkpoint that it saves."""

from __future__ import annotations

from pathlib import Path

from handover import Handover, give_gptq_layer, serve


def compress(request: Handover) -> None:
    """Quantize, save in GPTQ's second format, and read that."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from safetensors.torch import load_file

    settings, grid = request.settings, request.settings["grid"]
    config = QuantizeConfig(
        bits=grid["bits"],
        group_size=-1 if grid["group_size"] is None else grid["group_size"],
        sym=grid["symmetric"],
        format="gptq_v2",
        damp_percent=settings["damping"],
        act_group_aware=settings["group_aware_order"],
        desc_act=False,
        device=request.device,
        offload_to_disk=False,
    )
    model = GPTQModel.load(request.model, config, dtype=request.dtype)
    with request.clock():
        model.quantize(request.examples(), batch_size=1)
        model.save(str(request.folder / "packed"))
    state = {}
    for file in sorted(Path(request.folder / "packed").glob("*.safetensors")):
        state |= load_file(file)
    for name in request.linears:
        parts = {part: state[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        give_gptq_layer(request, name, parts, grid["bits"])
    request.finish("gptqmodel")


if __name__ == "__main__":
    serve(compress)
