"""Which engine runs the artifacts of a run: a choice like the hardware, never mixed in one table.

`engine=transformers` is the default and changes no record: its digest leaves the engine out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.engines.transformers import Mode
    from harness.environment import Hardware
    from harness.evaluation import Probe
    from harness.method import LanguageModel

DEFAULT = {"_target_": "harness.engines.choice.Transformers", "name": "transformers"}


class EngineChoice(Protocol):
    """How artifacts are run.

    name: as in `engine=`. gives: what probes may ask for beyond scoring and decoding: "hidden states", "caches" (keys
    and values within reach, ways to decode), "requests".
    dtype: arithmetic in the place of the hardware's; None leaves that.
    """

    name: str
    dtype: str | None
    gives: frozenset[str]

    def check_available(self) -> None:
        """Raise ConfigError with the way to get it where it is missing. Imports and loads nothing."""

    def check_hardware(self, hardware: Hardware) -> None:
        """Raise ConfigError for a configuration of hardware that this engine cannot use."""

    def versions(self) -> dict[str, str]:
        """Of packages outside this interpreter that touch a number."""

    def running(self, folder: Path, hardware: Hardware, mode: Mode, log: Path) -> AbstractContextManager[LanguageModel]:
        """The artifact in `folder`, loaded for `mode`."""


@dataclass(frozen=True)
class Transformers:
    """transformers, in the process of the stage."""

    name: str = "transformers"

    dtype: ClassVar[None] = None
    gives: ClassVar[frozenset[str]] = frozenset({"hidden states", "caches"})

    def check_available(self) -> None:
        """Always there."""

    def versions(self) -> dict[str, str]:
        """Those of this interpreter are in every record."""
        return {}

    def check_hardware(self, hardware: Hardware) -> None:
        """Runs on whatever a configuration describes."""

    @contextmanager
    def running(self, folder: Path, hardware: Hardware, mode: Mode, log: Path) -> Iterator[LanguageModel]:
        """See EngineChoice."""
        import torch

        from harness import artifact

        hardware.make_current()
        dtype = hardware.scoring_dtype if mode == "scoring" else hardware.resolved_decoding_dtype()
        lm = artifact.load(folder, hardware.places, getattr(torch, dtype), mode)
        # answers are written faster in captured steps; to compile for each batch's shape would take longer
        steps = "auto" if mode == "scoring" and hardware.steps != "plain" else hardware.steps
        lm.engine = lm.engine.on_hardware(hardware.attention, steps)
        yield lm


def is_default(section: dict[str, Any] | None) -> bool:
    """Whether a configuration's engine is the one that records do not mention."""
    return section is None or section == DEFAULT


def shared_over(engine: Any, hardware: Hardware) -> int:
    """GPUs that hold a part of every layer each, and read their parts at the same time: 1 where none are shared.

    engine: what runs the model, or the choice of it.
    """
    return getattr(engine, "tensor_parallel", 1) if hardware.device == "cuda" else 1


def places_of(engine: Any, hardware: Hardware) -> list[str]:
    """The devices that hold the model, as torch names them; those that the engine shares its layers over, too."""
    several = shared_over(engine, hardware)
    return hardware.places if several == 1 else [f"{hardware.device}:{number}" for number in range(several)]


def hardware_with(engine: EngineChoice, hardware: Hardware) -> Hardware:
    """The hardware as this engine uses it: in the engine's own arithmetic, where it has one."""
    if engine.dtype is None:
        return hardware
    return replace(hardware, scoring_dtype=engine.dtype, decoding_dtype=engine.dtype)


def check_probes(engine: EngineChoice, probes: dict[str, Probe]) -> None:
    """Raise ConfigError, naming the probes, where one needs what this engine does not give."""
    lacking: dict[str, list[str]] = {}
    for name, probe in probes.items():
        for need in sorted(set(getattr(probe, "needs", ())) - engine.gives):
            lacking.setdefault(need, []).append(name)
    if lacking:
        what = "; ".join(f"{need}, which {', '.join(names)} asks for" for need, names in lacking.items())
        way_out = "engine=vllm" if "requests" in lacking else "evaluation=served, which asks for what it gives"
        raise ConfigError(f"engine={engine.name} gives no {what}; choose {way_out}")
