"""Implementations of attention by name: transformers' own, one fused kernel of torch and no other, or our reference.

`sdpa` lets torch choose a kernel, call by call. `sdpa_flash`, `sdpa_efficient`, `sdpa_cudnn` and `sdpa_math` allow one
alone and fail where it cannot run, so that a row which names a kernel ran that kernel. `tiled` is the reference of
`methods.architecture.flash_attention`. `split_keys` reads a single query by a kernel of ours and all else as `sdpa`
does; captured steps on a GPU choose it where several heads share keys and nothing was chosen. `sdpa` on a CPU
reads padded rows in a form that copies no shared keys, see `share_heads`.
"""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F

from harness.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

TRANSFORMERS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
BACKENDS = {
    "sdpa_flash": "FLASH_ATTENTION",
    "sdpa_efficient": "EFFICIENT_ATTENTION",
    "sdpa_cudnn": "CUDNN_ATTENTION",
    "sdpa_math": "MATH",
}
ONE_QUERY = "split_keys"
OURS = (*BACKENDS, "tiled", ONE_QUERY)
IMPLEMENTATIONS = (*TRANSFORMERS, *OURS)
UNUSUAL = ("position_bias", "s_aux", "softcap", "cache")  # arguments that change more than a scaled product does


def check_name(name: str, option: str) -> None:
    """Raise ConfigError for a name that is no implementation; option: what the user set."""
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"{option}={name}: choose one of {', '.join(IMPLEMENTATIONS)}")


def needs_plain_rows(name: str) -> bool:
    """Whether an implementation reads rows without padding only."""
    return name in OURS and name != ONE_QUERY


def shares_keys(module: PreTrainedModel) -> bool:
    """Whether several query heads of a model read one key head."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    return heads is not None and (getattr(config, "num_key_value_heads", None) or heads) < heads


def runs_one_query(module: PreTrainedModel) -> bool:
    """Whether `split_keys` runs on this model's device, and the model asks for attention by name."""
    if not module._supports_attention_backend or find_spec("triton") is None:
        return False
    import triton

    return module.device.type == "cuda" or triton.knobs.runtime.interpret


def use_attention(module: PreTrainedModel, name: str) -> None:
    """Make every attention layer of a model run one implementation.

    Raises RunError where the model or this machine cannot: nothing is replaced silently.
    """
    check_name(name, "attention")
    if name in OURS:
        if not module._supports_attention_backend:
            raise RunError(
                f"{type(module).__name__} has an attention of its own and cannot run {name}; choose eager or sdpa"
            )
        if name == ONE_QUERY and not runs_one_query(module):
            raise RunError(f"{name} is a kernel in Triton and needs a GPU; choose sdpa")
        _register(name)
    try:
        module.set_attn_implementation(_inside(name))
    except (ImportError, ValueError) as error:
        raise RunError(f"{type(module).__name__} cannot run {name} attention here: {error}") from error
    if attention_of(module) != name:
        raise RunError(f"{type(module).__name__} runs {attention_of(module)} attention, not {name}")


def asks_for_sdpa(module: PreTrainedModel) -> bool:
    """Whether a model's code looks whether its attention is called "sdpa" and does something else under another name.

    Of those installed, models with an index of keys do: they would read all keys instead of the chosen ones.
    True as well where the code cannot be read.
    """
    try:
        return '"sdpa"' in inspect.getsource(sys.modules[type(module).__module__])
    except (OSError, TypeError):
        return True


def share_heads() -> None:
    """Let sdpa read keys that query heads share as they lie, also where rows are padded and one query is asked.

    transformers copies them for every head where there is a mask, because torch's kernels for GPUs cannot mask shared
    heads. On a CPU, heads of one key head may be its queries instead, 3 to 12 times as fast; all else is as before, in
    the whole process.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", _attend_sharing)


def _attend_sharing(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Q, D], key [B, H_kv, K, D], value [B, H_kv, K, D_v] -> [B, Q, H, D_v]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    usual = not dropout and all(rest.get(name) is None for name in UNUSUAL)
    masked = attention_mask is not None and attention_mask.shape[1:3] == (1, 1)  # one query, all heads alike
    if not (usual and masked and query.shape[2] == 1 and query.device.type == "cpu"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
    rows, heads, _, width = query.shape
    together = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    found = F.scaled_dot_product_attention(together, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[-1]), None


def attention_of(module: PreTrainedModel) -> str:
    """The implementation that a model runs, by the name of `IMPLEMENTATIONS`."""
    own = module.config._attn_implementation
    return next((name for name in OURS if _inside(name) == own), own)


def _inside(name: str) -> str:
    """The name inside transformers, which takes every name with "flash" in it for a package to be installed."""
    return f"own_{name.replace('flash', 'fused')}" if name in OURS else name


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    if name == ONE_QUERY:
        from harness.engines.split_keys import attend, mask_once

        AttentionInterface.register(_inside(name), attend)
        AttentionMaskInterface.register(_inside(name), mask_once)
        return
    if name == "tiled":
        from methods.architecture.flash_attention import attend_tiled

        AttentionInterface.register(_inside(name), attend_tiled)
    else:
        AttentionInterface.register(_inside(name), _through(name))
    # no mask where rows are not padded: the kernels know what causal means
    AttentionMaskInterface.register(_inside(name), flash_attention_mask)


def _through(name: str) -> Any:
    """An attention function of transformers that runs one of torch's kernels or fails."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
    from transformers.integrations.sdpa_attention import repeat_kv

    backend = getattr(SDPBackend, BACKENDS[name])

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, Q, D], key and value [B, H_kv, K, D] -> [B, Q, H, D]."""
        check_call(name, attention_mask, key, rest)
        if rest.get("softcap"):
            raise RunError(f"{name}: torch's kernels do not cap attention logits, as this model does; choose eager")
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        lengths = query.shape[2], key.shape[2]
        causal = attention_mask is None and lengths[0] > 1
        if causal and lengths[0] != lengths[1]:
            attention_mask, causal = causal_lower_right(*lengths), False
        try:
            with sdpa_kernel([backend]):
                out = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling
                )
        except RuntimeError as error:
            if "kernel" not in str(error):
                raise
            raise RunError(f"{name}: this kernel cannot run here in {query.dtype}: {error}") from error
        return out.transpose(1, 2).contiguous(), None

    return attend


def check_call(name: str, attention_mask: Tensor | None, key: Tensor, rest: dict[str, Any]) -> None:
    """Raise RunError for a call that an implementation of ours would answer wrongly."""
    if attention_mask is not None and attention_mask.ndim != 4:
        raise RunError(f"{name}: rows with padding must be read one by one")
    window = rest.get("sliding_window")
    if attention_mask is None and window is not None and key.shape[2] > window:
        raise RunError(f"{name} does not know this model's own window of {window} tokens; choose eager or sdpa")
    if rest.get("s_aux") is not None:
        raise RunError(f"{name} does not know this model's learned attention sinks; choose eager")
