"""What the machine can do at most: how fast it reads memory, how fast it multiplies matrices.

Measured once per machine and thread count and kept; every speed is also reported as a share of the limit that these
two numbers set. Datasheets promise more than a process gets.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.environment import Hardware, machine_fingerprint
from harness.records import write_json_atomically

if TYPE_CHECKING:
    import torch

REPEATS = 7
READ_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # well beyond every cache
MATRIX_ROWS = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """read_bytes_per_second: one pass over memory; matmul_flops_per_second: a square product in `dtype`."""

    read_bytes_per_second: float
    matmul_flops_per_second: float
    dtype: str
    threads: int


def ceilings(hardware: Hardware, dtype: str, cache: Path, clock: Callable[[], float] = time.perf_counter) -> Ceilings:
    """The ceilings of this machine with these threads in this dtype, measured at first use and kept in `cache`."""
    name = f"{machine_fingerprint()}-{hardware.device}-{hardware.thread_count}-{dtype}.json"
    path = cache / "ceilings" / name.replace(":", "_")
    if path.exists():
        return Ceilings(**json.loads(path.read_text(encoding="utf-8")))
    measured = _measure(hardware, dtype, clock)
    write_json_atomically(asdict(measured), path)
    return measured


def _measure(hardware: Hardware, dtype: str, clock: Callable[[], float]) -> Ceilings:
    """Best of several runs each: foreign load can only make a ceiling look lower."""
    import torch

    device = torch.device(hardware.device)
    block = torch.ones(READ_BYTES[device.type] // 4, device=device)
    read = min(_timed(block.sum, device, clock) for _ in range(REPEATS))
    rows = MATRIX_ROWS[device.type]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, rows, generator=generator).to(device, getattr(torch, dtype))
    product = min(_timed(lambda: matrix @ matrix, device, clock) for _ in range(REPEATS))
    return Ceilings(
        read_bytes_per_second=block.numel() * block.element_size() / read,
        matmul_flops_per_second=2 * rows**3 / product,
        dtype=dtype,
        threads=hardware.thread_count,
    )


def _timed(work: Callable[[], torch.Tensor], device: torch.device, clock: Callable[[], float]) -> float:
    import torch

    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started
