"""How long tables take over 10,000 records, and how much memory: made from published ones, read and printed.

    python tests/benchmarks/ten_thousand_records.py [records=10000] [folder=DIR]

Records are copies of published ones under new ids, spread over ten models, with an error for each of 210 linears where
the original has weights that changed. Every command runs in a process of its own: start, imports, reading, writing the
table in four formats. The first one reads every file, the others what it left in a cache of their own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
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


def measure(arguments: list[str], results: Path, cache: Path) -> tuple[float, float, int]:
    """Seconds of wall time and of the processor, and peak bytes of one command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments, f"paths.results={results}"],
        cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed: {errors}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Print one line per command."""
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count = int(options.get("records", 10_000))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.get("folder", temporary))
        if not (folder / "records").is_dir():
            generate(folder, count)
        size = sum(path.stat().st_size for path in folder.glob("records/*/*.json"))
        print(f"{count} records, {size / 1e6:.0f} MB of JSON")
        for title, arguments in COMMANDS.items():
            seconds, processor, peak = measure(arguments, folder, Path(temporary) / "cache")
            print(f"{title:<16} {seconds:6.2f} s  {processor:6.2f} s of the processor  {peak / 1e6:6.0f} MB")


if __name__ == "__main__":
    main()
