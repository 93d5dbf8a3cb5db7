"""The uncompressed baseline: what everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class Dense:
    """Leaves the model as it is."""

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Return `base` untouched."""
        return base
