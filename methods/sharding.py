"""Training a model whose weights, gradients and optimizer state are spread over processes (torch's `fully_shard`).

`hardware.sharded=true` asks for it, `accelerate launch` starts the processes. What is sharded is a copy: the model that
a method holds waits in host memory, keeps its parameters' identities, and gets the trained values at the end. Decoder
blocks are gathered one at a time; no device ever holds the whole student while it trains. Each process writes its part
of a checkpoint.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.environment import process_rank, training_processes
from harness.errors import ConfigError
from methods.blocks import decoder_blocks

PARTS = "parts"  # of a checkpoint, below its folder
SCHEDULER = "scheduler.json"
WAY_OUT = "launch it data parallel, with hardware.sharded=false"


def check(what: str, **unfit: object) -> None:
    """Raise ConfigError where a training cannot be sharded.

    unfit: what a training asks for that needs the whole student outside its loss, by name; None or empty: it does not.
    """
    asked = [name for name, value in unfit.items() if value]
    if asked:
        raise ConfigError(
            f"{what} needs the whole student besides its loss ({', '.join(asked)}), and hardware.sharded=true spreads "
            f"it over processes; {WAY_OUT}"
        )
    if training_processes() < 2:
        raise ConfigError(
            "hardware.sharded=true spreads a student over several processes, and this is one: "
            "accelerate launch --num_processes 2 -m harness …"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError("hardware.sharded=true shards by itself: accelerate launch without --use_fsdp")


def sharded_copy(module: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device) -> nn.Module:
    """A copy spread over all processes, on `device` of each; the module itself moves to the host.

    parameters: what is trained. Raises ConfigError for parameters that are not the module's.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    own = {id(parameter) for parameter in module.parameters()}
    if any(id(parameter) not in own for parameter in parameters):
        raise ConfigError(f"parameters beside the student's are trained with it and would not be sharded; {WAY_OUT}")
    twin = copy.deepcopy(module.to("cpu"))
    mesh = init_device_mesh(device.type, (training_processes(),))
    for block in decoder_blocks(twin)[1]:
        fully_shard(block, mesh=mesh)  # moves its part to the device
    return fully_shard(twin, mesh=mesh)


@torch.no_grad()
def bring_home(twin: nn.Module, module: nn.Module, device: torch.device) -> None:
    """Copy what was trained from the sharded copy into the module, on every process, and move it back to `device`."""
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            module.get_parameter(name).copy_(parameter.full_tensor())
    module.to(device)


def save_parts(folder: Path, trained: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Write a checkpoint: every process its part of weights and optimizer state, the first also the schedule."""
    from torch.distributed import checkpoint

    checkpoint.save(_state(trained, optimizer), checkpoint_id=folder / PARTS)
    if process_rank() == 0:
        (folder / SCHEDULER).write_text(json.dumps(scheduler.state_dict()), encoding="utf-8")


def load_parts(folder: Path, trained: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """Go on from what `save_parts` wrote."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = _state(trained, optimizer)
    checkpoint.load(state, checkpoint_id=folder / PARTS)
    set_state_dict(trained, _plain(optimizer), model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_text(encoding="utf-8")))


def _state(trained: nn.Module, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer_state = get_state_dict(trained, _plain(optimizer))
    return {"model": model, "optimizer": optimizer_state}


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, out of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
