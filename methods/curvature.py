"""Second moments of what linears read, and the column solver that GPTQ, OWQ, SpQR and SparseGPT share.

For a linear with inputs x the squared output error of a change ΔW is tr(ΔW H ΔWᵀ) with H = Σ x xᵀ: all that these
methods need to know about the calibration text. Linears that read one tensor share one H.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import RunError
from methods.block_training import BlockTensors
from methods.blocks import Block, decoder_blocks, input_groups, one_at_a_time, record_blocks
from methods.fused_sweep import FusedColumns, sweep_fused

if TYPE_CHECKING:
    from harness.method import Bench, LanguageModel

PANEL_COLUMNS = 192  # of the symmetric product that are computed at a time
GPU_PANELS, GPU_PANEL_COLUMNS = 4, 2048  # of a symmetric product on a GPU: so many, but none narrower
RESIDENT_SHARE = 0.25  # of the working memory that hidden states between blocks may take on a GPU
INNER_COLUMNS = 16  # columns after which the rest of a lazy block is brought up to date
CACHED_TOKENS = 1024  # a CPU's caches hold about what a block makes of so many; more at once wait for memory
THREADED_MULTIPLICATIONS = 2**29  # a CPU product below this takes milliseconds; waiting threads would burn as much
MAXIMUM_DAMPING_RETRIES = 6

Project = Callable[[Tensor, int, Callable[[int, int], Tensor]], Tensor]
Change = Callable[[list[str], "Moments"], None]


# ---------------------------------------------------------------------------------------------------- statistics


@dataclass
class Moments:
    """Statistics of one distinct input x [N, C], summed over all tokens, in float32.

    matrix: whether Σ x xᵀ is collected, or only its diagonal; magnitudes: whether Σ|x| and max|x| are.
    """

    width: int
    device: torch.device
    matrix: bool = True
    magnitudes: bool = False
    tokens: int = field(default=0, init=False)
    _upper: Tensor | None = field(default=None, init=False, repr=False)  # [C, C], right on and above the diagonal
    _diagonal: Tensor | None = field(default=None, init=False, repr=False)  # [C], where there is no matrix
    _absolute: Tensor | None = field(default=None, init=False, repr=False)  # [C]
    _largest: Tensor | None = field(default=None, init=False, repr=False)  # [C]

    def __post_init__(self) -> None:
        if self.matrix:
            self._upper = torch.zeros(self.width, self.width, device=self.device)
        else:
            self._diagonal = torch.zeros(self.width, device=self.device)
        if self.magnitudes:
            self._absolute = torch.zeros(self.width, device=self.device)
            self._largest = torch.zeros(self.width, device=self.device)

    def add(self, x: Tensor) -> None:
        """Take in the inputs x [N, C]. On a GPU 16-bit inputs are multiplied as they are, and added in float32."""
        narrow = x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)
        x = x if narrow else x.float()
        self.tokens += len(x)
        if self.matrix:
            _add_product(self._upper, x)
        elif narrow:  # one pass over x, without a copy of it in float32
            self._diagonal += torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square_()
        else:
            self._diagonal += x.square().sum(0)
        if self.magnitudes:
            absolute = x.abs()
            self._absolute += absolute.sum(0, dtype=torch.float32)
            torch.maximum(self._largest, absolute.amax(0).float(), out=self._largest)

    def second(self) -> Tensor:
        """Mean of x xᵀ over tokens, symmetric [C, C]."""
        return _mirror(self._upper.clone()).div_(max(self.tokens, 1))

    def take_second(self) -> Tensor:
        """`second`, in the memory of the sums: nothing can be added or asked for afterwards."""
        taken, self._upper = self._upper, None
        return _mirror(taken).div_(max(self.tokens, 1))

    def squares(self) -> Tensor:
        """Mean of x² per channel [C]."""
        diagonal = self._diagonal if self._upper is None else self._upper.diagonal()
        return diagonal / max(self.tokens, 1)

    def mean_magnitude(self) -> Tensor:
        """Mean of |x| per channel [C]."""
        return self._absolute / max(self.tokens, 1)

    def largest(self) -> Tensor:
        """Maximum of |x| per channel [C]."""
        return self._largest

    def tensors(self) -> dict[str, Tensor]:
        """The sums as tensors, to be kept in a file."""
        sums = {name: getattr(self, f"_{name}") for name in _SUMS}
        return {"tokens": torch.tensor(self.tokens)} | {name: t for name, t in sums.items() if t is not None}

    @classmethod
    def from_tensors(cls, kept: dict[str, Tensor], width: int, device: torch.device) -> Moments:
        """The inverse of `tensors`."""
        moments = cls(width, device, matrix=False)
        moments.matrix, moments.magnitudes = "upper" in kept, "absolute" in kept
        moments.tokens = int(kept["tokens"])
        for name in _SUMS:
            setattr(moments, f"_{name}", kept[name].to(device) if name in kept else None)
        return moments


_SUMS = ("upper", "diagonal", "absolute", "largest")


def _add_product(upper: Tensor, x: Tensor) -> None:
    """upper += xᵀ x on and above the diagonal; below it panels are left out, which saves nearly half."""
    step = _panel_columns(x)
    for first in range(0, x.shape[1], step):
        rows, panel, rest = x[:, first : first + step].T, upper[first : first + step, first:], x[:, first:]
        if x.dtype == upper.dtype:
            panel.addmm_(rows, rest)
        else:
            panel.add_(torch.mm(rows, rest, out_dtype=upper.dtype))


def _panel_columns(x: Tensor) -> int:
    """Columns of [N, C] that go into one product; a GPU needs large ones to be filled."""
    return PANEL_COLUMNS if x.device.type == "cpu" else max(-(-x.shape[1] // GPU_PANELS), GPU_PANEL_COLUMNS)


def _mirror(upper: Tensor) -> Tensor:
    """Copy what is above the diagonal to below it, in place and in panels."""
    for first in range(0, len(upper), PANEL_COLUMNS):
        last = first + PANEL_COLUMNS
        corner = upper[first:last, first:last]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[last:, first:last] = upper[first:last, last:].T
    return upper


def require_finite(values: Tensor, what: str) -> None:
    """Raise RunError, naming `what`, where a value is no number: a ranking by it is none, and nobody would see that."""
    if not bool(values.isfinite().all()):
        raise RunError(f"{what} hold values that are not finite; score in float32 (hardware.scoring_dtype=float32)")


def blocks_to_calibrate(
    base: LanguageModel, bench: Bench, working_memory_gib: float, sequential: Literal["linear", "block"]
) -> tuple[list[Block], list[Tensor]]:
    """The decoder blocks ready to be run, and what enters the first, for the calibration windows of this run.

    sequential: as `calibrate_block` will be told. Where all linears see the unchanged block, a CPU is faster with
    chunks that its caches hold.
    On a GPU, hidden states that take more than a quarter of the working memory wait in host memory between blocks.
    """
    windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
    _, modules = decoder_blocks(base.module)
    device = torch.device(bench.device or next(modules.parameters()).device)
    per_chunk = windows_that_fit(modules[0], windows, working_memory_gib)
    if device.type == "cpu":
        if sequential == "block":
            per_chunk = min(per_chunk, max(1, CACHED_TOKENS // windows.shape[1]))
        return record_blocks(base.module, windows, per_chunk, compute_on=bench.device)
    width = base.module.get_input_embeddings().weight.shape[1]
    resident = windows.numel() * width * next(modules.parameters()).element_size()
    keep_on = None if resident <= RESIDENT_SHARE * working_memory_gib * 2**30 else "cpu"
    return record_blocks(base.module, windows, per_chunk, keep_on, bench.device)


def observed_blocks(
    base: LanguageModel,
    bench: Bench,
    working_memory_gib: float,
    matrix: bool = True,
    magnitudes: bool = False,
    needs_hidden: bool = False,
) -> Iterator[tuple[Block, dict[str, Moments], list[Tensor]]]:
    """Every block with the moments of its linears' inputs in the uncompressed model, and what enters it.

    The caller may change a block once it has it. What the calibration text says about the uncompressed model is the
    same for every bit-width, so it is kept in `bench.statistics` and a later run of a sweep does not run the model
    again; then nothing enters the blocks (an empty list), unless needs_hidden asks for it.
    """
    prefix, modules = decoder_blocks(base.module)
    kind = "-".join(word for word, wanted in (("matrix", matrix), ("magnitudes", magnitudes)) if wanted)
    kept = None if bench.statistics is None else BlockTensors(bench.statistics / kind)
    names = [f"{prefix}.{index}" for index in range(len(modules))]
    if kept is not None and not needs_hidden and all(map(kept.has, names)):
        windows = bench.corpus.calibration_windows(base.tokenizer, bench.generator)
        blocks, _ = record_blocks(base.module, windows[:1, :2], compute_on=bench.device)
        for block in one_at_a_time(blocks):
            found = kept.get(block.name)
            bench.log.spared_seconds += float(found.pop("seconds"))
            yield block, _moments_from(found, block), []
        return
    blocks, hidden = blocks_to_calibrate(base, bench, working_memory_gib, "block")
    for block in one_at_a_time(blocks):
        started = time.perf_counter()
        moments, outputs = observe_block(block, hidden, magnitudes, matrix)
        if kept is not None:
            seconds = torch.tensor(time.perf_counter() - started)
            kept.put(block.name, _tensors_of(moments, block) | {"seconds": seconds})
        yield block, moments, hidden
        hidden = outputs


def _tensors_of(moments: dict[str, Moments], block: Block) -> dict[str, Tensor]:
    """The moments of a block, those of linears that share an input once."""
    return {
        f"{index}.{part}": tensor
        for index, names in enumerate(input_groups(block))
        for part, tensor in moments[names[0]].tensors().items()
    }


def _moments_from(kept: dict[str, Tensor], block: Block) -> dict[str, Moments]:
    linears = block.linears()
    found = {}
    for index, names in enumerate(input_groups(block)):
        own = {key.partition(".")[2]: t for key, t in kept.items() if key.startswith(f"{index}.")}
        first = linears[names[0]]
        shared = Moments.from_tensors(own, first.in_features, first.weight.device)
        found.update(dict.fromkeys(names, shared))
    return found


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Products of float32 matrices run on a GPU's matrix units while inside, their operands cut to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def quadratic_form(change: Tensor, second: Tensor) -> Tensor:
    """tr(ΔW H ΔWᵀ) for a change ΔW [R, C] and a symmetric H [C, C]; products across the diagonal are taken once.

    A tensor [] in float64: nobody waits for it before its value is asked for.
    """
    step = _panel_columns(change)
    total = torch.zeros((), dtype=torch.float64, device=change.device)
    for first in range(0, change.shape[1], step):
        last = first + step
        panel = change[:, first:last]
        inside = panel @ second[first:last, first:last]
        across = change[:, last:] @ second[last:, first:last]
        total += torch.sum(inside.add_(across, alpha=2).mul_(panel))
    return total


class _Enough(Exception):
    """The forward of a block has gone as far as it is needed."""


def calibrate_block(
    block: Block,
    hidden: Sequence[Tensor],
    change: Change,
    sequential: Literal["linear", "block"],
    last: bool,
    magnitudes: bool = False,
    matrix: bool = True,
) -> list[Tensor]:
    """Call `change(names, moments)` for every group of linears that share an input; return the block's outputs.

    hidden: chunks [B, T, H]. `change` alters the linears called `names` in place.
    sequential="linear": each group sees inputs that went through the changed groups before it. If all windows are in
    one chunk, that takes a single forward: each group is changed the moment its input arrives, and the forward goes
    on with the changed weights. With several chunks the block is run again up to each group.
    sequential="block": all groups see the unchanged block; a second pass gives the outputs.
    last: nobody reads the outputs, so none are computed.
    """
    linears = block.linears()
    groups = input_groups(block)

    def empty(index: int) -> Moments:
        first = linears[groups[index][0]]
        return Moments(first.in_features, first.weight.device, matrix, magnitudes)

    if sequential == "linear" and len(hidden) == 1:

        def arrive(index: int, x: Tensor) -> None:
            moments = empty(index)
            moments.add(x)
            change(groups[index], moments)
            if last and index == len(groups) - 1:
                raise _Enough

        return _run(block, hidden, linears, groups, arrive)
    stops = range(len(groups)) if sequential == "linear" else [len(groups) - 1]
    first = 0
    for stop in stops:
        moments = {index: empty(index) for index in range(first, stop + 1)}  # a matrix is there while it is needed

        def collect(index: int, x: Tensor, stop: int = stop, moments: dict[int, Moments] = moments) -> None:
            if index in moments:
                moments[index].add(x)
            if index == stop:
                raise _Enough

        _run(block, hidden, linears, groups, collect)
        for index in range(first, stop + 1):
            change(groups[index], moments.pop(index))
        first = stop + 1
    return [] if last else block(hidden)


def observe_block(
    block: Block, hidden: Sequence[Tensor], magnitudes: bool = False, matrix: bool = True
) -> tuple[dict[str, Moments], list[Tensor]]:
    """Moments of the input of every linear of an unchanged block, by name, and the block's outputs; one pass.

    hidden: chunks [B, T, H]. Linears that share an input share one object.
    """
    linears = block.linears()
    groups = input_groups(block)
    moments = [
        Moments(linears[names[0]].in_features, linears[names[0]].weight.device, matrix, magnitudes) for names in groups
    ]
    outputs = _run(block, hidden, linears, groups, lambda index, x: moments[index].add(x))
    return {name: found for names, found in zip(groups, moments, strict=True) for name in names}, outputs


def _run(
    block: Block,
    hidden: Sequence[Tensor],
    linears: dict[str, nn.Module],
    groups: list[list[str]],
    see: Callable[[int, Tensor], None],
) -> list[Tensor]:
    """Run every chunk through the block; `see(group index, x [N, C])` at each distinct input, and may end the chunk."""
    with ExitStack() as stack:
        for index, names in enumerate(groups):

            def hook(_module: nn.Module, args: tuple, index: int = index) -> None:
                see(index, args[0].flatten(0, -2))

            stack.callback(linears[names[0]].register_forward_pre_hook(hook).remove)
        return block(hidden, _Enough)


def windows_that_fit(block: nn.Module, windows: Tensor, gib: float) -> int:
    """How many calibration windows [S, T] may go through a block at once within `gib` GiB of activations.

    Counts the inputs and outputs of all linears as alive together, twice: for what lies between them.
    """
    sizes = [m.in_features + m.out_features for m in block.modules() if isinstance(m, nn.Linear)]
    itemsize = next(block.parameters()).element_size()
    per_window = 2 * sum(sizes) * itemsize * windows.shape[1]
    return max(1, min(len(windows), int(gib * 2**30 / per_window)))


# ------------------------------------------------------------------------------------------------- column solver


@dataclass(frozen=True)
class Sweep:
    """A solved weight and how it was reached."""

    weight: Tensor  # [R, C]
    error: Tensor  # [R], tr(ΔW H ΔWᵀ) by row, with the damped H
    damping: float  # that made H positive definite
    retries: int  # how often it had to be raised


def sweep_columns(
    weight: Tensor,
    moment: Tensor,
    project: Project,
    damping: float = 0.01,
    block_columns: int = 128,
    order: Tensor | None = None,
    see_pivots: Callable[[Tensor], None] | None = None,
    removed: Tensor | None = None,
    fused: FusedColumns | None = None,
) -> Sweep:
    """Replace columns of W [R, C] one by one by `project`, spreading each error over the columns still to come.

    project(column [R], k, current) -> [R]: what column k (its index in `weight`) becomes, given its present value;
    `current(first, last)` are the present values [R, last - first] of columns at positions first..last of the sweep.
    moment: H [C, C]; damping: fraction of its mean diagonal added to the diagonal.
    order: positions -> column index; None sweeps from left to right.
    see_pivots: called once with the diagonal of U [C], by position, before the sweep begins.
    removed: bool [R, C], weights that an earlier method took out: zero when projected, so that the others make up.
    fused: what `project` and `removed` do, in the form that a GPU kernel takes; used on a GPU that has Triton.
    A column that is never active (H_jj = 0) becomes zero; only the damping is on H's diagonal there, so that the result
    does not depend on the units of H. Updates beyond a block of `block_columns` are one product.

    With H⁻¹ = Uᵀ U, U upper triangular: e_j = (w_j - q_j) / U_jj, and w_k -= e_j U_jk for every k > j
    (Frantar et al. 2022, Algorithm 1); Σ e² is the error.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device) if order is None else order
    dead = moment.diagonal()[order] == 0
    work = weight.T[order]  # [C, R]: a column of W is contiguous; indexing copies
    work[dead] = 0
    factor, used, retries = _factor_in_order(moment, order, damping)
    if see_pivots is not None:
        see_pivots(factor.diagonal().clone())
    if fused is not None and fused.runs_on(work):
        factor = factor.contiguous()  # a Cholesky factor comes in columns
        error = sweep_fused(work, factor, order, fused, block_columns)
        return Sweep(_in_place_of(order, work), error, used, retries)
    pivots = factor.diagonal().tolist()
    indices = order.tolist()
    error = weight.new_zeros(weight.shape[0])
    for first in range(0, columns, block_columns):
        last = min(first + block_columns, columns)
        errors = weight.new_empty(last - first, weight.shape[0])
        with _threads_for(work.shape[1] * block_columns**2):
            for inner in range(first, last, INNER_COLUMNS):
                end = min(inner + INNER_COLUMNS, last)
                for j in range(inner, end):
                    current = partial(_present_values, work, factor, errors, (first, inner, end, last), j)
                    column = work[j]
                    present = column if removed is None else column.masked_fill(removed[:, indices[j]], 0)
                    projected = project(present, indices[j], current)
                    scaled = torch.sub(column, projected, out=errors[j - first]).div_(pivots[j])
                    column.copy_(projected)
                    work[j + 1 : end].addr_(factor[j, j + 1 : end], scaled, alpha=-1)
                work[end:last].addmm_(factor[inner:end, end:last].T, errors[inner - first : end - first], alpha=-1)
        with _threads_for(errors.numel() * (columns - last)):
            work[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
        error += errors.square().sum(0)
    return Sweep(_in_place_of(order, work), error, used, retries)


def _in_place_of(order: Tensor, work: Tensor) -> Tensor:
    """Columns that were swept in this order [C, R], back where they belong: [R, C]."""
    solved = work.new_empty(work.shape[1], work.shape[0])
    solved[:, order] = work.T
    return solved


@contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """One CPU thread for work so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    if multiplications < THREADED_MULTIPLICATIONS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _present_values(
    work: Tensor, factor: Tensor, errors: Tensor, bounds: tuple[int, int, int, int], j: int, start: int, stop: int
) -> Tensor:
    """Columns at positions start..stop as they are when position j is reached: with the updates still pending.

    Positions before `end` are up to date; the errors since `inner` are pending up to `last`, all since `first` beyond.
    """
    first, inner, end, last = bounds
    values = work[start:stop].clone()
    for pending, low, high in ((inner, end, last), (first, last, len(work))):
        low, high = max(low, start), min(high, stop)
        if low < high and pending < j:
            update = factor[pending:j, low:high].T @ errors[pending - first : j - first]
            values[low - start : high - start] -= update
    return values.T


def inverse_factor(moment: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """Upper triangular U with (H + λ mean(diag H) I)⁻¹ = Uᵀ U; the λ that was needed; how often it was raised tenfold.

    With H = R Rᵀ, R upper triangular (a Cholesky factor read backwards), U is R⁻¹.
    """
    return _factor_backwards(moment.flip(0, 1), damping)


def _factor_in_order(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """`inverse_factor` by positions of an order of columns."""
    reverse = order.flip(0)
    return _factor_backwards(moment.index_select(0, reverse).index_select(1, reverse), damping)


def _factor_backwards(backwards: Tensor, damping: float) -> tuple[Tensor, float, int]:
    """`inverse_factor` of a moment that is given backwards, and not needed afterwards: of few copies is there room."""
    diagonal = backwards.diagonal().clone()
    level = diagonal.flip(0).mean()
    require_finite(level, "calibration inputs")
    if level == 0:  # no column is ever active: any damping will do
        level = torch.ones_like(level)
    for retries in range(MAXIMUM_DAMPING_RETRIES + 1):
        used = damping * 10**retries
        backwards.diagonal().copy_(diagonal).add_(used * level)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if failed and backwards.device.type == "cuda" and backwards.dtype == torch.float32:  # it has float64 to spare
            lower, failed = torch.linalg.cholesky_ex(backwards.double())
            lower = lower.float()
        if not failed:
            del backwards
            lower = lower.flip(0, 1)
            return _invert_upper_(lower), used, retries
    raise RunError(
        f"second moments are not positive definite even with damping {used:g}; raise method.damping above 0, or "
        "calibrate on more tokens"
    )


def inverse_of_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves: nearly all of it is matrix products."""
    return _invert_upper_(upper.triu())


def _invert_upper_(upper: Tensor) -> Tensor:
    """`inverse_of_upper` in the memory of a matrix whose lower triangle is zero; room for a quarter of it beside."""
    size = len(upper)
    if size <= 256:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return upper.copy_(torch.linalg.solve_triangular(upper, identity, upper=True))
    half = size // 2
    left, right = _invert_upper_(upper[:half, :half]), _invert_upper_(upper[half:, half:])
    across = upper[:half, half:]
    across.addmm_(left @ across, right, beta=0, alpha=-1)
    return upper
