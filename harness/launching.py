"""Sweeps in other processes and on other machines: what a launcher needs, who gets which GPU, who was lost.

Hydra's launchers hand out the jobs of a sweep (conf/hydra/launcher). A job marks its folder when it begins and writes
its outcome over the mark when it ends: a mark that stays is a worker that was lost, killed or out of memory or out of
the time that a scheduler gave it. Its row says so, and the same command runs it again.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import slurm_queue
from harness.errors import ConfigError

LOST = "lost"
REASON = "its worker was lost before it finished: killed, out of memory or out of time; the same command runs it again"
ELSEWHERE = "not finished: lost, or still running on another machine; the same command runs what has no record"
NEEDS = {  # launcher -> (module, extra)
    "parallel": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "joblib"),
    "slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "slurm_rehearsal": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
    "ray_cluster": ("hydra_plugins.hydra_ray_launcher", "ray"),
}


def missing(arguments: Sequence[str]) -> str:
    """What a chosen launcher needs and this Python does not have; empty when nothing is missing."""
    for argument in arguments:
        key, _, name = argument.partition("=")
        if key.lstrip("+") == "hydra/launcher" and name in NEEDS:
            module, extra = NEEDS[name]
            if not _is_installed(module):
                package = f'"llm-inference-harness[{extra}]"'
                return f'{argument} needs a package of its own: pip install {package} (in a checkout: -e ".[{extra}]")'
    return ""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the namespace package that holds it
        return False


def take_device(folder: Path, devices: Sequence[str]) -> str:
    """One of the devices for this process, kept until it ends, and no other process's of the same folder.

    A claim is a file made exclusively, named by the device, that holds a process; the claim of a process that has ended
    is void. Raises ConfigError when every device is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for device in devices:
        claim = folder / device.replace("/", "_")
        mine = str(os.getpid())
        try:
            with claim.open("x", encoding="utf-8") as file:
                file.write(mine)
            return device
        except FileExistsError:
            owner = claim.read_text(encoding="utf-8")
        if owner == mine:
            return device
        if owner and not _is_alive(int(owner)):
            void = claim.with_name(f"{claim.name}.void-{owner}")
            try:
                claim.rename(void)  # of several that see it, one succeeds
                with claim.open("x", encoding="utf-8") as file:
                    file.write(mine)
                return device
            except (FileNotFoundError, FileExistsError):
                continue
    raise ConfigError(
        f"{len(devices)} devices ({', '.join(devices)}) for more jobs at a time: "
        f"hydra.launcher.n_jobs={len(devices)} gives each job its own"
    )


def visible_devices(installed: int) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; all `installed` where it names none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(installed)]
    return [name.strip() for name in named.split(",") if name.strip()]


def own_device(device: str) -> str:
    """The device of a run as every process of this machine names it, whichever GPUs each of them sees.

    device: torch's, "cpu", "cuda" or "cuda:1".
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    from harness.environment import machine

    visible, number = visible_devices(len(machine()["gpus"])), int(index or 0)
    return f"GPU {visible[number] if number < len(visible) else number}"


def share_devices(launcher: str, device: str, sweep: Path) -> None:
    """Give this worker of a parallel sweep one GPU of the machine and hide the others.

    launcher: `hydra.launcher._target_`; device: torch's device of the run. Slurm shares out GPUs itself; a device with
    a number was chosen by hand. Raises ConfigError when there are fewer devices than workers.
    """
    if "joblib" not in launcher or device != "cuda":
        return
    from harness.environment import machine

    devices = visible_devices(len(machine()["gpus"]))
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = take_device(sweep / "devices", devices)


def settle() -> None:
    """Let stages start from a worker whose way to start processes only joblib knows: their own children ask for it."""
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("forkserver", force=True)


def mark_of_this_process() -> dict[str, Any]:
    """Which process works on a job, and for which job of Slurm."""
    mark = {"host": socket.gethostname(), "process": os.getpid()}
    job = slurm_queue.own_job()
    return {**mark, "slurm_job": job} if job else mark


def is_at_work(mark: dict[str, Any]) -> bool | None:
    """Whether another process still works on a marked job; None when this machine cannot know.

    Slurm knows of its own jobs, on whatever machine; of other processes only their own machine does.
    """
    here = mark_of_this_process()
    job = mark.get("slurm_job")
    if job is not None and job != here.get("slurm_job"):
        try:
            return not slurm_queue.has_ended(job, slurm_queue.queue())
        except (OSError, subprocess.SubprocessError):
            return None
    if mark["host"] != here["host"]:
        return None
    return mark["process"] != here["process"] and _is_alive(mark["process"])


def _is_alive(process: int) -> bool:
    import psutil

    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
