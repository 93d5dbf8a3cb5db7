"""Runs programs that a language model wrote, and gives them nothing: a fresh process behind several shut doors.

A generated program is untrusted text. What stands between it and the machine, from the outside in:

1. `process`: a new interpreter for every program (`python -I -S`) with an empty environment, an empty temporary folder
   as its working directory, no descriptors but three pipes, in a session of its own that is killed whole when the
   program ends or its wall clock runs out; its output is read up to a bound.
2. `limits`: CPU seconds, address space, no bytes written to files, no new processes, no further descriptors, no core.
3. `system_calls` (Linux on x86-64 and ARM64): a filter of the kernel's under which only memory, clocks, the three
   pipes and exit are left. Opening a file, a socket, or a process fails, whatever code runs.
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
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.errors import ConfigError, RunError

CHILD = Path(__file__).with_name("sandbox_child.py")
LAYERS = ("limits", "system_calls", "namespaces", "audit", "language")
Kind = Literal["value", "syntax", "refused", "error", "time", "memory", "output", "killed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    kind: "value" it returned a number or text; "syntax" it is no Python; "refused" it uses what is not allowed;
        "error" it raised, or returned something else; "time", "memory", "output" it went over a limit;
        "killed" it ended itself.
    error: what a programmer would read, e.g. "NameError: name 'x' is not defined"; empty with a value.
    shut: the layer of the kernel that was in force.
    """

    kind: Kind
    value: bool | int | float | str | None = None
    error: str = ""
    shut: tuple[str, ...] = ()


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
        return execute(source, self, LAYERS)

    def run_all(self, sources: Iterable[str], workers: int = 1) -> Iterator[Outcome]:
        """Outcomes in the order of the programs, `workers` of them at a time."""
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(self.run, sources)


def execute(source: str, sandbox: Sandbox, layers: tuple[str, ...]) -> Outcome:
    """`Sandbox.run` behind chosen layers only: what each of them is worth can be tested with the others open."""
    if os.name != "posix":
        raise RunError("programs of a model are run on Linux and macOS only: this system limits no process")
    if len(source.encode("utf-8", "replace")) > sandbox.source_bytes:
        return Outcome("refused", error=f"the program is longer than {sandbox.source_bytes} bytes")
    request = {
        "source": source,
        "layers": layers,
        "limits": {"cpu_seconds": sandbox.cpu_seconds, "memory_bytes": sandbox.memory_bytes},
        "output_bytes": sandbox.output_bytes,
        "kernel_required": sandbox.kernel_required,
    }
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        status, text = _start(
            json.dumps(request).encode(), folder, sandbox.wall_seconds, 8 * sandbox.output_bytes + 8192
        )
    return _outcome(status, text)


def _start(request: bytes, folder: str, wall_seconds: float, most: int) -> tuple[int | None, bytes]:
    """Exit status (None: the clock ran out) and what was written, of a process group that is dead afterwards."""
    deadline = time.monotonic() + wall_seconds
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd=folder,
        start_new_session=True,
        close_fds=True,
    )
    text = b""
    try:
        with contextlib.suppress(BrokenPipeError):  # it died before it read: its status says why
            process.stdin.write(request)
            process.stdin.close()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None, text
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    break
                text += piece
                if len(text) > most:
                    return 1, b""
        return process.wait(max(0.0, deadline - time.monotonic())), text
    except subprocess.TimeoutExpired:
        return None, text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session's, so that nothing stays behind
        process.wait()
        process.stdout.close()


def _outcome(status: int | None, text: bytes) -> Outcome:
    """What the child's exit and its line mean."""
    if status is None or status in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("time", error="TimeoutError: the program took too long")
    lines = text.splitlines()
    try:
        found = json.loads(lines[0]) if status == 0 and len(lines) == 1 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return Outcome("killed", error=f"the program ended the interpreter (status {status})")
    if found["kind"] == "unprotected":
        raise RunError(
            f"{found['error']}, so programs that a model wrote are not run here; run on Linux outside of a container "
            "that forbids both, or set method.sandbox.kernel_required=false for programs that you trust"
        )
    value = found.get("value")
    if found["kind"] == "value":
        value = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}[found["type"]](value)
    return Outcome(found["kind"], value, found.get("error", ""), tuple(found["shut"]))
