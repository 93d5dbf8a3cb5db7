"""Independent jobs of one command on two cores.

Thousands of records keep one core busy for seconds. A process made by `fork` has them already: nothing is copied or
started to hand them over, only what its jobs return comes back.
"""

from __future__ import annotations

import marshal
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
MOST_CLAIMS = 250  # each is one byte


def helps() -> bool:
    """Whether a second process may be made here, and has a core of its own.

    `fork` copies one thread alone: what others hold at that moment, such as the lock of an allocator, stays held in
    the copy for ever. So there must be no others, which only Linux tells of all threads, those of libraries too.
    """
    try:
        return len(os.sched_getaffinity(0)) > 1 and len(list(Path("/proc/self/task").iterdir())) == 1
    except (AttributeError, OSError):
        return False


def shared_out(jobs: Sequence[Callable[[], Result]], worthwhile: bool = True) -> list[Result]:
    """What each job returns, in their order; whichever of the two processes is free takes the next one.

    Results must be plain values, such as texts and lists of them. Put long jobs first. A job that the second process
    did not finish, because it raised or the process was killed, is done here: so errors are raised as if there were
    one process, and none is lost.
    """
    if not (worthwhile and len(jobs) > 1 and helps()):
        return [job() for job in jobs]
    claims, claimed = os.pipe()  # of a byte each, which only one process can read
    with open(claimed, "wb", buffering=0) as file:
        file.write(bytes(range(min(len(jobs), MOST_CLAIMS))))
    results, sent = os.pipe()
    try:
        child = os.fork()
    except OSError:  # no more processes or memory for this user: one is enough
        child = None
    if child == 0:
        _work(jobs, claims, sent)
    os.close(sent)
    try:
        done = {k: jobs[k]() for k in _claimed(claims, len(jobs))}
        with open(results, "rb", closefd=False) as file:
            theirs = file.read()
    finally:
        for _ in _claimed(claims, len(jobs)):
            pass  # after an error here, the other process shall find no more to do
        os.close(claims)
        os.close(results)
        status = os.waitpid(child, 0)[1] if child else None
    if status == 0:
        done |= marshal.loads(theirs)
    return [done[k] if k in done else job() for k, job in enumerate(jobs)]


def _work(jobs: Sequence[Callable[[], Any]], claims: int, sent: int) -> None:
    """The second process: do jobs, send what they return, end without what a process does at its end."""
    status = 1
    try:
        content = marshal.dumps({k: jobs[k]() for k in _claimed(claims, len(jobs))})
        with open(sent, "wb") as file:
            file.write(content)
        status = 0
    finally:
        os._exit(status)  # an error too ends here: the first process meets it again


def _claimed(claims: int, count: int) -> Iterator[int]:
    """Numbers of the jobs that this process is the first to claim."""
    while claim := os.read(claims, 1):
        yield from range(claim[0], count, MOST_CLAIMS)
