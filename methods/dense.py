"""The uncompressed baseline: what everything else is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel


@dataclass(frozen=True)
class Dense:
    """Leaves the model as it is; so it may be larger than a GPU."""

    computes_block_by_block: ClassVar[bool] = True

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """Return `base` untouched."""
        return base
