"""Answers in vLLM's place, through the same messages: what tests run instead of vLLM.

With transformers, on the folder's tiny model; or, where the environment variable HARNESS_TEST_SERVER says how to go
wrong (or "parrots"), with made-up numbers, which takes no library and no time. Of this project only the server's loop
is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "harness" / "engines" / "served"))
from server import serve

CONDUCT = os.environ.get("HARNESS_TEST_SERVER", "")
CACHE_BYTES = 1 << 20


def facts(arguments: dict) -> dict:
    """What the engine says of itself."""
    return {
        "version": "0.0",
        "dtype": arguments["dtype"],
        "context_tokens": arguments["max_model_len"],
        "kernels": "dense matmul",
        "attention": "sdpa",
        "reserved_cache_bytes": CACHE_BYTES,
        "reserved_cache_tokens": CACHE_BYTES // 512,
        "model_memory_bytes": None,
        "grown_bytes": 12345,
        "arguments": arguments,
    }


class WithTransformers:
    """One request after the other, first come, first served."""

    preemptions = 0

    def __init__(self, settings: dict) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.torch, self.facts = torch, facts(settings["arguments"])
        dtype = getattr(torch, settings["arguments"]["dtype"])
        self.module = AutoModelForCausalLM.from_pretrained(settings["arguments"]["model"], dtype=dtype).eval()
        self.module.requires_grad_(False)

    def score(self, rows):
        """Losses by the whole log-softmax."""
        ids = self.torch.tensor(rows)
        logs = self.module(ids).logits[:, :-1].float().log_softmax(-1)
        return (-logs.gather(-1, ids[:, 1:, None])[..., 0]).tolist()

    def run(self, prompts, new_tokens, arrivals):
        """Reads everything again for every token."""
        started = time.monotonic()
        for row in sorted(range(len(prompts)), key=lambda row: arrivals[row]):
            time.sleep(max(0.0, started + arrivals[row] - time.monotonic()))
            ids = self.torch.tensor([prompts[row]])
            for _ in range(new_tokens[row]):
                token = self.module(ids).logits[0, -1].argmax()
                ids = self.torch.cat([ids, token.view(1, 1)], 1)
                yield [(row, int(token), time.monotonic() - started - arrivals[row])]


class Parrot:
    """Scores zero and answers with the number of the step, unless it goes wrong."""

    preemptions = 0

    def __init__(self, settings: dict) -> None:
        if CONDUCT == "refuses":
            raise ValueError("Failed to find a kernel\n  for 3 bits\nReasons: none is there")
        if CONDUCT == "has a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(os.environ["HARNESS_TEST_FILE"]).write_text(str(child.pid))
        self.facts = facts(settings["arguments"])

    def score(self, rows):
        """Nothing is lost."""
        go_wrong()
        return [[0.0] * (len(row) - 1) for row in rows]

    def run(self, prompts, new_tokens, arrivals):
        """One step after the other, a row at a time."""
        for step in range(max(new_tokens)):
            if step == 1:
                go_wrong()
            for row in range(len(prompts)):
                yield [(row, step, 0.25 * (step + 1) + row / 8)]


def go_wrong() -> None:
    """As HARNESS_TEST_SERVER says."""
    if CONDUCT == "crashes":
        print("the last words", flush=True)
        os._exit(7)
    if CONDUCT == "hangs":
        time.sleep(600)
    if CONDUCT == "fails":
        raise RuntimeError("no such operator")
    if CONDUCT == "talks nonsense":
        os.write(int(sys.argv[1]), b"\xff" * 64)


if __name__ == "__main__":
    serve(Parrot if CONDUCT else WithTransformers)
