"""How long tables take over 10,000 records, and how much memory: made from published ones, read and printed.

    python tests/benchmarks/ten_thousand_records.py [records=10000] [folder=DIR] [repeats=3]

Records are copies of published ones under new ids, spread over ten models, with an error for each of 210 linears where
the original has weights that changed. Every command runs in a process of its own: start, imports, reading, writing the
table in four formats. The first one reads every file, the others what it left in a cache of their own: of `repeats`
runs, the median is printed, and the fastest to the slowest. Memory is that of the command and of the second process
that it makes where two cores are free, pages that both use counted once. The exit status is 1 where a target is missed.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINEARS = [
    f"model.layers.{block}.{part}_proj"
    for block in range(30)
    for part in (*(f"self_attn.{p}" for p in "qkvo"), *(f"mlp.{p}" for p in ("gate", "up", "down")))
]
COMMANDS = {
    "table I, first": ["harness.tables", "table_1"],
    "table I, again": ["harness.tables", "table_1"],
    "all tables": ["harness.tables", "all"],
    "report, first": ["harness.report"],
    "report, again": ["harness.report"],
    "advice": ["harness.advise", "max_perplexity_increase=10%"],
}
TARGETS = {"table I, again": 2.0, "report, first": 15.0, "report, again": 15.0}  # seconds on two cores
MOST_BYTES = 500e6


def generate(folder: Path, count: int) -> None:
    """Write `count` records below `folder/records`."""
    published = ROOT / "results" / "published"
    originals = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(published.glob("*/records/*/*.json"))]
    rng = random.Random(0)
    for index in range(count):
        record = dict(originals[index % len(originals)])
        record["id"] = f"{index:012x}"
        record["model"] = f"model-{index // len(originals) % 10}"
        record["config"] = {**record["config"], "seed": index // len(originals) // 10}
        record["config"]["model"] = {**record["config"]["model"], "name": record["model"]}
        if record["card"]["name"] != "dense":
            for field in ("layer_errors", "layer_output_errors"):
                record[field] = {name: float(f"{rng.lognormvariate(-5, 1):.3g}") for name in LINEARS}
        path = folder / "records" / record["model"] / f"{record['card']['name']}-{record['id']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(arguments: list[str], results: Path, cache: Path) -> tuple[float, float, float]:
    """Seconds of wall time and of the processor, and peak bytes of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments, f"paths.results={results}"],
        cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    peaks = [0.0]
    watching = threading.Thread(target=watch, args=(process.pid, peaks))
    watching.start()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    watching.join()
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed: {errors}")
    return seconds, usage.ru_utime + usage.ru_stime, max(*peaks, usage.ru_maxrss * 1024)


def watch(process: int, peaks: list[float]) -> None:
    """Append the bytes that a process and those that it made use together, every 50 ms until it has ended."""
    try:
        while True:
            children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
            peaks.append(sum(map(share_of_memory, [str(process), *children])))
            time.sleep(0.05)
    except OSError:  # it has ended, or this is not Linux
        return


def share_of_memory(process: str) -> float:
    """Bytes of a process, of a page that n processes use an n-th; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0.0)


def main() -> int:
    """Print one line per command; return 1 where one misses its target."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count, repeats = int(options.get("records", 10_000)), int(options.get("repeats", 3))
    missed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.get("folder", temporary))
        if not (folder / "records").is_dir():
            generate(folder, count)
        size = sum(path.stat().st_size for path in folder.glob("records/*/*.json"))
        print(f"{count} records, {size / 1e6:.0f} MB of JSON")
        print(f"{'':<16} {'median':>8} {'fastest to slowest':>20} {'processor':>10} {'memory':>8}  targets")
        for title, arguments in COMMANDS.items():
            runs = 1 if title.endswith("first") else repeats
            if title == "report, first":
                shutil.rmtree(Path(temporary) / "cache")
            found = [measure(arguments, folder, Path(temporary) / "cache") for _ in range(runs)]
            seconds, processor, peak = (sorted(values) for values in zip(*found, strict=True))
            met = seconds[runs // 2] < TARGETS.get(title, math.inf) and peak[-1] < MOST_BYTES
            missed |= not met
            targets = [f"{TARGETS[title]:.0f} s"] if title in TARGETS else []
            print(
                f"{title:<16} {seconds[runs // 2]:6.2f} s {f'{seconds[0]:.2f} to {seconds[-1]:.2f} s':>20} "
                f"{processor[runs // 2]:8.2f} s {peak[-1] / 1e6:5.0f} MB  "
                f"{', '.join([*targets, f'{MOST_BYTES / 1e6:.0f} MB'])}: {'met' if met else 'MISSED'}",
                flush=True,
            )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
