"""SignRound of Intel's AutoRound: rounding and clipping learned block by block with signed gradients.

https://github.com/intel/auto-round; Cheng et al. 2023, https://arxiv.org/abs/2309.05516.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import ConfigError
from methods.peers.exchange import Library, ask, grid_settings
from methods.peers.layers import integer_layer, put_back

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.grids import IntegerGrid

LIBRARY = Library("AutoRound", "auto_round", "auto-round", "run_auto_round.py")
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class AutoRound:
    """`AutoRound`.

    interpreter: Python with AutoRound; None is this one. iterations: steps of each block, 0 for round to nearest.
    learning_rate: None is 1 / iterations. batch: windows of a step. extension: its own additions to the paper.
    """

    grid: IntegerGrid
    interpreter: str | None = None
    iterations: int = 200
    learning_rate: float | None = None
    batch: int = 8
    extension: bool = False

    def __post_init__(self) -> None:
        grid_settings(self.grid)
        if self.grid.bits not in WIDTHS:
            raise ConfigError(f"bits={self.grid.bits}: AutoRound packs {', '.join(map(str, WIDTHS))} bits")
        for name, least in (("iterations", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least {least}")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, tune there, take over codes and scales."""
        knobs = {name: getattr(self, name) for name in ("iterations", "learning_rate", "batch", "extension")}
        answer = ask(
            LIBRARY, self.interpreter, base, bench, {"grid": grid_settings(self.grid), **knobs}, calibrates=True
        )
        return put_back(base, answer, lambda linear, parts: integer_layer(linear, parts, self.grid))
