"""What compressing a decoder block costs: seconds, peak memory and where the time goes, beside the two floors.

    PYTHONPATH=$PWD python3 tests/benchmarks/compress_block.py --device cuda
    PYTHONPATH=$PWD python3 tests/benchmarks/compress_block.py --device cuda --whole 32 --methods gptq
    PYTHONPATH=$PWD python3 tests/benchmarks/compress_block.py --hidden 64 --intermediate 96 --heads 2 \
        --samples 4 --window 32 --group-size 32

Blocks of the shape of Llama-2-7B with random weights, in bfloat16; nothing is downloaded. Methods run as the harness
runs them: the model lies in host memory, `compress` takes each block to the device in turn. The clock holds `compress`
alone, synchronised between blocks; the first block also compiles kernels and pins memory and is reported apart. First
every piece is checked against the CPU in float64, each on its own, then timed on its own: one visit to a machine tells
what is wrong. --peer runs llm-compressor's `oneshot` on the same blocks, where it can be imported.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.method import Bench, LanguageModel
from harness.progress import NoProgress
from methods import curvature, fused_sweep
from methods.blocks import Block, record_blocks
from methods.curvature import Moments, inverse_factor, quadratic_form, tensor_cores
from methods.fused_sweep import FusedColumns
from methods.pruning import sparsegpt as sparsegpt_file
from methods.pruning import wanda as wanda_file
from methods.pruning.masks import Pattern, lowest
from methods.pruning.sparse_linear import SparseLinear
from methods.pruning.sparsegpt import SparseGPT
from methods.pruning.wanda import Wanda
from methods.quantization import awq as awq_file
from methods.quantization import gptq as gptq_file
from methods.quantization.awq import AWQ
from methods.quantization.gptq import GPTQ, ColumnGrids
from methods.quantization.grids import IntegerGrid

TARGET_SECONDS = {"gptq": 1.2, "awq": 1.5, "sparsegpt": 1.4, "wanda": 0.8}  # one H100, the default shape
PEER_SECONDS = {"gptq": 6.85, "awq": 14.8, "sparsegpt": 13.9, "wanda": 2.57}
PEER_GIB = {"gptq": 6.3, "awq": 55.8, "sparsegpt": 10.3, "wanda": 13.0}
WHOLE_SECONDS = 45.0  # GPTQ of 32 blocks
GIB = 2**30
PARTS = ("forward", "moments", "factor", "sweep", "search", "mask", "pack", "foldings")


# ------------------------------------------------------------------------------------------------------ what is run


class Windows:
    """A corpus of windows [S, T] that are there already."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def calibration_windows(self, tokenizer: Any, generator: torch.Generator) -> Tensor:
        return self.windows


def random_model(arguments: argparse.Namespace, blocks: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama of `blocks` blocks in host memory; weights are drawn on the device, which is faster there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads or arguments.heads,
        num_hidden_layers=blocks,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=max(arguments.window, 64),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    module.model.rotary_emb = type(module.model.rotary_emb)(config)
    generator = torch.Generator(arguments.device).manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator, device=arguments.device)
        values = values * 0.1 + 1 if values.ndim == 1 else values if "embed" in name else values * 0.02
        parent, _, attribute = name.rpartition(".")
        made = nn.Parameter(values.to(dtype).cpu(), requires_grad=False)
        setattr(module.get_submodule(parent), attribute, made)
    return module.eval()


def windows_of(arguments: argparse.Namespace) -> Tensor:
    """Token ids [S, T]."""
    shape = (arguments.samples, arguments.window)
    return torch.randint(arguments.vocabulary, shape, generator=torch.Generator().manual_seed(0))


def method_of(name: str, arguments: argparse.Namespace) -> Any:
    """A method with the settings of its configuration file, but for the group size."""
    grid, memory = IntegerGrid(4, False, arguments.group_size), arguments.working_memory_gib
    if name == "gptq":
        return GPTQ(grid, sequential=arguments.sequential, working_memory_gib=memory)
    if name == "awq":
        return AWQ(grid, working_memory_gib=memory)
    return {"sparsegpt": SparseGPT, "wanda": Wanda}[name](arguments.sparsity, working_memory_gib=memory)


class StopWatch:
    """A Progress that notes the seconds between one item and the next, synchronised."""

    def __init__(self, device: str, first_is_done: Callable[[], None]) -> None:
        self.device, self.seconds, self.first_is_done = device, [], first_is_done

    def track(self, items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        last = now(self.device)
        for item in items:
            yield item
            # what brings the item home again runs when the next one is asked for, and is counted with that one
            self.seconds.append((here := now(self.device)) - last)
            last = here
            if len(self.seconds) == 1 and total != 1:
                self.first_is_done()


def now(device: str) -> float:
    """Seconds, with the device idle."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Parts:
    """Where the time goes: device time between entering and leaving a function, less that of functions inside it."""

    device: str
    spans: list[list] = field(default_factory=list)  # [part, start, end, index of the span around it]
    peaks: dict[str, int] = field(default_factory=dict)  # most bytes of device memory that a part saw
    _counted: int = 0  # index of the first span that counts
    _open: list[int] = field(default_factory=list)
    _restore: list[tuple[Any, str, Any]] = field(default_factory=list)

    def mark(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def see_peak(self) -> None:
        """Count the peak since the last look to the part that is running."""
        if self.device == "cuda":
            part = self.spans[self._open[-1]][0] if self._open else "other"
            self.peaks[part] = max(self.peaks.get(part, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def count_from_here(self) -> None:
        """Leave out what was timed so far: the first block compiles kernels and pins memory."""
        self._counted = len(self.spans)

    def wrap(self, part: str, owner: Any, name: str) -> None:
        original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            index = len(self.spans)
            self.see_peak()
            self.spans.append([part, self.mark(), None, self._open[-1] if self._open else None])
            self._open.append(index)
            try:
                return original(*args, **kwargs)
            finally:
                self.see_peak()
                self._open.pop()
                self.spans[index][2] = self.mark()

        self._restore.append((owner, name, original))
        setattr(owner, name, timed)

    def __enter__(self) -> Parts:
        self.wrap("forward", Block, "__call__")
        self.wrap("moments", Moments, "add")
        self.wrap("factor", curvature, "_factor_in_order")
        for file in (gptq_file, sparsegpt_file):
            self.wrap("sweep", file, "sweep_columns")
        self.wrap("search", AWQ, "search_scale")
        self.wrap("search", AWQ, "best_limit")
        self.wrap("foldings", awq_file, "find_foldings")
        self.wrap("foldings", awq_file, "fold")
        self.wrap("mask", wanda_file, "lowest")
        self.wrap("mask", sparsegpt_file, "lowest")
        for file in (gptq_file, awq_file):
            self.wrap("pack", file, "pack_linear")
        original = SparseLinear.__dict__["from_mask"]
        self.wrap_class_method("pack", SparseLinear, "from_mask", original)
        return self

    def wrap_class_method(self, part: str, owner: type, name: str, original: classmethod) -> None:
        holder = type("Holder", (), {name: staticmethod(original.__get__(None, owner))})
        bound = getattr(holder, name)

        class Calls:
            call = staticmethod(bound)

        self.wrap(part, Calls, "call")
        wrapped = Calls.__dict__["call"]
        self._restore[-1] = (owner, name, original)
        setattr(owner, name, staticmethod(wrapped))

    def __exit__(self, *_: Any) -> None:
        for owner, name, original in reversed(self._restore):
            setattr(owner, name, original)

    def totals(self) -> dict[str, float]:
        """Seconds by part."""
        now(self.device)
        took = [
            end - start if self.device != "cuda" else start.elapsed_time(end) / 1e3 for _, start, end, _ in self.spans
        ]
        own = list(took)
        for (_, _, _, around), seconds in zip(self.spans, took, strict=True):
            if around is not None:
                own[around] -= seconds
        sums: dict[str, float] = defaultdict(float)
        for (part, *_), seconds in list(zip(self.spans, own, strict=True))[self._counted :]:
            sums[part] += seconds
        return dict(sums)


def run_method(name: str, arguments: argparse.Namespace, blocks: int, windows: Tensor) -> dict[str, Any]:
    """Compress a fresh model and report."""
    module = random_model(arguments, blocks)
    parts = Parts(arguments.device)
    watch = StopWatch(arguments.device, parts.count_from_here)
    base = LanguageModel(module, None, None, torch.bfloat16)
    bench = Bench(Windows(windows), torch.Generator().manual_seed(0), Path("."), watch, device=on_device(arguments))
    forget(arguments.device)
    held = torch.cuda.memory_allocated() if arguments.device == "cuda" else 0
    started = now(arguments.device)
    with parts:
        method_of(name, arguments).compress(base, bench)
    total = now(arguments.device) - started
    parts.see_peak()
    totals, steady = parts.totals(), watch.seconds[1:] or watch.seconds
    report = {
        "method": name,
        "blocks": blocks,
        "seconds_per_block": statistics.median(steady),
        "first_block_seconds": watch.seconds[0],
        "block_seconds": watch.seconds,
        "total_seconds": total,
        "outside_blocks_seconds": total - sum(watch.seconds),
        "peak_gib": max(parts.peaks.values()) / GIB if parts.peaks else None,
        "peak_gib_of_parts": {part: peak / GIB for part, peak in parts.peaks.items()},
        "held_before_gib": held / GIB,
        "parts_seconds_per_block": {part: totals.get(part, 0.0) / len(steady) for part in PARTS},  # not of the first
    }
    report["parts_seconds_per_block"]["other"] = statistics.mean(steady) - sum(
        report["parts_seconds_per_block"].values()
    )
    del module, base
    return report


def on_device(arguments: argparse.Namespace) -> str | None:
    return arguments.device if arguments.device != "cpu" else None


def forget(device: str) -> None:
    """Give memory back and start counting its peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------------------- floors


def floors(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """TFLOP on the matrix units and GB through device memory that one block needs at least; see docs/gpu.md."""
    h, i, t = arguments.hidden, arguments.intermediate, arguments.window
    n = arguments.samples * t
    kv = h * (arguments.key_value_heads or arguments.heads) // arguments.heads
    attention = 2 * n * t * h  # scores and mixing, half of each below the diagonal
    # what a pass adds from the input of one group of linears to that of the next: operations, and channels that are
    # written once and read once; the last ends at the block's output
    stretches = [
        (0, h),
        (2 * n * h * (h + 2 * kv) + attention, 2 * h + 2 * kv),
        (2 * n * h * h, 2 * h),
        (2 * n * 2 * h * i, 3 * i),
        (2 * n * h * i, h),
    ]
    up_to = [tuple(map(sum, zip(*stretches[: end + 1], strict=True))) for end in range(len(stretches))]
    passes = [up_to[4]] if name == "awq" else [up_to[3], up_to[4]]
    if name == "gptq" and arguments.sequential == "linear":
        passes = up_to
    moments = sum(n * c * c for c in (h, h, h, i))  # half of a square product is enough
    rows = ((h + 2 * kv, h), (h, h), (2 * i, h), (h, i))
    solve = sum(r * c * c + 4 * c**3 / 3 for r, c in rows)  # updates; Cholesky and inverse
    search = 20 * sum(r * c * c for r, c in rows)
    beside = {"gptq": moments + solve, "sparsegpt": moments + solve, "awq": moments + search, "wanda": 0}[name]
    flops, channels = (sum(part) for part in zip(*passes, strict=True))
    # weights are small beside the activations
    return {"tflop": (flops + beside) / 1e12, "gigabytes": 2 * 2 * n * channels / 1e9}


# ----------------------------------------------------------------------------------------------------------- checks


def relative(out: Tensor, reference: Tensor) -> float:
    """‖out - ref‖ / ‖ref‖ in float64 on the CPU."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    return ((out - reference).norm() / reference.norm()).item()


def correlated(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs [N, C] whose channels hang together and differ in size, float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns // 4 + 1, generator=generator)
    x = torch.randn(tokens, columns // 4 + 1, generator=generator) @ mix.T
    return (x + torch.randn(tokens, columns, generator=generator)) * torch.rand(columns, generator=generator).add(0.1)


class Checks:
    """Runs every check on its own; a failure is a line, not the end."""

    def __init__(self, device: str) -> None:
        self.device, self.rows = device, []

    def __call__(self, name: str, bound: float, check: Callable[[], float]) -> None:
        try:
            value = check()
            good = value <= bound  # NaN is not
            text = f"{value:.3g} (at most {bound:g})"
        except Exception as error:
            traceback.print_exc()
            good, text = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.rows.append((name, good, text))
        print(f"  {'ok    ' if good else 'FAILED'} {name}: {text}", flush=True)


def sweep_case(device: str, rows: int, columns: int, **changes: Any) -> tuple[Any, Any]:
    """(what the device's solver makes of a problem, what the reference makes of it in float64 on the CPU)."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    x = correlated(columns, 4 * columns, rows)
    moment = x.T @ x / len(x)
    solved = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        solved.append(changes["solve"](weight.to(place, dtype), moment.to(place, dtype), rows))
    return solved[0], solved[1]


def check_pieces(arguments: argparse.Namespace) -> Checks:
    """Every piece against the reference, small."""
    device = arguments.device
    checks = Checks(device)
    print(f"checks against float64 on the CPU ({device})", flush=True)

    def error_ratio(solve: Callable, rows: int, columns: int) -> float:
        """How much the total error differs: the columns' order of rounding is the same, a tie may fall elsewhere."""
        ours, reference = sweep_case(device, rows, columns, solve=solve)
        return abs(ours.error.double().sum().cpu().item() / reference.error.sum().item() - 1)

    def agreement(solve: Callable, rows: int, columns: int) -> float:
        """Share of weights that came out otherwise."""
        ours, reference = sweep_case(device, rows, columns, solve=solve)
        apart = (ours.weight.double().cpu() - reference.weight).abs() > 1e-3 * reference.weight.abs().max()
        return apart.double().mean().item()

    def gptq(**settings: Any) -> Callable:
        method = GPTQ(**{"grid": IntegerGrid(4, group_size=settings.pop("group_size", None)), **settings})
        return lambda weight, moment, rows: method.solve(weight, moment, torch.bfloat16, [rows])[0]

    def sparse(sparsity: float | str, grid: IntegerGrid | None = None) -> Callable:
        method = SparseGPT(sparsity, grid)
        return lambda weight, moment, rows: method.solve(weight, moment, torch.bfloat16, [rows - 3, 3])[0]

    cases = {
        "GPTQ rows": (gptq(), 37, 70),
        "GPTQ groups": (gptq(group_size=32), 130, 256),
        "GPTQ groups, no order": (gptq(group_size=128, activation_order=False), 256, 512),
        "GPTQ dynamic groups": (gptq(group_size=32, activation_order=False, groups="dynamic"), 37, 160),
        "SparseGPT 50 %": (sparse(0.5), 67, 300),
        "SparseGPT 2:4": (sparse("2:4"), 67, 300),
        "SparseGPT 50 % and 4 bits": (sparse(0.5, IntegerGrid(4, group_size=None)), 67, 300),
    }
    for name, (solve, rows, columns) in cases.items():
        checks(f"{name} {rows}x{columns}, total error", 1e-3, lambda s=solve, r=rows, c=columns: error_ratio(s, r, c))
        checks(f"{name} {rows}x{columns}, weights apart", 0.02, lambda s=solve, r=rows, c=columns: agreement(s, r, c))

    def moments(dtype: torch.dtype, matrix: bool) -> float:
        x = correlated(520, 4096).to(dtype)
        found = Moments(520, torch.device(device), matrix, magnitudes=True)
        for part in x.to(device).split(1000):
            found.add(part)
        exact = x.double().T @ x.double() / len(x)
        other = relative(found.mean_magnitude(), x.double().abs().mean(0))
        return max(
            relative(found.second() if matrix else found.squares(), exact if matrix else exact.diagonal()), other
        )

    for dtype in (torch.bfloat16, torch.float32):
        checks(f"second moments of {dtype} inputs", 1e-5, lambda d=dtype: moments(d, True))
        checks(f"squares of {dtype} inputs", 1e-5, lambda d=dtype: moments(d, False))

    def wide_moment() -> float:
        x = torch.randn(2048, 4500, generator=torch.Generator().manual_seed(1)).bfloat16()
        found = Moments(4500, torch.device(device))
        found.add(x.to(device))
        return relative(found.take_second(), (x.float().T @ x.float()) / len(x))

    checks("second moments in panels (4500 wide, against float32)", 1e-5, wide_moment)

    def form(context: Any) -> float:
        x = correlated(2500, 5000)
        second, change = x.T @ x / len(x), torch.randn(64, 2500, generator=torch.Generator().manual_seed(2))
        with context():
            ours = quadratic_form(change.to(device), second.to(device)).item()
        exact = torch.einsum("ij,jk,ik->", change.double(), second.double(), change.double()).item()
        return abs(ours / exact - 1)

    from contextlib import nullcontext

    checks("tr(ΔW H ΔWᵀ)", 1e-5, lambda: form(nullcontext))
    checks("tr(ΔW H ΔWᵀ), tf32", 2e-3, lambda: form(tensor_cores))

    def factor() -> float:
        x = correlated(1200, 4800)
        moment = x.T @ x / len(x)
        upper = inverse_factor(moment.to(device), 0.01)[0].double().cpu()
        damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(1200, dtype=torch.float64)
        return relative(upper @ damped @ upper.T, torch.eye(1200))

    checks("factor of the inverse", 1e-3, factor)

    def masks(scope: str) -> float:
        scores = torch.randint(50, (200, 128), generator=torch.Generator().manual_seed(3)).float()
        found = lowest(scores.to(device), Pattern.parse(0.37), scope).cpu()
        return float((found != lowest(scores, Pattern.parse(0.37), scope)).sum())

    checks("masks with many ties, layer", 0, lambda: masks("layer"))
    checks("masks with many ties, row", 0, lambda: masks("row"))
    small = argparse.Namespace(**vars(arguments) | {
        "hidden": 128, "intermediate": 352, "heads": 4, "key_value_heads": None, "vocabulary": 200, "samples": 10,
        "window": 64, "group_size": 32,
    })  # fmt: skip
    checks("hidden states streamed through host memory", 0, lambda: streaming(small))
    for name in arguments.methods:
        checks(f"{name} of a small model, outputs against the CPU in float32", 0.05, lambda n=name: whole(small, n))
    return checks


def streaming(arguments: argparse.Namespace) -> float:
    """Largest difference between hidden states that stayed on the device and that came and went; 7 chunks."""
    device, outputs = arguments.device, []
    for keep_on in (None, "cpu"):
        module = random_model(arguments, 3, torch.float32)
        blocks, hidden = record_blocks(module, windows_of(arguments), 3, keep_on, device)
        with torch.no_grad():
            for block in blocks:
                with block.visiting():
                    hidden = block(hidden)
                assert next(block.module.parameters()).device.type == "cpu"
        assert all(chunk.device.type == (keep_on or device) for chunk in hidden)
        outputs.append(torch.cat([chunk.cpu() for chunk in hidden]))
    return (outputs[0] - outputs[1]).abs().max().item()


def whole(arguments: argparse.Namespace, name: str) -> float:
    """By how much the compressed block's output error on the device exceeds, or falls short of, the CPU's."""
    windows, logits = windows_of(arguments), []
    for place, memory in ((arguments.device, 1e-3), ("cpu", 4.0)):
        settings = argparse.Namespace(**vars(arguments) | {"working_memory_gib": memory})
        module = random_model(arguments, 2, torch.float32)
        with torch.no_grad():
            dense = module(windows, use_cache=False).logits
        base = LanguageModel(module, None, None, torch.float16)
        generator = torch.Generator().manual_seed(0)
        bench = Bench(Windows(windows), generator, Path("."), NoProgress(), device=None if place == "cpu" else place)
        method_of(name, settings).compress(base, bench)
        with torch.no_grad():
            logits.append((module(windows, use_cache=False).logits - dense).double())
    return abs(logits[0].norm() / logits[1].norm() - 1).item()


# ---------------------------------------------------------------------------------------------------- pieces, timed


def timed(device: str, work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds after a warm-up."""
    work()
    took = []
    for _ in range(repeats):
        started = now(device)
        work()
        took.append(now(device) - started)
    return statistics.median(took)


def time_ceilings(note: Callable, device: str) -> None:
    """What the machine can do at most."""
    size = 8192 if device == "cuda" else 512
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    note("bf16 product", lambda: square @ square, lambda s: f"({2 * size**3 / s / 1e12:.0f} TFLOP/s)")
    single = square.float()
    note("float32 product", lambda: single @ single, lambda s: f"({2 * size**3 / s / 1e12:.0f} TFLOP/s)")

    def rounded() -> Tensor:
        with tensor_cores():
            return single @ single

    note("tf32 product", rounded, lambda s: f"({2 * size**3 / s / 1e12:.0f} TFLOP/s)")
    large = torch.empty(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(large)
    note("copy", lambda: target.copy_(large), lambda s: f"({8 * large.numel() / s / 1e12:.2f} TB/s read and written)")
    if device == "cuda":
        host = torch.empty(2**26, pin_memory=True)
        there = torch.empty(2**26, device=device)
        note("host to device, pinned", lambda: there.copy_(host), lambda s: f"({4 * 2**26 / s / 1e9:.1f} GB/s)")
        note("device to host, pinned", lambda: host.copy_(there), lambda s: f"({4 * 2**26 / s / 1e9:.1f} GB/s)")
        loose = torch.empty(2**26)
        note("host to device, not pinned", lambda: there.copy_(loose), lambda s: f"({4 * 2**26 / s / 1e9:.1f} GB/s)")
        note("device to host, not pinned", lambda: loose.copy_(there), lambda s: f"({4 * 2**26 / s / 1e9:.1f} GB/s)")


def time_pieces(arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each piece at the real shape, and the ceilings they are to be held against."""
    device, h, i = arguments.device, arguments.hidden, arguments.intermediate
    found: dict[str, float] = {}

    def note(name: str, work: Callable[[], Any], detail: Callable[[float], str] = lambda seconds: "") -> None:
        try:
            seconds = timed(device, work)
            found[name] = seconds
            print(f"  {name}: {seconds * 1e3:.2f} ms {detail(seconds)}", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"  {name}: FAILED {type(error).__name__}: {error}", flush=True)
        forget(device)

    print("pieces", flush=True)
    time_ceilings(note, device)
    forget(device)
    tokens = min(6, arguments.samples) * arguments.window
    for width in (h, i):
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
        moments = Moments(width, torch.device(device))
        flops = 2 * tokens * width * width
        note(
            f"second moments of {tokens} tokens, {width} wide",
            lambda m=moments, x=x: m.add(x),
            lambda s, f=flops: f"({f / s / 1e12:.0f} TFLOP/s of the full square)",
        )
        diagonal = Moments(width, torch.device(device), matrix=False)
        note(
            f"squares of {tokens} tokens, {width} wide",
            lambda m=diagonal, x=x: m.add(x),
            lambda s, x=x: f"({2 * x.numel() / s / 1e12:.2f} TB/s)",
        )
        del x, moments, diagonal

    for width in (h, i):
        x = torch.randn(2 * width, width, device=device)
        moment = x.T @ x / len(x)
        del x
        note(f"factor, {width} wide", lambda m=moment: inverse_factor(m, 0.01))
        note(f"Cholesky alone, {width} wide", lambda m=moment: torch.linalg.cholesky_ex(m))
        del moment

    for rows, columns in ((3 * h, h), (2 * i, h), (h, i)):
        work = torch.randn(columns, rows, device=device)
        upper = torch.eye(columns, device=device) + torch.triu(torch.randn(columns, columns, device=device), 1) * 1e-3
        grid = IntegerGrid(4, group_size=arguments.group_size)
        grids = ColumnGrids(grid, [grid.fit(work.T.contiguous(), torch.bfloat16)], [rows], columns, torch.float32)
        order = torch.randperm(columns, device=device)
        if grids.fused().runs_on(work):
            note(
                f"sweep, {rows} rows of {columns}",
                lambda w=work, u=upper, o=order, g=grids: fused_sweep.sweep_fused(w.clone(), u, o, g.fused(), 128),
            )
            errors, indices = work.new_empty(128, rows), order.int()
            for tile, warps in ((16, 2), (16, 4), (32, 2), (32, 4), (32, 8), (64, 4), (64, 8)):
                note(
                    f"  one block of 128 columns of {rows} rows, tile {tile}, {warps} warps",
                    lambda w=work, u=upper, o=indices, g=grids, e=errors, t=tile, n=warps: fused_sweep.solve_block(
                        w, u, o, g.fused(), e, 0, 128, t, n
                    ),
                )
            pruned = FusedColumns(removed=torch.rand(columns, rows, device=device) < 0.5)
            note(
                f"  the same, pruned, {rows} rows",
                lambda w=work, u=upper, o=indices, p=pruned, e=errors: fused_sweep.solve_block(w, u, o, p, e, 0, 128),
            )
            note(
                f"  its update of the rest, {rows} rows of {columns}",
                lambda w=work, u=upper, e=errors: w[128:].addmm_(u[:128, 128:].T, e, alpha=-1),
            )
        scores = work[:128].T.square()
        note(f"mask of 128 columns of {rows} rows", lambda s=scores: lowest(s, Pattern.parse(0.5), "layer"))
        scores = work.T.contiguous()
        note(f"mask by row of {rows} rows of {columns}", lambda s=scores: lowest(s, Pattern.parse(0.5), "row"))
        del work, upper, grids, scores

    module = random_model(arguments, 1)
    windows = windows_of(arguments)[: min(6, arguments.samples)]
    blocks, hidden = record_blocks(module, windows, None, None, on_device(arguments))
    block = blocks[0]
    kinds = {key: type(v).__name__ for key, v in block.calls[0].kwargs.items()}
    print(f"  a block is called with {kinds}; attention {module.config._attn_implementation}")
    per_token = 2 * sum(p.numel() for p in block.module.parameters() if p.ndim == 2)
    flops = windows.numel() * (per_token + 2 * arguments.window * h)
    with block.visiting(), torch.no_grad():
        note(f"forward of {len(windows)} windows", lambda: block(hidden), lambda s: f"({flops / s / 1e12:.0f} TFLOP/s)")
        if device == "cuda":
            kernels(block, hidden)
    return found


def kernels(block: Block, hidden: list[Tensor]) -> None:
    """Which kernels a forward consists of, the costly ones first."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            block(hidden)
            torch.cuda.synchronize()
        rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)[:14]
        for row in rows:
            print(f"    {row.device_time_total / 1e3:8.3f} ms  {row.count:3d} x {row.key[:90]}", flush=True)
    except Exception as error:
        print(f"    no profile: {type(error).__name__}: {error}", flush=True)


# -------------------------------------------------------------------------------------------------------------- peer


def run_peer(name: str, arguments: argparse.Namespace, blocks: int, windows: Tensor) -> dict[str, Any]:
    """llm-compressor's `oneshot` on the same blocks: seconds of all of it by block, and its peak."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    module = random_model(arguments, blocks)  # in host memory, from where `oneshot` takes each block to the GPU
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    forget(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        module.config.save_pretrained(folder)
        module.config.name_or_path = folder  # where `oneshot` looks whether the model is compressed already
        started = now(arguments.device)
        oneshot(
            model=module,
            processor=object(),  # there is no text to cut into tokens
            dataset=DataLoader(examples, batch_size=1),
            recipe=peer_recipe(name, arguments),
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            pipeline="sequential",
        )
        seconds = now(arguments.device) - started
    peak = torch.cuda.max_memory_allocated() / GIB if arguments.device == "cuda" else None
    return {"method": name, "seconds_per_block": seconds / blocks, "peak_gib": peak, "total_seconds": seconds}


def peer_recipe(name: str, arguments: argparse.Namespace) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=arguments.group_size)
    target = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
        "ignore": ["lm_head"],
    }
    if name == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(**target)]
    if name == "awq":
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(n_grid=20), QuantizationModifier(**target)]
    from llmcompressor.modifiers import pruning

    kind = {"sparsegpt": pruning.SparseGPTModifier, "wanda": pruning.WandaPruningModifier}[name]
    return [kind(sparsity=float(arguments.sparsity), mask_structure="0:0", ignore=["re:.*lm_head"])]


# -------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Check, time, run, and print a short table last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in (("hidden", 4096), ("intermediate", 11008), ("heads", 32), ("blocks", 4), ("samples", 128),
                          ("window", 2048), ("vocabulary", 32000), ("group-size", 128)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--key-value-heads", type=int)
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--sequential", default="linear", choices=["linear", "block"], help="of GPTQ")
    parser.add_argument("--working-memory-gib", type=float, default=4.0)
    parser.add_argument("--methods", default="gptq,awq,sparsegpt,wanda", type=lambda text: text.split(","))
    parser.add_argument("--whole", type=int, default=0, help="also time GPTQ on a model of so many blocks")
    parser.add_argument("--peer", action="store_true", help="run llm-compressor beside it")
    parser.add_argument("--skip", default="", help="checks, pieces, methods: comma between")
    parser.add_argument("--json", help="file for everything that was measured")
    arguments = parser.parse_args()
    skipped = arguments.skip.split(",")
    print(machine(arguments), flush=True)
    report: dict[str, Any] = {
        "machine": machine(arguments),
        "date": datetime.now(UTC).date().isoformat(),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
        "methods": [],
        "peer": [],
    }
    failures: list[str] = []
    if "checks" not in skipped:
        checks = check_pieces(arguments)
        report["checks"] = checks.rows
        failures += [f"check: {name}: {text}" for name, good, text in checks.rows if not good]
    if "pieces" not in skipped:
        report["pieces"] = time_pieces(arguments)
    windows = windows_of(arguments)
    jobs: list[tuple[str, str, Callable, int]] = []
    if "methods" not in skipped:
        for name in arguments.methods:
            jobs.append(("methods", name, run_method, arguments.blocks))
            if arguments.peer:
                jobs.append(("peer", name, run_peer, arguments.blocks))
    if arguments.whole:
        jobs.append(("methods", "gptq", run_method, arguments.whole))
    for side, name, job, blocks in jobs:
        try:
            report[side].append(job(name, arguments, blocks, windows))
            print(json.dumps(report[side][-1]), flush=True)
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{side} {name}: {type(error).__name__}: {str(error)[:200]}")
        forget(arguments.device)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print_table(report, arguments)
    for line in failures:
        print(f"FAILED {line}")
    sys.exit(bool(failures))


def machine(arguments: argparse.Namespace) -> str:
    import transformers

    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    options = " ".join(sys.argv[1:]).replace(f"--json {arguments.json}", "").strip()  # a folder of this machine
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {options}"


def print_table(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """A line for each run: seconds a block, peak, parts in milliseconds a block, floors; where the peak is."""
    columns = (*PARTS, "other")
    print("\n" + report["machine"])
    print(
        f"{'method':10} {'blocks':>6} {'s/block':>8} {'target':>6} {'first':>6} {'total':>6} {'GiB':>6} {'limit':>6}  "
        + " ".join(f"{part:>8}" for part in columns)
        + "   TFLOP     GB   (parts in ms a block)"
    )
    for run in report["methods"]:
        floor, name = floors(arguments, run["method"]), run["method"]
        parts = " ".join(f"{run['parts_seconds_per_block'][part] * 1e3:8.1f}" for part in columns)
        peak = "-" if run["peak_gib"] is None else f"{run['peak_gib']:.2f}"
        print(
            f"{name:10} {run['blocks']:6} {run['seconds_per_block']:8.3f} {TARGET_SECONDS[name]:6} "
            f"{run['first_block_seconds']:6.2f} {run['total_seconds']:6.1f} {peak:>6} {PEER_GIB[name] / 2:6.2f}  "
            f"{parts} {floor['tflop']:7.1f} {floor['gigabytes']:6.1f}"
        )
        if run.get("peak_gib_of_parts"):
            where = sorted(run["peak_gib_of_parts"].items(), key=lambda item: -item[1])
            print("  peak GiB while in " + ", ".join(f"{part} {peak:.2f}" for part, peak in where))
        if run["blocks"] == arguments.whole:
            print(
                f"  {run['blocks']} blocks: {run['total_seconds']:.1f} s of compress (at most {WHOLE_SECONDS} for 32)"
            )
    for run in report["peer"]:
        peak = "-" if run["peak_gib"] is None else f"{run['peak_gib']:.2f}"
        print(f"peer {run['method']:10} {run['seconds_per_block']:8.3f} s/block, peak {peak} GiB")


if __name__ == "__main__":
    main()
