"""Decoder blocks of packed linears in few kernels, for few rows of input on a GPU.

    h = h + attention(norm(h));  h = h + down(silu(gate(norm(h))) up(norm(h)))

What writes h also writes h times the gain of the norm that follows and sums of its squares, so that the products which
read the norm take both and divide at their end: root mean square norms (Zhang & Sennrich 2019, equation 4) are no
kernels of their own, nor are the sums with what went around a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.engines.joined import JoinedPart
from methods.quantization.fragment_product import (
    COLUMNS,
    DENSE_ROWS,
    before_norm,
    fragment_product,
    fragment_product_before_norm,
)
from methods.quantization.gated import GatedLinears
from methods.quantization.linear import MATRIX_UNITS, QuantizedLinear

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}  # of a block as Llama's, and no others


class NormedLinear(nn.Module):
    """A packed linear that reads what `before_norm` brings, while it has the squares; else the layer as it is."""

    def __init__(self, layer: QuantizedLinear, epsilon: float) -> None:
        super().__init__()
        self.layer, self.epsilon = layer, epsilon
        self.squares: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.squares is None:
            return self.layer(x)
        rows = x.reshape(-1, self.layer.in_features)
        y = fragment_product(
            rows, self.layer.operand, self.layer.operand_scale, False, self.squares, self.epsilon, None
        )
        y = y if self.layer.bias is None else y + self.layer.bias.to(y.dtype)
        return y.view(*x.shape[:-1], -1)


class AddingLinear(nn.Module):
    """A packed linear that adds `added` to its outputs, where there is any, and leaves in `made` what a norm needs."""

    def __init__(self, layer: QuantizedLinear, gain: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("gain", gain, persistent=False)
        self.added: Tensor | None = None
        self.made: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self.added is None:
            return self.layer(x)
        rows = x.reshape(-1, self.layer.in_features)
        y, *made = fragment_product_before_norm(
            rows, self.layer.operand, self.layer.operand_scale, self.added, self.gain
        )
        self.made = tuple(made)
        return y.view(*x.shape[:-1], -1)


@dataclass
class Carried:
    """What a block leaves for the next one's norm: its output times the gain, and the squares; between steps None."""

    made: tuple[Tensor, Tensor] | None = None


def fuse(blocks: Sequence[nn.Module]) -> Callable[[], None] | None:
    """Let the blocks run so, all of them, and return what undoes it; None where one of them is built otherwise.

    Expects linears joined and gated layers made (`harness.engines.joined`).
    """
    if not all(_fits(block) for block in blocks):
        return None
    carried, originals = Carried(), []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        whole = block.self_attn.q_proj.whole
        originals.append((block, vars(block).get("forward"), whole, whole.layer, block.self_attn.o_proj))
        whole.layer = NormedLinear(whole.layer, _epsilon(block.input_layernorm))
        block.self_attn.o_proj = AddingLinear(block.self_attn.o_proj, block.post_attention_layernorm.weight.detach())
        block.forward = partial(_forward, block, block.forward, carried, block is blocks[0], after)

    def undo() -> None:
        for block, own, whole, layer, out in originals:
            del block.forward
            if own is not None:
                block.forward = own
            whole.layer, block.self_attn.o_proj = layer, out

    return undo


def _forward(
    block: nn.Module,
    plain: Callable[..., Tensor],
    carried: Carried,
    first: bool,
    after: nn.Module | None,
    hidden_states: Tensor,
    **options: Any,
) -> Tensor:
    """A block's forward pass: [B, T, H] -> [B, T, H].

    What a pass that failed on the way has left behind, in another layer or block, is never read.
    """
    normed, out, gated = block.self_attn.q_proj.whole.layer, block.self_attn.o_proj, block.mlp
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    made, carried.made = None if first else carried.made, None
    normed.squares = out.added = out.made = None
    if len(rows) >= DENSE_ROWS:
        return plain(hidden_states, **options)
    scaled, squares = made or before_norm(rows, block.input_layernorm.weight)
    normed.squares, out.added = squares, rows
    hidden, *_ = block.self_attn(hidden_states=scaled.view_as(hidden_states), **options)
    scaled, squares = out.made
    normed.squares = out.added = out.made = None
    epsilon = _epsilon(block.post_attention_layernorm)
    inner = fragment_product(scaled, gated.both.operand, gated.both.operand_scale, True, squares, epsilon, None)
    hidden, down = hidden.reshape(-1, hidden.shape[-1]), gated.down
    if after is None:
        hidden = fragment_product(inner, down.operand, down.operand_scale, False, None, 0.0, hidden)
    else:
        hidden, *made = fragment_product_before_norm(
            inner, down.operand, down.operand_scale, hidden, after.input_layernorm.weight
        )
        carried.made = tuple(made)
    return hidden.view_as(hidden_states)


def _fits(block: nn.Module) -> bool:
    """Whether a block consists of what `_forward` computes."""
    if {name for name, _ in block.named_children()} != PARTS or not isinstance(block.mlp, GatedLinears):
        return False
    first = getattr(block.self_attn, "q_proj", None)
    if not isinstance(first, JoinedPart) or not _is_packed(first.whole.layer):
        return False
    read = [getattr(block.self_attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if any(not isinstance(part, JoinedPart) or part.whole is not first.whole for part in read):
        return False
    out, norms = getattr(block.self_attn, "o_proj", None), (block.input_layernorm, block.post_attention_layernorm)
    plain = all(_is_packed(layer) and layer.bias is None for layer in (out, block.mlp.both, block.mlp.down))
    return plain and out.out_features % COLUMNS == 0 and all(_is_root_mean_square(norm) for norm in norms)


def _is_packed(layer: nn.Module | None) -> bool:
    return isinstance(layer, QuantizedLinear) and layer.kernel.startswith(MATRIX_UNITS)


def _epsilon(norm: nn.Module) -> float:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _is_root_mean_square(norm: nn.Module) -> bool:
    """Whether a module divides by the root of the mean square and multiplies with its weight, by trying."""
    weight = getattr(norm, "weight", None)
    if _epsilon(norm) is None or weight is None or weight.ndim != 1:
        return False
    x = torch.randn(2, len(weight), dtype=weight.dtype, device=weight.device)
    expected = functional.rms_norm(x, x.shape[-1:], weight, _epsilon(norm)).float()
    return float((norm(x).float() - expected).norm()) <= 0.02 * float(expected.norm())
