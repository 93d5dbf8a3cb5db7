"""What stands around the numbers of a block: the protocol above them, the footnotes of each row below."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from harness.columns import PROTOCOL_METRICS, QUANTITIES, Column, batch_of
from harness.environment import DISTURBED, FOREIGN
from harness.records import OFF_GRID, REMOVED_SHARE, WITH_ZEROS, Measurement, RunRecord
from harness.rows import engine_name, lines_of, name_of, shortened, sparsity_of, title_of
from harness.sanity import AT_CHANCE
from harness.taxonomy import DENSE

PROTOCOLS = (  # above a block
    ("perplexity", "Perplexity"),
    ("word_perplexity", "Perplexity per word"),
    ("accuracy", "Tasks"),
)


def remarks_of(record: RunRecord, beside: Sequence[RunRecord] = ()) -> list[str]:
    """Footnotes of a row: departures from the paper, what its author must say, what else runs it, why it has gaps.

    beside: the other rows of the block; a stack is compared with its steps among them.
    """
    remarks = [*lines_of(record, "departures"), *lines_of(record, "notes"), *_additivity(record, beside)]
    remarks += [*_removal(record, beside), *_zeros(record), *_off_grid(record)]
    if record.card.get("runtime"):
        remarks.append(f"other runtimes: {record.card['runtime']}")
    if record.failure:
        remarks.append(shortened(f"failed in {record.failure.stage}: {record.failure.reason}"))
    noted = [m for m in record.measurements if m.note]
    remarks += [
        shortened(f"{m.metric} not measured ({m.on}): {m.note}")
        for m in noted
        if m.value is None and m.metric in {q.metric for q in QUANTITIES}
    ]
    remarks += [
        shortened(f"{m.metric} {_with_rounded_load(m.note)}")  # e.g. a baseline outside its anchor
        for m in noted
        if m.metric in ("perplexity", "compress_seconds") and m.value is not None and "collapsed" not in m.note
    ]
    remarks += [*_guesses(noted), *_doubts_about_speed(noted)]
    return remarks


def _additivity(record: RunRecord, beside: Sequence[RunRecord]) -> list[str]:
    """What a stack's steps cost alone, what that predicts if losses (nats per token) add up, what was measured."""
    steps = (record.config.get("method") or {}).get("steps") or []
    if not steps:
        return []
    dense = next((r for r in beside if name_of(r) == DENSE.name), None)
    alone = [next((r for r in beside if r.config.get("method") == step), None) for step in steps]
    found = [r.find("perplexity") if r else None for r in (dense, record, *alone)]
    if any(m is None or m.value is None for m in found):
        return []
    start, measured, *parts = (math.log(m.value) for m in found)
    predicted = math.exp(start + sum(part - start for part in parts))
    listed = ", ".join(f"{title_of(r)} {math.exp(part):.4g}" for r, part in zip(alone, parts, strict=True))
    return [
        f"alone: {listed}; if their losses added up, {predicted:.4g}; measured {math.exp(measured):.4g} "
        f"({math.exp(measured) / predicted - 1:+.1%})"
    ]


def _removal(record: RunRecord, beside: Sequence[RunRecord]) -> list[str]:
    """What a structured pruner took out, beside what it was asked for, and the parameters that are left."""
    reached = record.curves.get(REMOVED_SHARE)
    if not reached:
        return []
    parts = [f"{reached[-1][1]:.1%} of the blocks' weights removed, {sparsity_of(record)} asked for"]
    dense = next((r for r in beside if name_of(r) == DENSE.name), None)
    left, whole = (r.value("parameters") if r else None for r in (record, dense))
    if left and whole:
        parts.append(f"{left:,.0f} of {whole:,.0f} parameters left ({left / whole - 1:+.1%})")
    return ["; ".join(parts)]


def _zeros(record: RunRecord) -> list[str]:
    """That zeros were multiplied like other numbers, where no speed column says which kernel ran."""
    loaded = record.find("loaded_weight_bytes")
    if record.find("time_per_output_token_ms") or loaded is None or WITH_ZEROS not in loaded.note:
        return []
    return [f"runs {WITH_ZEROS}: no faster than dense"]


def _off_grid(record: RunRecord) -> list[str]:
    """That a stack has no longer the bit-width that its row names."""
    off = record.curves.get(OFF_GRID)
    return [f"{off[-1][1]:.0f} linears left the grid of an earlier step and are stored in 16 bits"] if off else []


def _guesses(noted: Sequence[Measurement]) -> list[str]:
    """Tasks whose right answers may all be luck, with what luck gives."""
    found = [
        (m.on.partition(" ")[0], re.fullmatch(rf"(?:collapsed|{AT_CHANCE}) \((\d+ %)\)", m.note))
        for m in noted
        if m.metric == "accuracy"
    ]
    tasks = [f"{task} ({luck[1]})" for task, luck in found if luck]
    return [shortened(f"{AT_CHANCE}: {', '.join(tasks)}")] if tasks else []


def _doubts_about_speed(noted: Sequence[Measurement]) -> list[str]:
    """What a reader must know before trusting the times: foreign load, repeats that did not settle."""
    doubts: dict[str, list[str]] = {}
    load = 0
    for m in noted:
        if m.metric == "time_per_output_token_ms":
            for part in m.note.split("; ")[1:]:
                disturbed = re.match(FOREIGN, part)
                load = max(load, int(disturbed[1]) if disturbed else 0)
                if not re.fullmatch(r"\d+ requests", part):
                    key = DISTURBED if disturbed else part
                    doubts.setdefault(key, []).append(m.on.partition(",")[0].removeprefix("batch "))
    return [
        shortened(f"speed at batch {', '.join(dict.fromkeys(on))}: {_by(load) if doubt == DISTURBED else doubt}")
        for doubt, on in doubts.items()
    ]


def _with_rounded_load(note: str) -> str:
    return re.sub(FOREIGN, lambda load: _by(int(load[1])), note)


def _by(load: int) -> str:
    """Foreign load in percent to one digit (two below 20, 200, …), upwards: rows disturbed alike share a footnote."""
    digits = str(load)
    step = 10 ** max(0, len(digits) - (2 if digits[0] == "1" else 1))
    return f"{DISTURBED} up to {-(-load // step) * step} % of the cores meanwhile"


def protocol_lines(records: list[RunRecord], columns: list[Column], kernel: str) -> list[str]:
    """What a reader must know before the numbers: model, workloads, text, arithmetic, versions, dates."""
    models = _different(record.config.get("model") for record in records)
    notes = dict.fromkeys(str((model or {}).get("note") or "") for model in models)
    lines = [f"Model: {shortened(note)}" for note in notes if note]
    for metric, words in PROTOCOLS:
        on = [c.on for c in columns if c.quantity.metric == metric and c.on]
        if on:
            lines.append(f"{words}: {'; '.join(dict.fromkeys(on))}")
    if any(c.quantity.metric in ("kl_divergence", "top1_agreement") for c in columns):
        lines.append("KL(dense ‖ row) per token and top-1 agreement: against the dense run on the same windows")
    speed = [c for c in columns if c.quantity.metric in PROTOCOL_METRICS and c.on and batch_of(c.on) < math.inf]
    if speed:
        on = "; ".join(f"{heads} at {on}" for on, heads in _heads_by_workload(speed).items())
        lines.append(f"Speed: {on}" + (f"; {kernel}" if kernel and not on.endswith(kernel) else ""))
    load = [f"{c.head}: {c.on}" for c in columns if c.quantity.metric == "requests_per_second" and c.on]
    if load:
        lines.append(f"Load: {'; '.join(load)}")
    calibrations = _different(r.config.get("calibration") for r in records if name_of(r) != DENSE.name)
    calibration = {json.dumps(settings, sort_keys=True) for settings in calibrations}
    calibration.discard("null")
    if len(calibration) == 1:
        settings = json.loads(calibration.pop())
        if isinstance(settings, dict):
            texts = [text for text in _different(record.environment.get("text") for record in records) if text]
            source = _distinct(text["calibration"]["name"] for text in texts if text.get("calibration"))
            domain = "in the domain of the evaluation" if any(t.get("calibrated_in_domain") for t in texts) else ""
            facts = [source, *(f"{key} {value}" for key, value in settings.items()), domain]
            lines.append("Calibration: " + ", ".join(filter(None, facts)))
    known = {
        key: [value for value in _different(record.environment.get(key) for record in records) if value]
        for key in ("engine_versions", "scoring_dtype", "decoding_dtype", "threads", "versions", "source")
    }
    if engine_name(records[0]):
        outside = _distinct(
            f"{package} {version}" for versions in known["engine_versions"] for package, version in versions.items()
        )
        lines.append(f"Engine: {engine_name(records[0])}, in an interpreter of its own ({outside})")
    facts = [
        _distinct(f"{dtype} scoring" for dtype in known["scoring_dtype"]),
        _distinct(f"{dtype} decoding" for dtype in known["decoding_dtype"]),
        _distinct(f"{threads} {'thread' if threads == 1 else 'threads'}" for threads in known["threads"]),
    ]
    for package in ("torch", "transformers"):
        facts.append(_distinct(f"{package} {v[package]}" for v in known["versions"] if package in v))
    days = sorted({r.finished[:10] for r in records if r.finished})
    if days:
        facts.append(f"measured {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else ""))
    facts.append(_commits(known["source"]))
    lines.append(", ".join(filter(None, facts)))
    return [line for line in lines if line]


def _heads_by_workload(columns: list[Column]) -> dict[str, str]:
    heads: dict[str, list[str]] = {}
    for column in columns:
        heads.setdefault(column.on or "", []).append(column.head.removesuffix(" ms"))
    return {on: ", ".join(names) for on, names in heads.items()}


def _different(values: Iterable[Any]) -> list[Any]:
    """These values in order, without those that are the same object as an earlier one: most are, in many records."""
    return list({id(value): value for value in values}.values())


def _distinct(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _commits(sources: list[dict[str, Any]]) -> str:
    found = _distinct(
        f"{s['commit'][:8]}{' with changes' if s.get('dirty') else ''}" for s in sources if s.get("commit")
    )
    return f"commit {found}" if found else ""
