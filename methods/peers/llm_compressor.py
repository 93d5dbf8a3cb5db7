"""GPTQ, AWQ and SmoothQuant of llm-compressor, the compressor of the vLLM project.

https://github.com/vllm-project/llm-compressor. Defaults are the library's. Scales are rounded to the stored 16-bit type
before weights are (`scale_dtype`), as everywhere here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from methods.peers.exchange import Library, ask, grid_settings
from methods.peers.layers import int_quantized_layer, pack_quantized_layer, put_back
from methods.quantization.activations import InputGrid
from methods.quantization.grids import IntegerGrid

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

LIBRARY = Library("llm-compressor", "llmcompressor", "llmcompressor", "run_llm_compressor.py")
EIGHT_BITS = IntegerGrid(8, symmetric=True, group_size=None)


@dataclass(frozen=True)
class LLMCompressorGPTQ:
    """`GPTQModifier`.

    interpreter: Python with llm-compressor; None is this one. damping, block_columns: as in our GPTQ.
    activation_order: "static" there, the most active input channels first with groups of the original weights.
    """

    grid: IntegerGrid
    interpreter: str | None = None
    damping: float = 0.01
    activation_order: bool = True
    block_columns: int = 128

    def __post_init__(self) -> None:
        grid_settings(self.grid)
        for name in ("damping", "block_columns"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be greater than 0")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, compress there, load what it packed."""
        knobs = {name: getattr(self, name) for name in ("damping", "activation_order", "block_columns")}
        return _weight_only(self.interpreter, base, bench, self.grid, {"algorithm": "gptq", **knobs})


@dataclass(frozen=True)
class LLMCompressorAWQ:
    """`AWQModifier`, then round to nearest. It has no clipping search.

    search_points: exponents that are tried. weight_magnitudes: its "duo scaling", scales from activations and weights.
    """

    grid: IntegerGrid
    interpreter: str | None = None
    search_points: int = 20
    weight_magnitudes: bool = True

    def __post_init__(self) -> None:
        grid_settings(self.grid)
        if self.search_points < 1:
            raise ConfigError(f"method.search_points={self.search_points}: must be at least 1")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, compress there, load what it packed."""
        knobs = {"search_points": self.search_points, "weight_magnitudes": self.weight_magnitudes}
        return _weight_only(self.interpreter, base, bench, self.grid, {"algorithm": "awq", **knobs})


@dataclass(frozen=True)
class LLMCompressorSmoothQuant:
    """`SmoothQuantModifier`, then 8-bit rows of weights (round to nearest) and 8-bit inputs, a scale for each token.

    strength: 0 leaves all difficulty with the inputs, 1 gives all of it to the weights.
    """

    interpreter: str | None = None
    strength: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"method.strength={self.strength}: must lie between 0 and 1")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get the library where it is missing."""
        LIBRARY.require(self.interpreter)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Hand over, compress there, load what it packed."""
        settings = {
            "algorithm": "smoothquant",
            "strength": self.strength,
            "grid": grid_settings(EIGHT_BITS),
            "input_bits": 8,
        }
        answer = ask(LIBRARY, self.interpreter, base, bench, settings, calibrates=True)
        inputs = InputGrid()
        return put_back(base, answer, lambda linear, parts: int_quantized_layer(linear, parts, inputs))


def _weight_only(
    interpreter: str | None, base: LanguageModel, bench: Bench, grid: IntegerGrid, settings: dict[str, Any]
) -> LanguageModel:
    settings = {**settings, "grid": grid_settings(grid), "input_bits": None}
    answer = ask(LIBRARY, interpreter, base, bench, settings, calibrates=True)
    dtype = base.storage_dtype
    return put_back(base, answer, lambda linear, parts: pack_quantized_layer(linear, parts, grid, dtype))
