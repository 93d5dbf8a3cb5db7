"""What a probe is, what it may use, and the evaluator that runs every probe on a model in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from harness.records import Measurement, measurement_from_json, write_json_atomically

if TYPE_CHECKING:
    from harness.corpus import Corpus
    from harness.environment import Hardware
    from harness.method import LanguageModel, Progress

Stage = Literal["evaluate", "time"]


@dataclass(frozen=True)
class Context:
    """All that a probe may use besides the model."""

    corpus: Corpus
    hardware: Hardware
    artifact: Path  # the folder that the model was loaded from
    samples: Path  # where this run keeps token losses, question outcomes and raw timings
    reference: Path | None  # the same folder of the dense run; None when this is the dense run itself
    cache: Path  # files worth keeping between runs: downloads, measured ceilings
    seed: int
    progress: Progress


class Probe(Protocol):
    """Measures one aspect of a model through its engine, or counts the module; never asks how it was compressed.

    `stage` says in which process it runs: "evaluate" (quality; the engine is prepared for scoring) or
    "time" (speed and memory; a fresh process, the engine prepared for decoding).
    `compares` is true when it reads the outcomes of the dense run (`context.reference`).
    `needs`, where a probe has it, names what the engine must give beyond scores and tokens: "hidden states",
    "caches", "requests" (see harness.engines.choice).
    """

    stage: Stage
    compares: bool

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """The measurements, in the order a reader expects them."""


def run_probes(
    probes: Sequence[Probe], lm: LanguageModel, context: Context, stage: Stage, kept: Path
) -> list[Measurement]:
    """What the probes of one stage measure, in their order; the engine is prepared for that stage first.

    Each probe's measurements are kept in `kept/<index>-<class>.json` as soon as it is done, and a probe found there
    is not run again: an evaluation that was killed goes on where it stopped.
    A probe with a true `ends_stage` leaves the model in another state and therefore runs after the others.
    """
    files = _files(probes, stage, kept)
    remaining = [path for path in files if not path.exists()]
    if remaining:
        import torch

        hardware = context.hardware
        if stage == "evaluate":
            lm.engine.prepare("scoring", getattr(torch, hardware.scoring_dtype))
        else:
            lm.engine.prepare("decoding", getattr(torch, hardware.resolved_decoding_dtype()))
    for path in sorted(remaining, key=lambda path: getattr(files[path], "ends_stage", False)):
        measured = [_plain(measurement) for measurement in files[path].measure(lm, context)]
        write_json_atomically(measured, path)
    return _read(files)


def kept_measurements(probes: Sequence[Probe], stage: Stage, kept: Path) -> list[Measurement] | None:
    """What all probes of a stage have left in `kept`, as `run_probes` returns it; None where one is still to run."""
    files = _files(probes, stage, kept)
    return _read(files) if all(path.exists() for path in files) else None


def _files(probes: Sequence[Probe], stage: Stage, kept: Path) -> dict[Path, Probe]:
    """Where the measurements of each probe of a stage are kept, in the order of the probes."""
    names = {kept / f"{index}-{type(probe).__name__}.json": probe for index, probe in enumerate(probes)}
    return {path: probe for path, probe in names.items() if probe.stage == stage}


def _read(files: Iterable[Path]) -> list[Measurement]:
    return [measurement_from_json(data) for path in files for data in json.loads(path.read_text(encoding="utf-8"))]


def _plain(measurement: Measurement) -> dict[str, Any]:
    """Plain JSON values; NaN and infinity, which JSON lacks, become None."""
    data = asdict(measurement)
    if data["value"] is not None and not isfinite(data["value"]):
        data["value"] = None
    if data["interval"] is not None and not all(map(isfinite, data["interval"])):
        data["interval"] = None
    return data
