"""A stage of a run in a process of its own: what it uses is measured, and how it ends is data.

The parent never loads a model. Children are forked from a server that has already imported torch and transformers
(and never touched a GPU), so a process costs little; the parent blocks until the child answers or ends, because a
polling parent would steal a core from what the child measures.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

import psutil

from harness import progress
from harness.environment import peak_resident_bytes
from harness.errors import ConfigError, RunError
from harness.redaction import redact

PRELOAD = [
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto",
    "harness.engines.transformers",
    "pandas",
    "lm_eval.evaluator",
]
GRACE_SECONDS = 5
_CRASHED = ": compiled code of a library crashed"
HINTS = {
    "SIGKILL": ": most often the system ran out of memory",
    "SIGSEGV": _CRASHED,
    "SIGBUS": f"{_CRASHED}, or a file that it had mapped was cut short",
    "SIGILL": _CRASHED,
    "SIGABRT": _CRASHED,
    "SIGTERM": ": somebody, or a scheduler, asked it to end",
    "SIGXCPU": ": over the limit of processor time that was set for it",
}


@dataclass(frozen=True)
class StageResult:
    """What a stage brought back.

    value: what the function returned (JSON values only); seconds: wall time of the whole process, start included;
    peak_bytes: largest resident memory of the process.
    """

    value: Any
    seconds: float
    peak_bytes: int | None


class StageFailure(Exception):
    """A stage did not finish. `kind` is "config", "run", "memory", "disk", "time", "signal" or "bug"."""

    def __init__(self, stage: str, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.stage, self.kind, self.reason = stage, kind, reason


def warm_up() -> None:
    """Let the fork server import torch and transformers while the parent goes on; returns at once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    # Ctrl-C reaches the whole process group; the server must not answer it with a traceback in mid-import
    resource_tracker.ensure_running()  # the server needs it, and starting it would unblock the signal
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with _no_bars_of_libraries():
        forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


@contextmanager
def _no_bars_of_libraries() -> Iterator[None]:
    """Processes that are started meanwhile draw bars on terminals only; this one, perhaps a notebook, keeps its own."""
    if sys.stderr.isatty() or "TQDM_DISABLE" in os.environ:
        yield
        return
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TQDM_DISABLE"]


def run_stage(
    stage: str,
    function: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    seconds_limit: float,
    threads: int,
    log: Path,
) -> StageResult:
    """Call `function(**arguments)` in a child process and wait for it.

    function: importable by name; arguments and result: plain picklable values.
    Raises StageFailure when the child raises, is killed or runs longer than `seconds_limit`; the traceback of an
    unexpected error goes to `log`.
    """
    context = multiprocessing.get_context("forkserver")
    warm_up()
    ours, theirs = context.Pipe(duplex=False)
    bars = progress.NotebookBars() if progress.is_notebook() and not progress.is_hidden() else None
    child = (theirs, function, arguments, threads, bars is not None)
    process = context.Process(target=_child, args=child, name=f"harness {stage}")
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        while True:
            left = max(0.0, started + seconds_limit - time.monotonic())
            ready = connection.wait([ours, process.sentinel], timeout=left)
            answer = None
            if ours in ready or (ready and ours.poll()):
                try:
                    answer = ours.recv()
                except EOFError:
                    answer = None
            if not isinstance(answer, tuple):
                break
            bars.show(answer)
        if not ready:
            raise StageFailure(stage, "time", f"ran longer than its limit of {seconds_limit:.0f} s and was ended")
        process.join()
    except BaseException:
        _end(process)
        raise
    finally:
        ours.close()
        if bars is not None:
            bars.close()
    seconds = time.monotonic() - started
    if answer is None:
        raise StageFailure(stage, "signal", _how_it_ended(process.exitcode))
    if "error" in answer:
        if answer["traceback"]:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(redact(answer["traceback"]), encoding="utf-8")
            raise StageFailure(stage, answer["error"], f"{answer['reason']} (traceback in {log})")
        raise StageFailure(stage, answer["error"], answer["reason"])
    return StageResult(answer["value"], seconds, answer["peak_bytes"])


def _child(
    answers: connection.Connection, function: Callable, arguments: dict[str, Any], threads: int, reports: bool
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    if reports:
        progress.report_to(answers.send)
    try:
        answer = {"value": function(**arguments), "peak_bytes": peak_resident_bytes()}
    except ConfigError as error:
        answer = {"error": "config", "reason": str(error), "traceback": ""}
    except RunError as error:
        answer = {"error": "run", "reason": str(error), "traceback": ""}
    except (MemoryError, torch.OutOfMemoryError) as error:
        answer = _out_of_memory(error)
    except OSError as error:
        answer = {"error": "disk", "reason": f"{error}", "traceback": traceback.format_exc()}
    except Exception as error:  # whatever a method or probe does wrong is a failed row, not the end of the sweep
        reason = f"{type(error).__name__}: {error}"
        answer = {"error": "bug", "reason": reason, "traceback": traceback.format_exc()}
        if "can't allocate memory" in reason:  # torch says so in a plain RuntimeError when the host has none left
            answer = _out_of_memory(error)
    sys.stderr.flush()
    answers.send(answer)
    answers.close()


def _out_of_memory(error: BaseException) -> dict[str, str]:
    return {"error": "memory", "reason": f"out of memory: {error}", "traceback": traceback.format_exc()}


def _end_with_parent() -> None:
    """No orphan goes on computing for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _kill(_started_by(os.getpid()))
        os._exit(1)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End a stage and all that it started: politely, then, or at a second Ctrl-C, at once."""
    started = _started_by(process.pid)
    try:
        process.terminate()
        process.join(GRACE_SECONDS)
    finally:
        process.kill()
        _kill(started)
        process.join()


def _started_by(pid: int | None) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            process.kill()


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        known = {each.value: each.name for each in signal.Signals}
        name = known.get(-exitcode, f"signal {-exitcode}")
        return f"the process was ended by {name}{HINTS.get(name, '')}"
    return f"the process ended with exit status {exitcode} and no answer"
