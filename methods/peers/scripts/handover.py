"""What the scripts of this folder share. They run in a peer's environment: nothing of this project is imported here.

A script gets the path of a request and leaves a folder: `answer.json` and safetensors files, or `error.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


class Handover:
    """A request, and the answer as it grows.

    model: folder of the dense model; windows: calibration tokens [samples, window], None where none were asked for.
    linears: names of the linears to compress; others: names of the linears that stay as they are.
    dtype: arithmetic; scale_dtype: what scales are stored in; settings: the method's own knobs.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        self.model, self.folder = request["model"], Path(request["answer"])
        self.linears, self.others = request["linears"], request["others"]
        self.dtype, self.scale_dtype = getattr(torch, request["dtype"]), getattr(torch, request["scale_dtype"])
        self.device, self.seed, self.settings = request["device"], request["seed"], request["settings"]
        self.windows = load_file(request["windows"])["windows"] if request["windows"] else None
        self.tensors: dict[str, torch.Tensor] = {}
        self.digests: dict[str, str] = {}
        self.seconds = 0.0

    def load(self, **arguments: Any) -> torch.nn.Module:
        """The dense model in evaluation mode; `arguments` go to `from_pretrained`."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=self.dtype, **arguments).eval()

    def examples(self) -> list[dict[str, torch.Tensor]]:
        """The windows as a data set: one dictionary each, ids and mask [window]."""
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in self.windows]

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Counts what is inside as the peer's own time."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def give_integers(self, name: str, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Weights scale * (codes - zero) of a linear: codes [out, in] from 0, scale and zero [out, groups]."""
        self.tensors[f"{name}.codes"] = codes.to(torch.uint8).cpu()
        self.tensors[f"{name}.scale"] = scale.cpu()
        self.tensors[f"{name}.zero"] = zero.to(torch.int32).cpu()

    def witness(self, name: str, weight: torch.Tensor) -> None:
        """What the peer itself says that the weights [out, in] of a linear are: compared with what we make of them."""
        wide = weight.detach().float().cpu() + 0.0  # -0.0 is 0.0
        self.digests[name] = hashlib.sha256(wide.contiguous().numpy().tobytes()).hexdigest()

    def finish(self, *packages: str) -> None:
        """Write the answer; packages: distributions whose versions belong in a record."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        if self.tensors:
            kept = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
            save_file(kept, self.folder / "answer.safetensors")
        versions = {name: metadata.version(name) for name in (*packages, "torch", "transformers")}
        answer = {"seconds": self.seconds, "versions": versions, "digests": self.digests}
        (self.folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def gptq_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [rows, columns] out of int32 [rows, columns * bits / 32]: a dense little-endian bit stream a row.

    GPTQ's checkpoints hold inputs (`qweight`, transposed) and outputs (`qzeros`) that way.
    """
    octets = words.contiguous().view(torch.uint8)
    stream = (octets[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1  # lowest bit first
    codes = stream.view(len(words), -1, bits) << torch.arange(bits, dtype=torch.uint8)
    return codes.sum(-1, dtype=torch.uint8)


def give_gptq_layer(request: Handover, name: str, parts: dict[str, torch.Tensor], bits: int) -> None:
    """A linear as GPTQ's second format stores it (zero points as they are, not one less).

    Raises ValueError where its groups are scattered over the row.
    """
    parts = {part: tensor.cpu() for part, tensor in parts.items()}
    codes = gptq_codes(parts["qweight"].T, bits)  # [out, in]
    zeros = gptq_codes(parts["qzeros"], bits)  # [groups, out]
    if "g_idx" in parts:
        in_order = torch.arange(codes.shape[1]) // -(-codes.shape[1] // len(zeros))
        if not torch.equal(parts["g_idx"].long(), in_order):
            raise ValueError(f"{name}: its groups are scattered over the row (g_idx), which no plain layout holds")
    request.give_integers(name, codes, parts["scales"].T, zeros.T)


def serve(compress: Callable[[Handover], None]) -> None:
    """Entry of a script: `python SCRIPT REQUEST`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    try:
        compress(Handover(request))
    except Exception as error:  # whatever a peer raises becomes the reason of a failed row
        traceback.print_exc()
        reason = json.dumps({"reason": f"{type(error).__name__}: {error}"})
        folder = Path(request["answer"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.json").write_text(reason, encoding="utf-8")
        sys.exit(1)


def _end_with_parent() -> None:
    """Standard input is a pipe that closes when the process that asked is gone: do not go on computing for nobody."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter ends
        pass
    os._exit(1)
