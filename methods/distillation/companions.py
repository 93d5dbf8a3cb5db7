"""A second model that is stored, loaded and counted with a first one, for systems of two students."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from harness.method import LanguageModel


class Companion(nn.Module):
    """A causal language model inside another one's checkpoint; the outer model's forward pass never calls it.

    Its weights are 16-bit as stored, whatever the outer model computes in; `opened` gives it to an engine.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = config["model_type"]
        others = {key: value for key, value in config.items() if key != "model_type"}
        self.config = config
        self.module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **others))
        self._prepare()

    def _prepare(self) -> None:
        self.tied = dict(getattr(self.module, "all_tied_weights_keys", None) or {})
        self.module.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_without_tied)
        self.register_load_state_dict_pre_hook(_with_tied)

    @classmethod
    def of(cls, lm: LanguageModel) -> Companion:
        """Take over the weights of a model, which the caller gives up."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.config = lm.module.config.to_dict()
        made.module = _with_weights_in(lm.module, lm.storage_dtype)
        made._prepare()
        return made

    @property
    def weight_count(self) -> int:
        """Weights, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def spec(self) -> dict[str, Any]:
        """Arguments that build it again."""
        return {"config": self.config}

    def compressed_tensors_scheme(self) -> None:
        """No other program reads two models from one checkpoint."""

    def opened(self, outer: LanguageModel) -> LanguageModel:
        """Ready to run, in the type and on the device of the model that it came with."""
        from harness.engines.transformers import TransformersEngine
        from harness.method import LanguageModel

        reference = next(parameter for name, parameter in outer.module.named_parameters() if parameter.ndim > 1)
        module = _with_weights_in(copy.deepcopy(self.module).to(reference.device), reference.dtype)
        module.tie_weights()
        return LanguageModel(module, outer.tokenizer, TransformersEngine(module), outer.storage_dtype)


def _with_weights_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters alone in a type: rotary frequencies stay exact."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def _without_tied(companion: Companion, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for name in companion.tied:
        state.pop(f"{prefix}module.{name}", None)


def _with_tied(companion: Companion, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, source in companion.tied.items():
        if f"{prefix}module.{source}" in state:
            state.setdefault(f"{prefix}module.{name}", state[f"{prefix}module.{source}"])
