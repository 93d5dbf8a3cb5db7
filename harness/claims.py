"""Who works on what, where several sweeps share a results folder, also one on a network file system.

A claim is a small file that says which process holds it: host, boot, process id and when that process started.
It appears whole and at once by a hard link (or by exclusive creation, where a file system has no links), which the
server of a network file system decides; no lock is used. Claims of one thing are numbered: the highest number
counts, taking over a dead one means creating the next, and numbers are never used again, so of all that want to take
over exactly one does, however old what they saw of the folder is.

Dead is a claim whose process this host knows to be gone (or whose host has been started again), and one that does not
show a sign of life for `SILENCE_SECONDS` by the clock of whoever waits: clocks of two hosts are never compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 20.0
SILENCE_SECONDS = 300.0  # a network file system may show a time of change a minute late
POLL_SECONDS = 1.0
_NUMBER = re.compile(r"(\d+)\.json")


@contextmanager
def claimed(folder: Path, say: Callable[[str], None] = print, what: str = "") -> Iterator[None]:
    """Hold the claim that `folder` stands for; wait while a living process holds it.

    what: named to `say`, once, when there is somebody to wait for. Raises OSError when the folder cannot be written.
    """
    path = _acquire(folder, say, what)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):  # gone with its folder: nobody can mistake it for a living one
            os.utime(path, (0, 0))  # released; unlike a word in the file this needs no space on a full disk


def _acquire(folder: Path, say: Callable[[str], None], what: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    watched, since, said = None, 0.0, False
    while True:
        number = _highest(folder)
        path = folder / f"{number}.json"
        state, holder = (number, _sign_of_life(path)), _holder(path)
        if state != watched:
            watched, since = state, time.monotonic()
        silent = time.monotonic() - since > SILENCE_SECONDS
        if not state[1] or silent or (holder is not None and _is_dead(holder)):
            made = _create(folder, number + 1)
            if made is not None:
                return made
        elif not said:
            said = True
            by = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            say(f"  {what or folder.name}: {by} is at it; waiting")
        time.sleep(POLL_SECONDS)


def _highest(folder: Path) -> int:
    return max((int(m[1]) for name in os.listdir(folder) if (m := _NUMBER.fullmatch(name))), default=0)


def _sign_of_life(path: Path) -> int:
    """When the holder last showed one, in nanoseconds of its host's clock; 0 for a claim that is released or gone."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _holder(path: Path) -> dict[str, Any] | None:
    """Who holds the claim; None where the file does not say (yet)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() >= identity().keys() else None


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether this host knows that the process of a claim is gone; False where only its silence could tell."""
    here = identity()
    if any(holder[key] != here[key] for key in ("host", "machine")):
        return False
    if holder["boot"] != here["boot"]:
        return True
    return holder["namespace"] == here["namespace"] and _start_of(holder["pid"]) != holder["start"]


def _create(folder: Path, number: int) -> Path | None:
    """The claim with this number, made by this process; None when another was faster."""
    path, text = folder / f"{number}.json", json.dumps(identity(), indent=1)
    draft = folder / f".{uuid.uuid4().hex}.draft"
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, path)
        except FileExistsError:
            # the answer of a network file system may be lost although the link was made: the count of links knows
            return path if draft.stat().st_nlink == 2 else None
        except OSError:
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return None
        return path
    finally:
        draft.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):  # a server of files that does not answer now may do so at the next beat
            os.utime(path)


def identity() -> dict[str, Any]:
    """What tells this process from every other one, now and after the next start of the machine."""
    return {**_place(), "pid": os.getpid(), "start": _start_of(os.getpid())}


@cache
def _place() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _first_line("/etc/machine-id"),
        "boot": _first_line("/proc/sys/kernel/random/boot_id") or _boot_time(),
        "namespace": _link("/proc/self/ns/pid"),
    }


def _start_of(pid: Any) -> float | None:
    """When the process with this number started; None when there is none (a zombie is none).

    In clock ticks since the boot where the system says it: seconds of the wall clock move when the clock is set.
    """
    import psutil

    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    try:
        return round(psutil.Process(pid).create_time(), 1)
    except (psutil.Error, TypeError, ValueError):
        return None


def _boot_time() -> str:
    import psutil

    return str(int(psutil.boot_time()))


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
