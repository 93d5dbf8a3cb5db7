"""GPTQ of GPTQModel, the successor of AutoGPTQ. https://github.com/ModelCloud/GPTQModel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import ConfigError
from methods.peers.exchange import Library, ask, grid_settings
from methods.peers.layers import integer_layer, put_back

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel
    from methods.quantization.grids import IntegerGrid

LIBRARY = Library("GPTQModel", "gptqmodel", "gptqmodel", "run_gptqmodel.py")


@dataclass(frozen=True)
class GPTQModel:
    """`GPTQModel.quantize`.

    interpreter: Python with GPTQModel; None is this one. damping: as in our GPTQ, raised when a factorization fails.
    group_aware_order: the most active groups first, and the most active channels of each (its "act_group_aware").
    """

    grid: IntegerGrid
    interpreter: str | None = None
    damping: float = 0.05
    group_aware_order: bool = True

    def __post_init__(self) -> None:
        grid_settings(self.grid)
        if not 0 < self.damping < 1:
            raise ConfigError(f"method.damping={self.damping}: must lie between 0 and 1")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, quantize there, take over codes and scales."""
        knobs = {"damping": self.damping, "group_aware_order": self.group_aware_order}
        answer = ask(
            LIBRARY, self.interpreter, base, bench, {"grid": grid_settings(self.grid), **knobs}, calibrates=True
        )
        return put_back(base, answer, lambda linear, parts: integer_layer(linear, parts, self.grid))
