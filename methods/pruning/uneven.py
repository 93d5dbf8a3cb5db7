"""Models whose layers have widths of their own: rebuilt from a configuration, saved and loaded like any other.

When every layer is left with the same widths, a plain configuration says it, and transformers and vLLM load the model
natively. Otherwise the model is one of class `Uneven…ForCausalLM`, with a configuration that names the widths of each
layer; importing this module registers it with transformers' Auto classes. Nothing is pickled.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from harness.errors import RunError
from methods.blocks import decoder_blocks
from methods.pruning.structured import Layer, set_head_counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from harness.method import LanguageModel

MODEL_TYPE = "uneven_decoder"
CHANNEL_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size")
KEY_VALUE_FIELDS = ("num_key_value_heads", "num_kv_heads")
TOLERANCE = 1e-5  # of the largest logit: the same products in another order


class UnevenConfig(PreTrainedConfig):
    """What `config.json` of such a model is read by.

    Its fields are those of `dense_model_type`, and `uneven_layers`: for every decoder block the shapes of the linears
    that lost something, with `channels`, `query_heads` and `key_value_heads`.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> PreTrainedConfig:
        """A configuration of the class made for its architecture. Raises RunError when it names none."""
        kind = config_dict.get("dense_model_type")
        if kind is None:
            raise RunError(f"config.json of an {MODEL_TYPE} lacks dense_model_type; it was not written by this project")
        return uneven_classes(kind)[0].from_dict(config_dict, **options)


AutoConfig.register(MODEL_TYPE, UnevenConfig, exist_ok=True)


@cache
def uneven_classes(model_type: str) -> tuple[type, type]:
    """Configuration and model class of an architecture ("llama") with layers of their own widths, registered."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunError(f"transformers knows no causal language model of type {model_type}; update transformers")
    dense_config = CONFIG_MAPPING[model_type]
    dense_model = MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]
    name = f"Uneven{dense_config.__name__}"
    config_class = type(name, (dense_config,), {"model_type": MODEL_TYPE, "__module__": __name__})

    def build(self: nn.Module, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        dense_model.__init__(self, config, *args, **options)
        shape_layers(self, config.uneven_layers)

    members = {"__init__": build, "config_class": config_class, "__module__": __name__}
    model_class = type(f"Uneven{dense_model.__name__}", (dense_model,), members)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def shape_layers(module: nn.Module, layers: Sequence[dict[str, Any]]) -> None:
    """Give every decoder block its widths; the weights that come with them are empty."""
    _, blocks = decoder_blocks(module)
    for block, layer in zip(blocks, layers, strict=True):
        for name, (rows, columns) in layer["shapes"].items():
            linear = block.get_submodule(name)
            linear.out_features, linear.in_features = rows, columns
            linear.weight = nn.Parameter(linear.weight.new_empty(rows, columns), linear.weight.requires_grad)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.new_empty(rows), linear.bias.requires_grad)
        if "attention" in layer:
            set_head_counts(block.get_submodule(layer["attention"]), layer["query_heads"], layer["key_value_heads"])


@torch.no_grad()
def rebuilt(lm: LanguageModel, layers: Sequence[Layer]) -> LanguageModel:
    """The model with what was removed from `layers` as a model of its own class, its weights the same tensors.

    Plain where a plain configuration gives the same logits, uneven otherwise.
    """
    from harness.method import LanguageModel

    module = lm.module
    tokens = torch.arange(8, device=module.device)[None] % module.get_input_embeddings().num_embeddings
    expected = module(input_ids=tokens, use_cache=False).logits
    bound = max(TOLERANCE, 8 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    for made in _models(module, layers):
        got = made(input_ids=tokens, use_cache=False).logits
        if torch.allclose(got, expected, rtol=0, atol=bound):
            return LanguageModel(made, lm.tokenizer, lm.engine.changed(made), lm.storage_dtype)
    raise RunError(f"{type(module).__name__} could not be rebuilt with narrower layers; choose another model")


def _models(module: nn.Module, layers: Sequence[Layer]) -> Iterator[nn.Module]:
    """Models with the weights of `module`, the one that most programs read first."""
    from huggingface_hub.errors import StrictDataclassError

    values = module.config.to_dict()
    described = [layer.description() for layer in layers]
    if all(one == described[0] for one in described) and values["model_type"] != MODEL_TYPE:
        for config_class, fields in _plain(module.config, values, layers[0], described[0]):
            try:
                made = _with_weights_of(module, config_class.from_dict(fields))
            except (StrictDataclassError, ValueError):
                continue  # this architecture wants, say, its width divided by the number of heads
            if made is not None:
                yield made
    dense_type = values.pop("dense_model_type", values.pop("model_type"))
    earlier = values.pop("uneven_layers", None) or [{"shapes": {}} for _ in described]
    merged = [
        {**before, **now, "shapes": {**before["shapes"], **now["shapes"]}}
        for before, now in zip(earlier, described, strict=True)
    ]
    config_class, _ = uneven_classes(dense_type)
    made = _with_weights_of(
        module, config_class.from_dict({**values, "dense_model_type": dense_type, "uneven_layers": merged})
    )
    if made is not None:
        yield made


def _plain(
    config: PreTrainedConfig, values: dict[str, Any], layer: Layer, widths: dict[str, Any]
) -> Iterator[tuple[type, dict[str, Any]]]:
    """Configuration classes and fields that may say it when all layers are equal.

    Llama's class wants its width divided by the number of heads; Mistral's, the same function, does not.
    """
    from transformers import MistralConfig

    wanted = dict(values)
    wanted |= {name: widths["channels"] for name in CHANNEL_FIELDS if name in values and "channels" in widths}
    queries = widths.get("query_heads", config.num_attention_heads)
    if queries != config.num_attention_heads:
        wanted |= {name: widths["key_value_heads"] for name in KEY_VALUE_FIELDS if name in values}
        wanted["num_attention_heads"] = queries
        if not isinstance(getattr(type(config), "head_dim", None), property):  # Falcon derives it
            wanted["head_dim"] = len(layer.units["heads"].columns) // queries
    yield type(config), wanted
    if config.model_type == "llama":
        yield MistralConfig, {**wanted, "model_type": "mistral", "sliding_window": None}


def _with_weights_of(module: nn.Module, config: PreTrainedConfig) -> nn.Module | None:
    """A model of `config` that holds the parameters of `module`; None when they do not fit."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        made = AutoModelForCausalLM.from_config(
            config, dtype=module.dtype, attn_implementation=module.config._attn_implementation
        )
    state = module.state_dict()
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        return None
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    made.generation_config = module.generation_config
    return made.requires_grad_(False).eval().to(module.device)
