"""A sweep that is killed again and again leaves what an undisturbed one leaves.

    python tests/benchmarks/kill_sweep.py [moments=50] [seed=0]

A sweep over the tiny model is killed with SIGKILL at a random moment, half of the time alone and half with all its
processes, and started again, until it finishes; then the next one begins in a new folder, until there were as many
kills as asked for. After each kill every file of records, reports of stages and kept measurements must be whole, and
what was there before must be untouched; in the end every number but times must be that of the undisturbed sweep.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.records import read_records

ROOT = Path(__file__).resolve().parents[2]
SWEEP = ["-m", "method=rtn,gptq", "bits=4", "model=tiny", "corpus=generated", "calibration=smoke"]
SWEEP += ["evaluation=smoke", "tracker=none", "hardware.threads=1"]
# the sweep itself, without libraries that none of its probes needs: starting takes most of the time otherwise
START = "import harness.cli, harness.stages as stages; stages.PRELOAD = stages.PRELOAD[:4]; harness.cli.main()"
SHARE_WHILE_STARTING = 0.1  # of the kills: before the sweep says its first word, which takes most of its time


def quality(results: Path) -> dict[tuple, dict[tuple, tuple]]:
    """What two sweeps agree on to the last bit: every number of every record but times and the memory of processes."""
    return {
        (record.card["name"], record.bits, record.status, record.id, record.artifact.get("sha256")): {
            (m.metric, m.on): (m.value, m.interval)
            for m in record.measurements
            if m.unit not in ("s", "ms", "tokens/s", "requests")
            and m.metric not in ("peak_memory_bytes", "peak_compress_bytes", "decode_roofline_fraction")
        }
        for _, record in read_records(results)
    }


def finished_work(results: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file that says something is done: its inode, its time of change, its content. All must be whole JSON."""
    found = {}
    for pattern in ("records/*/*.json", "scratch/artifacts/*/stage.json", "scratch/measurements/*/*.json"):
        for path in results.glob(pattern):
            content, state = path.read_bytes(), path.stat()
            json.loads(content)
            found[str(path.relative_to(results))] = (state.st_ino, state.st_mtime_ns, content)
    return found


def drafts(results: Path) -> list[Path]:
    """Unfinished files beside records, models and measurements. Statistics, which sweeps share, may keep some."""
    return [path for path in results.rglob("*.partial") if "statistics" not in path.parts]


def start(arguments: list[str], results: Path) -> subprocess.Popen:
    """The sweep in a session of its own."""
    command = [sys.executable, "-c", START, *arguments, f"paths.results={results}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def killed_at(arguments: list[str], results: Path, wait: float, after_first_word: bool, whole: bool) -> str | None:
    """Run the sweep for `wait` seconds and kill it; what it said when it was faster, None when it was killed.

    whole: with all its processes, as when a machine loses power; otherwise alone, as by the system for its memory.
    """
    before = finished_work(results)
    sweep = start(arguments, results)
    said = sweep.stdout.readline() if after_first_word else ""
    killed = False
    try:
        said += sweep.communicate(timeout=wait)[0]
    except subprocess.TimeoutExpired:
        killed = True
        os.killpg(sweep.pid, signal.SIGKILL) if whole else os.kill(sweep.pid, signal.SIGKILL)
        sweep.communicate()
    after = finished_work(results)
    repeated = [path for path, state in before.items() if after.get(path) != state]
    assert not repeated, f"finished work was repeated or lost: {repeated}"
    assert killed or sweep.returncode == 0, said
    return None if killed else said


def main(arguments: list[str]) -> None:
    """Kill, start again, compare; print what was seen."""
    options: dict[str, Any] = {"moments": 50, "seed": 0}
    options |= {key: int(value) for key, _, value in (argument.partition("=") for argument in arguments)}
    rng = random.Random(options["seed"])
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as temporary:
        undisturbed = Path(temporary) / "undisturbed"
        sweep = start(SWEEP, undisturbed)
        first = time.monotonic()
        sweep.stdout.readline()
        begun = time.monotonic()
        said = sweep.communicate()[0]
        starting, working = begun - first, time.monotonic() - begun
        assert sweep.returncode == 0, said
        expected = quality(undisturbed)
        print(f"undisturbed: {starting:.1f} s to start, {working:.1f} s of work, {len(expected)} records", flush=True)
        kills = sweeps = 0
        while kills < options["moments"]:
            results, sweeps = Path(temporary) / str(sweeps), sweeps + 1
            here = 0
            while True:
                early = rng.random() < SHARE_WHILE_STARTING
                last = kills >= options["moments"]
                wait = 3600 if last else rng.uniform(0, starting if early else working)
                if killed_at(SWEEP, results, wait, not early, whole=rng.random() < 0.5) is not None:
                    break
                kills, here = kills + 1, here + 1
                done = len(list(results.glob("records/*/*.json")))
                print(f"kill {kills}: after {wait:.2f} s{' of starting' if early else ''}, {done} records", flush=True)
            assert quality(results) == expected, f"other numbers after {here} kills"
            assert not drafts(results), f"drafts are left: {drafts(results)}"
            print(f"sweep {sweeps}: finished after {here} kills, every number equal", flush=True)
    print(f"{kills} kills, {sweeps} sweeps: nothing lost, torn or repeated")


if __name__ == "__main__":
    main(sys.argv[1:])
