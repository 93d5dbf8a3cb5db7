"""Students: the smaller model that learns from a larger one.

A smaller checkpoint, the teacher with blocks taken out, or fresh weights of a smaller shape. Which blocks stay follows
"How To Train Your (Compressed) Large Language Model" (Jha et al. 2023, https://arxiv.org/abs/2305.14864, Section 3).
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from harness.errors import ConfigError
from methods.blocks import decoder_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from harness.method import Bench, LanguageModel
    from harness.models import ModelSource

Pattern = Literal["maximal_gap", "input", "output", "middle", "both"]
PATTERNS = ("maximal_gap", "input", "output", "middle", "both")
log = logging.getLogger(__name__)

DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# what a tokenizer can do differently: spaces, case, digits, code, other scripts, control characters
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\tand a tab\nand a new line\n\n",
    "3.14159 + 2,718,281 = -42 × 10⁹",
    "def f(x):\n    return [i**2 for i in range(x)]  # naïve café",
    "Привет, 世界! नमस्ते 🙂",
)


class Student(Protocol):
    """Makes the model that is trained."""

    def make(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """A model with float weights of its own, on the device of `base`, which stays as it is.

        Raises ConfigError for one that cannot learn from `base`: another tokenizer, or more weights.
        """


@dataclass(frozen=True)
class Truncated:
    """The teacher with some decoder blocks taken out; everything else is copied.

    keep: share of the blocks that stay, rounded; the first and the last always do, so that two blocks stay two.
    pattern: where blocks are taken from: right after the first ("input"), right before the last ("output"), from the
        middle, from both ends, or evenly spread ("maximal_gap").
    """

    keep: float = 0.5
    pattern: Pattern = "input"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(
                f"student.keep={self.keep}: must lie above 0 and be at most 1, the share of blocks that stay"
            )
        if self.pattern not in PATTERNS:
            raise ConfigError(f"student.pattern={self.pattern}: choose one of {', '.join(PATTERNS)}")

    def make(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """See Student."""
        return truncated(base, self.blocks(base, bench))

    def blocks(self, base: LanguageModel, bench: Bench) -> list[int]:
        """Numbers of the blocks that stay; how many they are goes into the log, loudly when that is all."""
        count = len(decoder_blocks(base.module)[1])
        kept = kept_blocks(count, max(round(self.keep * count), min(2, count)), self.pattern)
        bench.log.point("blocks left", 0, len(kept))
        if len(kept) == count and self.keep < 1:
            log.warning("keep=%s was asked for, of %s blocks that takes out none", self.keep, count)
        return kept


@dataclass(frozen=True)
class Checkpoint:
    """A smaller model from anywhere that models come from, for instance a student of an earlier run.

    source: as in conf/model. cache: where converted models are kept.
    """

    source: ModelSource
    cache: str | None = None

    def make(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """See Student."""
        from harness.wheels import default_cache

        reference = next(base.module.parameters())
        folder = Path(self.cache) if self.cache else default_cache()
        made, _ = self.source.load(folder, str(reference.device), reference.dtype)
        require_same_tokenizer(made.tokenizer, base.tokenizer)
        require_smaller(made.module, base.module)
        return made


@dataclass(frozen=True)
class Fresh:
    """Random weights of the teacher's architecture in a smaller shape.

    shape: fields of the teacher's configuration that differ ({num_hidden_layers: 4, hidden_size: 256}).
    """

    shape: dict[str, Any] = field(default_factory=dict)

    def make(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """See Student."""
        config = copy.deepcopy(base.module.config)
        unknown = [key for key in self.shape if not hasattr(config, key)]
        if unknown:
            raise ConfigError(f"student.shape: {type(config).__name__} has no field {', '.join(unknown)}")
        values = {**config.to_dict(), **self.shape}
        depth = depth_of(config)
        if values[depth] != getattr(config, depth):
            for key in per_layer_fields(config):
                values[key] = list(values[key])[: values[depth]] or None
        module = _build(type(base.module), type(config), values, base, seed=bench.generator.initial_seed())
        require_smaller(module, base.module)
        return _model(module, base)


def kept_blocks(count: int, kept: int, pattern: Pattern) -> list[int]:
    """Numbers of the blocks that stay, in order, when `kept` of `count` do; the first and the last always stay.

    Raises ConfigError when fewer than two would stay.
    """
    if kept >= count:
        return list(range(count))
    if kept < 2:
        raise ConfigError(
            f"a student of {kept} of {count} blocks: at least the first and the last stay; raise student.keep"
        )
    gone = count - kept
    if pattern == "maximal_gap":
        return torch.linspace(0, count - 1, kept, dtype=torch.float64).round().long().tolist()
    start = {"input": 1, "output": count - 1 - gone, "middle": (count - gone) // 2, "both": 0}[pattern]
    removed = set(range(start, start + gone))
    if pattern == "both":
        early = -(-gone // 2)
        removed = set(range(1, 1 + early)) | set(range(count - 1 - (gone - early), count - 1))
    return [index for index in range(count) if index not in removed]


@torch.no_grad()
def truncated(base: LanguageModel, kept: Sequence[int]) -> LanguageModel:
    """A model of the blocks `kept` of `base` with copies of their weights; its configuration is a plain one.

    Raises ConfigError for architectures whose blocks depend on each other (shared keys and values).
    """
    config = base.module.config
    if getattr(config, "num_kv_shared_layers", 0):
        raise ConfigError(f"{type(base.module).__name__}: blocks share keys and values, so none can be taken out")
    values, depth = config.to_dict(), depth_of(config)
    for key in per_layer_fields(config):
        values[key] = [values[key][index] for index in kept]
    values[depth] = len(kept)
    module = _build(type(base.module), type(config), values, base, seed=0)
    prefix, _ = decoder_blocks(base.module)
    renamed = {}
    for name, tensor in base.module.state_dict().items():
        inside = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
        if inside is None:
            renamed[name] = tensor
        elif int(inside[1]) in kept:
            renamed[f"{prefix}.{kept.index(int(inside[1]))}.{name[inside.end() :]}"] = tensor
    module.load_state_dict(renamed, strict=True)  # copies
    module.tie_weights()
    return _model(module, base)


def depth_of(config: PreTrainedConfig) -> str:
    """The field of a configuration that says how many decoder blocks there are."""
    written = config.to_dict()
    for name in DEPTH_FIELDS:
        if name in written:
            return name
    raise ConfigError(f"{type(config).__name__} does not say how many blocks it has; choose another model")


def per_layer_fields(config: PreTrainedConfig) -> list[str]:
    """Fields with one entry for every decoder block.

    A list of that length whose name speaks of layers, or of attention by layer: sliding windows, rotary positions.
    """
    written = config.to_dict()
    count = written[depth_of(config)]
    named = re.compile(r"layer|attention|sliding|rope|mlp|pattern", re.I)
    return [
        key
        for key, value in written.items()
        if isinstance(value, list | tuple) and len(value) == count and named.search(key)
    ]


def require_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless both turn texts into the same ids."""
    for text in PROBES:
        ours, theirs = (tokenizer(text)["input_ids"] for tokenizer in (student, teacher))
        if ours != theirs:
            raise ConfigError(
                f"the student's tokenizer reads {text!r} as {ours[:6]}…, the teacher's as {theirs[:6]}…: token by "
                "token they cannot be compared; choose a student of the same family, or a method that learns from text"
            )


def require_smaller(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ConfigError when a student has more weights than its teacher."""
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (student, teacher)]
    if sizes[0] > sizes[1]:
        raise ConfigError(
            f"the student has {sizes[0] / 1e6:.1f} million weights, its teacher {sizes[1] / 1e6:.1f} million: choose a "
            "smaller student, or the larger one as model="
        )


def _build(
    kind: type[nn.Module], config_class: type, values: dict[str, Any], base: LanguageModel, seed: int
) -> nn.Module:
    """A model of a configuration, random weights, on the device and in the type of `base`."""
    from huggingface_hub.errors import StrictDataclassError

    reference = next(base.module.parameters())
    device = reference.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(seed)
            module = kind._from_config(config_class.from_dict(values), dtype=reference.dtype)
    except (StrictDataclassError, ValueError) as error:
        raise ConfigError(f"student: {config_class.__name__} refuses this shape: {error}") from error
    return module.requires_grad_(False).eval()


def _model(module: nn.Module, base: LanguageModel) -> LanguageModel:
    from harness.engines.transformers import TransformersEngine
    from harness.method import LanguageModel

    if getattr(base.module, "generation_config", None) is not None:
        module.generation_config = copy.deepcopy(base.module.generation_config)
    return LanguageModel(module, base.tokenizer, TransformersEngine(module), base.storage_dtype)


def settled(student: LanguageModel) -> LanguageModel:
    """The trained student with its weights as a 16-bit checkpoint holds them; nothing else is ever measured."""
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.requires_grad_(False)
            parameter.copy_(parameter.to(student.storage_dtype))
    return student
