"""Progress bars on terminals and in notebooks, silence everywhere else.

A stage runs in a process of its own. On a terminal it draws there itself; from a notebook, in whose cells only the
kernel can draw, it is told to report how far it is, and the kernel draws.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Report = tuple[int, str, int | None, int | None]  # number of the loop, what, done (None: it ended), of how many
REPORT_SECONDS = 0.5  # between two reports of a loop; one that ends before the first is never seen

_report: Callable[[Report], None] | None = None  # of this process, where another one draws
_loops = 0


class TerminalProgress:
    """A bar with a description and the time left, where somebody looks: a terminal, or a notebook's cell.

    TQDM_DISABLE=1 hides it there, too.
    """

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while showing `what`, how many are done and how long the rest may take."""
        if _report is not None:
            yield from _reported(items, what, total, _report)
            return
        from tqdm import tqdm

        quiet = not sys.stderr.isatty() or is_hidden()
        yield from tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True, disable=quiet)


class NoProgress:
    """Shows nothing: for tests and libraries."""

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """Yield the items."""
        yield from items


def is_hidden() -> bool:
    """Whether the user asked for no bars."""
    return os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", {})


def report_to(report: Callable[[Report], None]) -> None:
    """From now on this process draws no bars and reports what they would show."""
    global _report
    _report = report


def _reported(items: Iterable[T], what: str, total: int | None, report: Callable[[Report], None]) -> Iterator[T]:
    global _loops
    _loops += 1
    number, seen, due = _loops, False, time.monotonic() + REPORT_SECONDS
    try:
        for done, item in enumerate(items):
            if time.monotonic() >= due:
                report((number, what, done, total))
                seen, due = True, time.monotonic() + REPORT_SECONDS
            yield item
    finally:
        if seen:
            report((number, what, None, total))


@dataclass
class NotebookBars:
    """Bars in the cell that runs: widgets where ipywidgets is installed, else one line of text that is written over.

    Text goes to one loop at a time, the outermost: cells have no lines above to write over.
    """

    shown: dict[int, Any] = field(default_factory=dict)

    def show(self, report: Report) -> None:
        """Draw what a stage reports."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm's advice to install ipywidgets
            from tqdm import std
            from tqdm.autonotebook import tqdm
        number, what, done, total = report
        if done is None:
            if number in self.shown:
                self.shown.pop(number).close()
        elif number in self.shown:
            self.shown[number].n = done
            self.shown[number].refresh()
        elif not self.shown or tqdm is not std.tqdm:
            self.shown[number] = tqdm(desc=what, initial=done, total=total, leave=False)

    def close(self) -> None:
        """Take away what is left of a stage that ended in the middle."""
        while self.shown:
            self.shown.popitem()[1].close()
