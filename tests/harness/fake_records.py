"""Records as a run leaves them, with numbers that behave like real ones: for tests of whatever reads records."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.records import Failure, Measurement, RunRecord, write_record

QUICK = "wikipedia-sample evaluation, gptq-512, 16 windows"
CLOZE = "wikipedia_cloze v1, 0-shot, 200 of 300 questions (sample 0)"
LONG = "wikipedia-sample evaluation, gptq-1024, 32 windows"
EPYC = {"processor": "AMD EPYC 9B14", "cores": 2, "memory_bytes": 2**34, "architecture": "x86_64", "gpus": []}
XEON = {"processor": "Intel(R) Xeon(R) 8481C", "cores": 8, "memory_bytes": 2**35, "architecture": "x86_64", "gpus": []}
CARDS = {
    "dense": ("Dense", "baseline", []),
    "rtn": ("Round to nearest", "quantization/weight_only", []),
    "gptq": ("GPTQ", "quantization/weight_only", []),
    "awq": ("AWQ", "quantization/weight_only", ["no clipping of query and key projections"]),
    "wanda": ("Wanda", "pruning/unstructured", []),
    "minillm": ("MiniLLM", "distillation/white_box", []),
}
DENSE_PERPLEXITY = 19.83
SECONDS = {"rtn": 1.2, "gptq": 61.4, "awq": 88.1, "wanda": 31.0, "minillm": 900.0}


def record(
    name: str,
    bits: float | None = None,
    *,
    loss: float = 0.0,
    on: str = QUICK,
    machine: dict[str, Any] = EPYC,
    model: str = "smollm2-135m-gguf",
    method: dict[str, Any] | None = None,
    evaluation: str = "quick",
    batches: tuple[int, ...] = (1, 4),
    day: int = 22,
    card: dict[str, Any] | None = None,
) -> RunRecord:
    """A finished run whose perplexity is dense × exp(loss)."""
    title, taxonomy, departures = CARDS.get(name, (name.upper(), "", []))
    method = {
        "_target_": f"methods.{name}",
        **({"grid": {"bits": bits, "group_size": 64}} if bits else {}),
        **(method or {}),
    }
    config = {
        "method": method,
        "model": {"name": model, "revision": "abc"},
        "hardware": {"name": "cpu", "device": "cpu"},
        "corpus": {"name": "wikipedia-sample"},
        "calibration": {"samples": 16, "window": 512},
        "evaluation": {"name": evaluation, "probes": {}},
        "seed": 0,
    }
    identity = json.dumps([name, config, machine["processor"], on], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    noise = random.Random(digest)
    perplexity = DENSE_PERPLEXITY * math.exp(loss)
    stored = 2.69e8 * ((bits or 16) + 3) / 19
    kernel = "int4 packed (torch)" if bits == 4 else "dequantised" if bits else "dense matmul"
    token_ms = (9.1 if bits == 4 else 14.2) * noise.uniform(0.98, 1.02)
    measurements = [Measurement("perplexity", perplexity, "ppl", on, "lower", (perplexity * 0.96, perplexity * 1.04))]
    if name != "dense":
        spread = 0.008
        measurements += [
            Measurement(
                "perplexity_ratio",
                math.exp(loss),
                "ratio",
                on,
                "lower",
                (math.exp(loss - spread), math.exp(loss + spread)),
            ),
            Measurement("kl_divergence", 0.004 + 0.9 * abs(loss), "nats/token", on, "lower"),
            Measurement("top1_agreement", 0.98 * math.exp(-1.2 * abs(loss)), "share", on, "higher"),
        ]
    accuracy = 0.41 * math.exp(-loss)
    measurements.append(
        Measurement(
            "accuracy",
            accuracy,
            "share",
            CLOZE,
            "higher",
            (accuracy - 0.055, accuracy + 0.055),
        )
    )
    if name != "dense":
        gap = accuracy - 0.41
        measurements.append(
            Measurement(
                "accuracy_difference", gap, "share", CLOZE, "higher", (gap - 0.02, gap + 0.02), "McNemar p = 0.5"
            )
        )
    for batch in batches:
        workload = f"batch {batch}, prompt 128, 32 new"
        note = f"{kernel}, bfloat16"
        ms = token_ms * (1 + 0.2 * (batch - 1))
        measurements += [
            Measurement("time_to_first_token_ms", 40.3 * batch, "ms", workload, "lower", (39.0, 41.0), note),
            Measurement("time_per_output_token_ms", ms, "ms", workload, "lower", (ms * 0.98, ms * 1.02), note),
            Measurement("decode_tokens_per_second", 1000 * batch / ms, "tokens/s", workload, "higher", None, note),
        ]
    measurements += [
        Measurement("effective_bits_per_weight", (bits or 15.5) + 0.5, "bits", "decoder linears", "lower"),
        Measurement("stored_bytes", stored, "bytes", "artifact on disk", "lower"),
    ]
    if name in SECONDS:
        measurements.append(Measurement("compress_seconds", SECONDS[name], "s", "8192 calibration tokens", "lower"))
    return RunRecord(
        id=digest,
        status="finished",
        card={"name": name, "title": title, "taxonomy": taxonomy, "departures": departures, **(card or {})},
        model=model,
        bits=bits,
        config=config,
        measurements=measurements,
        cost={"compress_seconds": SECONDS.get(name)},
        environment={
            "machine": machine,
            "threads": machine["cores"],
            "scoring_dtype": "float32",
            "decoding_dtype": "bfloat16",
            "versions": {"torch": "2.13.0", "transformers": "5.20.0"},
            "source": {"commit": "0123456789abcdef", "dirty": False},
        },
        artifact={"path": digest, "bytes": int(stored), "sha256": "0" * 64},
        samples=f"samples/{model}/{digest}",
        finished=f"2026-11-{day:02d}T10:00:00+00:00",
    )


def failed(
    run: RunRecord, reason: str = "out of memory: 3.1 GB asked, 2.0 GB free", stage: str = "compress"
) -> RunRecord:
    """The same run, ended in a stage before anything was measured."""
    return replace(run, status="failed", measurements=[], artifact={}, failure=Failure(stage, reason))


def collapsed(run: RunRecord) -> RunRecord:
    """The same run with its perplexity flagged."""
    first, *rest = run.measurements
    return replace(run, measurements=[replace(first, note="collapsed: over 10 × dense"), *rest])


def sweep(**settings: Any) -> list[RunRecord]:
    """Dense, and three methods at 4 and 3 bits: AWQ 4 bits not to be told from dense, RTN 3 bits collapsed."""
    return [
        record("dense", **settings),
        record("rtn", 4, loss=0.09, **settings),
        collapsed(record("rtn", 3, loss=2.9, **settings)),
        record("gptq", 4, loss=0.031, **settings),
        record("gptq", 3, loss=0.28, **settings),
        record("awq", 4, loss=0.004, **settings),
        failed(record("awq", 3, **settings)),
    ]


def write_all(records: list[RunRecord], results: Path) -> None:
    """Put records where a run would."""
    for run in records:
        write_record(run, results / "records" / "model" / f"{run.card['name']}-{run.id}.json")
