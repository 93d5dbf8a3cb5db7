"""A Slurm cluster of one node in a folder: Debian's daemons, run directly, without a system's own configuration."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
SYSTEM = "/usr/sbin:/usr/bin"
CONFIGURATION = """\
ClusterName=onenode
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def what_is_missing() -> str:
    """Why a cluster cannot be started here; empty when it can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:{SYSTEM}") is None]
    return f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)" if missing else ""


@contextmanager
def one_node_cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach a new cluster; it is gone afterwards, its jobs with it.

    Raises RuntimeError with the daemons' logs when the node does not become ready.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has at most 107 characters
    folder.chmod(0o755)  # munged refuses a folder that others may write to, or that clients cannot enter
    for name in ("state", "spool"):
        (folder / name).mkdir()
    with (folder / "munge.key").open("xb") as key:
        key.write(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    user, host = subprocess.check_output(["id", "-un"], text=True).strip(), socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    cores, ports = len(os.sched_getaffinity(0)), _free_ports(2)
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, user=user, cores=cores, ports=ports))
    environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": f"{os.environ['PATH']}:{SYSTEM}"}
    munge = [f"--{option}={folder}/munge.{option.partition('-')[0]}" for option in ("socket", "key-file", "pid-file")]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    running = []
    try:
        for command in (["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = (folder / f"{command[0]}.txt").open("w")
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            log.close()
        _wait_until_idle(folder, environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--me"], env=environment, capture_output=True, check=False)
        deadline = time.monotonic() + 15
        while _ask(environment, "squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_idle(folder: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    while "idle" not in _ask(environment, "sinfo", "--noheader"):
        if time.monotonic() > deadline:
            logs = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
            raise RuntimeError(f"the node is not ready after 30 s:\n{logs}")
        time.sleep(0.2)


def _ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
