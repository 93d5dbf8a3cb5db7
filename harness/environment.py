"""The machine: what a run may use of it, and what a record must say about it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm-eval",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pandas",
    "wandb",
    "datasets",
    "gguf",
    "vllm",
    "compressed-tensors",
)
DTYPES = ("float32", "bfloat16", "float16")
USUAL = {
    "attention": None,
    "steps": "plain",
    "sharded": False,
    "devices": 1,
}  # options that came later: at these values nothing is new
FOREIGN_LOAD = 0.1  # share of this process's cores that others may take before what was measured says so
DISTURBED = "other processes used"  # how the note begins
FOREIGN = rf"{DISTURBED} (\d+)% of the cores meanwhile"  # the whole of it, with percent
STEPS = ("plain", "captured", "compiled", "auto")  # how tokens are decoded, see TransformersEngine


@dataclass(frozen=True)
class Hardware:
    """What a run uses of a machine.

    name: the name of the configuration, part of every record ("cpu", "h100").
    device: torch device string.
    threads: CPU threads for torch; None takes the cores this process may run on.
    scoring_dtype: arithmetic of quality measurements and of compression.
    decoding_dtype: arithmetic of speed measurements; "auto" takes bfloat16 where the device has it natively.
    attention: implementation of attention, where the method has none of its own; None is transformers' choice.
    steps: how tokens are decoded in speed measurements: "plain", "captured" (a static cache, one CUDA graph for all
        steps), "compiled" (the same, the step compiled before: a minute or two for each shape of request), or "auto",
        which captures on a GPU where nothing is guessed. Answers of tasks are decoded as by "auto", unless it is
        "plain".
    devices: GPUs of this machine that hold the model together, some blocks each, while it is measured.
    sharded: processes that train a student together (`accelerate launch`) hold a part of it each, instead of all of it.
    compress_seconds_limit, evaluate_seconds_limit: a stage that runs longer is ended and recorded as failed.
    """

    name: str
    device: str = "cpu"
    threads: int | None = None
    scoring_dtype: str = "float32"
    decoding_dtype: str = "auto"
    attention: str | None = None
    steps: str = "plain"
    devices: int = 1
    sharded: bool = False
    compress_seconds_limit: float = 14400
    evaluate_seconds_limit: float = 14400

    def __post_init__(self) -> None:
        for field, allowed in (("scoring_dtype", DTYPES), ("decoding_dtype", (*DTYPES, "auto"))):
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError(f"hardware.{field}={value}: choose one of {', '.join(allowed)}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"hardware.device={self.device}: choose cpu or cuda")
        if self.attention is not None:
            from harness.engines.attention import check_name

            check_name(self.attention, "hardware.attention")
        if self.steps not in STEPS:
            raise ConfigError(f"hardware.steps={self.steps}: choose one of {', '.join(STEPS)}")
        self._check_devices()
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"hardware.threads={self.threads}: must be at least 1, or null for all cores")
        for field in ("compress_seconds_limit", "evaluate_seconds_limit"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"hardware.{field}={getattr(self, field)}: must be greater than 0")

    def _check_devices(self) -> None:
        several = f"hardware.devices={self.devices}"
        if self.devices < 1:
            raise ConfigError(f"{several}: must be at least 1")
        if training_processes() > 1 and ":" in self.device:
            raise ConfigError(
                f"hardware.device={self.device} with {training_processes()} processes that train together: each has "
                "one GPU; choose hardware.device=cuda (CUDA_VISIBLE_DEVICES says which GPUs)"
            )
        if self.devices == 1:
            return
        if self.device != "cuda":
            raise ConfigError(
                f"{several} divides a model over GPUs 0 to {self.devices - 1}, and hardware.device={self.device}: "
                "choose hardware.device=cuda (CUDA_VISIBLE_DEVICES says which GPUs), or hardware.devices=1"
            )
        if self.steps in ("captured", "compiled"):
            raise ConfigError(
                f"{several}, hardware.steps={self.steps}: a CUDA graph belongs to one GPU; choose hardware.steps=plain"
            )
        if training_processes() > 1:
            raise ConfigError(
                f"{several} with {training_processes()} processes that train together: each has one GPU; choose "
                "hardware.devices=1, and hardware.sharded=true where a student does not fit"
            )

    @property
    def places(self) -> list[str]:
        """The devices that hold the model, as torch names them."""
        return [self.device] if self.devices == 1 else [f"{self.device}:{number}" for number in range(self.devices)]

    @property
    def thread_count(self) -> int:
        """Threads torch may use."""
        return self.threads or len(os.sched_getaffinity(0))

    def resolved_decoding_dtype(self) -> str:
        """`decoding_dtype` with "auto" replaced by what this device does natively."""
        if self.decoding_dtype != "auto":
            return self.decoding_dtype
        if self.device.startswith("cuda"):
            return "bfloat16"
        return "bfloat16" if _cpu_has_bfloat16() else "float32"

    def make_current(self) -> None:
        """Make a numbered GPU the one for whatever is not told which: kernels of Triton, counts of memory."""
        if ":" in self.places[0]:
            import torch

            torch.cuda.set_device(self.places[0])

    def check_device(self) -> None:
        """Raise ConfigError when the device is not there."""
        import torch

        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f"hardware={self.name} needs a CUDA device and torch sees none; use hardware=cpu, "
                "or install a CUDA build of torch"
            )
        if self.devices > 1 and torch.cuda.device_count() < self.devices:
            raise ConfigError(
                f"hardware.devices={self.devices}: torch sees {torch.cuda.device_count()} (CUDA_VISIBLE_DEVICES hides "
                "others, and so does hydra/launcher=parallel, which gives each job one)"
            )


def label(hardware: dict[str, Any]) -> str:
    """What a machine's configuration is called: "h100", over two of them "h100_x2"."""
    name, devices = str(hardware.get("name", "unknown hardware")), hardware.get("devices", 1)
    return name if devices == 1 else f"{name}_x{devices}"


def telling(hardware: dict[str, Any]) -> dict[str, Any]:
    """A hardware section without options at their usual values, which older records do not have."""
    return {key: value for key, value in hardware.items() if key not in USUAL or value != USUAL[key]}


def training_processes() -> int:
    """How many processes train a student together, as their launcher says in WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this is; the one with rank 0 measures and writes."""
    return int(os.environ.get("RANK", "0"))


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cpu_has_bfloat16() -> bool:
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@cache
def machine() -> dict[str, Any]:
    """The hardware itself, as far as it can be read without loading torch."""
    return {
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "architecture": platform.machine(),
        "gpus": _gpu_names(),
    }


def machine_fingerprint() -> str:
    """A short digest of what decides speed: processor, cores and GPUs. Memory size is left out: it varies by boot."""
    return fingerprint_of(machine())


def fingerprint_of(parts: dict[str, Any]) -> str:
    """The fingerprint of a machine as a record describes it."""
    key = f"{parts['processor']}|{parts['cores']}|{parts['architecture']}|{parts['gpus']}"
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu_names() -> list[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Versions of every installed package that may touch a number."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> dict[str, Any]:
    """Git commit of the project and whether the tree differs from it; empty outside a checkout."""
    try:
        revision = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": revision, "dirty": bool(changes)}


def load_average() -> float | None:
    """Load of the last minute: foreign work shows up here."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


class ForeignLoad:
    """CPU time that other processes take of this machine from now on; says nothing where the system does not.

    threads: cores that this process may use, of which the share is taken.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.started, self.before = time.monotonic(), foreign_cpu_seconds()

    def note(self) -> str:
        """A warning for what was measured meanwhile, or nothing."""
        now = foreign_cpu_seconds()
        if now is None or self.before is None:
            return ""
        share = (now - self.before) / max(time.monotonic() - self.started, 1e-9) / self.threads
        return f"{DISTURBED} {share:.0%} of the cores meanwhile" if share > FOREIGN_LOAD else ""


def foreign_cpu_seconds() -> float | None:
    """CPU seconds since boot of all but this process and what it started; None where the system does not say."""
    import psutil

    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft_irq = (int(value) for value in fields[:7])
    busy = (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):  # an engine's server, workers of a compiler, other programs
        with suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
            times = process.cpu_times()
            busy -= times.user + times.system + times.children_user + times.children_system
    return busy


def available_memory_bytes() -> int | None:
    """Memory that a new process could take without swapping; None where the system does not say."""
    return _kibibytes("/proc/meminfo", "MemAvailable")


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    return _kibibytes("/proc/self/status", "VmRSS")


def peak_resident_bytes() -> int | None:
    """The most memory that this process ever held; None where the system does not say."""
    return _kibibytes("/proc/self/status", "VmHWM")


def _kibibytes(file: str, field: str) -> int | None:
    """A size that Linux prints as "field: 123 kB", in bytes."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, flags=re.M)
    return int(found[1]) * 1024 if found else None
