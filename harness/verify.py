"""Run a record again and say for each number whether it falls within its noise.

    python -m harness.verify results/records/MODEL/NAME.json
    python -m harness.verify ID [paths.results=DIR]           a record by the start of its id

The run, its dense baseline included, goes into a fresh folder that is deleted afterwards. Noise is what `make
noise-floor` measured on this machine, where it did, else fixed tolerances.
Exit status: 0 all within, 1 something is not, 2 there is nothing to verify.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import environment, markup
from harness.errors import ConfigError, RunError
from harness.noise_floor import NoiseFloor, assumed, read_floors
from harness.options import RESULTS
from harness.records import Measurement, RunRecord, read_record
from harness.text_table import aligned
from harness.wheels import default_cache

QUALITY_RELATIVE = 1e-4  # scores on one machine repeat but for the order of additions in threads
QUALITY_ABSOLUTE = 1e-6  # where the value itself is zero: KL of the dense model with itself
MEMORY_PEAK_BYTES = 2**20  # a tiny model fits into what the process already holds, or just not
MEMORY_PEAK_RELATIVE = 0.10  # allocators and threads differ from run to run
# A quotient of a time and a difference of times: its noise has no bound where the two are close.
DERIVED = ("break_even_requests",)


@dataclass(frozen=True)
class Verdict:
    """One number, then and now.

    difference: new - old; None when one of them is missing.
    tolerance: largest |difference| that is noise; rule: where it comes from.
    """

    metric: str
    on: str
    unit: str
    old: float | None
    new: float | None
    difference: float | None
    tolerance: float
    rule: str
    within: bool


def compare(old: RunRecord, new: RunRecord, floor: NoiseFloor | None = None) -> list[Verdict]:
    """A verdict for each number of either record, in the order of the old one.

    floor: what two runs on this machine differ by; a number that it has no noise for is judged by fixed tolerances.
    A number that only one of them has is not within noise; one that neither could measure is.
    """
    keys = dict.fromkeys((m.metric, m.on) for record in (old, new) for m in record.measurements)
    return [_verdict(old.find(*key), new.find(*key), floor) for key in keys]


def _verdict(old: Measurement | None, new: Measurement | None, floor: NoiseFloor | None) -> Verdict:
    known = old or new
    assert known is not None, "the key came from one of the two"
    was, now = (m.value if m else None for m in (old, new))
    if known.metric in DERIVED:
        difference = None if was is None or now is None else now - was
        rule = "follows from numbers judged above"
        return Verdict(known.metric, known.on, known.unit, was, now, difference, math.inf, rule, True)
    tolerance, rule = _measured_tolerance(known, floor) or _tolerance(known.metric, known.unit, old, new)
    if was is None or now is None:
        both_missing = was is None and now is None and old is not None and new is not None
        rule = "not measured in either" if both_missing else "measured in one run only"
        return Verdict(known.metric, known.on, known.unit, was, now, None, 0.0, rule, both_missing)
    difference = now - was
    return Verdict(
        known.metric, known.on, known.unit, was, now, difference, tolerance, rule, abs(difference) <= tolerance
    )


def _measured_tolerance(number: Measurement, floor: NoiseFloor | None) -> tuple[float, str] | None:
    """The machine's own noise; None where it is not known, or no wider than what scores differ by anyway."""
    share = floor.relative(number.metric, number.on) if floor else None
    if share is None or number.value is None or share <= QUALITY_RELATIVE:
        return None
    return share * abs(number.value), f"noise floor, {share:.2%} ({floor.runs} runs)"


def _tolerance(metric: str, unit: str, old: Measurement | None, new: Measurement | None) -> tuple[float, str]:
    """The largest difference that is noise, and the rule it follows from."""
    size = abs(old.value) if old and old.value is not None else 0.0
    if share := assumed(metric):
        noise = max(_half_width(old), _half_width(new))
        if noise > share * size:
            return noise, "95 % interval"
        return share * size, f"{share:.0%} of {'compression time' if metric == 'compress_seconds' else 'speed'}"
    if "peak" in metric:
        if MEMORY_PEAK_RELATIVE * size < MEMORY_PEAK_BYTES:
            return MEMORY_PEAK_BYTES, "pages of the allocator"
        return MEMORY_PEAK_RELATIVE * size, f"{MEMORY_PEAK_RELATIVE:.0%} of peak memory"
    if unit in ("bytes", "bits"):
        return 0.0, "sizes are exact"
    return max(QUALITY_RELATIVE * size, QUALITY_ABSOLUTE), f"{QUALITY_RELATIVE:g} relative"


def _half_width(measurement: Measurement | None) -> float:
    if measurement is None or measurement.interval is None:
        return 0.0
    low, high = measurement.interval
    return (high - low) / 2


def circumstances(record: RunRecord, machine: dict[str, Any], versions: dict[str, str]) -> list[str]:
    """What is different from when the record was made: machine and versions, in words. Empty when nothing is."""
    then = record.environment.get("machine") or {}
    differing = [key for key in ("processor", "cores", "architecture", "gpus") if then.get(key) != machine.get(key)]
    lines = [f"another machine: {key} was {then.get(key)}, is {machine.get(key)}" for key in differing]
    before = record.environment.get("versions") or {}
    lines += [
        f"another version: {package} was {before.get(package, 'absent')}, is {versions.get(package, 'absent')}"
        for package in sorted({*before, *versions})
        if before.get(package) != versions.get(package)
    ]
    return lines


def report(verdicts: Sequence[Verdict]) -> str:
    """One aligned line per number."""
    head = ("", "metric", "on", "old", "new", "difference", "tolerance", "rule")
    lines = [
        (
            "ok" if v.within else "NO",
            f"{v.metric} [{v.unit}]" if v.unit else v.metric,
            markup.plain(v.on),
            _number(v.old),
            _number(v.new),
            "" if v.difference is None else f"{v.difference:+.3g}",
            f"{v.tolerance:.3g}",
            v.rule,
        )
        for v in verdicts
    ]
    return aligned([head, *lines], right=(3, 4, 5, 6))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}" if float(value).is_integer() else f"{value:.6g}"


def find_record(name: str, results: Path) -> Path:
    """The file of a record: a path, or the start of an id below `results`. Raises ConfigError when there is not one."""
    if Path(name).is_file():
        return Path(name)
    if name.endswith(".json") or "/" in name:
        raise ConfigError(f"{name}: there is no such file; records are in {results / 'records'}")
    found = sorted(p for p in (results / "records").glob("*/*.json") if p.stem.rpartition("-")[2].startswith(name))
    if not found:
        raise ConfigError(f"no record in {results / 'records'} has an id that starts with {name!r}")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} records have ids that start with {name!r}: {', '.join(p.name for p in found)}")
    return found[0]


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Path]]:
    """The record, and the folders. Raises ConfigError for anything else."""
    names, folders = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            names.append(argument)
        elif key in ("paths.results", "paths.cache"):
            folders[key] = Path(value)
        else:
            raise ConfigError(f"option {key!r} is neither paths.results nor paths.cache")
    if len(names) != 1:
        raise ConfigError(f"name one record, not {len(names)}")
    return names[0], folders


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when all numbers are within their noise, 1 when not, 2 when there is nothing to verify."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        name, folders = parse(arguments)
        path = find_record(name, folders.get("paths.results", RESULTS))
        record = read_record(path)
        if record.status != "finished":
            reason = f": {record.failure.reason}" if record.failure else ""
            raise ConfigError(f"{path} is the record of a failed run{reason}. There is no number to compare")
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    changed = circumstances(record, environment.machine(), environment.versions())
    for line in changed:
        print(f"not as recorded: {line}")
    if changed:
        print("Differences below may come from that.\n")
    try:
        cache = folders.get("paths.cache") or default_cache()
        floors = read_floors(cache, folders.get("paths.results", RESULTS))
        verdicts, notes = _run_again(record, cache, floors.of(record) if not changed else None)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was verified", file=sys.stderr)
        return 1
    outside = [v for v in verdicts if not v.within]
    print(f"\n{report(verdicts)}\n\n{notes}")
    print(f"{len(verdicts) - len(outside)} of {len(verdicts)} numbers within their noise")
    return 1 if outside else 0


def _run_again(record: RunRecord, cache: Path, floor: NoiseFloor | None) -> tuple[list[Verdict], str]:
    from harness.run import rerun

    with tempfile.TemporaryDirectory(prefix="harness-verify-") as folder:
        again = rerun(record, Path(folder), cache)
    same = record.artifact.get("sha256") == again.artifact.get("sha256")
    return compare(record, again, floor), f"artifact: {'the same bytes' if same else 'other bytes than recorded'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
