"""Weight-only round to nearest of torchao, a PyTorch project. https://github.com/pytorch/ao. No calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from methods.peers.exchange import Library, ask, grid_settings
from methods.peers.layers import integer_layer, put_back
from methods.quantization.grids import IntegerGrid

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

LIBRARY = Library("torchao", "torchao", "torchao transformers accelerate", "run_torchao.py")
EIGHT_BITS = IntegerGrid(8, symmetric=True, group_size=None)


@dataclass(frozen=True)
class TorchAO:
    """`IntxWeightOnlyConfig` on `grid`; without a grid `Int8WeightOnlyConfig`, a 32-bit scale for each row."""

    grid: IntegerGrid | None = None
    interpreter: str | None = None

    def __post_init__(self) -> None:
        if self.grid is not None:
            grid_settings(self.grid)

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, quantize there, take over codes and scales."""
        settings = {"grid": None if self.grid is None else grid_settings(self.grid)}
        answer = ask(LIBRARY, self.interpreter, base, bench, settings, calibrates=False)
        grid = self.grid or EIGHT_BITS
        return put_back(base, answer, lambda linear, parts: integer_layer(linear, parts, grid))
