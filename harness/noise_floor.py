"""How far apart two runs of one and the same configuration lie on this machine.

    python -m harness.noise_floor method=gptq bits=4 [runs=5] [any override of a run]

Runs the configuration several times, each time from the start (the dense run that it is compared with once), and keeps
for every number what two such runs differ by less than 95 times in 100, as a share of its median (Student's t on the
runs' spread). `harness.verify`, the tables and the advice take a difference below it for noise, whatever configuration
it is of. It lies beside the ceilings of the machine in the cache; a folder `noise_floor` in a results folder is read as
well.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import markup
from harness.environment import DISTURBED, fingerprint_of
from harness.errors import ConfigError, RunError
from harness.records import RunRecord, write_json_atomically
from harness.statistics import difference_quantile

FOLDER = "noise_floor"
RUNS = 5
FEWEST_RUNS = 3
SPEED_RELATIVE = 0.10
COMPRESS_RELATIVE = 0.30
SPEED_SUFFIXES = ("_ms", "_per_second", "_seconds")
SPEED_WORDS = ("roofline", "bandwidth", "speedup", "energy", "exponent")
MACHINE = {"processor", "cores", "architecture", "gpus"}  # what a fingerprint is made of


@dataclass(frozen=True)
class NoiseFloor:
    """What was found on one machine.

    machine: as records describe it; device, threads: of the hardware section; runs: how many; of: their configuration
    in words; spreads: metric → workload → share of the median; disturbed: runs beside which other processes computed.
    """

    machine: dict[str, Any]
    device: str
    threads: int
    runs: int
    of: str
    measured: str  # ISO 8601, UTC
    spreads: dict[str, dict[str, float]]
    disturbed: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What records it is for."""
        return fingerprint_of(self.machine), self.device, self.threads

    def relative(self, metric: str, on: str) -> float | None:
        """The floor of a number as a share of it: of this workload, else the widest of its metric; None without any."""
        known = self.spreads.get(metric)
        return None if not known else known.get(on, max(known.values()))


@dataclass(frozen=True)
class NoiseFloors:
    """The floors of several machines; each record finds its own."""

    floors: dict[tuple[str, str, int], NoiseFloor] = field(default_factory=dict)
    _found: dict[tuple, NoiseFloor | None] = field(default_factory=dict, repr=False, compare=False)

    def of(self, record: RunRecord) -> NoiseFloor | None:
        """The floor of the machine, device and thread count that a record was made with."""
        if not self.floors:
            return None
        machine = record.environment.get("machine")
        if not isinstance(machine, dict) or not machine.keys() >= MACHINE:
            return None
        device = str((record.config.get("hardware") or {}).get("device", "cpu"))
        parts = (str(machine), device, record.environment.get("threads"))
        if parts not in self._found:
            self._found[parts] = self.floors.get((fingerprint_of(machine), *parts[1:]))
        return self._found[parts]

    def relative(self, record: RunRecord, metric: str, on: str) -> float | None:
        """The floor of one number of a record as a share of it; None where it was not measured."""
        floor = self.of(record)
        return None if floor is None else floor.relative(metric, on)


def assumed(metric: str) -> float:
    """What two runs are taken to differ by, as a share, where no floor was measured.

    Of times and what is made of them: speeds, energy, speed-ups. 0 for what repeats exactly.
    """
    if metric == "compress_seconds":
        return COMPRESS_RELATIVE
    return SPEED_RELATIVE if metric.endswith(SPEED_SUFFIXES) or any(word in metric for word in SPEED_WORDS) else 0.0


def read_floors(*folders: Path) -> NoiseFloors:
    """Every floor below `FOLDER/noise_floor`; of two for one machine the later folder's counts.

    Raises ConfigError for a file that is not one.
    """
    found = {}
    for path in (path for folder in folders for path in sorted((folder / FOLDER).glob("*.json"))):
        try:
            floor = NoiseFloor(**json.loads(path.read_text(encoding="utf-8")))
            found[floor.key] = floor
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is not a noise floor: {error}; delete it and run `make noise-floor`") from error
    return NoiseFloors(found)


def spreads_of(records: Sequence[RunRecord]) -> dict[str, dict[str, float]]:
    """Metric → workload → what two runs differ by less than 95 times in 100, as a share of the median of these runs.

    A number that one of them lacks, or whose median is 0, has none.
    """
    from statistics import median  # tables, which only read floors, need not wait for it

    spreads: dict[str, dict[str, float]] = {}
    for m in records[0].measurements:
        values = [record.value(m.metric, m.on) for record in records]
        if any(value is None for value in values) or not median(values):
            continue
        spreads.setdefault(m.metric, {})[m.on] = difference_quantile(values) / abs(median(values))
    return spreads


def measure(config: dict[str, Any], cache: Path, scratch: Path, runs: int, say: Callable[[str], None]) -> NoiseFloor:
    """Run one configuration `runs` times in the folder `scratch`. Raises RunError when a run fails."""
    from harness.run import Paths, describe, run

    paths = Paths(scratch, cache)
    records = []
    for index in range(runs):
        # what a run keeps for others of a sweep would spare the next one the work whose spread is asked for
        shutil.rmtree(paths.scratch / "statistics", ignore_errors=True)
        started = time.monotonic()
        outcome = run(config, paths, force=True, say=lambda _: None)
        if outcome.record is None or outcome.status != "finished":
            raise RunError(f"run {index + 1} of {runs} {outcome.status}: {outcome.reason}")
        records.append(outcome.record)
        say(f"run {index + 1} of {runs}: {outcome.title}, {time.monotonic() - started:.0f} s")
    last = records[-1]
    return NoiseFloor(
        machine=last.environment["machine"],
        device=str(config["hardware"]["device"]),
        threads=last.environment["threads"],
        runs=runs,
        of=describe(config),
        measured=last.finished,
        spreads=spreads_of(records),
        disturbed=sum(any(DISTURBED in m.note for m in record.measurements) for record in records),
    )


def report(floor: NoiseFloor) -> str:
    """One line per metric: the narrowest and the widest of its workloads."""
    lines = [f"{floor.runs} runs of {markup.plain(floor.of)}: two of them differ by less than this, 95 times in 100"]
    for metric, known in floor.spreads.items():
        low, high = min(known.values()), max(known.values())
        words = f"{low:.2%}" + (f" to {high:.2%}" if high > low else "") if high else "the same every time"
        lines.append(f"  {metric:<30} {words}")
    if floor.disturbed:
        lines.append(
            f"Other processes computed beside {floor.disturbed} of the runs, which raises the floor: real differences "
            "may pass for noise. Measure again when the machine is quiet"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 1 when a run failed; 2 for what was typed wrong."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    import tempfile

    from harness.cli import composed

    try:
        runs, overrides = _runs(arguments)
        config, paths, *_ = composed(overrides)
        paths.scratch.mkdir(parents=True, exist_ok=True)  # not /tmp, which may lie in the memory that is measured
        with tempfile.TemporaryDirectory(prefix="noise-", dir=paths.scratch) as folder:
            floor = measure(config, paths.cache, Path(folder), runs, lambda line: print(line, flush=True))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}; no noise floor was kept", file=sys.stderr)
        return 1
    fingerprint, device, threads = floor.key
    path = paths.cache / FOLDER / f"{fingerprint}-{device}-{threads}.json".replace(":", "_")
    write_json_atomically(asdict(floor), path)
    print(f"{report(floor)}\nkept: {path}")
    return 0


def _runs(arguments: Iterable[str]) -> tuple[int, list[str]]:
    runs, overrides = RUNS, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "runs":
            overrides.append(argument)
        elif not value.isdecimal() or int(value) < FEWEST_RUNS:
            raise ConfigError(f"runs={value}: must be a whole number of at least {FEWEST_RUNS}")
        else:
            runs = int(value)
    return runs, overrides


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
