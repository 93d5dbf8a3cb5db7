"""The rows of experiment=large_shapes one after the other, within a time: shapes of 7B and 8B on one GPU.

    python tests/benchmarks/large_shapes.py --results DIR --seconds 530
    python tests/benchmarks/large_shapes.py --results DIR --models tiny --override hardware=cpu --override …

A row that is recorded is skipped, one for which too little time is left is not begun: the same command goes on there.
Each row's artifact (4 to 16 GB) is deleted once it is measured. Prints the tables last.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from harness import run
from harness.errors import ConfigError, RunError
from harness.records import RunRecord

ROWS = {  # overrides, and seconds that a row of 7B or 8B took at most on an H100 (estimated before the first run)
    "dense": (["method=dense"], 90),
    "gptq": (["method=gptq", "bits=4", "grid@method.grid=int_group128"], 130),
    "w8a8": (["method=smoothquant", "bits=8"], 100),
    "fp8": (["method=fp8"], 80),
    "rtn": (["method=rtn", "bits=4", "grid@method.grid=int_group128"], 80),
}
SHOWN = ("context_first_token_ms", "context_output_token_ms")


def main() -> None:
    arguments = parse()
    started, records = time.monotonic(), []
    for row in arguments.rows:
        for model in arguments.models:
            overrides, seconds = ROWS[row]
            left = arguments.seconds - (time.monotonic() - started)
            if left < seconds:
                print(f"{model} {row}: not begun, {left:.0f} s are left and it may take {seconds}", flush=True)
                continue
            common = [f"model={model}", f"paths.results={arguments.results}"]
            record = one(["experiment=large_shapes", *common, *overrides, *arguments.override])
            print(f"{model} {row}: {time.monotonic() - started:.0f} s since the start", flush=True)
            if record is not None:
                records.append(record)
                shutil.rmtree(arguments.results / "scratch" / "artifacts", ignore_errors=True)
    for record in records:
        print(grid(record))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=530)
    parser.add_argument("--models", nargs="*", default=["random-llama-7b", "random-llama-3.1-8b"])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--override", action="append", default=[], help="KEY=VALUE for every row")
    return parser.parse_args()


def one(overrides: list[str]) -> RunRecord | None:
    """The record of one row; a row that fails is said and does not end the others."""
    sys.argv[1:] = overrides  # a record holds the command that makes it
    try:
        return run(*overrides)
    except (ConfigError, RunError) as error:
        print(f"failed: {error}", flush=True)
        return None


def grid(record: RunRecord) -> str:
    """Milliseconds to the first and for each later token, by batch and context."""
    lines = [f"\n{record.model}, {record.card['title']} {record.bits or ''}, {record.value('compress_seconds')} s"]
    for m in record.measurements:
        if m.metric in SHOWN and (m.value is not None or "not read" not in m.note):
            value = m.note if m.value is None else f"{m.value:10.2f}"
            lines.append(f"  {m.metric.split('_')[1]:7} {m.on.rpartition(', ')[0]:40} {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
