"""Tiny random models of every block shape that the methods promise to handle."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
WINDOWED = {**GROUPED, "head_dim": 8, "sliding_window": 4}

ARCHITECTURES = {
    "llama": ("llama", GROUPED),
    "llama_all_heads": ("llama", {**GROUPED, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": 4}),
    "gemma": ("gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("gemma2", WINDOWED),
    "gemma3": ("gemma3_text", {**WINDOWED, "sliding_window_pattern": 2}),
    "opt": (
        "opt",
        {**COMMON, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "opt_norm_after": (
        "opt",
        {
            **COMMON,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
        },
    ),
    "gpt_neox": ("gpt_neox", {**COMMON, "intermediate_size": 64, "max_position_embeddings": 64}),
    "phi": ("phi", {**GROUPED, "num_key_value_heads": 4}),
    "phi3": ("phi3", {**GROUPED, "pad_token_id": 0}),
    "falcon_new": ("falcon", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_old": ("falcon", {**COMMON, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon_alibi": (
        "falcon",
        {**COMMON, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "alibi": True},
    ),
    "bloom": ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
}


def tiny_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A random model in evaluation mode; norms and biases are random too, so that mistakes with them show."""
    kind, fields = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                elif parameter.shape[0] != 97:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model.requires_grad_(False).eval()


def tiny_tokens(samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [samples, length]."""
    return torch.randint(3, 97, (samples, length), generator=torch.Generator().manual_seed(seed))
