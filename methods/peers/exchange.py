"""A model handed to another project's compressor and back.

The peer runs in the interpreter that the configuration names, on the dense model as a transformers folder and on
exactly the calibration windows of this run. What comes back is loaded bit by bit into the same layers as ours, so that
bits, bytes and kernels of both are counted alike.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import ConfigError, RunError
from harness.interpreters import environment, executable, require
from methods.blocks import plain_linears

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.method import Bench, LanguageModel
    from methods.quantization.grids import IntegerGrid
    from methods.quantization.linear import PackedLinear

SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class Library:
    """Another project's compressor.

    module: what is imported; install: the arguments of `pip install`; script: what runs there, in `scripts`.
    """

    title: str
    module: str
    install: str
    script: str

    def require(self, interpreter: str | None) -> None:
        """Raise ConfigError unless `interpreter` (None: this one) exists and finds the library. Imports nothing."""
        require(interpreter, "method.interpreter", self.title, self.module, self.install)


@dataclass(frozen=True)
class Answer:
    """What a peer left.

    tensors: by name, as it stored them; digests: SHA-256 of float32 weights [out, in] as the peer itself reads them,
    of some or all linears; seconds: of its own work, without starting it and handing over; versions: of its packages.
    """

    tensors: dict[str, Tensor]
    digests: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The tensors of one linear, by their last name."""
        inside = f"{name}."
        return {key.removeprefix(inside): tensor for key, tensor in self.tensors.items() if key.startswith(inside)}

    def confirm(self, name: str, layer: PackedLinear) -> None:
        """Raise RunError unless the layer means, to the last bit, what the peer said that this linear's weights are."""
        if name in self.digests and digest(layer.dequantise()) != self.digests[name]:
            raise RunError(
                f"{name}: the weights that came back are not the ones that the peer computes with; its version "
                f"({self.versions}) may store them in another way than this project reads"
            )


def ask(
    library: Library,
    interpreter: str | None,
    base: LanguageModel,
    bench: Bench,
    settings: dict[str, Any],
    calibrates: bool,
) -> Answer:
    """Hand the model over, let the peer compress the linears of its blocks, and read what it left.

    Raises ConfigError when the library is not there, RunError with the peer's own reason when it fails.
    """
    from safetensors.torch import save_file

    from harness import artifact

    library.require(interpreter)
    device, dtype = base.module.device, base.module.dtype
    linears = list(plain_linears(base.module))
    folder = bench.scratch.absolute() / "peer"
    shutil.rmtree(folder, ignore_errors=True)
    windows = None
    artifact.save(base, folder / "dense")
    if calibrates:
        windows = folder / "windows.safetensors"
        save_file({"windows": bench.corpus.calibration_windows(base.tokenizer, bench.generator).contiguous()}, windows)
    base.module.to("cpu")  # the peer needs the accelerator's memory
    request = {
        "model": str(folder / "dense"),
        "answer": str(folder / "answer"),
        "windows": None if windows is None else str(windows),
        "linears": linears,
        "others": other_linears(base.module, linears),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "scale_dtype": str(base.storage_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": bench.generator.initial_seed() % 2**31,
        "settings": settings,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    run(library, interpreter, folder, bench)
    answer = read(folder / "answer")
    shutil.rmtree(folder, ignore_errors=True)
    return answer


def run(library: Library, interpreter: str | None, folder: Path, bench: Bench) -> None:
    """Run the library's script on `folder`/request.json; its output goes to `folder`/output.txt.

    It ends with this process: its standard input is a pipe that it watches. Raises RunError when it fails.
    """
    output = folder / "output.txt"
    process = subprocess.Popen(
        [executable(interpreter), str(SCRIPTS / library.script), str(folder / "request.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment(interpreter),
        cwd=folder,  # some leave logs where they are
        start_new_session=True,  # Ctrl-C is for the parent, whose end is the peer's
    )
    try:
        with output.open("w", encoding="utf-8") as kept:
            for line in bench.progress.track(process.stdout, f"{library.title}, lines of output"):
                kept.write(line)
        status = process.wait()
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()
    if status:
        raise RunError(f"{library.title} failed: {_reason(folder, status)} (its output is in {output})")


def _reason(folder: Path, status: int) -> str:
    """What the script says, else the last line that the peer printed, else its exit status."""
    try:
        return json.loads((folder / "answer" / "error.json").read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError):
        lines = (folder / "output.txt").read_text(encoding="utf-8").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"exit status {status}: {last}"


def read(folder: Path) -> Answer:
    """The answer in `folder`."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return Answer(tensors, **json.loads((folder / "answer.json").read_text(encoding="utf-8")))


def other_linears(module: nn.Module, linears: list[str]) -> list[str]:
    """Names of the nn.Linear that stay as they are: the output head, projections outside the blocks."""
    from torch import nn

    chosen = set(linears)
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear) and name not in chosen]


def digest(weight: Tensor) -> str:
    """SHA-256 of weights [out, in] as float32, which a script computes in the same way."""
    wide = weight.detach().float().cpu() + 0.0  # -0.0 is 0.0
    return hashlib.sha256(wide.contiguous().numpy().tobytes()).hexdigest()


def grid_settings(grid: IntegerGrid) -> dict[str, Any]:
    """The grid as a script reads it. Raises ConfigError for one that no peer has."""
    if grid.group_size == "tensor" or grid.short_group:
        raise ConfigError(
            "method.grid: other projects' compressors have groups that divide the row, or one group a row; choose "
            "grid@method.grid=int_group64 or int_channel"
        )
    return asdict(grid)
