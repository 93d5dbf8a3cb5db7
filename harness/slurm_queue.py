"""What Slurm says of jobs: from its queue, which every cluster has, rather than from its accounts, which some lack.

`sacct` needs a database that a cluster may not run; the launcher asks nothing else and would wait for ever for a job
that was lost there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
FORGOTTEN = "COMPLETED"  # the queue drops a job some minutes after its end (MinJobAge)
QUEUE = ("squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i|%T")
ANSWER_SECONDS = 60


def states(text: str) -> dict[str, str]:
    """State of each job, by its number or, in an array, by the array's number and its place: lines of `QUEUE`."""
    lines = (line.strip().split("|") for line in text.splitlines())
    return {job: state if state in (*ENDED, "PENDING") else "RUNNING" for job, state in lines}


def own_job() -> str:
    """The job that this process runs in, as the queue names it; empty outside Slurm."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the last job of an array has the array's own number
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID", "")


def has_ended(job: str, known: Mapping[str, str]) -> bool:
    """Whether a job that was submitted runs no more and waits no more."""
    return known.get(job, FORGOTTEN) in ENDED


def queue() -> dict[str, str]:
    """States of this user's jobs. Raises OSError or subprocess.SubprocessError when Slurm does not answer."""
    answer = subprocess.run(QUEUE, capture_output=True, text=True, check=True, timeout=ANSWER_SECONDS)
    return states(answer.stdout)


def keeps_accounts() -> bool:
    """Whether `sacct` answers on this cluster."""
    try:
        answer = subprocess.run(["sacct", "--noheader", "--jobs=1"], capture_output=True, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return False
    return answer.returncode == 0


def watch_queue_without_accounts() -> None:
    """Let submitit learn from the queue how its jobs are, on a cluster that keeps no accounts."""
    if keeps_accounts():
        return
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class QueueWatcher(SlurmInfoWatcher):
        """Asks `squeue` where its parent asks `sacct`."""

        def _make_command(self) -> list[str] | None:
            return list(QUEUE) if self._registered - self._finished else None

        def read_info(self, string: str | bytes) -> dict[str, dict[str, str]]:
            known = states(string if isinstance(string, str) else string.decode())
            return {job: {"JobID": job, "State": known.get(job, FORGOTTEN)} for job in self._registered}

    SlurmJob.watcher = QueueWatcher(delay_s=60)
