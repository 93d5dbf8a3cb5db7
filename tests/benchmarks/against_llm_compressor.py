"""GPTQ, SparseGPT and Wanda here against llm-compressor's `oneshot`: one machine, model and text, in turn.

    python tests/benchmarks/against_llm_compressor.py MODEL_FOLDER TEXT_FILE --peer PYTHON [--method sparsegpt]

PYTHON is the interpreter of an environment of its own with llmcompressor installed (its pins clash with ours).
Both get the same calibration windows, grid or sparsity, and evaluation windows. The clock holds `compress` and
`oneshot` alone: loading, tokenising and evaluating are outside. CPU seconds are of the whole process, all threads. On a
machine with other work to do use --threads 1: threads that wait for one another burn CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

GROUP_SIZE = 64
EVALUATION_SHARE = 4  # the last quarter of the text is held out
EVALUATION_WINDOWS = 32


def windows(folder: str, text: str, samples: int, length: int, seed: int):
    """Calibration windows [samples, length] at seeded positions and held-out evaluation windows [32, length]."""
    import torch
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(encoding="utf-8"), return_tensors="pt")
    ids = tokens.input_ids[0]
    cut = len(ids) - len(ids) // EVALUATION_SHARE
    starts = torch.randint(cut - length, (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = ids[cut : cut + EVALUATION_WINDOWS * length]
    return torch.stack([ids[start : start + length] for start in starts]), held_out.view(-1, length)


def perplexity(model, tokens) -> float:
    """exp of the mean token loss over windows [S, T]."""
    import torch
    from torch.nn.functional import cross_entropy

    losses = []
    with torch.no_grad():
        for window in tokens.split(2):
            logits = model(window).logits[:, :-1].float()
            losses.append(cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().exp().item()


def compress_here(model, calibration, arguments: argparse.Namespace):
    """Our method in place: stops before the clock starts, after it ended, and when the model can be scored."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from harness.method import Bench, LanguageModel
    from harness.progress import NoProgress
    from methods.pruning.sparsegpt import SparseGPT
    from methods.pruning.wanda import Wanda
    from methods.quantization.gptq import GPTQ
    from methods.quantization.grids import IntegerGrid

    class Windows:
        def calibration_windows(self, tokenizer, generator):
            return calibration

    if arguments.method == "gptq":
        method = GPTQ(IntegerGrid(int(arguments.bits), arguments.symmetric, GROUP_SIZE))
    else:
        method = {"sparsegpt": SparseGPT, "wanda": Wanda}[arguments.method](arguments.sparsity)
    base = LanguageModel(model, None, None, torch.float16)
    bench = Bench(Windows(), torch.Generator().manual_seed(0), Path("."), NoProgress())
    yield
    method.compress(base, bench)
    yield
    for module in model.modules():
        if hasattr(module, "prepare"):
            module.prepare("scoring", torch.float32)
    yield


def recipe_there(arguments: argparse.Namespace):
    """llm-compressor's modifier with the same settings."""
    if arguments.method == "gptq":
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor.modifiers.gptq import GPTQModifier

        weights = QuantizationArgs(
            num_bits=int(arguments.bits), symmetric=arguments.symmetric, strategy="group", group_size=GROUP_SIZE
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    from llmcompressor.modifiers import pruning

    structure = arguments.sparsity if ":" in arguments.sparsity else "0:0"
    keep, of = map(int, structure.split(":"))
    share = 1 - keep / of if of else float(arguments.sparsity)
    modifier = {"sparsegpt": pruning.SparseGPTModifier, "wanda": pruning.WandaPruningModifier}[arguments.method]
    return modifier(sparsity=share, mask_structure=structure, ignore=["re:.*lm_head"])


def compress_there(model, calibration, arguments: argparse.Namespace):
    """llm-compressor's method in place, in the same three steps."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot

    data = Dataset.from_dict(
        {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    )
    recipe = recipe_there(arguments)
    samples, length = calibration.shape
    yield
    oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=samples, max_seq_length=length)
    yield
    for module in model.modules():
        if hasattr(module, "quantization_enabled"):
            module.quantization_enabled = False  # weights are already rounded; do not round them again
    yield


def measure(arguments: argparse.Namespace) -> dict:
    """Compress once in this process and report."""
    import torch
    from transformers import AutoModelForCausalLM

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    calibration, held_out = windows(
        arguments.model, arguments.text, arguments.samples, arguments.window, arguments.seed
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    steps = {"here": compress_here, "there": compress_there}[arguments.side](model, calibration, arguments)
    next(steps)
    cpu, wall = time.process_time(), time.perf_counter()
    next(steps)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    next(steps)
    return {"cpu_seconds": cpu, "wall_seconds": wall, "perplexity": perplexity(model, held_out)}


def main() -> None:
    """Run both sides and print the comparison; with --side, be one side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("text", help="text file")
    parser.add_argument("--peer", help="interpreter with llmcompressor")
    parser.add_argument("--method", choices=["gptq", "sparsegpt", "wanda"], default="gptq")
    parser.add_argument("--bits", default="4", help="of GPTQ")
    parser.add_argument("--sparsity", default="0.5", help="of SparseGPT and Wanda: a share, or N:M")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the positions of the calibration windows")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 for its own choice")
    parser.add_argument("--side", choices=["here", "there"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    if not arguments.peer:
        parser.error("--peer PYTHON is needed: the interpreter of an environment with llmcompressor")
    what = f"{arguments.bits} bits, groups of {GROUP_SIZE}" if arguments.method == "gptq" else arguments.sparsity
    results = {}
    for side, python in (("there", arguments.peer), ("here", sys.executable)):
        command = [python, __file__, arguments.model, arguments.text, "--side", side]
        for name in ("method", "bits", "sparsity", "samples", "window", "threads", "seed"):
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--symmetric"] * arguments.symmetric
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[side] = r = json.loads(output.strip().splitlines()[-1])
        label = {"there": "llm-compressor", "here": "this project"}[side]
        print(
            f"{arguments.method}, {what}: {label}: {r['cpu_seconds']:.1f} CPU s, {r['wall_seconds']:.1f} s, "
            f"perplexity {r['perplexity']:.3f}",
            flush=True,
        )
    print(f"ratio of CPU seconds {results['here']['cpu_seconds'] / results['there']['cpu_seconds']:.3f}")


if __name__ == "__main__":
    main()
