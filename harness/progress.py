"""Progress bars on a terminal, silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class TerminalProgress:
    """A tqdm bar with a description and the time left; quiet when standard error is not a terminal."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while showing `what`, how many are done and how long the rest may take."""
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


class NoProgress:
    """Shows nothing: for tests and libraries."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items."""
        yield from items
