"""Files of one JSON object a line, plain or compressed, read one line at a time."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from harness.errors import RunError

ENDINGS = (".jsonl", ".jsonl.xz")


def json_rows(
    path: Path, broken: Literal["refuse", "skip"] = "refuse", say: Callable[[str], None] = print
) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file (.jsonl or .jsonl.xz), in order.

    A line that is no JSON object raises RunError with its number, or is said and passed over.
    """
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
                    if broken == "refuse":
                        raise RunError(f"{path}, line {number}: {error}; broken=skip passes over such lines") from error
                    say(f"{path}, line {number} passed over: {error}")
                    continue
                yield row
        except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise RunError(f"{path} could not be read: {error}") from error
