"""SignRound of AutoRound; leaves codes and scales out of the layers that it packs for its own format."""

from __future__ import annotations

import torch
from handover import Handover, give_gptq_layer, serve

PACKING = "auto_round:gptqmodel"  # zero points as they are, and the same layout for symmetric and asymmetric grids


def compress(request: Handover) -> None:
    """Tune, pack, and take the packed buffers."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    settings, grid = request.settings, request.settings["grid"]
    samples, length = request.windows.shape
    model = request.load()
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(request.model),
        bits=grid["bits"],
        group_size=-1 if grid["group_size"] is None else grid["group_size"],
        sym=grid["symmetric"],
        dataset=DataLoader(request.examples(), batch_size=settings["batch"]),
        iters=settings["iterations"],
        lr=settings["learning_rate"],
        enable_alg_ext=settings["extension"],
        nsamples=samples,
        seqlen=length,
        batch_size=settings["batch"],
        device_map=request.device,
        seed=request.seed,
    )
    with request.clock():
        tuner.quantize()
        packed = tuner.save_quantized(str(request.folder / "packed"), format=PACKING, inplace=True)
    modules = dict(packed.named_modules())
    for name in request.linears:
        give_gptq_layer(request, name, modules[name].state_dict(), grid["bits"])
    first = modules[request.linears[0]].float()
    request.witness(request.linears[0], first(torch.eye(first.infeatures)).T)
    request.finish("auto-round")


if __name__ == "__main__":
    serve(compress)
