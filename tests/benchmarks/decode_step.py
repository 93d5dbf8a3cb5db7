"""How close decoding comes to reading every byte once: products alone, then whole steps, dense against packed weights.

    python tests/benchmarks/decode_step.py                         # a GPU, the shape of Llama-2-7B, a few minutes
    python tests/benchmarks/decode_step.py --no-products --batches 1 --profile --json steps.json
    python tests/benchmarks/decode_step.py --device cpu --model random-smollm2-135m --layers 2 --steps captured

Prints a line a measurement and a table last. Random weights: times do not depend on the values, but inputs and weights
are never zeros, on which some units run faster. Times are medians of device events; shares are of the read bandwidth
measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from harness.models import RandomModel
from harness.probes.speed import bytes_read_per_step
from methods.quantization.grids import IntegerGrid
from methods.quantization.round_to_nearest import RoundToNearest, rounded_linear

MODELS = Path(__file__).parents[2] / "conf" / "model"


class Bench:
    """What a method needs of a bench and round to nearest does not use: progress."""

    class progress:
        @staticmethod
        def track(items, *_):
            return items


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with torch.inference_mode():
        bandwidth = read_bandwidth(device)
        print(f"{device_name(device)}, torch {torch.__version__}; reads {bandwidth / 1e12:.3f} TB/s", flush=True)
        if not arguments.no_products:
            products(device, shape_of(arguments), bandwidth)
    rows = []
    for variant in arguments.variants:
        rows += whole_steps(variant, arguments, device, bandwidth)
    if rows:
        print(table(rows))
    if arguments.json:
        found = {"device": device_name(device), "torch": torch.__version__, "read bytes/s": bandwidth, "steps": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="random-llama-7b", help="of conf/model, random weights in Llama's shape")
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--steps", default="compiled", choices=["plain", "captured", "compiled"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--variants", nargs="*", default=["dense", "int4"], help="dense, int2, int3, int4, int8")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--no-products", action="store_true", help="whole steps alone")
    parser.add_argument("--profile", action="store_true", help="the kernels of a captured step, on a GPU")
    parser.add_argument("--json", type=Path, help="where whole steps are written to as well")
    return parser.parse_args()


def shape_of(arguments: argparse.Namespace) -> dict:
    shape = OmegaConf.to_container(OmegaConf.load(MODELS / f"{arguments.model}.yaml"))["shape"]
    return shape | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})


# ---------------------------------------------------------------------------------------------------- products alone


def products(device: torch.device, shape: dict, bandwidth: float) -> None:
    """Every matrix of a block, joined ones too, at several rows of input: dense, and 4 bits in groups of 128."""
    hidden, wide, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    joined = hidden + 2 * hidden // heads * shape.get("num_key_value_heads", heads)
    sizes = {(hidden, hidden), (joined, hidden), (wide, hidden), (2 * wide, hidden), (hidden, wide)}
    print("product            rows   dense us (share)   int4 us (share)   dense/int4")
    for outputs, columns in sorted(sizes):
        copies = 1 + int(120e6 // (2 * outputs * columns))  # more bytes than any cache holds
        if device.type == "cpu":
            copies = 2
        dense = [linear(outputs, columns, device) for _ in range(copies)]
        packed = [
            rounded_linear(one, IntegerGrid(4, False, min(128, columns & -columns)), torch.bfloat16) for one in dense
        ]
        for layer in packed:
            layer.prepare("decoding", torch.bfloat16)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
            times, shares = [], []
            for layers in (dense, packed * 4):
                times.append(seconds(lambda layers=layers, x=x: [layer(x) for layer in layers], device) / len(layers))
                read = sum(t.numel() * t.element_size() for t in (*layers[0].parameters(), *layers[0].buffers()))
                shares.append(read / bandwidth / times[-1])
            print(
                f"{outputs:6} x {columns:6} {rows:8} {1e6 * times[0]:10.1f} ({shares[0]:4.0%})"
                f" {1e6 * times[1]:10.1f} ({shares[1]:4.0%}) {times[0] / times[1]:10.2f}",
                flush=True,
            )
        print(f"  kernel: {packed[0].kernel}")


def linear(outputs: int, columns: int, device: torch.device) -> nn.Linear:
    return nn.Linear(columns, outputs, bias=False, device=device, dtype=torch.bfloat16)


def seconds(work, device: torch.device, repeats: int = 20) -> float:
    """Median time of `work`, on a GPU of one graph that is replayed, so that launches from Python do not count."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return statistics.median(timed(work) for _ in range(3))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        work()
    return statistics.median(device_seconds(graph.replay) for _ in range(repeats))


def device_seconds(work) -> float:
    """Between two events around `work`."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------- whole steps


def whole_steps(variant: str, arguments: argparse.Namespace, device: torch.device, bandwidth: float) -> list[dict]:
    """Greedy decoding through the harness's engine, one row a batch size."""
    shape = shape_of(arguments)
    lm, _ = RandomModel(arguments.model, "llama", shape).load(Path("."), str(device), torch.bfloat16)
    if variant != "dense":
        width = min(128, shape["hidden_size"] & -shape["hidden_size"])
        lm = RoundToNearest(IntegerGrid(int(variant.removeprefix("int")), False, width)).compress(lm, Bench)
    engine = lm.engine.on_hardware(None, arguments.steps)
    engine.prepare("decoding", torch.bfloat16)
    weights = bytes_read_per_step(engine.module)
    rows = []
    for batch in arguments.batches:
        prompt = torch.randint(shape["vocab_size"], (batch, arguments.prompt))
        started = time.perf_counter()
        one_request(engine, prompt, arguments.new, device)
        prepared = time.perf_counter() - started
        found = [one_request(engine, prompt, arguments.new, device) for _ in range(3)]
        step = statistics.median(value[1] for value in found)
        tokens = arguments.prompt + arguments.new / 2
        read = weights + batch * tokens * engine.kv_cache_bytes_per_token(torch.bfloat16)
        row = {
            "weights": variant,
            "batch": batch,
            "first token ms": 1e3 * statistics.median(value[0] for value in found),
            "step ms": 1e3 * step,
            "graph ms": graph_ms(engine),
            "tokens/s": batch / step,
            "GB read": read / 1e9,
            "share of bandwidth": read / bandwidth / step,
            "prepared s": prepared,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan"),
        }
        rows.append(row)
        print(
            " ".join(
                f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
        print(f"  {engine.kernels()}", flush=True)
        if arguments.profile and device.type == "cuda":
            print(kernels_of_a_step(engine), flush=True)
    return rows


@torch.inference_mode()
def kernels_of_a_step(engine) -> str:
    """Microseconds and calls of every kernel of one step, as the graph of the last request replays it."""
    slot, steps = engine._captured._slot, 3
    if slot is None:
        return f"  {engine.kernels()}: nothing was captured"
    slot.cache.reset()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            slot.step()
        torch.cuda.synchronize()
    found = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us())
    lines = [
        f"  {sum(times) / steps:9.1f} us {len(times) / steps:5.0f} x {statistics.mean(times):8.2f} {name[:90]}"
        for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]
    return "\n".join(lines)


@torch.inference_mode()
def graph_ms(engine) -> float:
    """Milliseconds of the graph of a captured step alone, median of replays; NaN where there is none."""
    slot = engine._captured._slot if engine._captured is not None else None
    if slot is None or not torch.cuda.is_available():
        return float("nan")
    slot.cache.reset()
    return 1e3 * statistics.median(
        device_seconds(slot.step) for _ in range(min(50, slot.cache.layers[0].max_cache_len))
    )


def one_request(engine, prompt: torch.Tensor, new: int, device: torch.device) -> tuple[float, float]:
    """Seconds to the first token, and for each later one."""
    stamps = [time.perf_counter()]
    for _ in engine.generate(prompt, new):
        if device.type == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
    return stamps[1] - stamps[0], (stamps[-1] - stamps[1]) / (len(stamps) - 2)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of one pass over memory, best of ten."""
    block = torch.randn((1 << 30 if device.type == "cuda" else 1 << 26), device=device)
    block.sum()
    return block.numel() * 4 / min(seconds(block.sum, device, 3) for _ in range(5))


def table(rows: list[dict]) -> str:
    """Steps of every variant side by side, and from which batch size on packed weights stop paying."""
    dense = {row["batch"]: row["step ms"] for row in rows if row["weights"] == "dense"}
    lines = ["", "weights  batch   step ms   graph ms   tokens/s   share of bandwidth   faster than dense"]
    for row in rows:
        ratio = f"{dense[row['batch']] / row['step ms']:.2f}" if row["batch"] in dense else ""
        lines.append(
            f"{row['weights']:8} {row['batch']:5} {row['step ms']:9.3f} {row['graph ms']:10.3f} {row['tokens/s']:10.1f}"
            f" {row['share of bandwidth']:15.0%} {ratio:>20}"
        )
    for variant in dict.fromkeys(row["weights"] for row in rows if row["weights"] != "dense" and dense):
        slower = [row["batch"] for row in rows if row["weights"] == variant and dense[row["batch"]] <= row["step ms"]]
        lines.append(f"{variant} {f'stops paying at batch {min(slower)}' if slower else 'pays at every batch size'}")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
