"""Data files of JSON objects, plain or compressed, read one object at a time."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from harness.errors import RunError

ENDINGS = (".jsonl", ".jsonl.xz")
CHUNK = 2**16  # characters of an array read at a time

Broken = Literal["refuse", "skip"]


def json_rows(path: Path, broken: Broken = "refuse", say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file (.jsonl or .jsonl.xz), or of a .json file that holds one array, in order.

    A line that is no JSON object raises RunError with its number, or is said and passed over.
    """
    return (row for _, row in numbered_rows(path, broken, say))


def numbered_rows(
    path: Path, broken: Broken = "refuse", say: Callable[[str], None] = print
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same with the number of the line that each object begins on.

    An array cannot be read past a place that is no JSON: RunError whatever `broken` says.
    """
    if path.suffix == ".json":
        yield from _array(path)
        return
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("expected a JSON object")
                except ValueError as error:
                    pass_over(path, number, str(error), broken, say)
                    continue
                yield number, row
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise RunError(f"{path} could not be read: {error}") from error


def pass_over(place: Path | str, number: int, why: str, broken: Broken, say: Callable[[str], None] = print) -> None:
    """What happens to a row that cannot be used: RunError with its number, or a word about it."""
    if broken == "refuse":
        raise RunError(f"{place}, line {number}: {why}; broken=skip passes over such lines")
    say(f"{place}, line {number} passed over: {why}")


def _array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    decoder, held, line, opened = json.JSONDecoder(), "", 1, False
    with path.open(encoding="utf-8") as text:
        while True:
            more = text.read(CHUNK)
            held += more
            while True:
                rest = held.lstrip(" \t\r\n,") if opened else held.lstrip()
                line += held.count("\n", 0, len(held) - len(rest))
                held = rest
                if held and not opened:
                    if held[0] != "[":
                        raise RunError(f"{path}: a .json file must hold one array; use .jsonl for an object a line")
                    opened, held = True, held[1:]
                    continue
                if not held or held[0] == "]":
                    break
                try:
                    row, end = decoder.raw_decode(held)
                except ValueError as error:
                    if more:
                        break  # the rest of the object is not read yet
                    raise RunError(f"{path}, line {line}: {error}") from error
                if not isinstance(row, dict):
                    raise RunError(f"{path}, line {line}: expected a JSON object")
                yield line, row
                line += held.count("\n", 0, end)
                held = held[end:]
            if held.startswith("]"):
                return
            if not more:
                raise RunError(f"{path}: the array does not end; the file was cut off")
