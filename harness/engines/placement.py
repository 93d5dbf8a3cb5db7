"""A model over several GPUs of one machine: which parts lie where, in the form of accelerate's device maps.

Decoder blocks are never divided, and follow each other from device to device: a token passes through all devices in
turn, so that several hold a larger model and are no faster than one. What comes before the blocks lies on the first
device, what comes after them on the last one, unless its weights are the embeddings'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import RunError
from methods.blocks import decoder_blocks, linears_in

if TYPE_CHECKING:
    from torch import nn

    from harness.engines.transformers import Mode

USABLE = 0.9  # of a device's free memory, for weights; the rest is for keys and values and what is computed
GIB = 1 << 30
EARLY_CAPABILITY = 9  # from this on a kernel may start before the one before has ended
HALVINGS = 50  # of the interval in which the fullest device's share lies


def divide(sizes: Sequence[int], room: Sequence[int]) -> list[int]:
    """The device of each part: parts keep their order, and the fullest device is as empty as it can be.

    sizes: bytes of each part; room: bytes that each device can take, in order. Filling every device up to a share of
    its room, one after the other, places all parts if any order-keeping division does: the least share is bisected.
    Raises RunError where the parts do not fit.
    """
    found = _filled(sizes, room, 1.0)
    if found is None:
        raise RunError(
            f"its weights need {sum(sizes) / GIB:.1f} GiB and {len(room)} devices have {sum(room) / GIB:.1f} GiB for "
            f"them ({USABLE:.0%} of what is free on each; blocks are not divided); use more with hardware.devices=N, "
            "fewer bits, hardware.scoring_dtype=bfloat16, or a smaller model"
        )
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = _filled(sizes, room, middle)
        if tried is None:
            low = middle
        else:
            found, high = tried, middle
    return found


def _filled(sizes: Sequence[int], room: Sequence[int], share: float) -> list[int] | None:
    """Devices of the parts, each filled up to a share of its room before the next one; None where parts are left."""
    placed: list[int] = []
    device, taken = 0, 0
    for size in sizes:
        while taken + size > share * room[device]:
            device, taken = device + 1, 0
            if device == len(room):
                return None
        taken += size
        placed.append(device)
    return placed


def parts(module: nn.Module) -> list[str]:
    """Names of the parts that are not divided, in the order in which a text passes through them.

    Every tensor lies in one of them. Raises RunError for a model that keeps tensors beside its parts.
    """
    prefix, blocks = decoder_blocks(module)
    before, after = [], []
    here = before
    for name, child in _outside(module, prefix):
        if child is blocks:
            here = after
        elif next(chain(child.parameters(), child.buffers()), None) is not None:
            buffers_alone = next(child.parameters(), None) is None  # rotary frequencies: read with the first block
            (before if buffers_alone or _is_tied(module, name) else here).append(name)
    names = [*before, *(f"{prefix}.{number}" for number in range(len(blocks))), *after]
    held = tuple(f"{name}." for name in names)
    left = [name for name, _ in chain(module.named_parameters(), module.named_buffers()) if not name.startswith(held)]
    if left:
        raise RunError(
            f"{type(module).__name__} keeps {left[0]} beside its blocks and layers, so it cannot be divided over "
            "several devices; use hardware.devices=1"
        )
    return names


def _is_tied(module: nn.Module, name: str) -> bool:
    """Whether a part has its weights from another one: a head, from the embeddings."""
    return any(key.startswith(f"{name}.") for key in getattr(module, "all_tied_weights_keys", None) or ())


def _outside(module: nn.Module, blocks: str, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The largest modules that do not contain the blocks, and the list of blocks itself, in the model's order."""
    found = []
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        found += _outside(child, blocks, f"{name}.") if blocks.startswith(f"{name}.") else [(name, child)]
    return found


def ready_bytes(name: str, part: nn.Module, mode: Mode, dtype: torch.dtype) -> int:
    """Bytes of a part's tensors; scoring keeps a dense copy beside every packed linear."""
    held = {id(tensor): tensor.numel() * tensor.element_size() for tensor in chain(part.parameters(), part.buffers())}
    packed = [linear for linear in linears_in(part, name).values() if hasattr(linear, "weight_count")]
    copies = sum(linear.weight_count for linear in packed) * dtype.itemsize if mode == "scoring" else 0
    return sum(held.values()) + copies


def device_map(
    module: nn.Module, devices: Sequence[str], free: Sequence[int], mode: Mode, dtype: torch.dtype
) -> dict[str, str]:
    """Part -> device, in the form of accelerate's device maps.

    module: with the layers it will have, its tensors possibly on the meta device; free: bytes on each device.
    Raises RunError where it does not fit, or cannot be divided.
    """
    names = parts(module)
    sizes = [
        0 if _is_tied(module, name) else ready_bytes(name, module.get_submodule(name), mode, dtype) for name in names
    ]
    placed = divide(sizes, [int(USABLE * size) for size in free])
    return {name: devices[number] for name, number in zip(names, placed, strict=True)}


def check_engine(settings: dict[str, Any]) -> None:
    """Raise RunError for a saved model that is run in a way of its own which knows one device."""
    kept = [key for key in ("cache", "decoding") if key in settings]
    if kept:
        name = settings[kept[0]]["_target_"].rpartition(".")[2]
        raise RunError(
            f"this model has a {kept[0]} of its own ({name}), which lies on one device; use hardware.devices=1"
        )


def home_of(name: str, places: dict[str, str]) -> str:
    """The device of a tensor by its name; "" stands for the whole model."""
    while name not in places and name:
        name = name.rpartition(".")[0]
    return places[name]


def dispatch(module: nn.Module, places: dict[str, str], folder: str | None = None) -> None:
    """Put every part where `places` says, and let what it reads follow it there; what the model returns comes back.

    folder: holds the weights of parts on "disk".
    """
    if list(places) == [""]:
        module.to(places[""])
        return
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    first = next(iter(places.values()))
    dispatch_model(
        module,
        places,
        main_device=first,
        offload_dir=folder,
        skip_keys=getattr(module, "_skip_keys_device_placement", None),
        force_hooks=True,
    )
    for name, place in places.items():
        part = module.get_submodule(name)
        if place != "disk":  # within a part nothing moves, and looking for it would cost as much as a small product
            for child in part.children():
                remove_hook_from_module(child, recurse=True)
        if place.startswith("cuda"):
            run_on(place, part)


def run_on(place: str, part: nn.Module) -> None:
    """Make a part's GPU the current one while the part runs, and the one before it again afterwards, errors included.

    Triton launches its kernels on the current device, wherever their tensors are: another one's stream would not wait
    for what these are made by.
    """
    before: list[int] = []

    def enter(_part: nn.Module, _args: tuple) -> None:
        before.append(torch.cuda.current_device())
        torch.cuda.set_device(place)

    def leave(_part: nn.Module, _args: tuple, _output: Any) -> None:
        torch.cuda.set_device(before.pop())

    part.register_forward_pre_hook(enter)
    part.register_forward_hook(leave, always_call=True)


def is_divided(module: nn.Module) -> bool:
    """Whether several devices hold the module."""
    return len(set(getattr(module, "hf_device_map", {}).values())) > 1  # accelerate leaves it


def devices_of(module: nn.Module) -> list[torch.device]:
    """The devices that hold the module's tensors, the first part's first; where GPUs do, these alone.

    What waits on the CPU or on disk (the meta device) is brought to a GPU to be used, and no GPU's peak is read there.
    """
    held = list(dict.fromkeys(tensor.device for tensor in chain(module.parameters(), module.buffers())))
    return [device for device in held if device.type == "cuda"] or held


def starts_early(device: torch.device) -> bool:
    """Whether kernels of this device can start before the one before has ended (Hopper and later)."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= EARLY_CAPABILITY


def largest_share(module: nn.Module) -> float:
    """The part of the decoder blocks, and so of keys and values, that the device with most of them holds."""
    places, (prefix, blocks) = getattr(module, "hf_device_map", {}), decoder_blocks(module)
    counts = Counter(home_of(f"{prefix}.{number}", places) if places else "" for number in range(len(blocks)))
    return max(counts.values()) / len(blocks)


def free_bytes(devices: Sequence[str | torch.device]) -> list[int]:
    """Free memory of each GPU."""
    return [torch.cuda.mem_get_info(device)[0] for device in devices]
