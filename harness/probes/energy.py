"""Energy of answering, from the counters of the hardware; no value where none can be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from harness.engines.choice import places_of
from harness.errors import ConfigError
from harness.records import Measurement

if TYPE_CHECKING:
    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

POWERCAP = Path("/sys/class/powercap")


class Counter(Protocol):
    """A hardware counter of energy."""

    name: str

    def start(self) -> None:
        """From here on."""

    def joules(self) -> float:
        """Energy since `start`."""


@dataclass(frozen=True)
class Energy:
    """Joules per output token of the whole processor package or GPU, idle draw included, prompt reading included.

    Requests are repeated for at least `seconds`, because counters tick some ten to a thousand times a second only.
    """

    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 32
    seconds: float = 10
    clock: Callable[[], float] = field(default=time.perf_counter, repr=False)

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"energy {name}={getattr(self, name)}: must be at least 1")
        if self.seconds <= 0:
            raise ConfigError(f"energy seconds={self.seconds}: must be more than 0")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """One number: `energy_per_output_token_joules`."""
        dtype = context.hardware.resolved_decoding_dtype()
        on = f"batch {self.batch}, prompt {self.prompt_tokens}, {self.new_tokens} new, {dtype}"
        counter = counter_of(*map(torch.device, places_of(lm.engine, context.hardware)))
        value, note = None, "no energy counter can be read here"
        if counter is not None:
            value, note = self._joules_per_token(lm, context, counter), f"{counter.name}; {lm.engine.kernels()}"
        yield Measurement("energy_per_output_token_joules", value, "J/token", on, "lower", note=note)

    def _joules_per_token(self, lm: LanguageModel, context: Context, counter: Counter) -> float:
        generator = torch.Generator().manual_seed(context.seed)
        vocabulary = lm.module.get_input_embeddings().num_embeddings
        prompt = torch.randint(vocabulary, (self.batch, self.prompt_tokens), generator=generator)
        self._answer(lm, prompt)  # the first request prepares kernels
        tokens, started = 0, self.clock()
        counter.start()
        while not tokens or self.clock() - started < self.seconds:
            self._answer(lm, prompt)
            tokens += self.batch * self.new_tokens
        return counter.joules() / tokens

    def _answer(self, lm: LanguageModel, prompt: torch.Tensor) -> None:
        for tokens in lm.engine.generate(prompt, self.new_tokens):
            tokens.cpu()  # waits for the device


def counter_of(*devices: torch.device, powercap: Path = POWERCAP) -> Counter | None:
    """The counters behind the devices as one, or None: no such hardware, no right to read it, or no driver package."""
    try:
        gpus = [device.index or 0 for device in devices if device.type == "cuda"]
        counter = NvmlCounters(gpus) if gpus else RaplCounter(powercap)
        counter.start()
        counter.joules()
    except (OSError, ImportError, RuntimeError):
        return None
    return counter


class RaplCounter:
    """Intel's and AMD's running average power limit: one counter a package, in microjoules, that wraps around.

    Beside the packages some machines count "psys": all of the board, packages included, which must not come on top.
    """

    name = "RAPL packages"

    def __init__(self, powercap: Path = POWERCAP) -> None:
        zones = sorted(powercap.glob("intel-rapl:[0-9]"))
        self.packages = [zone for zone in zones if (zone / "name").read_text(encoding="ascii").startswith("package")]
        if not self.packages:
            raise OSError(f"no packages in {powercap}")

    def start(self) -> None:
        """From here on."""
        self.started = [_number(package / "energy_uj") for package in self.packages]

    def joules(self) -> float:
        """Energy of all packages since `start`; right for less than one whole turn of the counter."""
        total = 0
        for package, started in zip(self.packages, self.started, strict=True):
            total += (_number(package / "energy_uj") - started) % (_number(package / "max_energy_range_uj") + 1)
        return total / 1e6


class NvmlCounters:
    """GPUs' own counts of millijoules since their driver was loaded (Volta and later), summed."""

    name = "NVML"

    def __init__(self, indices: Sequence[int]) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            # torch and NVML number GPUs differently when some are hidden: the identifier is one
            identifiers = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in indices]
            handles = [pynvml.nvmlDeviceGetHandleByUUID(identifier) for identifier in identifiers]
            self._read = lambda: sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles))
            self._read()
        except pynvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error

    def start(self) -> None:
        """From here on."""
        self.started = self._read()

    def joules(self) -> float:
        """Energy since `start`."""
        return (self._read() - self.started) / 1e3


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
