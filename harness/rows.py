"""What a row says of its record besides the numbers: name, widths, place in the survey, machine."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import markup
from harness.environment import label
from harness.records import RunRecord
from harness.taxonomy import DENSE, GROUPS, SYSTEMS, Group, placement

_Settings = dict[str, Any]  # dotted name → value
GROUP_PLACES = {key: place for place, key in enumerate(GROUPS)}
SYSTEM_PLACES = {name: place for place, name in enumerate(SYSTEMS)}
LONGEST_TITLE = 32
MOST_WORDS = 4  # settings in brackets behind a title
LONGEST_NOTE = 400  # characters of a failure's reason below a table; the CSV file has all


def machine_in_words(record: RunRecord) -> str:
    """The machine in words: "AMD EPYC 9B14, 2 cores"."""
    machine = record.environment.get("machine") or {}
    if not isinstance(machine, dict):
        return str(machine)
    gpus = machine.get("gpus") or []
    counted = [f"{gpus.count(gpu)} × {gpu}" if gpus.count(gpu) > 1 else gpu for gpu in dict.fromkeys(gpus)]
    cores = f"{machine['cores']} cores" if "cores" in machine else ""
    return ", ".join(filter(None, [*counted, machine.get("processor", ""), cores])) or "unknown machine"


def engine_name(record: RunRecord) -> str:
    """The engine where it is not the one that records leave out."""
    return str((record.config.get("engine") or {}).get("name", ""))


def hardware_name(record: RunRecord) -> str:
    """The name of the hardware configuration."""
    return label(record.config.get("hardware") or {})


@dataclass(frozen=True)
class Description:
    """What a row of a table says of its record besides the numbers.

    bits: as `_widths` has it; sparsity: as asked for, "" without; group: None for a system that the survey has not.
    """

    name: str
    title: str
    bits: str
    sparsity: str
    group: Group | None
    hardware: str
    machine: str
    engine: str
    dense: bool
    collapsed: bool


def describe(record: RunRecord) -> Description:
    """The record in the words of the tables, for whatever shows records in another way."""
    sparsity = sparsity_of(record)
    return Description(
        name=name_of(record),
        title=title_of(record),
        bits=widths(record),
        sparsity="" if sparsity is None else str(sparsity),
        group=group_of(record),
        hardware=hardware_name(record),
        machine=machine_in_words(record),
        engine=engine_name(record),
        dense=name_of(record) == DENSE.name,
        collapsed=has_collapsed(record),
    )


def in_print_order(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Dense first, then as in the survey, then by settings; the order of the rows of `block_of`."""
    records = list(records)  # holds them, and so what an id stands for
    known: dict[tuple, tuple] = {}  # of a card and sections that are one object in many records
    return sorted(records, key=lambda record: (*_order(record, known), _natural(record.config.get("seed")), record.id))


def name_of(record: RunRecord) -> str:
    """What a user types after `method=`."""
    return str(record.card.get("name", ""))


def activation_bits(record: RunRecord) -> float | None:
    """Bits of what weights multiply; None where they are not quantized."""
    return record.card.get("activation_bits")


def key_value_bits(record: RunRecord) -> float | None:
    """Bits of cached keys and values; None where they are not quantized."""
    return record.card.get("key_value_bits")


def widths(record: RunRecord) -> str:
    """Bits of weights, of what they multiply, of cached keys and values: "4", "W4A8", "KV8", "W4A16KV8"."""
    weights, inputs, cached = record.bits, activation_bits(record), key_value_bits(record)
    if inputs is None and (cached is None or weights is None):
        return f"{weights:g}" if weights is not None else "" if cached is None else f"KV{cached:g}"
    return f"W{weights or 16:g}A{inputs or 16:g}" + ("" if cached is None else f"KV{cached:g}")


def group_of(record: RunRecord) -> Group | None:
    """The group of the survey, or of the card; None for a taxonomy that no table has."""
    return placement(name_of(record), str(record.card.get("taxonomy", "")))


def _order(record: RunRecord, known: dict[tuple, tuple]) -> tuple[tuple]:
    """Dense first; groups and systems as in the survey, others after them by name; bits downwards, sparsity upwards.

    Rows that agree in all of this stand by their settings, upwards: numbers by size, whatever their length.
    """
    sections = [record.config.get(name) for name in ("method", "calibration", "evaluation")]
    parts = (id(record.card), record.bits, *map(id, sections))
    if parts not in known:
        known[parts] = (_made_order(record, *sections),)
    return known[parts]


def _made_order(record: RunRecord, method: Any, calibration: Any, evaluation: Any) -> tuple:
    name, group = name_of(record), group_of(record)
    return (
        name != DENSE.name,
        GROUP_PLACES[group.key] if group else len(GROUP_PLACES),
        SYSTEM_PLACES.get(name, len(SYSTEM_PLACES)),
        name,
        -(record.bits if record.bits is not None else -math.inf),
        -(activation_bits(record) or 16),
        -(key_value_bits(record) or 16),
        _natural(sparsity_of(record)),
        *(_section_order(name, part) for name, part in (("method", method), ("calibration", calibration))),
        _natural((evaluation or {}).get("name")),
    )


def _section_order(name: str, section: Any) -> list[tuple]:
    """Settings of a section to sort by."""
    settings = _settings(name, section)
    return [(key, _natural(settings[key])) for key in sorted(settings)]


def _natural(value: Any) -> tuple:
    """A key by which nothing stands first, then numbers by size, then texts with the numbers in them by size."""
    if value is None:
        return (0,)
    if isinstance(value, int | float):
        return (1, value)
    return (2, [int(part) if k % 2 else part for k, part in enumerate(re.split(r"([0-9]+)", str(value)))])


def row_labels(records: Sequence[RunRecord]) -> dict[str, str]:
    """What each row is called: the title, and what sets it apart from rows of the same title and bits."""
    alike: dict[tuple, list[RunRecord]] = {}
    for record in records:
        alike.setdefault((name_of(record), widths(record), str(sparsity_of(record))), []).append(record)
    labels = {}
    known: dict[tuple, _Settings] = {}
    for same in alike.values():
        if len(same) == 1:
            labels[same[0].id] = title_of(same[0])
            continue
        apart = _apart({record.id: _leaves(record, known) for record in same})
        for record in same:
            words = apart[record.id]
            if len(words) > MOST_WORDS:
                words = [record.id[:8]]
            labels[record.id] = title_of(record) + (f" ({', '.join(words)})" if words else "")
    return labels


def _apart(leaves: dict[str, tuple[_Settings, _Settings]]) -> dict[str, list[str]]:
    """Record id → "key=value" of what it has and most of the others have not; a key alone where that is clear.

    leaves: as `_leaves` gives them.
    """
    counted: dict[str, Counter] = {}
    for parts in zip(*leaves.values(), strict=True):
        found = {id(settings): settings for settings in parts}
        counts = Counter(map(id, parts))
        for key in {key for settings in found.values() for key in settings}:
            counted[key] = Counter()
            for part, settings in found.items():
                counted[key][str(settings.get(key))] += counts[part]
    differing = [key for key in sorted(counted) if len(counted[key]) > 1]
    differing = [key for key in differing if not key.endswith("._target_")] or differing
    tails = Counter(key.rpartition(".")[2] for key in differing)
    usual = {key: counted[key].most_common(1)[0] for key in differing}
    words: dict[str, list[str]] = {}
    for record, (own, shared) in leaves.items():
        words[record] = []
        for key in differing:
            value, count = usual[key]
            found = own if key in own else shared
            if found.get(key) is None or (str(found[key]) == value and 2 * count > len(leaves)):
                continue
            tail = key.rpartition(".")[2]
            name = tail if tails[tail] == 1 else ".".join(key.split(".")[-2:])
            words[record].append(f"{name}={found[key]}")
    said = Counter(map(tuple, words.values()))
    return {record: own if said[tuple(own)] == 1 else [record[:8]] for record, own in words.items()}


def title_of(record: RunRecord) -> str:
    """The name in print: the survey's, else the card's."""
    name = name_of(record)
    if name in SYSTEMS:
        return SYSTEMS[name].title
    return shortened(str(record.card.get("title") or name), LONGEST_TITLE)


def _leaves(record: RunRecord, known: dict[tuple, _Settings]) -> tuple[_Settings, _Settings]:
    """Settings by which two runs of one method may differ: of this run, and of its method and its calibration.

    known: those found before, by what makes them; both are one object for all records that agree in them.
    """
    seed, evaluation = record.config.get("seed"), (record.config.get("evaluation") or {}).get("name")
    calibrates = record.card.get("calibrates", True) is True
    sections = {name: record.config.get(name) for name in ("method", *(("calibration",) if calibrates else ()))}
    run, method = (repr(seed), repr(evaluation)), (calibrates, *map(id, sections.values()))
    if run not in known:
        known[run] = {"seed": seed, "evaluation": evaluation}
    if method not in known:
        known[method] = {}
        for name, section in sections.items():
            known[method] |= _settings(name, section)
    return known[run], known[method]


def _settings(name: str, section: Any) -> _Settings:
    """A section of a configuration: dotted name → value."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                walk(f"{prefix}.{index}", item)
        else:
            found[prefix] = value

    walk(name, section)
    return found


def sparsity_of(record: RunRecord) -> Any:
    """The share or pattern of removed weights that was asked for; None without any."""
    method = record.config.get("method")
    if not isinstance(method, dict):
        return None
    for step in (method, *method.get("steps", ())):
        for part in (step, step.get("pruner")):
            if part and part.get("sparsity") is not None:
                return part["sparsity"]
    return None


def has_collapsed(record: RunRecord) -> bool:
    """Whether its perplexity is flagged as collapsed."""
    return any("collapsed" in m.note for m in record.measurements if m.metric in ("perplexity", "perplexity_ratio"))


def lines_of(record: RunRecord, field: str) -> list[str]:
    """The lines of a field of the card that holds one text or several."""
    lines = record.card.get(field) or []
    return [str(text) for text in ([lines] if isinstance(lines, str) else lines)]


def shortened(text: str, length: int = LONGEST_NOTE) -> str:
    """One printable line of at most `length` characters."""
    line = markup.plain(text)
    return line if len(line) <= length else line[: length - 1] + "…"
