"""One linear in every form that a GPU multiplies: dense, 2:4, NF4, int4, int8 and FP8, at 1 to 4096 rows of input.

    python tests/benchmarks/layer_products.py                                  # a GPU, Llama-2-7B's shapes, 2 minutes
    python tests/benchmarks/layer_products.py --device cpu --shapes 64x128 --rows 1 8

Times are medians of replayed graphs over copies that no cache holds, of the layers as the engine runs them: what rounds
the inputs is in them. Before it is timed, each product is compared with the layer's own decoded weights in float32.
A form that this platform has no kernel for says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from decode_step import device_name, linear, read_bandwidth, seconds
from torch import nn

from methods.pruning.sparse_linear import SparseLinear
from methods.quantization.activations import InputGrid
from methods.quantization.codebooks import CodebookGrid
from methods.quantization.eight_bit import EightBitGrid
from methods.quantization.grids import IntegerGrid
from methods.quantization.linear import PackedLinear
from methods.quantization.round_to_nearest import rounded_linear

HELD = 120e6  # bytes, more than any cache holds


def forms(width: int) -> dict:
    """Name -> layer made of a dense linear."""
    bfloat16 = torch.bfloat16
    return {
        "int4 g128": lambda dense: rounded_linear(dense, IntegerGrid(4, False, min(128, width)), bfloat16),
        "int8": lambda dense: rounded_linear(dense, EightBitGrid("int"), bfloat16, InputGrid(8, "int")),
        "fp8": lambda dense: rounded_linear(dense, EightBitGrid("e4m3"), bfloat16, InputGrid(8, "e4m3")),
        "nf4": lambda dense: rounded_linear(dense, CodebookGrid("nf4", 4, 64), bfloat16),
        "2:4": two_of_four,
    }


def two_of_four(dense: nn.Linear) -> SparseLinear:
    """The two larger of every four neighbours stay."""
    weight = dense.weight.data
    order = weight.abs().view(len(weight), -1, 4).argsort(-1)
    removed = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :2], True).view_as(weight)
    return SparseLinear.from_mask(dense, weight, removed, "2:4", torch.bfloat16)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    found = []
    with torch.inference_mode():
        bandwidth = read_bandwidth(device)
        print(f"{device_name(device)}, torch {torch.__version__}; reads {bandwidth / 1e12:.3f} TB/s", flush=True)
        for outputs, columns in arguments.shapes:
            copies = 1 + int(HELD // (2 * outputs * columns)) if device.type == "cuda" else 1
            dense = [linear(outputs, columns, device) for _ in range(copies)]
            found += measured("dense", dense, arguments.rows, bandwidth)
            for name, made in forms(columns).items():
                if arguments.forms is not None and name not in arguments.forms:
                    continue
                times = 4 if "4" in name.split(":")[0] else 2  # as many bytes as the dense ones hold, or more
                layers = [made(one) for one in dense for _ in range(times if device.type == "cuda" else 1)]
                found += packed(name, layers, arguments.rows, bandwidth)
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device_name(device), "products": found}, indent=1) + "\n")
    print(table(found))


def packed(name: str, layers: list[PackedLinear], rows: list[int], bandwidth: float) -> list[dict]:
    """The same for a form that is prepared first, and held against its own weights; why not, where it fails."""
    exact = layers[0].dequantise()
    try:
        for layer in layers:
            layer.prepare("decoding", torch.bfloat16)
        if layers[0].dense is not None:
            print(f"{name}: no kernel on this platform ({layers[0].kernel})", flush=True)
            return []
        for count in (1, 40):
            x = torch.randn(count, exact.shape[1], device=exact.device, dtype=torch.bfloat16)
            expected = x.float() @ exact.t()
            error = float((layers[0](x).float() - expected).norm() / expected.norm())
            print(f"{name}: {layers[0].kernel}, {count} rows, relative error {error:.1e}", flush=True)
        return measured(name, layers, rows, bandwidth)
    except RuntimeError as error:
        print(f"{name}: {str(error).splitlines()[0]}", flush=True)
        return []


def measured(name: str, layers: list[nn.Module], rows: list[int], bandwidth: float) -> list[dict]:
    """Microseconds of one product at each number of rows, and at what share of the bandwidth its bytes were read."""
    columns, outputs = layers[0].in_features, layers[0].out_features
    tensors = [*layers[0].parameters(), *layers[0].buffers()]
    device, held = tensors[0].device, sum(t.numel() * t.element_size() for t in tensors)
    found = []
    for count in rows:
        x = torch.randn(count, columns, device=device, dtype=torch.bfloat16)
        taken = seconds(lambda x=x: [layer(x) for layer in layers], device) / len(layers)
        share = (held + 2 * count * (columns + outputs)) / bandwidth / taken
        found.append(
            {
                "shape": f"{outputs} x {columns}",
                "form": name,
                "kernel": getattr(layers[0], "kernel", "dense matmul"),
                "rows": count,
                "microseconds": 1e6 * taken,
                "share_of_bandwidth": share,
                "teraflops": 2e-12 * count * columns * outputs / taken,
            }
        )
    return found


def table(found: list[dict]) -> str:
    """Microseconds by rows, one line a form, and in brackets how many times as fast as dense."""
    lines = []
    for shape in dict.fromkeys(entry["shape"] for entry in found):
        here = [entry for entry in found if entry["shape"] == shape]
        rows = list(dict.fromkeys(entry["rows"] for entry in here))
        dense = {entry["rows"]: entry["microseconds"] for entry in here if entry["form"] == "dense"}
        lines.append(f"\n{shape:14}" + "".join(f"{count:>16}" for count in rows))
        for form in dict.fromkeys(entry["form"] for entry in here):
            times = {entry["rows"]: entry["microseconds"] for entry in here if entry["form"] == form}
            lines.append(
                f"{form:14}" + "".join(f"{times[n]:9.1f} ({dense[n] / times[n]:4.2f})" for n in rows if n in times)
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", type=shape, default=[(4096, 4096), (11008, 4096), (4096, 11008)])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096])
    parser.add_argument("--forms", nargs="*", choices=list(forms(128)), help="besides dense; all without it")
    parser.add_argument("--json", type=Path, help="all numbers, into this file")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of "11008x4096"."""
    outputs, columns = text.split("x")
    return int(outputs), int(columns)


if __name__ == "__main__":
    main()
