"""Runs programs that a language model wrote, and gives them nothing: a fresh process behind several shut doors.

A generated program is untrusted text. What stands between it and the machine, from the outside in:

1. `process`: a process for every program, forked from an interpreter (`python -I -S`) with an empty environment, an
   empty temporary folder as its working directory and a session of its own. It has a pipe for its answer, which is
   read up to a bound, and is killed when it has answered or its wall clock runs out; the session is killed in the end.
2. `limits`: CPU seconds, address space, no bytes written to files, no new processes, no further descriptors, no core.
3. `system_calls` (Linux on x86-64 and ARM64): a filter of the kernel's under which only memory, clocks, its
   pipe and exit are left. Opening a file, a socket, or a process fails, whatever code runs.
4. `namespaces` (Linux without 3): user, mount, network, name and message namespaces of its own, its root is the empty
   folder, all privileges dropped.
5. `audit`: the interpreter refuses files, sockets, processes, frames and imports.
6. `language`: a syntax tree of allowed nodes, attributes, names and modules (math, datetime, fractions), and a short
   list of builtins.

Guaranteed on Linux where the kernel grants layer 3 or 4 (`Outcome.shut` says which): no file outside the temporary
folder can be read or written, no network, no process is left behind, and memory, time and output are bounded, even if
layers 5 and 6 were broken. With layer 3 no file at all can be opened, not even in the temporary folder.
Where the kernel grants
neither (macOS, Windows, a container without both), layers 5 and 6 are no guarantee, because no interpreter ever was a
safe boundary: programs are then not run at all, unless `kernel_required=False`. macOS does not enforce limits of
memory; Windows has none of layer 2, and programs are refused there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import ConfigError, RunError

CHILD = Path(__file__).with_name("sandbox_child.py")
GRACE_SECONDS = 20  # for the interpreter itself on a busy machine
LAYERS = ("limits", "system_calls", "namespaces", "audit", "language")
Kind = Literal["value", "nothing", "syntax", "refused", "error", "time", "memory", "output", "killed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    kind: "value" it returned a number or text; "nothing" it ran and returned nothing; "syntax" it is no Python;
        "refused" it uses what is not allowed; "error" it raised, or returned something else; "time", "memory",
        "output" it went over a limit; "killed" it ended itself.
    error: what a programmer would read, e.g. "NameError: name 'x' is not defined"; empty with a value.
    shut: the layer of the kernel that was in force.
    """

    kind: Kind
    value: bool | int | float | str | None = None
    error: str = ""
    shut: tuple[str, ...] = ()


Run = Callable[[str], Outcome]


@dataclass(frozen=True)
class Sandbox:
    """Limits of one program, and where it may run.

    cpu_seconds, wall_seconds: of the program; starting the interpreter counts against the second only.
    memory_bytes: of address space, the interpreter's own included (about 40 MB).
    output_bytes: of what it prints, and of a text it returns. source_bytes: longer programs are refused unread.
    kernel_required: false runs programs behind the interpreter's own restrictions alone: for programs you trust.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 10.0
    memory_bytes: int = 256 * 2**20
    output_bytes: int = 1000
    source_bytes: int = 20_000
    kernel_required: bool = True

    def __post_init__(self) -> None:
        for name, least in (("cpu_seconds", 1), ("output_bytes", 1), ("source_bytes", 1), ("memory_bytes", 2**26)):
            if getattr(self, name) < least:
                raise ConfigError(f"sandbox.{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.wall_seconds <= 600:
            raise ConfigError(f"sandbox.wall_seconds={self.wall_seconds}: must lie between 0 and 600")

    def run(self, source: str) -> Outcome:
        """Run one program: the value of `solution()`, else of `answer` or `ans`, else the last line it printed.

        Raises RunError where the kernel offers no isolation and `kernel_required` is set.
        """
        return next(self.run_all([source]))

    def run_all(self, sources: Iterable[str]) -> Iterator[Outcome]:
        """`run` of each program, as they come; they know nothing of each other."""
        with self.opened() as run:
            for source in sources:
                yield run(source)

    def opened(self) -> AbstractContextManager[Run]:
        """`run` for many programs, in any order: one interpreter is started, and every program is a fork of it."""
        return opened(self, LAYERS)


@contextlib.contextmanager
def opened(sandbox: Sandbox, layers: tuple[str, ...]) -> Iterator[Run]:
    """`Sandbox.opened` behind chosen layers only: what each is worth can be tested with the others open."""
    if os.name != "posix":
        raise RunError("programs of a model are run on Linux and macOS only: this system limits no process")
    most = 8 * sandbox.output_bytes + 8192
    common = {
        "layers": layers,
        "limits": {"cpu_seconds": sandbox.cpu_seconds, "memory_bytes": sandbox.memory_bytes},
        "output_bytes": sandbox.output_bytes,
        "most_bytes": most,
        "wall_seconds": sandbox.wall_seconds,
        "kernel_required": sandbox.kernel_required,
    }
    server: _Server | None = None

    def run(source: str) -> Outcome:
        nonlocal server
        if len(source.encode("utf-8", "replace")) > sandbox.source_bytes:
            return Outcome("refused", error=f"the program is longer than {sandbox.source_bytes} bytes")
        server = server or _Server()
        found = server.ask({"source": source} | common, sandbox.wall_seconds + GRACE_SECONDS, 8 * most)
        if found is None:  # a program ended it, or kept it from answering: the next one gets another
            server.close()
            server = None
            return Outcome("killed", error="the program ended the interpreter that runs it")
        return _outcome(found["status"], found["text"])

    try:
        yield run
    finally:
        if server is not None:
            server.close()


@functools.cache
def kernel_layers() -> frozenset[str]:
    """Which of "system_calls" and "namespaces" this kernel grants, tried with a harmless program."""
    if sys.platform != "linux":
        return frozenset()
    found: set[str] = set()
    for layer in ("system_calls", "namespaces"):
        with opened(Sandbox(kernel_required=False), (layer,)) as run:
            found |= set(run("answer = 1").shut)
    return frozenset(found)


class _Server:
    """The interpreter that programs are forked from, in a session of its own."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="program-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=self._folder.name,
            start_new_session=True,
            close_fds=True,
        )

    def ask(self, request: dict[str, Any], seconds: float, most: int) -> dict[str, Any] | None:
        """Its answer to a request; None when it ended, took too long or wrote something else."""
        deadline, line = time.monotonic() + seconds, b""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                while not line.endswith(b"\n"):
                    if not selector.select(max(0.0, deadline - time.monotonic())) or len(line) > most:
                        return None
                    piece = os.read(self._process.stdout.fileno(), 65536)
                    if not piece:
                        return None
                    line += piece
            found = json.loads(line)
        except (BrokenPipeError, ValueError):
            return None
        return found if isinstance(found, dict) and set(found) == {"status", "text"} else None

    def close(self) -> None:
        """Kill its whole session, so that nothing stays behind, and remove the folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._folder.cleanup()


def _outcome(status: int | None, text: str) -> Outcome:
    """What a program's exit and its line mean."""
    if status in (None, -signal.SIGXCPU) or (status == -signal.SIGKILL and not text):
        return Outcome("time", error="TimeoutError: the program took too long")
    lines = text.splitlines()
    try:
        found = json.loads(lines[0]) if len(lines) == 1 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return Outcome("killed", error="the program ended without an answer")
    if found["kind"] == "unprotected":
        raise RunError(
            f"{found['error']}, so programs that a model wrote are not run here; run on Linux outside of a container "
            "that forbids both, or set method.decoding.sandbox.kernel_required=false for programs that you trust"
        )
    value = found.get("value")
    if found["kind"] == "value":
        value = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}[found["type"]](value)
    return Outcome(found["kind"], value, found.get("error", ""), tuple(found["shut"]))
