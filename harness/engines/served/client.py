"""The side that asks: a server's process, and its answers as they come."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from harness.engines.served import frames
from harness.errors import RunError
from harness.interpreters import executable

LAST_LINES = 40  # of the server's output that are searched for a reason


class Server:
    """A script in another interpreter that answers on a socket, and ends with this object or this process.

    log: where its output goes. patience: seconds to wait for any single answer; then it is ended.
    Every failure is a RunError with the server's own reason, and leaves no process behind.
    """

    def __init__(
        self, title: str, interpreter: str | None, script: Path, environment: dict[str, str], log: Path, patience: float
    ) -> None:
        self.title, self.log, self.patience = title, log, patience
        self._connection, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [executable(interpreter), str(script), str(theirs.fileno())],
                stdin=subprocess.PIPE,  # closes with this process, however that ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a group of its own: it is ended with all that it started
            )
        theirs.close()
        self._closed = False

    def ask(self, message: dict[str, Any], **arrays: np.ndarray) -> frames.Frame:
        """The one answer to a question."""
        self.tell(message, **arrays)
        return self.hear()

    def tell(self, message: dict[str, Any], **arrays: np.ndarray) -> None:
        """Hand a question in; its answers are to be heard."""
        self._connection.settimeout(self.patience)
        try:
            frames.send(self._connection, message, **arrays)
        except OSError as error:
            raise self._failed(error) from error

    def hear(self, patience: float | None = None) -> frames.Frame:
        """The next answer. patience: seconds, in the place of the usual ones."""
        self._connection.settimeout(patience or self.patience)
        try:
            message, arrays = frames.receive(self._connection)
        except (EOFError, OSError, ValueError) as error:
            raise self._failed(error) from error
        if "error" in message:
            raise RunError(f"{self.title}: {message['error']} (its output is in {self.log})")
        return message, arrays

    def answers(self, message: dict[str, Any], **arrays: np.ndarray) -> Iterator[frames.Frame]:
        """Answers to a question until the one that says it is done, which comes last; stopping early is said."""
        self.tell(message, **arrays)
        done = False
        try:
            while not done:
                answer = self.hear()
                done = "done" in answer[0]
                yield answer
        except RunError:
            done = True  # nothing more comes
            raise
        finally:
            if not done:
                self.tell({"do": "stop"})
                while "done" not in self.hear()[0]:
                    pass

    def close(self) -> None:
        """End the server and all that it started."""
        if self._closed:
            return
        self._closed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()
        self._connection.close()

    def _failed(self, error: Exception) -> RunError:
        """What happened to a server that no longer answers; it is ended."""
        if isinstance(error, TimeoutError):
            reason = f"gave no answer in {self.patience:.0f} s and was ended"
        elif isinstance(error, ValueError):
            reason = f"sent what is no answer ({error}) and was ended"
        else:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)  # the connection is gone; its status comes next
            reason = f"ended ({_ending(self._process.poll())}): {self._last_line()}"
        self.close()
        return RunError(f"{self.title} {reason} (its output is in {self.log})")

    def _last_line(self) -> str:
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        except OSError:
            lines = []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return signal.Signals(-status).name
    return f"exit status {status}"
