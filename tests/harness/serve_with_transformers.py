"""Answers in vLLM's place, through the same messages, with transformers: what tests run instead of vLLM.

The folder's tiny model is read with transformers alone; nothing of this project is imported but the server's loop.
Misbehaves on request: the environment variable HARNESS_TEST_SERVER names how.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "harness" / "engines" / "served"))
from server import serve

MISBEHAVIOUR = os.environ.get("HARNESS_TEST_SERVER", "")
CACHE_BYTES = 1 << 20


class Backend:
    """One request after the other, first come, first served."""

    def __init__(self, settings: dict) -> None:
        from transformers import AutoModelForCausalLM

        arguments = settings["arguments"]
        if MISBEHAVIOUR == "refuses":
            raise ValueError("Failed to find a kernel\n  for 3 bits\nReasons: none is there")
        if MISBEHAVIOUR == "has a child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(os.environ["HARNESS_TEST_FILE"]).write_text(str(child.pid))
        torch.set_num_threads(1)
        self.module = AutoModelForCausalLM.from_pretrained(
            arguments["model"], dtype=getattr(torch, arguments["dtype"])
        ).eval()
        self.preemptions = 0
        self.facts = {
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

    @torch.inference_mode()
    def score(self, rows):
        misbehave()
        ids = torch.tensor(rows)
        logs = self.module(ids).logits[:, :-1].float().log_softmax(-1)
        return (-logs.gather(-1, ids[:, 1:, None])[..., 0]).tolist()

    @torch.inference_mode()
    def run(self, prompts, new_tokens, arrivals):
        started = time.monotonic()
        for row in sorted(range(len(prompts)), key=lambda row: arrivals[row]):
            time.sleep(max(0.0, started + arrivals[row] - time.monotonic()))
            ids = torch.tensor([prompts[row]])
            for step in range(new_tokens[row]):
                if step == 1:
                    misbehave()
                token = self.module(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, token.view(1, 1)], 1)
                yield [(row, int(token), time.monotonic() - started - arrivals[row])]


def misbehave() -> None:
    if MISBEHAVIOUR == "crashes":
        print("the last words", flush=True)
        os._exit(7)
    if MISBEHAVIOUR == "hangs":
        time.sleep(600)
    if MISBEHAVIOUR == "fails":
        raise RuntimeError("no such operator")
    if MISBEHAVIOUR == "talks nonsense":
        os.write(int(sys.argv[1]), b"\xff" * 64)


if __name__ == "__main__":
    serve(Backend)
