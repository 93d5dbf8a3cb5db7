"""Bars on terminals and in notebooks, silence elsewhere, and no colours anywhere: NO_COLOR has nothing left to do."""

from __future__ import annotations

import os
import pty
import sys
import termios
import time
from typing import ClassVar

import pytest

from harness.progress import NotebookBars, TerminalProgress, is_notebook
from harness.stages import StageFailure, run_stage


def shown(monkeypatch, terminal: bool) -> str:
    """What a bar over three items writes to standard error."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(writer, (24, 80))
    with os.fdopen(writer, "w", closefd=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(TerminalProgress().track("abc", "letters", 3)) == ["a", "b", "c"]
        stream.flush()
        os.set_blocking(reader, False)
        try:
            return os.read(reader, 100_000).decode()
        except BlockingIOError:
            return ""
        finally:
            os.close(reader)


def test_a_terminal_sees_a_bar_without_colours(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    text = shown(monkeypatch, terminal=True)
    assert "letters" in text
    assert "\x1b[3" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_logs_and_ci_see_nothing(monkeypatch, terminal):
    """Their standard error is no terminal; on a terminal TQDM_DISABLE says the same."""
    if terminal:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    assert shown(monkeypatch, terminal) == ""


class Kernel:
    """What IPython is in a notebook's kernel."""

    config: ClassVar[dict] = {"IPKernelApp": {}}

    @classmethod
    def get_ipython(cls):
        return cls


def slow_loop(seconds: float, steps: int) -> str:
    for _ in TerminalProgress().track(range(steps), "steps", steps):
        time.sleep(seconds)
    return "done"


def stage(tmp_path, seconds: float, steps: int, limit: float = 60):
    arguments = {"seconds": seconds, "steps": steps}
    return run_stage("compress", slow_loop, arguments, seconds_limit=limit, threads=1, log=tmp_path / "log")


def test_a_notebooks_kernel_is_told_from_other_programs(monkeypatch):
    assert not is_notebook()
    monkeypatch.setitem(sys.modules, "IPython", Kernel)
    assert is_notebook()
    monkeypatch.setattr(Kernel, "config", {"TerminalIPythonApp": {}})
    assert not is_notebook()


def test_a_notebook_draws_what_its_stages_report(monkeypatch, tmp_path):
    reports, left = [], []
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setitem(sys.modules, "IPython", Kernel)
    monkeypatch.setattr(NotebookBars, "show", lambda bars, report: reports.append(report))
    monkeypatch.setattr(NotebookBars, "close", lambda bars: left.append(True))
    assert stage(tmp_path, 0.6, 4).value == "done"
    assert [what for _, what, _, _ in reports] == ["steps"] * len(reports)
    assert [done for _, _, done, _ in reports] == [1, 2, 3, None]  # one for each 0.5 s, and the end
    reports.clear()
    assert stage(tmp_path, 0.01, 4).value == "done"
    assert reports == []  # over before anybody could read it
    with pytest.raises(StageFailure, match="limit of 1 s"):
        stage(tmp_path, 0.6, 9, limit=1)
    assert left == [True] * 3
    monkeypatch.setenv("TQDM_DISABLE", "1")
    reports.clear()
    assert stage(tmp_path, 0.6, 2).value == "done"
    assert reports == []


def test_bars_of_a_notebook_that_has_no_widgets_are_one_line_of_text(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bars = NotebookBars()
    for report in [(2, "blocks", 3, 30), (3, "steps", 1, None), (2, "blocks", 15, 30), (3, "steps", None, None)]:
        bars.show(report)
    assert list(bars.shown) == [2]
    bars.close()
    text = capsys.readouterr().err
    assert "blocks:  10%" in text
    assert "blocks:  50%" in text
    assert "steps" not in text
    assert "\n" not in text
    assert bars.shown == {}
