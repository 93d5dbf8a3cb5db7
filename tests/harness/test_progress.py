"""Bars on a terminal, silence elsewhere, and no colours anywhere: NO_COLOR has nothing left to do."""

from __future__ import annotations

import os
import pty
import sys
import termios

import pytest

from harness.progress import TerminalProgress


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
def test_notebooks_logs_and_ci_see_nothing(monkeypatch, terminal):
    """Their standard error is no terminal; on a terminal TQDM_DISABLE says the same."""
    if terminal:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    assert shown(monkeypatch, terminal) == ""
