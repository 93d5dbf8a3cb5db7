"""Everything behind one row: its configuration, protocol, numbers, cost, environment, and the error of each layer.

    python -m harness.show results/records/MODEL/NAME.json
    python -m harness.show ID [paths.results=DIR] [errors=weights]        a record by the start of its id

errors: the table of layers shows the error of what each linear puts out (outputs, the default), or of its weights.
"""

from __future__ import annotations

import re
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import markup
from harness.command import single_command
from harness.comparison import is_dense
from harness.errors import ConfigError
from harness.options import RESULTS
from harness.records import Measurement, RunRecord, read_record
from harness.rows import describe, machine_in_words
from harness.tables import check_name, terminal_width
from harness.text_table import aligned, wrapped
from harness.verify import find_record

WIDEST = 100
OPTIONS = ("paths.results", "errors")
ERRORS = {"outputs": "layer_output_errors", "weights": "layer_errors"}
MEANING = {
    "outputs": "share of the energy of each linear's output that is error, on one passage and the original's inputs",
    "weights": "share of the energy of each linear's weights that is error, scales moved between layers taken out",
}
OLDER = "not recorded: made before records had them; the command above with force=true makes them"
LEFT_OUT = ("card", "bits", "sparsity")  # of the configuration: said elsewhere


def report(record: RunRecord, width: int = WIDEST, errors: str = "outputs") -> str:
    """The record as text of at most `width` columns, commands and unbreakable words aside."""
    parts = [
        _head(record, width),
        *_section("Numbers", "\n".join(_numbers(record.measurements, width))),
        *_section("Cost of compressing", _cost(record.cost, width)),
        *_section("Error of each layer", _layers(record, width, errors)),
        *_section("Configuration", "\n".join(_configuration(record.config, width))),
        *_section("Environment", "\n".join(_environment(record, width))),
    ]
    return "\n".join(parts)


def _section(title: str, body: str) -> list[str]:
    return [f"\n{title}", body] if body else []


def _head(record: RunRecord, width: int) -> str:
    words = describe(record)
    bits = f", {words.bits} bits" if words.bits else ""
    sparsity = f", sparsity {words.sparsity}" if words.sparsity else ""
    facts = [
        f"{markup.plain(words.title)}{bits}{sparsity}, on {markup.plain(record.model)}",
        f"{words.group.title} ({words.group.source})" if words.group else str(record.card.get("taxonomy", "")),
        str(record.card.get("paper") or ""),
    ]
    lines = [", ".join(filter(None, facts[:1]))]
    lines.append("  ".join(markup.plain(fact) for fact in facts[1:] if fact))
    lines.append(f"record {record.id}, {record.status}, {record.started} to {record.finished or 'its end'}")
    if record.baseline:
        lines.append(f"compared with the dense run {record.baseline}")
    if record.failure:
        why = f"failed in {record.failure.stage}: {markup.plain(record.failure.reason)}"
        lines.append(wrapped(why, width))
    for field, sign in (("departures", "departs from the paper"), ("notes", "note")):
        texts = record.card.get(field) or []
        for text in [texts] if isinstance(texts, str) else texts:
            lines.append(wrapped(f"{sign}: {markup.plain(str(text))}", width, "  ", ""))
    if record.card.get("runtime"):
        lines.append(wrapped(f"other runtimes: {markup.plain(str(record.card['runtime']))}", width, "  ", ""))
    lines.append(f"again: {markup.plain(single_command(record))}")
    return "\n".join(lines)


def _numbers(measurements: Sequence[Measurement], width: int) -> Iterator[str]:
    """Under each protocol or workload its numbers; a note that most of them share is said once."""
    by_workload: dict[str, list[Measurement]] = {}
    for m in measurements:
        by_workload.setdefault(m.on, []).append(m)
    for on, found in by_workload.items():
        ((common, times),) = Counter(m.note for m in found).most_common(1)
        shared = common if times > 1 else ""
        yield wrapped(markup.plain(on) + (f" ({markup.plain(shared)})" if shared else ""), width, "  ", "  ")
        rows = [[f"    {m.metric}", _value(m.value), markup.plain(m.unit), _interval(m)] for m in found]
        for m, line in zip(found, aligned(rows, right=(1,)).split("\n"), strict=True):
            note = "" if m.note == shared else markup.plain(m.note)
            if note and len(line) + 2 + len(note) > width:
                yield line
                yield wrapped(note, width, " " * 8)
            else:
                yield f"{line}  {note}".rstrip()


def _value(value: float | None) -> str:
    if value is None:
        return "—"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.2f}" if abs(value) >= 1000 else f"{value:.4g}"


def _interval(m: Measurement) -> str:
    return "" if m.interval is None else f"95 %: {_value(m.interval[0])} to {_value(m.interval[1])}"


def _cost(cost: dict[str, Any], width: int) -> str:
    known = {key: value for key, value in _flat(cost) if value is not None and value != {}}
    rows = [
        [f"  {key.replace('_', ' ')}", _value(v) if isinstance(v, int | float) else str(v)] for key, v in known.items()
    ]
    return aligned(rows, right=(1,))


def _layers(record: RunRecord, width: int, errors: str) -> str:
    """Blocks downwards, kinds of linears across; below, the largest, and the median of the other kind of error."""
    found: dict[str, float] = getattr(record, ERRORS[errors])
    if not found:
        why = "none: it is what others are compared with" if is_dense(record) else OLDER
        return f"  {markup.plain(str(record.environment.get('no_layer_errors') or why))}"
    table: dict[str, dict[str, float]] = {}
    for name, error in found.items():
        block, kind = _place(name)
        table.setdefault(block, {})[kind] = error
    kinds = list(dict.fromkeys(kind for row in table.values() for kind in row))
    lines = [wrapped(f"{MEANING[errors]}; 0 unchanged, 1 as wrong as zeros", width, "  ")]
    for shown in _fitting(kinds, width):
        rows = [["  block", *shown]]
        rows += [
            [f"  {b}", *(_error(row.get(k)) for k in shown)] for b, row in table.items() if row.keys() & set(shown)
        ]
        rows.append(["  median", *(_error(statistics.median([r[k] for r in table.values() if k in r])) for k in shown)])
        lines.append(aligned(rows, right=range(1, len(shown) + 1)))
    worst = sorted(found, key=found.__getitem__, reverse=True)[:3]
    lines.append(wrapped("largest: " + ", ".join(f"{markup.plain(n)} {found[n]:.3g}" for n in worst), width, "  "))
    other = "weights" if errors == "outputs" else "outputs"
    values = list(getattr(record, ERRORS[other]).values())
    if values:
        lines.append(f"  median of {other}: {statistics.median(values):.3g} (errors={other} shows them)")
    return "\n".join(lines)


def _place(name: str) -> tuple[str, str]:
    """Block and kind of a linear: "model.layers.3.mlp.up_proj" → ("3", "mlp.up"); experts keep their number."""
    found = re.fullmatch(r"(?:.*?\.)??(\d+)\.(.*)", name)
    number, after = found.groups() if found else ("", name)
    short = markup.plain(after).removeprefix("self_").replace("self_attn.", "").replace("_proj", "")
    return number, short


def _fitting(kinds: Sequence[str], width: int) -> Iterator[list[str]]:
    """Kinds of linears in groups that fit the width."""
    group, used = [], 10
    for kind in kinds:
        need = max(len(kind), 8) + 2
        if group and used + need > width:
            yield group
            group, used = [], 10
        group.append(kind)
        used += need
    yield group


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2e}" if 0 < value < 1e-4 else f"{value:.3g}"


def _configuration(config: dict[str, Any], width: int) -> Iterator[str]:
    """Section by section, as the values are typed on the command line."""
    for section, values in config.items():
        if section in LEFT_OUT:
            continue
        if not isinstance(values, dict):
            yield f"  {section}: {markup.plain(str(values))}"
            continue
        words = [f"{key}={markup.plain(str(value))}" for key, value in _flat(values)]
        yield wrapped(", ".join(words), width, "    ", f"  {section}: ")


def _environment(record: RunRecord, width: int) -> Iterator[str]:
    yield f"  machine: {markup.plain(machine_in_words(record))}"
    for key, value in record.environment.items():
        if key == "machine":
            memory = value.get("memory_bytes") if isinstance(value, dict) else None
            if memory:
                yield f"  memory: {memory / 2**30:.0f} GiB"
        elif isinstance(value, dict):
            words = [f"{name}={markup.plain(str(item))}" for name, item in _flat(value)]
            yield wrapped(", ".join(words), width, "    ", f"  {key}: ")
        elif key != "no_layer_errors":
            yield f"  {key}: {markup.plain(str(value))}"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf; short lists are leaves."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                yield from _flat(item, f"{name}.{index}.") if isinstance(item, dict) else [(f"{name}.{index}", item)]
        else:
            yield name, value


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The record and the options. Raises ConfigError for anything else."""
    names, options = [], {"errors": "outputs"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            check_name(key, OPTIONS, "option")
            options[key] = value
        else:
            names.append(argument)
    check_name(options["errors"], list(ERRORS), "errors")
    if len(names) != 1:
        raise ConfigError(f"name one record, not {len(names)}: a file, or the start of an id")
    return names[0], options


def main(arguments: Sequence[str]) -> int:
    """Exit status 0; 2 where there is no such record."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    try:
        name, options = parse(arguments)
        record = read_record(find_record(name, Path(options.get("paths.results", RESULTS))))
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(record, min(WIDEST, terminal_width()), options["errors"]))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends quietly; of a process that is ours alone
    sys.exit(main(sys.argv[1:]))
