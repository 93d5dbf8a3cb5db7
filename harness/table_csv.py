"""Every measurement of records as CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from harness import markup
from harness.records import RunRecord
from harness.rows import (
    activation_bits,
    group_of,
    hardware_name,
    key_value_bits,
    machine_in_words,
    name_of,
    sparsity_of,
    title_of,
)

CSV_HEADS = (
    *("model", "hardware", "machine", "group", "method", "title", "bits", "activation_bits", "key_value_bits"),
    *("sparsity", "status", "failed_stage", "failure_reason", "metric", "value", "low", "high", "unit", "on", "better"),
    *("note", "finished", "record", "baseline"),
)


def to_csv(records: Iterable[RunRecord]) -> str:
    """One row per measurement, nothing rounded or left out; a failed run without any has one row of its own.

    Text that a spreadsheet would run as a formula is quoted.
    """
    word = cache(_csv_word)  # the same few stand in every row

    def cells(values: Iterable[Any]) -> str:
        return ",".join([word(v) if isinstance(v, str) else "" if v is None else str(v) for v in values])

    words = cache(lambda *texts: cells(texts))
    lines = [",".join(CSV_HEADS)]
    for record in records:
        group, failure = group_of(record), record.failure
        run = cells(
            (
                *(record.model, hardware_name(record), machine_in_words(record)),
                group.key if group else str(record.card.get("taxonomy", "")),
                *(name_of(record), title_of(record), record.bits, activation_bits(record), key_value_bits(record)),
                *(sparsity_of(record), record.status),
                *((failure.stage, failure.reason) if failure else (None, None)),
            )
        )
        source = cells((record.finished, record.id, record.baseline))
        numbers = record.number_texts.split("\n") if record.measurements else []
        for m, number in zip(record.measurements, numbers, strict=True):
            lines.append(f"{run},{word(m.metric)},{number},{words(m.unit, m.on, m.better, m.note)},{source}")
        if not record.measurements:
            lines.append(f"{run},{cells([None] * 8)},{source}")
    return "\n".join(lines) + "\n"


def _csv_word(text: str) -> str:
    """A cell of text: no formula, quoted where it must be (RFC 4180)."""
    safe = markup.csv(text)
    return '"' + safe.replace('"', '""') + '"' if re.search('[",\r\n]', safe) else safe
