"""Answers to prompts of different lengths, and scoring in float32: in the quality stage and in plain transformers.

    python tests/benchmarks/padded_answers.py [--device cuda] [--rows 64] [--prompt 900] [--steps 40]

Random weights in the shape of SmolLM2-135M. Prints seconds a token of all rows, milliseconds and, on a GPU, peak GiB
for 4 windows of 2,048 tokens, and whether both ways gave the same tokens.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from harness.engines import transformers as engines
from harness.engines.transformers import TransformersEngine

SHAPE = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=900)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, initializer_range=0.06)  # large enough to have opinions
    module = LlamaForCausalLM(config).to(arguments.device).eval()
    windows = torch.randint(0, 49000, (4, 2048))
    prompts = torch.randint(0, 49000, (arguments.rows, arguments.prompt))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    for row in range(0, arguments.rows, 2):
        mask[row, : row * arguments.prompt // (3 * arguments.rows)] = False
    share_heads, tokens = engines.share_heads, {}
    for name in ("plain transformers", "quality stage"):
        if name == "plain transformers":
            engines.share_heads = lambda: AttentionInterface.register("sdpa", sdpa_attention_forward)
            engine = TransformersEngine(module)
        else:
            engines.share_heads = share_heads
            engine = TransformersEngine(module, steps="auto")
            engine.prepare("scoring", torch.float32)
        engine.hidden(windows)
        if arguments.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = now(arguments.device)
        engine.hidden(windows)
        scoring = now(arguments.device) - began
        peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if arguments.device == "cuda" else ""
        list(engine.generate(prompts, 3, mask))  # compiles kernels
        steps = engine.generate(prompts, arguments.steps, mask)
        found = [next(steps)]  # reads the prompts, and captures before
        began = now(arguments.device)
        found += steps
        each = (now(arguments.device) - began) / (arguments.steps - 1)
        tokens[name] = torch.stack(found)
        print(f"{name}: {each:.4f} s a token, {1e3 * scoring:.0f} ms{peak} to score; {engine.kernels()}", flush=True)
    print(f"tokens alike: {float((tokens['plain transformers'] == tokens['quality stage']).float().mean()):.4f}")


def now(device: str) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
