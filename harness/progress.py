"""Progress bars on a terminal, silence everywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class TerminalProgress:
    """A tqdm bar with a description and the time left; quiet when standard error is not a terminal.

    Quiet in notebooks too: stages run in processes of their own, which cannot draw in a cell. TQDM_DISABLE=1 hides
    it on a terminal.
    """

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while showing `what`, how many are done and how long the rest may take."""
        from tqdm import tqdm

        quiet = not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True, disable=quiet)


class NoProgress:
    """Shows nothing: for tests and libraries."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items."""
        yield from items
