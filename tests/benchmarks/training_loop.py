"""What the training loop costs beside the forward and backward passes and AdamW that it runs.

    python tests/benchmarks/training_loop.py [STEPS] [WINDOW]

The same steps on the embedded model, once as a bare loop and once through methods.training.train, in turn; CPU seconds
of one process and one thread, and on a GPU wall seconds. Each loop runs for STEPS and for three times as many; what the
difference took is compared, without set-up and without the checkpoint at the end, which a bare loop does not write.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness.method import Bench, TrainingLog
from harness.models import EmbeddedModel
from harness.progress import NoProgress
from harness.wheels import default_cache
from methods.training import TrainingSettings, language_modeling_loss, train

ROUNDS = 3


def main() -> None:
    """Print seconds of both loops and their ratio, round by round."""
    steps, window = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 8), (2, 256)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    windows = torch.randint(100, 40_000, (3 * steps, window), generator=torch.Generator().manual_seed(0))
    ratios = []
    for number in range(ROUNDS):
        bare, looped = (
            seconds_of(loop, windows, device) - seconds_of(loop, windows[:steps], device)
            for loop in (bare_loop, our_loop)
        )
        ratios.append(looped / bare)
        print(f"round {number + 1}: bare {bare:.2f} s, training loop {looped:.2f} s, ratio {ratios[-1]:.3f}")
    print(f"{2 * steps} steps of {window} tokens on {device}: median ratio {statistics.median(ratios):.3f}")


def seconds_of(loop, windows: torch.Tensor, device: str) -> float:
    """CPU seconds of a loop over windows [S, T] on a fresh model (wall seconds on a GPU), its set-up included."""
    module = EmbeddedModel("embedded").load(default_cache(), device, torch.float32)[0].module
    clock = time.perf_counter if device == "cuda" else time.process_time
    loop(module, windows[:1])  # imports, first allocations
    started = clock()
    loop(module, windows)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def bare_loop(module: torch.nn.Module, windows: torch.Tensor) -> None:
    """Forward, backward, clip, step."""
    parameters = [parameter.requires_grad_(True) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    for tokens in windows.to(module.device):
        loss = language_modeling_loss(module, tokens[None])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


def our_loop(module: torch.nn.Module, windows: torch.Tensor) -> None:
    """The same through the shared loop."""
    settings = TrainingSettings(steps=len(windows), learning_rate=1e-5, checkpoint_steps=10**6)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(None, torch.Generator().manual_seed(0), Path(folder), NoProgress(), TrainingLog())
        train(module, list(module.parameters()), windows, language_modeling_loss, settings, bench, "benchmark")


if __name__ == "__main__":
    main()
