"""What a model needs before anything is run: bytes and seconds from its shape, by formula.

    python -m harness.sizing            prints the page
    python -m harness.sizing FILE       writes it, docs/sizing.md in a checkout

Nothing here is measured, except the four rates of one H100 and how far four methods stay above their floors on it, both
from docs/gpu.md. The tests hold the formulas against published records.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from harness.options import print_or_write

GIB = 1 << 30
SAMPLES, WINDOW = 128, 2048  # calibration=standard
GROUP = 64
MOMENT_COPIES = 3  # Σxxᵀ, its factor and what the inverse is made in: float32, of the widest input
LINEAR_COPIES = 3  # a linear being solved: its float32 weights, the rounded ones, the errors
BF16, TF32, FP32 = 773e12, 422e12, 51e12  # products of an H100, operations a second; docs/gpu.md
MEMORY_RATE = 2.96e12  # bytes a second, read and written; docs/gpu.md
DEVICE_BYTES = 80e9
USABLE = 0.9  # of a device, for weights and caches
ABOVE_FLOOR = {"gptq": 1.048 / 0.467, "awq": 0.982 / 0.255, "sparsegpt": 0.847 / 0.376, "wanda": 0.592 / 0.255}


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: gated feed-forward, grouped keys and values, no biases."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Linears of a block that share an input, in order, as (outputs in sum, inputs)."""
        head = self.hidden // self.heads
        return (
            (self.hidden + 2 * self.key_value_heads * head, self.hidden),
            (self.hidden, self.hidden),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )

    @property
    def block_weights(self) -> int:
        """Weights of the linears of one block."""
        return sum(outputs * inputs for outputs, inputs in self.groups)

    @property
    def linear_weights(self) -> int:
        """Weights that methods compress: those of all blocks, no embeddings and no head."""
        return self.layers * self.block_weights

    @property
    def other_weights(self) -> int:
        """Embeddings, head and norms: they stay in 16 bits."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def weights(self) -> int:
        """All of them."""
        return self.linear_weights + self.other_weights


MODELS = (
    Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True),
    Shape("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000),
    Shape("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256),
    Shape("Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256),
    Shape("Llama-3.1-405B", 16384, 126, 128, 8, 53248, 128256),
)


def grouped_bits(bits: int, group: int = GROUP) -> float:
    """Bits a weight of an integer grid: codes, a 16-bit scale and a zero point of as many bits as a code."""
    return bits + (16 + bits) / group


def masked_bits(sparsity: float) -> float:
    """Bits a weight of a mask, one bit each, and of the 16-bit weights that it keeps."""
    return 1 + 16 * (1 - sparsity)


def stored_bytes(shape: Shape, bits: float = 16) -> float:
    """Bytes on disk with `bits` bits for every weight of a linear, 16 for the rest."""
    return shape.linear_weights * bits / 8 + shape.other_weights * 2


def solver_device_bytes(shape: Shape, moment_copies: int = MOMENT_COPIES) -> float:
    """Device memory at the peak of GPTQ, OWQ and SparseGPT: while the widest linear is solved, one block is there."""
    outputs, inputs = max(shape.groups, key=lambda group: group[1])
    return 4 * moment_copies * inputs**2 + 4 * LINEAR_COPIES * outputs * inputs + 2 * shape.block_weights


def host_bytes(shape: Shape, samples: int = SAMPLES, window: int = WINDOW) -> float:
    """Host memory of a method that goes block by block: all weights and the hidden states of all windows, 16 bits."""
    return 2 * shape.weights + 2 * samples * window * shape.hidden


def cache_bytes(shape: Shape, tokens: int) -> float:
    """Keys and values of `tokens` tokens in 16 bits."""
    return 2 * 2 * shape.layers * shape.key_value_heads * (shape.hidden // shape.heads) * tokens


def student_device_bytes(student: float, teacher: float, positions: int, vocabulary: int) -> float:
    """Device memory of training all weights of a student in float32 against a teacher in memory.

    student, teacher: weights; positions: tokens of one batch, whose logits are kept. 16 bytes for every weight of the
    student: itself, its gradient and Adam's two moments. Activations inside the blocks are not counted.
    """
    return 16 * student + 4 * teacher + 4 * positions * vocabulary


@dataclass(frozen=True)
class Work:
    """Operations for one block by the unit that does them: bfloat16, tf32 or float32 products."""

    bf16: float
    tf32: float
    fp32: float

    @property
    def floor_seconds(self) -> float:
        """At the rates of one H100."""
        return self.bf16 / BF16 + self.tf32 / TF32 + self.fp32 / FP32

    @property
    def operations(self) -> float:
        """In sum."""
        return self.bf16 + self.tf32 + self.fp32


def work(shape: Shape, method: str, samples: int = SAMPLES, window: int = WINDOW) -> Work:
    """What compressing one block takes: passes over the windows, second moments, the solver (docs/gpu.md)."""
    tokens = samples * window
    products = [2 * tokens * outputs * inputs for outputs, inputs in shape.groups]
    attention = 2 * tokens * window * shape.hidden
    up_to = [0, *(sum(products[:count]) + attention for count in (1, 2, 3, 4))]  # the input of each group; the end
    moments = tokens * sum(inputs**2 for _, inputs in shape.groups)
    updates = sum(outputs * inputs**2 for outputs, inputs in shape.groups)
    solver = updates + 4 / 3 * sum(inputs**3 for _, inputs in shape.groups)
    return {
        "gptq": Work(sum(up_to) + moments, 0, solver),
        "sparsegpt": Work(up_to[4] + up_to[3] + moments, 0, solver),
        "awq": Work(up_to[4] + moments, 20 * updates, 0),
        "wanda": Work(up_to[4] + up_to[3], 0, 0),
    }[method]


def compress_seconds(shape: Shape, method: str) -> float:
    """All blocks on one H100: the floor, times what the method took above its floor at Llama-2-7B's shape."""
    return shape.layers * work(shape, method).floor_seconds * ABOVE_FLOOR[method]


def devices_to_serve(shape: Shape, bits: float, tokens: int = 32 * 4096) -> int:
    """80 GB devices that hold the weights and the cache of `tokens` tokens."""
    return int(-(-(stored_bytes(shape, bits) + cache_bytes(shape, tokens)) // (USABLE * DEVICE_BYTES)))


def devices_to_hold(shape: Shape, bits: float, scoring: bool) -> int:
    """80 GB devices over which `hardware.devices` divides a model, blocks whole (harness.engines.placement).

    Scoring keeps a dense copy beside packed weights.
    """
    from harness.engines.placement import divide
    from harness.errors import RunError

    block = shape.block_weights * (bits + (16 if scoring and bits < 16 else 0)) / 8
    ends = [2 * shape.vocabulary * shape.hidden, 0 if shape.tied else 2 * shape.vocabulary * shape.hidden]
    sizes = [ends[0], *[int(block)] * shape.layers, ends[1]]
    for devices in range(1, shape.layers + 2):
        try:
            divide(sizes, [int(USABLE * DEVICE_BYTES)] * devices)
        except RunError:
            continue
        return devices
    raise ValueError(f"{shape.name}: one block is larger than a device")


def page() -> str:
    """The whole page, in Markdown."""
    four, three, sparse = grouped_bits(4), grouped_bits(3), masked_bits(0.5)
    spqr = 4.74  # measured on SmolLM2-135M; depends on the share of outliers
    disk = [
        ("dense, 16 bits", 16.0),
        ("8 bits: FP8, LLM.int8(), SmoothQuant", 8.05),
        ("4 bits, groups of 64: RTN, GPTQ, AWQ, OmniQuant, PEQA", four),
        ("3 bits, groups of 64: the same", three),
        ("NF4, FP4: 4 bits and a 16-bit scale for 64", 4.25),
        ("SpQR at 4 bits", spqr),
        ("half of the weights, mask: SparseGPT, Wanda, magnitude", sparse),
        ("the same and 4 bits: SparseGPT + GPTQ", 1 + (four - 0.25 - 4 / 64) / 2 + 6 / 16),
    ]
    names = [shape.name for shape in MODELS]
    parts = [
        HEAD.strip(),
        "## Disk\n\nGB (10⁹ bytes) of one artifact. A sweep keeps one for every method and width, and the model "
        "itself once more in its cache.",
        _table(
            ["", "bits/w", *names],
            [[row, f"{bits:.2f}", *(_gb(stored_bytes(shape, bits)) for shape in MODELS)] for row, bits in disk],
        ),
        f"## Compressing block by block\n\n`calibration=standard` ({SAMPLES} windows of {WINDOW} tokens), one "
        "device. Host memory is in 16 bits: `hardware.scoring_dtype=float32` doubles it, and the errors of "
        "layers, which load the original once more, double it again (without the room the record says that they were "
        "not measured). The model is scored on one device or several afterwards: see the next table.",
        _table(
            ["", *names],
            [
                ["weights, billions", *(f"{shape.weights / 1e9:.3g}" for shape in MODELS)],
                ["host memory, GB", *(_gb(host_bytes(shape)) for shape in MODELS)],
                ["device memory, GPTQ, OWQ, SparseGPT, GB", *(_gb(solver_device_bytes(s)) for s in MODELS)],
                *(
                    [f"{title}, time on one H100", *(_time(compress_seconds(s, name)) for s in MODELS)]
                    for title, name in TITLES
                ),
            ],
        ),
        "Device memory is without the windows that are worked on: add `method.working_memory_gib` (4) at most. "
        "At 7 billion weights AWQ's peak was 3.7 GiB and Wanda's 1.9 GiB (measured); they are not modelled. Small "
        "models take longer than their operations: they cannot fill an H100 (SmolLM2-135M took GPTQ 13.6 s with a "
        "sixteenth of the windows). Loading, saving and measuring come on top.",
        "## Running\n\n80 GB devices for the weights and the cache of 32 requests of 4096 tokens, 16-bit keys "
        f"and values, {USABLE:.0%} of each device used; and the least milliseconds for a token at batch 1 on one "
        "device, which reads every weight once (where it does not fit, as if it did: divide by the devices).",
        _table(
            ["", *names],
            [
                [
                    f"{label}: devices, ms a token",
                    *(f"{devices_to_serve(s, bits)}, {1e3 * stored_bytes(s, bits) / MEMORY_RATE:.3g}" for s in MODELS),
                ]
                for label, bits in (("16 bits", 16.0), ("8 bits", 8.05), ("4 bits", four))
            ]
            + [["cache of 32 × 4096 tokens, GB", *(_gb(cache_bytes(shape, 32 * 4096)) for shape in MODELS)]],
        ),
        "That is `engine=vllm engine.tensor_parallel=N` ([engines.md](engines.md)): every device has a part of every "
        "layer. The harness's own engine divides a model between its blocks with `hardware.devices=N` "
        f"([sweeps.md](sweeps.md)). Devices of 80 GB for the weights alone, {USABLE:.0%} of each used, scoring with "
        "the dense copy that it keeps beside packed weights:",
        _table(
            ["`hardware.devices=`", *names],
            [
                [f"{label}: to score, to decode", *(_scored_and_decoded(shape, bits) for shape in MODELS)]
                for label, bits in (("16 bits", 16.0), ("8 bits", 8.05), ("4 bits", four))
            ],
        ),
        "A token passes through one device after the other: its least milliseconds are those of one device, not "
        "divided. A host holds 8 devices; what needs more to be scored can be compressed here and scored by vLLM, "
        "which keeps no dense copy.",
        "## Training\n\nGB of device memory for a student of half of the blocks, trained in float32 against a "
        "teacher in memory (`teacher@method.teacher=in_memory`), batches of 8 × 512 tokens; without the "
        "activations inside blocks. Where it does not fit, several processes hold a part of the student each "
        "(`hardware.sharded=true`, [sweeps.md](sweeps.md)), or the teacher's likeliest tokens are kept on disk "
        "(`teacher@method.teacher=on_disk`).",
        _table(
            ["", *names],
            [["student of half of the blocks", *(_gb(_half_student(shape)) for shape in MODELS)]],
        ),
        CHECKS.strip(),
    ]
    return "\n\n".join(_wrapped(paragraph) for part in parts for paragraph in part.split("\n\n")) + "\n"


def _wrapped(paragraph: str) -> str:
    if paragraph[0] in "|#-":
        return paragraph
    return textwrap.fill(paragraph, 118, break_long_words=False, break_on_hyphens=False)


def _scored_and_decoded(shape: Shape, bits: float) -> str:
    return f"{devices_to_hold(shape, bits, scoring=True)}, {devices_to_hold(shape, bits, scoring=False)}"


def _half_student(shape: Shape) -> float:
    student = shape.linear_weights / 2 + shape.other_weights
    return student_device_bytes(student, shape.weights, 8 * 512, shape.vocabulary)


TITLES = (("GPTQ", "gptq"), ("AWQ", "awq"), ("SparseGPT", "sparsegpt"), ("Wanda", "wanda"))
HEAD = """
# Sizing

Memory, disk and time for models up to 405 billion weights, **computed** from their shapes by `harness/sizing.py`
(`python -m harness.sizing`), not measured: nothing above 8 billion weights was run here. What the formulas are held
against is at the end.
"""
CHECKS = """
## What the formulas were held against

`tests/harness/test_sizing.py` compares them with published numbers:

- disk: dense, RTN, GPTQ and AWQ at 3, 4 and 8 bits, Wanda at 50 %: records of SmolLM2-135M, within 0.2 %;
- operations for a block of Llama-2-7B: GPTQ 316, SparseGPT 246, AWQ 178, Wanda 197 TFLOP in docs/gpu.md, within 1 %;
- time: seconds of a block at that shape are those of docs/gpu.md by construction; all 32 blocks took GPTQ 38.3 s,
  the formula says 33.5 (it does not know the first block, which compiles, nor loading);
- device memory of GPTQ at that shape: 3.25 GiB measured when the solver kept five copies of the moments, for which the
  formula says 3.14; 2.37 GiB counted for the three that it keeps now, the formula says 2.24.
"""


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print_or_write(page, __doc__)
