"""A model over several GPUs beside the same model on one: logits, answers, times, memory of each card.

    python tests/benchmarks/two_devices.py                                  # two GPUs, the shape of TinyLlama-1.1B
    python tests/benchmarks/two_devices.py --devices 4 --model random-llama-3.1-8b --variants dense
    python tests/benchmarks/two_devices.py --model tiny --devices cpu cpu --dtype float32    # every step, on a CPU

Random weights: equal logits say that every tensor arrived where it is read. Prints a line a measurement; exit status 1
when a logit or a token differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch
from decode_step import Bench, shape_of

from harness import artifact
from harness.engines import placement
from harness.models import RandomModel
from harness.probes.footprint import loaded_by_device, peaks_by_device
from methods.quantization.grids import IntegerGrid
from methods.quantization.round_to_nearest import RoundToNearest

PROMPT, NEW = 128, 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", default=["2"], help="how many GPUs, or their names")
    parser.add_argument("--model", default="random-tinyllama-1.1b", help="of conf/model, random weights")
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--variants", nargs="*", default=["dense", "int4"], choices=["dense", "int4"])
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    devices = arguments.devices
    if devices[0].isdecimal():
        devices = [f"cuda:{number}" for number in range(int(devices[0]))]
    if devices[0] == "cpu":
        placement.free_bytes = lambda devices: [1 << 40] * len(devices)
    differ = 0
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            save(variant, arguments, devices[0], Path(folder) / "model")
            one = measured(Path(folder) / "model", devices[:1], arguments.dtype, variant)
            several = measured(Path(folder) / "model", devices, arguments.dtype, variant)
        furthest = float((one[0] - several[0]).abs().max())
        same = torch.equal(one[1], several[1])
        print(
            f"{variant}: largest difference of a logit {furthest:.3g}; tokens {'equal' if same else 'DIFFER'}",
            flush=True,
        )
        differ += furthest > 0 or not same
    return min(differ, 1)


def save(variant: str, arguments: argparse.Namespace, device: str, folder: Path) -> None:
    """The random model as an artifact, dense or rounded to 4 bits."""
    lm, _ = RandomModel(arguments.model, "llama", shape_of(arguments)).load(Path("unused"), device, torch.bfloat16)
    if variant == "int4":
        lm = RoundToNearest(IntegerGrid(4, False, 64)).compress(lm, Bench())
    artifact.save(lm, folder)


def measured(folder: Path, devices: list[str], dtype_name: str, variant: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] of one prompt and the tokens that follow it; times and memory are printed."""
    dtype = getattr(torch, dtype_name)
    started = time.perf_counter()
    lm = artifact.load(folder, devices, dtype, "decoding")
    loaded = time.perf_counter() - started
    tokens = torch.randint(256, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    lm.engine.prepare("decoding", dtype)
    logits = lm.engine.logits(lm.engine.hidden(tokens)[0]).cpu()
    answer = torch.stack([*lm.engine.generate(tokens, NEW)]).cpu()  # also warms up
    took: list[float] = []

    def again() -> None:
        for _ in lm.engine.generate(tokens, NEW):
            wait(devices)
            took.append(time.perf_counter())

    peaks = peaks_by_device(again, placement.devices_of(lm.module))
    steps = [b - a for a, b in itertools.pairwise(took)]
    held = loaded_by_device(lm.module)
    cards = "; ".join(
        f"{device} {size / 2**20:.0f} MiB of weights, {peak / 2**20:.0f} MiB more at the peak"
        for (device, size), peak in zip(held.items(), peaks, strict=True)
    )
    blocks = [*getattr(lm.module, "hf_device_map", {}).values()]
    shares = ", ".join(f"{blocks.count(device)} parts on {device}" for device in dict.fromkeys(blocks)) or "undivided"
    median = sorted(steps)[len(steps) // 2]
    print(
        f"{variant} on {len(devices)}: loaded in {loaded:.1f} s, {1e3 * median:.2f} ms a token, {lm.engine.kernels()}"
    )
    print(f"    {shares}; {cards}", flush=True)
    return logits, answer


def wait(devices: list[str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
