"""Records → tables, in the survey's order: Markdown, LaTeX, HTML and CSV, from records only.

    python -m harness.tables table_1                                  prints table I, writes results/tables/table_1.*
    python -m harness.tables all paths.results=DIR model=NAME         every table, of one model
    python -m harness.tables table_1 across=model                     models side by side under one protocol
    python -m harness.tables table_1 strict=true                      an error instead of several blocks

One block of a table holds rows that may be compared: the same model, hardware, engine, machine, text and protocol
(the `on` of every measurement). Whatever differs in one of these stands in a block of its own; no column ever mixes
two.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.columns import PROTOCOL_METRICS, Column, arrow_of, columns_of, is_speed, measured, significant
from harness.comparison import Arm, Judge, Kept
from harness.curve_plot import learning_curves
from harness.environment import telling
from harness.errors import ConfigError
from harness.noise_floor import read_floors
from harness.options import RESULTS
from harness.record_index import read_packed, without_collector
from harness.records import Measurement, RunRecord, write_text_atomically
from harness.remarks import protocol_lines, remarks_of
from harness.rows import (
    engine_name,
    group_of,
    hardware_name,
    has_collapsed,
    in_print_order,
    machine_in_words,
    name_of,
    row_labels,
    sparsity_of,
    title_of,
    widths,
)
from harness.side_by_side import KINDS, in_one
from harness.table_csv import to_csv
from harness.table_formats import (
    Block,
    Cell,
    Row,
    html_block,
    html_page,
    latex_block,
    latex_page,
    markdown_block,
    markdown_page,
    to_markdown,
)
from harness.taxonomy import DENSE, SURVEY, TABLES, Group, Table, table_named
from harness.two_processes import shared_out
from harness.wheels import default_cache

COMPARED_WITH_DENSE = PROTOCOL_METRICS
SHORT = {"perplexity", "kl_divergence", "accuracy", "rouge_l", "decoding_speedup", "effective_bits_per_weight"}
SHORT |= {"stored_bytes", "compress_seconds"}
SAME_AS_DENSE = "≈"
COLLAPSED = "✗"
WIDTH = 160  # characters of a line of a table in a file
EMPTY = Cell()
_two_digits = significant(2)
MANY = 300  # records below which one process writes a table no later than two would


@dataclass
class _Notes:
    """Footnotes in order of first use; the same text has one number."""

    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers) + 1)


# ---------------------------------------------------------------------------------------------- what goes together


def comparable(records: Iterable[RunRecord]) -> list[list[RunRecord]]:
    """Split records into blocks whose rows may be compared.

    Equal model, hardware, engine, machine and text come first. Among those, records with the same protocol share a
    block, and one that measured a part of what another block measured (a failed run, speed alone) joins it.
    """
    settings: dict[str, dict[frozenset, list[RunRecord]]] = {}
    known: dict[tuple, str] = {}  # sections that are one object in many records need writing out once
    records = list(records)  # holds them, and so what an id stands for
    for record in records:
        sections = [id(record.config.get(key)) for key in SETTING]
        parts = (record.model, id(record.environment.get("machine")), *sections)
        if parts not in known:
            known[parts] = _setting(record)
        settings.setdefault(known[parts], {}).setdefault(_protocol(record), []).append(record)
    blocks = []
    for by_protocol in settings.values():
        kept: dict[frozenset, list[RunRecord]] = {}
        for protocol in sorted(by_protocol, key=len, reverse=True):
            for record in by_protocol[protocol]:
                wider = [other for other in kept if protocol < other]
                home = max(wider, key=lambda other: _kinship(record, kept[other]), default=protocol)
                kept.setdefault(home, []).append(record)
        blocks += map(_one_dense, kept.values())
    return blocks


SETTING = ("model", "hardware", "engine", "corpus")


def _setting(record: RunRecord) -> str:
    config = record.config
    keys = [record.model, config.get("model"), telling(config.get("hardware") or {}), config.get("engine")]
    keys += [_evaluated_text(record), machine_in_words(record)]
    return json.dumps(keys, sort_keys=True, default=str)


def _evaluated_text(record: RunRecord) -> Any:
    """The corpus without its calibration text, which belongs to a method, not to the protocol."""
    corpus = record.config.get("corpus")
    return {k: v for k, v in corpus.items() if k != "calibration"} if isinstance(corpus, dict) else corpus


def _protocol(record: RunRecord) -> frozenset[tuple[str, str]]:
    found = {(m.metric, m.on) for m in record.measurements if m.metric in PROTOCOL_METRICS}
    text = (record.environment.get("text") or {}).get("evaluation") or {}
    if "sha256" in text and any(metric == "perplexity" for metric, _ in found):
        found.add(("text", str(text["sha256"])))  # a file may change and keep its name
    return frozenset(found)


def _kinship(record: RunRecord, others: list[RunRecord]) -> tuple[int, int]:
    """How well a record fits a block that measured more: the same evaluation first, then the larger block."""
    asked = record.config.get("evaluation")
    return sum(other.config.get("evaluation") == asked for other in others), len(others)


def _refuse_several(blocks: list[list[RunRecord]]) -> None:
    """Raise ConfigError when one model on one hardware has records that cannot share a block."""
    seen: dict[tuple[str, str], list[RunRecord]] = {}
    for block in blocks:
        first = seen.setdefault((block[0].model, hardware_name(block[0])), block)
        if first is not block:
            one, two = _difference(first[0], block[0])
            raise ConfigError(
                f"strict=true: records of {block[0].model} on {hardware_name(block[0])} do not compare: "
                f"{first[0].id} has {one}; {block[0].id} has {two}. Leave strict out for a block of each"
            )


def _difference(a: RunRecord, b: RunRecord) -> tuple[str, str]:
    if machine_in_words(a) != machine_in_words(b):
        return f'machine "{machine_in_words(a)}"', f'machine "{machine_in_words(b)}"'
    here, there = _protocol(a), _protocol(b)
    if here != there:
        words = [
            " and ".join(f'{metric} on "{on}"' for metric, on in sorted(mine)) or "no measurement of its own"
            for mine in (here - there, there - here)
        ]
        return words[0], words[1]
    for section in ("model", "hardware", "engine", "corpus"):
        if a.config.get(section) != b.config.get(section):
            return f"{section} {a.config.get(section)}", f"{section} {b.config.get(section)}"
    raise AssertionError("blocks differ in their setting or protocol")


# ---------------------------------------------------------------------------------------------------- one block


def blocks_of(
    table: Table,
    records: Sequence[RunRecord],
    strict: bool = False,
    judge: Judge | None = None,
    across: str | None = None,
) -> list[Block]:
    """The blocks of one table. Dense runs come along where a system of the table stands beside them.

    across: "model" or "machine", to set them side by side in one block. Raises ConfigError where they do not compare.
    """
    return [make() for make in _blocks(table, records, strict, judge, across)]


def _blocks(
    table: Table, records: Sequence[RunRecord], strict: bool, judge: Judge | None, across: str | None
) -> list[Callable[[], Block]]:
    """What makes each of these blocks. Raises as `blocks_of` does, before any of them is made."""
    rows = [r for r in records if name_of(r) == DENSE.name or group_of(r) in table.groups]
    split = [b for b in comparable(rows) if any(name_of(r) != DENSE.name for r in b)]
    if strict:
        _refuse_several(split)
    if across is not None:
        names = {"model": lambda r: r.model, "machine": lambda r: f"{hardware_name(r)} · {machine_in_words(r)}"}
        block = in_one(split, across, names, _protocol, partial(_block, groups=table.groups, judge=judge, short=True))
        return [lambda: block]
    return [partial(_block, records, table.groups, judge) for records in split]


def _one_dense(records: list[RunRecord]) -> list[RunRecord]:
    """A block in which one dense model stands once, however many ways its students were asked before they were taught.

    What it answered in each way is in the rows of those students.
    """
    dense = [record for record in records if name_of(record) == DENSE.name]
    asked = {m.on for record in records for m in record.measurements if m.metric == "accuracy_before"}
    if len(dense) < 2 or not asked:
        return records
    kept = [m for m in dense[0].measurements if not (m.metric.startswith("accuracy") and m.on in asked)]
    return [replace(dense[0], measurements=kept), *(record for record in records if name_of(record) != DENSE.name)]


def _block(
    records: list[RunRecord],
    groups: Sequence[Group] = (),
    judge: Judge | None = None,
    short: bool = False,
    footnotes: bool = True,
) -> Block:
    """One block. With groups, their headings stand between the rows and their systems without a record below.

    short: the columns that most questions are about, without kernels.
    """
    judge = replace(judge or Judge(), tests=set())
    records = in_print_order(records)
    columns = columns_of(records)
    kernels = _kernels(records)
    if short:
        timed = next((c for c in columns if c.quantity.metric == "decode_tokens_per_second"), None)
        columns = [c for c in columns if c.quantity.metric in SHORT or c is timed]
        kernels = replace(kernels, each={})
    swept = _sparsities(records)
    labels = row_labels(records)
    notes = _Notes()
    remarks = partial(remarks_of, beside=records) if footnotes else lambda _: []
    found = measured(records, columns)
    texts = [[_shown(m, c) for m, c in zip(numbers, columns, strict=True)] for numbers in found]
    best, same = _best(records, columns, found, texts, judge), _same_as_dense(records, columns, found, judge)
    heads = ["Method", "Bits", *(["sparsity"] if swept else []), *(c.head for c in columns)]
    rows: list[Row] = []
    previous: Group | None = None
    for record, numbers, shown in zip(records, found, texts, strict=True):
        group = group_of(record)
        if groups and group is not None and group is not previous:
            rows.append(Row(group=f"{group.title} ({group.source})"))
            previous = group
        cells = [
            Cell(
                labels[record.id],
                notes=tuple(notes.number(text) for text in remarks(record)),
            ),
            Cell(widths(record)),
        ]
        if swept:
            sparsity = sparsity_of(record)
            cells.append(Cell("" if sparsity is None else str(sparsity)))
        cells += [
            _cell(number, text, c, (record.id, c.head) in best, (record.id, c.head) in same)
            for c, number, text in zip(columns, numbers, shown, strict=True)
        ]
        if record.status == "failed":
            gap = next((k for k in range(len(cells) - len(columns), len(cells)) if not cells[k].value), 0)
            cells[gap] = cells[gap]._replace(value="failed" if gap else f"{cells[0].value}, failed")
        if kernels.each:
            cells.append(Cell(kernels.each.get(record.id, "")))
        rows.append(Row(tuple(cells)))
    return Block(
        title=" · ".join(
            filter(
                None,
                [records[0].model, engine_name(records[0]), hardware_name(records[0]), machine_in_words(records[0])],
            )
        ),
        protocol=tuple(protocol_lines(records, columns, kernels.shared)),
        heads=(*heads, *(["kernel"] if kernels.each else [])),
        arrows=(*[""] * (len(heads) - len(columns)), *(arrow_of(c) for c in columns), *([""] if kernels.each else [])),
        rows=tuple(rows),
        signs=tuple(_signs(rows, judge)),
        notes=tuple(notes.numbers),
        absent=_absent(records, groups),
        naming=3 if swept else 2,
        seam=next((len(heads) - len(columns) + k for k, c in enumerate(columns) if is_speed(c)), None),
    )


def block_of(records: Iterable[RunRecord], judge: Judge | None = None) -> Block:
    """Records that may be compared as one block, whatever their family, without headings between the rows."""
    return _block(list(records), judge=judge)


def _sparsities(records: list[RunRecord]) -> bool:
    return any(sparsity_of(record) is not None for record in records)


def _shown(measurement: Measurement | None, column: Column) -> str:
    """The digits in a cell; "" without a number."""
    if measurement is None or measurement.value is None:
        return ""
    return column.quantity.show(_scale(measurement, column) * measurement.value)


def _scale(measurement: Measurement, column: Column) -> float:
    return 1.0 if measurement.unit == "%" else column.quantity.scale


def _cell(measurement: Measurement | None, text: str, column: Column, bold: bool, same: bool) -> Cell:
    if measurement is None:
        return EMPTY
    sign = COLLAPSED if "collapsed" in measurement.note else ""
    if not text:
        return Cell(sign=sign)
    interval = half_width = ""
    if measurement.interval and (show := column.quantity.interval):
        scale = _scale(measurement, column)
        low, high = measurement.interval
        low, high = scale * low, scale * high
        interval = f"[{show(low)}–{show(high)}]"
        half_width = f"±{_two_digits((high - low) / 2)}"
    if same:
        sign = f"{SAME_AS_DENSE} {sign}" if sign else SAME_AS_DENSE
    return Cell(text, interval, half_width, sign, bold)


_Numbers = Sequence[Measurement | None]  # of one row, for each column


def _same_as_dense(
    records: list[RunRecord], columns: list[Column], found: list[_Numbers], judge: Judge
) -> set[tuple[str, str]]:
    """Record and head of every number that no test tells from the dense run's."""
    is_dense = [name_of(record) == DENSE.name for record in records]
    others = [row for row, dense in zip(zip(records, found, strict=True), is_dense, strict=True) if not dense]
    dense = next((row for row, dense in zip(zip(records, found, strict=True), is_dense, strict=True) if dense), None)
    same = set()
    for k, column in enumerate(columns):
        if column.quantity.metric in COMPARED_WITH_DENSE:
            arm = next(iter(_arms([dense], k)), None) if dense else None
            same |= {(id, column.head) for id in judge.same_as_dense(_arms(others, k), arm)}
    return same


def _arms(rows: Iterable[tuple[RunRecord, _Numbers]], k: int) -> list[Arm]:
    """The rows that have a number in the column at this place, with it."""
    return [(record, m) for record, numbers in rows if (m := numbers[k]) is not None and m.value is not None]


def _best(
    records: list[RunRecord], columns: list[Column], found: list[_Numbers], texts: list[list[str]], judge: Judge
) -> set[tuple[str, str]]:
    """Record and head of every best value, and what ties with it, among rows of equal bits and sparsity.

    A reference, a failed or a collapsed row is no competitor; a value alone or equal to all others is not best.
    """
    rivals: dict[tuple, list[int]] = {}
    for row, record in enumerate(records):
        if name_of(record) != DENSE.name and record.status == "finished" and not has_collapsed(record):
            rivals.setdefault((widths(record), str(sparsity_of(record))), []).append(row)
    best = set()
    for group in rivals.values():
        for k, column in enumerate(columns):
            shown = [texts[row][k] for row in group]
            rows = _arms(((records[row], found[row]) for row in group), k)
            if len(rows) > 1:
                ties = _ties(column, rows, [text for text in shown if text], judge)
                best |= {(id, column.head) for id in ties if len(ties) < len(rows)}
    return best


def _ties(column: Column, rows: list[Arm], shown: list[str], judge: Judge) -> set[str]:
    """Which of these records hold the best value: equal to it in the digits shown, or not told from it by a test."""
    values = [m.value for _, m in rows]
    top = values.index((min if column.better == "lower" else max)(values))
    equal = {record.id for (record, _), text in zip(rows, shown, strict=True) if text == shown[top]}
    return equal | judge.ties(rows, rows[top])


@dataclass(frozen=True)
class _Kernels:
    shared: str
    each: dict[str, str]


def _kernels(records: list[RunRecord]) -> _Kernels:
    """The kernel of every row, and what all rows say besides it (the dtype, mostly), said once."""
    notes = {
        record.id: (record.find("time_per_output_token_ms") or record.find("decode_tokens_per_second") or _NONE).note
        for record in records
    }
    parts = {note: _OUTSIDE.split(note.partition("; ")[0]) for note in dict.fromkeys(notes.values()) if note}
    rest = [set(q[1:]) for q in parts.values()]
    shared = set.intersection(*rest) if rest else set()
    words = {note: ", ".join([q[0], *(p for p in q[1:] if p not in shared)]) for note, q in parts.items()}
    return _Kernels(", ".join(sorted(shared)), {id: words[note] for id, note in notes.items() if note})


_OUTSIDE = re.compile(r", (?![^()]*\))")  # commas between parts, not those within a kernel's name in brackets
_NONE = Measurement("", None, "", "", "lower")


def _signs(rows: list[Row], judge: Judge) -> list[str]:
    used = " ".join(cell.sign for row in rows for cell in row.cells)
    bold = any(cell.bold for row in rows for cell in row.cells)
    signs = []
    if bold:
        signs.append("bold: best among rows of equal bits, with what no test tells from it")
    if SAME_AS_DENSE in used:
        signs.append(f"{SAME_AS_DENSE}: not to be told from dense")
    if (bold or SAME_AS_DENSE in used) and judge.tests:
        signs.append(f"tests at 5 % for a column together (Holm): {', '.join(sorted(judge.tests))}")
    if COLLAPSED in used:
        signs.append(f"{COLLAPSED}: collapsed, shown but never a reference")
    return signs


def _absent(records: list[RunRecord], groups: Sequence[Group]) -> str:
    present = {name_of(record) for record in records}
    missing = [system.title for group in groups for system in group.systems if system.name not in present]
    return ", ".join(missing)


# ---------------------------------------------------------------------------------------------------- entry points


def summary_table(records: Iterable[RunRecord], judge: Judge | None = None) -> str:
    """Markdown table of these records alone, whatever their family: what a sweep ends with. As wide as the terminal."""
    blocks = [_block(block, judge=judge) for block in comparable(records)]
    return to_markdown("", blocks, width=terminal_width())


def short_table(records: Iterable[RunRecord], judge: Judge | None = None) -> str:
    """The same with fewer columns and without footnotes, for the end of a sweep."""
    blocks = [_block(block, judge=judge, short=True, footnotes=False) for block in comparable(records)]
    return to_markdown("", blocks, width=terminal_width())


def judge_of(results: Path) -> Judge:
    """What tells rows of a results folder apart: the outcomes kept there, and the noise floors of its machines."""
    return Judge(Kept(results), read_floors(default_cache(), results))


def terminal_width() -> int:
    """Columns of the terminal, or of `COLUMNS`; 160 where output goes into a file or a pipe."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def write_table(
    table: Table,
    records: Sequence[RunRecord],
    folder: Path,
    strict: bool = False,
    judge: Judge | None = None,
    across: str | None = None,
) -> str:
    """Write `folder/table_N.{md,tex,html,csv}`, each atomically, and return the Markdown."""
    members = [r for r in records if group_of(r) in table.groups]
    shown = [r for r in records if group_of(r) in table.groups or (members and name_of(r) == DENSE.name)]
    title = f"Table {table.number}: {table.title}"
    absent = "" if members else ", ".join(system.title for system in table.systems)
    source = f"systems and order: {SURVEY}"
    width = terminal_width()

    def write(suffix: str, content: str) -> None:
        write_text_atomically(content, folder / f"{table.name}.{suffix}")

    def texts(make: Callable[[], Block]) -> tuple[str, ...]:
        block = make()
        wide = markdown_block(block, WIDTH)
        seen = wide if width == WIDTH else markdown_block(block, width)
        return wide, seen, latex_block(title, block), html_block(block)

    jobs = [partial(texts, make) for make in _blocks(table, records, strict, judge, across)]
    jobs[:0] = [lambda: write("csv", to_csv(shown)), lambda: learning_curves(shown, _curve_title)]
    _, curves, *written = shared_out(jobs, worthwhile=len(shown) >= MANY)
    wide, seen, latex, html = ([parts[k] for parts in written] for k in range(4))
    write("md", f"{markdown_page(title, wide, absent, WIDTH)}\n{source}\n")
    write("tex", latex_page(latex, absent))
    write("html", html_page(title, html, absent, curves))
    return markdown_page(title, seen, absent, width)


def _curve_title(record: RunRecord) -> str:
    bits = f", {record.bits} bits" if record.bits is not None else ""
    return f"{title_of(record)}{bits} ({record.model}, {record.id[:6]})"


LISTED = "\n".join(f"  {table.name}  {table.number:>3}  {table.title}" for table in TABLES)
HELP = f"""Print a table of the survey from the records, and write it as Markdown, LaTeX, HTML and CSV.

usage: python -m harness.tables TABLE [OPTION=VALUE ...]

tables
{LISTED}
  all           every one of them

options
  paths.results=DIR   where records/ is read (default: results)
  output=DIR          where the files are written (default: tables/ of that folder)
  model=NAME[,NAME]   records of these models alone
  hardware=NAME[,…]   records of these hardware configurations alone
  across=model        models side by side, under one protocol on one machine; across=machine: machines, one model
  strict=true         an error instead of several blocks when protocols or machines differ
"""
OPTIONS = ("paths.results", "output", "model", "hardware", "across", "strict")


def main(arguments: Sequence[str], held: list[RunRecord] | None = None) -> int:
    """Exit status 0; 1 when a record could not be read; 2 for what was typed wrong.

    held: takes the records, for a process that ends at once: freeing millions of objects one by one is of no use to it.
    """
    if not arguments or {"--help", "-h"} & set(arguments):
        print(HELP)
        return 0 if arguments else 2
    try:
        names, options = parse(arguments)
        results = Path(options.get("paths.results", RESULTS))
        folder = Path(options.get("output", results / "tables"))
        strict = options.get("strict", "false").lower()
        check_name(strict, ("true", "false"), "strict")
        across = options.get("across")
        if across is not None:
            check_name(across, KINDS, "across")
        with without_collector():
            broken = _write_tables(names, options, results, folder, strict == "true", across, held)
        print(
            f"written: {folder}/{{{','.join(names)}}}.{{md,tex,html,csv}}"
            if len(names) > 1
            else f"written: {folder}/{names[0]}.{{md,tex,html,csv}}"
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for reason in broken:
        print(f"not read: {reason}", file=sys.stderr)
    return 1 if broken else 0


def _write_tables(
    names: Sequence[str],
    options: dict[str, str],
    results: Path,
    folder: Path,
    strict: bool,
    across: str | None,
    held: list[RunRecord] | None,
) -> list[str]:
    """Write and print these tables; return why records could not be read. Nothing but `held` is left in memory."""
    judge = judge_of(results)
    records, broken = read_folder(results)
    if held is not None:
        held += records
    records = chosen(records, options)
    for name in names:
        try:
            print(write_table(table_named(name), records, folder, strict, judge, across))
        except OSError as error:  # records of others, for instance
            raise ConfigError(f"{folder}: {error.strerror}; output=DIR writes the tables elsewhere") from error
    return broken


def parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Names of tables, and options. Raises ConfigError for a name or option that is none."""
    known = [table.name for table in TABLES]
    names, options = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            check_name(key.lstrip("+"), OPTIONS, "option")
            options[key.lstrip("+")] = value
        else:
            check_name(argument, [*known, "all"], "table")
            names += known if argument == "all" else [argument]
    if not names:
        raise ConfigError(f"no table named: choose from {', '.join([*known, 'all'])}")
    return list(dict.fromkeys(names)), options


def check_name(name: str, choices: Sequence[str], what: str) -> None:
    """Raise ConfigError, with the nearest of the choices, for a name that is none of them."""
    if name not in choices:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), choices, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{what} {name!r} is not one of {', '.join(choices)}.{hint}")


def read_folder(results: Path) -> tuple[list[RunRecord], list[str]]:
    """Every readable record of a results folder, without errors of layers, and why the others are not.

    Raises ConfigError where there is no such folder.
    """
    if not results.is_dir():
        raise ConfigError(f"paths.results={results}: there is no such folder; run `python -m harness` first")
    reading = read_packed(results)
    return list(reading.records.values()), reading.broken


def chosen(records: list[RunRecord], options: dict[str, str]) -> list[RunRecord]:
    """Records of the models and hardware that the options name. Raises ConfigError for a name that none has."""
    for key, of in (("model", lambda r: r.model), ("hardware", hardware_name)):
        wanted = [name for name in options.get(key, "").split(",") if name]
        for name in wanted:
            check_name(name, sorted({of(record) for record in records}), key)
        records = [record for record in records if not wanted or of(record) in wanted]
    return records


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends quietly; of a process that is ours alone
    status = main(sys.argv[1:], held := [])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
