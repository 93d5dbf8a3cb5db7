"""Several models or several machines in one table: the same columns once for each, under one protocol.

Rows are methods at their widths; each side keeps its own best values and its own test against its dense run. What was
not measured under the same protocol is refused: two numbers that stand beside each other are read as a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from harness.errors import ConfigError
from harness.records import RunRecord
from harness.table_formats import Block, Cell, Row

KINDS = ("model", "machine")
Protocol = Callable[[RunRecord], Iterable[tuple[str, str]]]  # (metric, on) of everything that must agree


def in_one(
    blocks: Sequence[list[RunRecord]],
    kind: str,
    names: dict[str, Callable[[RunRecord], str]],
    protocol: Protocol,
    block_of: Callable[[list[RunRecord]], Block],
) -> Block:
    """Blocks of records that compare, as sides of one block.

    kind: what the sides differ in, one of KINDS; names: the words for each kind, in which all others must agree.
    Raises ConfigError, naming both sides, where there are fewer than two or where two do not compare.
    """
    if len(blocks) < 2:
        only = f" ({names[kind](blocks[0][0])})" if blocks else ""
        raise ConfigError(f"across={kind}: there are not two {kind}s to set side by side{only}")
    first = blocks[0]
    for block in blocks[1:]:
        _check(first, block, kind, names, protocol)
    sides = [(names[kind](block[0]), block_of(block)) for block in blocks]
    if len({name for name, _ in sides}) < len(sides):
        twice = next(name for k, (name, _) in enumerate(sides) if name in {other for other, _ in sides[:k]})
        raise ConfigError(
            f"across={kind}: {twice} has records of two settings (text, engine or configuration of the {kind}); leave "
            "across out to see them"
        )
    return merged(sides)


def _check(
    one: list[RunRecord],
    other: list[RunRecord],
    kind: str,
    names: dict[str, Callable[[RunRecord], str]],
    protocol: Protocol,
) -> None:
    here, there = names[kind](one[0]), names[kind](other[0])
    for what, name in names.items():
        if what != kind and name(one[0]) != name(other[0]):
            raise ConfigError(
                f"across={kind}: {here} was measured with {what} {name(one[0])}, {there} with {what} {name(other[0])}; "
                f"choose one with {'model' if what == 'model' else 'hardware'}=NAME"
            )
    workloads: list[dict[str, set[str]]] = [{}, {}]
    for found, records in zip(workloads, (one, other), strict=True):
        for metric, on in {pair for record in records for pair in protocol(record)}:
            found.setdefault(metric, set()).add(on)
    for metric in sorted(workloads[0].keys() & workloads[1].keys()):
        if workloads[0][metric] != workloads[1][metric]:
            mine, theirs = (" and ".join(f'"{on}"' for on in sorted(found[metric])) for found in workloads)
            raise ConfigError(
                f"across={kind}: two protocols do not stand side by side: {here} has {metric} on {mine}, {there} on "
                f"{theirs}. Leave across out for a block of each, or evaluate both alike"
            )


def merged(sides: Sequence[tuple[str, Block]]) -> Block:
    """Blocks of the same protocol as one: the same column of all sides stands together.

    A row that one side lacks has empty cells there. Columns of words (kernels) are left out.
    """
    naming = max(block.naming for _, block in sides)
    notes: list[str] = []
    labels: dict[tuple, Cell] = {}  # group and what names a row → its first cell
    order: list[tuple] = []
    columns: dict[str, list[tuple[int, int, str]]] = {}  # head → side, column, arrow
    found: list[dict[tuple, tuple[Cell, ...]]] = []
    for index, (_, block) in enumerate(sides):
        for k in range(block.naming, len(block.heads)):
            if k not in block.words:
                columns.setdefault(block.heads[k], []).append((index, k, block.arrows[k]))
        rows, place, group = {}, -1, ""
        for row in block.rows:
            group = row.group or group
            if row.group:
                continue
            name = row.cells[: block.naming] + (Cell(),) * (naming - block.naming)
            key = (group, *(cell.value for cell in name))
            own = tuple(_number(notes, block.notes[n - 1]) for n in name[0].notes)
            known = labels[key].notes if key in labels else ()
            labels[key] = name[0]._replace(notes=tuple(dict.fromkeys((*known, *own))))
            if key not in order:  # after the row that stands before it here
                order.insert(place + 1, key)
            place = order.index(key)
            rows[key] = row.cells
        found.append(rows)
    flat = [(head, *column) for head, where in columns.items() for column in where]
    body: list[Row] = []
    for group in dict.fromkeys(key[0] for key in order):
        body += [Row(group=group)] if group else []
        for key in (key for key in order if key[0] == group):
            cells = [found[index][key][k] if key in found[index] else Cell() for _, index, k, _ in flat]
            body.append(Row((labels[key], *(Cell(text) for text in key[2:]), *cells)))
    lacking = [block.absent.split(", ") for _, block in sides]
    return Block(
        title=" / ".join(name for name, _ in sides),
        protocol=(
            "Side by side: " + "; ".join(f"({index}) {name}" for index, (name, _) in enumerate(sides, 1)),
            *dict.fromkeys(line for _, block in sides for line in block.protocol),
        ),
        heads=(
            *max((block.heads[: block.naming] for _, block in sides), key=len),
            *(f"{h} ({i + 1})" for h, i, _, _ in flat),
        ),
        arrows=(*[""] * naming, *(arrow for *_, arrow in flat)),
        rows=tuple(body),
        signs=tuple(dict.fromkeys(sign for _, block in sides for sign in block.signs)),
        notes=tuple(notes),
        absent=", ".join(name for name in lacking[0] if all(name in lack for lack in lacking)),
        naming=naming,
    )


def _number(notes: list[str], text: str) -> int:
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1
