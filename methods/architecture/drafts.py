"""Where speculative decoding gets its guesses: the text itself, the target's first layers, a small model.

A draft says what may come next and, where it drew at random, from which distribution. It answers for a batch of rows
at once; a row for which it has no guess holds -1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from harness.errors import ConfigError, RunError
from methods.blocks import decoder_blocks

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from harness.engines.transformers import TransformersEngine
    from harness.method import LanguageModel
    from harness.models import ModelSource

NONE = -1  # no guess
Choose = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # logits [B, V] -> tokens [B], distribution [B, V]


@dataclass(frozen=True)
class Guesses:
    """tokens: [B, n], NONE where a row has no guess; distributions: [B, n, V] that they were drawn from, or None
    where each guess was certain."""

    tokens: Tensor
    distributions: Tensor | None = None


class Drafter(Protocol):
    """Guesses for one request."""

    def propose(self, text: Tensor, count: int, mask: Tensor | None) -> Guesses:
        """At most `count` tokens that may follow the text [B, T]; mask as in the engine. The text of the next call
        may take back guesses, and goes on from what was accepted."""


class Draft(Protocol):
    """A way to guess."""

    name: str

    def attached(self, base: LanguageModel) -> Draft:
        """The draft as it is kept with the model. Raises ConfigError or RunError where it does not fit."""

    def begin(self, engine: TransformersEngine, choose: Choose) -> Drafter:
        """Guesses for one request; choose: how the next token is taken from logits."""

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make it again."""


# ------------------------------------------------------------------------------------------------ the text itself


@dataclass(frozen=True)
class PromptLookup:
    """What followed the same last words earlier in the text: no second model, nothing to store.

    longest, shortest: of the words that must be the same, in tokens; the longest match counts, the newest of those.
    """

    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ConfigError(
                f"draft shortest={self.shortest}, longest={self.longest}: 1 <= shortest <= longest must hold"
            )

    @property
    def name(self) -> str:
        """For the row."""
        return "prompt lookup"

    def attached(self, base: LanguageModel) -> PromptLookup:
        """Nothing to attach."""
        return self

    def begin(self, engine: TransformersEngine, choose: Choose) -> PromptLookup:
        """Nothing to remember: the text says it all."""
        return self

    def propose(self, text: Tensor, count: int, mask: Tensor | None) -> Guesses:
        """See Drafter."""
        return Guesses(continuations(text, count, self.longest, self.shortest, mask))

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make it again."""
        return asdict(self)


def continuations(text: Tensor, count: int, longest: int, shortest: int, mask: Tensor | None = None) -> Tensor:
    """What followed the last n tokens of a row where they stood before: ids [B, T] -> [B, <= count], NONE for no guess.

    The largest n from `longest` down to `shortest` that is found counts; of several places the newest. A guess that
    reaches the end of the text goes on with itself, as a text that repeats itself does.
    mask: [B, T], 0 where a row is padded; padding matches nothing.
    """
    rows, length = text.shape
    if mask is not None:
        text = text.masked_fill(mask[:, :length] == 0, NONE)
    start = torch.full((rows,), length, device=text.device)  # where the guess begins; the end: no guess
    for n in range(min(longest, length - 1), shortest - 1, -1):
        suffix = text[:, -n:]
        same = (text.unfold(1, n, 1)[:, :-1] == suffix[:, None]).all(-1)  # at each place but the suffix's own
        same &= (suffix != NONE).all(-1, keepdim=True)
        newest = (same * torch.arange(1, same.shape[1] + 1, device=text.device)).amax(1) if same.shape[1] else 0 * start
        found = (newest > 0) & (start == length)
        start = torch.where(found, newest - 1 + n, start)
    period = (length - start).clamp(min=1)[:, None]
    places = start[:, None] + torch.arange(count, device=text.device) % period
    guesses = text.gather(1, places.clamp(max=length - 1)).masked_fill(places >= length, NONE)
    return guesses if bool((start < length).any()) else guesses[:, :0]


# ------------------------------------------------------------------------------------------------ a model that guesses


class ModelDrafter:
    """Guesses of a smaller model, token by token, with a cache of its own that follows what was accepted."""

    def __init__(self, engine: TransformersEngine, choose: Choose) -> None:
        self._engine, self._choose = engine, choose
        self._cache: Cache = engine.new_cache()
        self._cache.activate_past_recording()
        self._known = 0  # tokens of the text in the cache

    def propose(self, text: Tensor, count: int, mask: Tensor | None) -> Guesses:
        """See Drafter."""
        length = text.shape[1]
        step = text[:, self._back_to(length - 1) :].to(self._engine.module.device)
        tokens, distributions = [], []
        for _ in range(count):
            known = None if mask is None else _extended(mask, self._known + step.shape[1])
            logits = self._engine.advance(step, self._cache, mask=known)[:, -1]
            self._known += step.shape[1]
            token, distribution = self._choose(logits)
            tokens.append(token)
            distributions.append(distribution)
            step = token[:, None]
        drawn = distributions[0] is not None
        return Guesses(torch.stack(tokens, 1), torch.stack(distributions, 1) if drawn else None)

    def _back_to(self, length: int) -> int:
        """Forget what was not accepted; how many tokens are known then."""
        surplus = max(0, self._known - length)
        if self._known:
            self._cache.crop(-surplus)
        self._known -= surplus
        return self._known


def _extended(mask: Tensor, length: int) -> Tensor:
    """The mask of a text that has grown: new tokens are real."""
    return torch.cat([mask[:, :length], mask.new_ones(len(mask), max(0, length - mask.shape[1]))], dim=1)


@dataclass(frozen=True)
class TruncatedDraft:
    """The target's own first layers with its final norm and head: no weights of its own.

    layers: how many of the target's.
    """

    layers: int

    def __post_init__(self) -> None:
        if not isinstance(self.layers, int) or self.layers < 1:
            raise ConfigError(f"draft layers={self.layers}: must be at least 1")

    @property
    def name(self) -> str:
        """For the row."""
        return f"first {self.layers} layers"

    def attached(self, base: LanguageModel) -> TruncatedDraft:
        """Nothing to attach. Raises ConfigError when the target has no more layers than that."""
        blocks = decoder_blocks(base.module)[1]
        if self.layers >= len(blocks):
            raise ConfigError(f"draft layers={self.layers}: this model has {len(blocks)}; take fewer")
        return self

    def begin(self, engine: TransformersEngine, choose: Choose) -> ModelDrafter:
        """Guesses for one request."""
        from harness.engines.transformers import TransformersEngine

        return ModelDrafter(TransformersEngine(first_layers(engine.module, self.layers)), choose)

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make it again."""
        return asdict(self)


def first_layers(module: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of the first blocks of another: its modules are the other's own, only the lists around them are new."""
    path, blocks = decoder_blocks(module)
    made = _shallow(module)
    owner = made
    for part in path.split(".")[:-1]:
        owner._modules[part] = _shallow(owner._modules[part])
        owner = owner._modules[part]
        owner.config = _shortened(owner.config, count)
    owner._modules[path.rpartition(".")[2]] = nn.ModuleList(blocks[:count])
    made.config = _shortened(module.config, count)
    return made


def _shallow(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def _shortened(config: Any, count: int) -> Any:
    made = copy.deepcopy(config)
    made.num_hidden_layers = count
    if getattr(made, "layer_types", None):
        made.layer_types = list(made.layer_types[:count])
    return made


@dataclass(frozen=True)
class ModelDraft:
    """A smaller model of the same vocabulary; its weights are stored with the target's and count with them.

    source: where the small model comes from (a student, a smaller checkpoint).
    """

    source: ModelSource

    @property
    def name(self) -> str:
        """For messages."""
        return f"draft {self.source.name}"

    def attached(self, base: LanguageModel) -> AttachedDraft:
        """The small model as a part of the target. Raises RunError for another vocabulary."""
        from harness.wheels import default_cache

        small, _ = self.source.load(default_cache(), str(base.module.device), base.storage_dtype)
        if small.tokenizer.get_vocab() != base.tokenizer.get_vocab():
            raise RunError(
                f"{self.source.name} has another vocabulary than the target, so its guesses mean other words; "
                "choose a model of the same family"
            )
        if any(hasattr(child, "spec") for child in small.module.modules()):
            raise RunError(f"{self.source.name} is compressed; a draft's weights must be plain")
        base.module.draft = SmallModel(small.module.config.to_dict(), small.module)
        return AttachedDraft(self.source.name)

    def begin(self, engine: TransformersEngine, choose: Choose) -> ModelDrafter:
        """Drafts are attached before they guess."""
        raise RunError("this draft is not part of a model yet")

    def as_dict(self) -> dict[str, Any]:
        """Kept as AttachedDraft."""
        raise RunError("this draft is not part of a model yet")


@dataclass(frozen=True)
class AttachedDraft:
    """The small model that lies inside the target."""

    model: str

    @property
    def name(self) -> str:
        """For the row."""
        return f"draft {self.model}"

    def attached(self, base: LanguageModel) -> AttachedDraft:
        """It is."""
        return self

    def begin(self, engine: TransformersEngine, choose: Choose) -> ModelDrafter:
        """Guesses for one request."""
        from harness.engines.transformers import TransformersEngine

        inside = getattr(engine.module, "draft", None)
        if inside is None:
            raise RunError(f"{self.model} is no longer part of the model; put speculative_decoding last in the stack")
        return ModelDrafter(TransformersEngine(inside.model), choose)

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make it again."""
        return asdict(self)


class SmallModel(nn.Module):
    """A whole model inside another, so that it is saved, loaded, cast and counted with it.

    config: fields of its configuration, `model_type` among them; model: None makes an empty one.
    """

    is_another_model = True  # its blocks are not the target's

    def __init__(self, config: dict[str, Any], model: PreTrainedModel | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        self._config = config
        if model is None:
            fields = {key: value for key, value in config.items() if key != "model_type"}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
        self.model = model
        self.weight_count = sum(parameter.numel() for parameter in model.parameters())

    def spec(self) -> dict[str, Any]:
        """How to make it again."""
        return {"config": self._config}

    def compressed_tensors_scheme(self) -> dict[str, Any]:
        """No layer of that format."""
        return {}
