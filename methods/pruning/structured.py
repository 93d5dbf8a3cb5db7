"""Heads and feed-forward channels that can be taken out: find what is coupled, mask it, remove it.

A channel of a feed-forward layer is a row of every matrix that writes it and a column of the one that reads it; a
key/value head goes with the group of query heads that read it, and with their columns of the output matrix. Which
matrices these are is read off the running block: what is written is disturbed, and where the disturbance arrives first
is what reads it (the groups of LLM-Pruner, Ma et al. 2023, https://arxiv.org/abs/2305.11627, Section 3.1, without a
list of architectures). Removing a unit is exactly zeroing what is read of it. The width of the hidden states, the
embeddings, the head and the norms are never touched.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.records import REMOVED_SHARE
from methods.blocks import Block, linears_in, plain_linears, record_blocks
from methods.pruning.masks import Pattern

if TYPE_CHECKING:
    from harness.method import Bench

log = logging.getLogger(__name__)

Kind = Literal["heads", "channels"]
DISTURBED_TOKEN = 2  # of the trial: tokens before and after it tell whether a layer mixes tokens
QUERY_COUNTS = ("num_heads", "num_attention_heads")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads")


# ------------------------------------------------------------------------------------------------------ what is coupled


@dataclass
class Units:
    """What can only be removed together, of one kind, in one block.

    rows: dotted name in the block of every linear that writes them -> unit of each of its rows, long [out].
    parts: the same names -> which of several matrices stored as one (query, key, value) each row is of, long [out].
    reader: the linear that reads them; columns: unit of each of its columns, long [in].
    owner: the attention layer of heads, whose counts must follow; "" for channels.
    queries: query heads in a unit of heads, 0 for channels.
    """

    kind: Kind
    count: int
    rows: dict[str, Tensor]
    parts: dict[str, Tensor]
    reader: str
    columns: Tensor
    owner: str = ""
    queries: int = 0

    def weights_each(self, block: nn.Module) -> int:
        """Weights of one unit, biases not counted."""
        written = sum(block.get_submodule(name).in_features * len(unit) for name, unit in self.rows.items())
        return (written + block.get_submodule(self.reader).out_features * len(self.columns)) // self.count

    def without(self, kept: Tensor) -> Units:
        """The units that are left where `kept` (bool [count]) is true, numbered anew."""
        number = kept.cumsum(0) - 1
        rows = {name: number[unit[kept[unit]]] for name, unit in self.rows.items()}
        parts = {name: part[kept[self.rows[name]]] for name, part in self.parts.items()}
        columns = number[self.columns[kept[self.columns]]]
        return Units(self.kind, int(kept.sum()), rows, parts, self.reader, columns, self.owner, self.queries)


@dataclass
class Layer:
    """A decoder block and its removable units.

    weights: of its linears before anything was removed; a share is of them.
    """

    name: str
    module: nn.Module
    units: dict[Kind, Units] = field(default_factory=dict)
    weights: int = 0

    @torch.no_grad()
    def remove(self, kind: Kind, kept: Tensor) -> None:
        """Take out every unit of a kind where `kept` (bool [count]) is false: really, by slicing the linears."""
        units = self.units[kind]
        kept = kept.to(units.columns.device)
        for name, unit in units.rows.items():
            linear = self.module.get_submodule(name)
            chosen = kept[unit].to(linear.weight.device)
            linear.weight = _sliced(linear.weight, chosen)
            if linear.bias is not None:
                linear.bias = _sliced(linear.bias, chosen)
            linear.out_features = linear.weight.shape[0]
        reader = self.module.get_submodule(units.reader)
        reader.weight = _sliced(reader.weight.T, kept[units.columns].to(reader.weight.device), transposed=True)
        reader.in_features = reader.weight.shape[1]
        self.units[kind] = units.without(kept)
        if kind == "heads":
            owner = self.module.get_submodule(units.owner)
            set_head_counts(owner, int(kept.sum()) * units.queries, int(kept.sum()))

    def description(self) -> dict[str, Any]:
        """Widths and shapes that rebuild the block with empty weights."""
        changed = {name for units in self.units.values() for name in (*units.rows, units.reader)}
        found: dict[str, Any] = {
            "shapes": {name: list(self.module.get_submodule(name).weight.shape) for name in sorted(changed)}
        }
        if "channels" in self.units:
            found["channels"] = self.units["channels"].count
        if "heads" in self.units:
            heads = self.units["heads"]
            found |= {"attention": heads.owner, "query_heads": heads.count * heads.queries}
            found["key_value_heads"] = heads.count
        return found


def _sliced(parameter: Tensor, chosen: Tensor, transposed: bool = False) -> nn.Parameter:
    left = parameter.detach()[chosen]
    return nn.Parameter((left.T if transposed else left).contiguous(), requires_grad=False)


class HeadCounts:
    """A configuration as an attention layer of its own width sees it: other head counts, all else read through."""

    def __init__(self, config: Any, query: int, key_value: int) -> None:
        self.model_config = config.model_config if isinstance(config, HeadCounts) else config
        for name in QUERY_COUNTS:
            setattr(self, name, query)
        for name in KEY_VALUE_COUNTS:
            setattr(self, name, key_value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model_config":  # asked for while a copy is made
            raise AttributeError(name)
        return getattr(self.model_config, name)


def set_head_counts(attention: nn.Module, query: int, key_value: int) -> None:
    """Tell an attention layer how many heads it has; the number of query heads for each key head stays."""
    for names, value in ((QUERY_COUNTS, query), (KEY_VALUE_COUNTS, key_value)):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, value)
    if hasattr(attention, "config"):
        attention.config = HeadCounts(attention.config, query, key_value)


# ------------------------------------------------------------------------------------------------------------- finding


@torch.no_grad()
def find_layers(module: nn.Module, tokens: Tensor, heads: bool = True) -> list[Layer]:
    """Every decoder block with its feed-forward channels and, if `heads`, its heads.

    tokens: ids [1, T], read by a trial. Raises ConfigError when a block has no such units or cannot lose them.
    """
    plain_linears(module)
    blocks, _ = record_blocks(module, tokens[:1])
    known: dict[tuple, dict[Kind, Units]] = {}
    layers = []
    for block in blocks:
        linears = {name.removeprefix(f"{block.name}."): linear for name, linear in block.linears().items()}
        signature = tuple((name, *linear.weight.shape) for name, linear in linears.items())
        if signature not in known:
            known[signature] = _find_units(block, linears, heads)
        weights = sum(linear.weight.numel() for linear in linears.values())
        layers.append(Layer(block.name, block.module, dict(known[signature]), weights))
    return layers


def _find_units(block: Block, linears: dict[str, nn.Linear], heads: bool) -> dict[Kind, Units]:
    found: dict[Kind, Units] = {}
    usual = _inputs(block, linears)
    for reader, (writers, mixes) in _readers(block, linears, usual).items():
        if mixes and not heads:
            continue
        candidates = (_head_layouts if mixes else _channel_layouts)(block.module, linears, writers, reader)
        for units in candidates:
            if _is_local(block, linears, usual, units):
                found[units.kind] = units
                break
    for kind, wanted in (("channels", True), ("heads", heads)):
        if not wanted:
            continue
        way_out = "choose another model or method=wanda" + ("; method.heads=false leaves heads" * (kind == "heads"))
        if kind not in found:
            raise ConfigError(
                f"{block.name}: no {kind} found that could be removed (linears {', '.join(linears)}); {way_out}"
            )
        _check_removal(block, found[kind], way_out)
    return found


def _inputs(block: Block, linears: dict[str, nn.Linear], added: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What every linear reads in a trial, in the order of their calls, with `added` [1, T, out] to what some return."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, linear in linears.items():

            def see(_module: nn.Module, args: tuple, name: str = name) -> None:
                seen[name] = args[0].clone()

            def disturb(_module: nn.Module, _args: tuple, output: Tensor, name: str = name) -> Tensor:
                return output + added[name]

            stack.callback(linear.register_forward_pre_hook(see).remove)
            if added and name in added:
                stack.callback(linear.register_forward_hook(disturb).remove)
        block.trial()
    return seen


def _noise(block: Block, linear: nn.Linear, seed: int) -> Tensor:
    """[1, T, out], as large as what a linear usually returns of inputs around one."""
    tokens = block.trial_hidden.shape[1]
    noise = torch.randn(1, tokens, linear.out_features, generator=torch.Generator().manual_seed(seed))
    return noise.to(linear.weight)


def _readers(
    block: Block, linears: dict[str, nn.Linear], usual: dict[str, Tensor]
) -> dict[str, tuple[list[str], bool]]:
    """Linear -> the linears whose output it is the first to feel, and whether it feels that at other tokens too."""
    readers: dict[str, tuple[list[str], bool]] = {}
    for name, linear in linears.items():
        noise = torch.zeros_like(_noise(block, linear, 0))
        noise[:, DISTURBED_TOKEN] = _noise(block, linear, 0)[:, DISTURBED_TOKEN]
        disturbed = _inputs(block, linears, {name: noise})
        for other, x in disturbed.items():
            changed = (x != usual[other]).reshape(noise.shape[1], -1).any(-1)  # [T]; OPT flattens tokens
            if changed.any():
                writers, mixes = readers.get(other, ([], False))
                elsewhere = int(changed.sum()) > int(changed[DISTURBED_TOKEN])
                readers[other] = ([*writers, name], mixes or elsewhere)
                break
    return readers


def _channel_layouts(
    block: nn.Module, linears: dict[str, nn.Linear], writers: list[str], reader: str
) -> Iterator[Units]:
    """How channels may lie in the rows: one matrix each, or gate and up stored as one."""
    width = linears[reader].in_features
    columns = torch.arange(width)
    sizes = {name: linears[name].out_features for name in writers}
    if all(size == width for size in sizes.values()):
        rows = {name: torch.arange(width) for name in writers}
        parts = {name: torch.zeros(width, dtype=torch.long) for name in writers}
        yield Units("channels", width, rows, parts, reader, columns)
    elif list(sizes.values()) == [2 * width]:
        row = torch.arange(2 * width)
        for unit, part in ((row % width, row // width), (row // 2, row % 2)):
            yield Units("channels", width, {writers[0]: unit}, {writers[0]: part}, reader, columns)


def _head_layouts(block: nn.Module, linears: dict[str, nn.Linear], writers: list[str], reader: str) -> Iterator[Units]:
    """How heads may lie in the rows: a matrix each, or one with all queries first, or one group after the other."""
    owner = _common_parent([*writers, reader])
    attention = block.get_submodule(owner)
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    width = linears[reader].in_features
    if not isinstance(size, int) or width % size:
        return
    queries = width // size
    heads = {name: linears[name].out_features / size for name in writers}
    fused = len(writers) == 1
    groups = (heads[writers[0]] - queries) / 2 if fused else min(heads.values())
    if groups < 1 or groups % 1 or queries % groups or any(count % groups for count in heads.values()):
        return
    groups = int(groups)
    each = queries // groups
    columns = torch.arange(width) // (each * size)
    if not fused:
        sizes = {name: linears[name].out_features for name in writers}
        rows = {name: torch.arange(features) // (features // groups) for name, features in sizes.items()}
        parts = {name: torch.zeros_like(unit) for name, unit in rows.items()}
        yield Units("heads", groups, rows, parts, reader, columns, owner, each)
        return
    head = torch.arange(linears[writers[0]].out_features) // size
    beyond = head - queries
    sections = torch.where(beyond < 0, head // each, beyond % groups)
    part = torch.where(beyond < 0, 0, 1 + beyond // groups)
    within = head % (each + 2)
    grouped = head // (each + 2)
    grouped_part = (within - each + 1).clamp(min=0)
    for unit, kinds in ((sections, part), (grouped, grouped_part)):
        yield Units("heads", groups, {writers[0]: unit}, {writers[0]: kinds}, reader, columns, owner, each)


def _common_parent(names: list[str]) -> str:
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _is_local(block: Block, linears: dict[str, nn.Linear], usual: dict[str, Tensor], units: Units) -> bool:
    """Whether disturbing some units' rows arrives in those units' columns and in no other."""
    number = torch.arange(units.count)
    for chosen in (number < (units.count + 1) // 2, number % 2 == 0):
        added = {
            name: _noise(block, linears[name], seed) * chosen[unit].to(linears[name].weight)
            for seed, (name, unit) in enumerate(units.rows.items())
        }
        x = _inputs(block, linears, added)[units.reader]
        changed = (x != usual[units.reader]).flatten(0, -2).any(0).cpu()  # [in]
        expected = chosen[units.columns]
        if changed[~expected].any() or not changed[expected].any():
            return False
    return True


def _check_removal(block: Block, units: Units, way_out: str) -> None:
    """Remove the last unit of a copy and compare with masking it: some models give each head something else."""
    if units.count == 1:
        return
    kept = torch.arange(units.count) < units.count - 1
    copied = Layer(block.name, copy.deepcopy(block.module), {units.kind: units})
    with masking([(block.module, units, kept)]):
        expected = block.trial()
    try:
        copied.remove(units.kind, kept)
        got = block.trial_call.run(copied.module, block.trial_hidden)
        same = torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{block.name}: {units.kind} cannot be removed one by one ({error}); {way_out}") from error
    if not same:
        raise ConfigError(f"{block.name}: without its last of {units.kind} the block is another function; {way_out}")


# ------------------------------------------------------------------------------------------------------------- masking


@contextmanager
def masking(masked: Iterable[tuple[nn.Module, Units, Tensor]]) -> Iterator[None]:
    """While active, blocks compute as without the units whose mask [count] is 0 (or false): nothing is read of them.

    masked: (block, units, mask). The mask is read at every call, and gradients reach it.
    """
    with ExitStack() as stack:
        for block, units, mask in masked:

            def hide(_module: nn.Module, args: tuple, units: Units = units, mask: Tensor = mask) -> tuple:
                return (args[0] * mask[units.columns.to(mask.device)].to(args[0]), *args[1:])

            stack.callback(block.get_submodule(units.reader).register_forward_pre_hook(hide).remove)
        yield


# ------------------------------------------------------------------------------------------------------------- scoring


def matrix_scores(units: Units, of_weights: Callable[[str], Tensor], signed: bool) -> Tensor:
    """Sums over each unit's slice of each matrix, [matrices, units]; what reads the units comes last.

    of_weights: name of a linear in the block -> [out, in]. signed: rows and columns are summed before |·| is taken.
    A matrix that stores several (query, key, value) counts as so many.
    """
    found = []
    for name, unit in units.rows.items():
        rows = of_weights(name).sum(1)
        part = units.parts[name].to(rows.device)
        table = rows.new_zeros(int(part.max()) + 1, units.count)
        table.index_put_((part, unit.to(rows.device)), rows.abs() if signed else rows, accumulate=True)
        found.extend(table)
    columns = of_weights(units.reader).sum(0)
    columns = columns.abs() if signed else columns
    found.append(columns.new_zeros(units.count).index_add_(0, units.columns.to(columns.device), columns))
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------------------ how much


@dataclass(frozen=True)
class Extent:
    """How much is removed, and where.

    sparsity: share of all weights of the blocks' linears.
    keep_first, keep_last: shares of the blocks, rounded to whole ones, that are left as they are.
    heads: whether heads are removed, not channels alone.
    fill: channels make up for what whole heads cannot give; without it each kind loses its own share, rounded.
    round_to: as many channels are left as a multiple of it, the nearest: kernels and groups of a grid may want that.
    """

    sparsity: float
    keep_first: float
    keep_last: float
    heads: bool
    fill: bool
    round_to: int = 1

    def __post_init__(self) -> None:
        share_of(self.sparsity)
        if self.round_to < 1:
            raise ConfigError(f"method.round_to={self.round_to}: must be at least 1")
        for name in ("keep_first", "keep_last"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 0 and less than 1")

    def chosen(self, layers: Sequence[Layer]) -> list[Layer]:
        """The blocks that lose something. Raises ConfigError when there are none."""
        first, last = (int(share * len(layers) + 0.5) for share in (self.keep_first, self.keep_last))
        chosen = list(layers[first : len(layers) - last])
        if not chosen:
            raise ConfigError(
                f"method.keep_first={self.keep_first} and keep_last={self.keep_last} leave none of "
                f"{len(layers)} blocks to prune; choose smaller shares"
            )
        return chosen

    def counts(self, layers: Sequence[Layer]) -> list[dict[Kind, int]]:
        """For each of the `chosen` blocks, how many units of each kind go.

        Raises ConfigError when these blocks do not hold as many weights, or when nothing would be removed.
        """
        chosen = self.chosen(layers)
        total, available = (sum(layer.weights for layer in some) for some in (layers, chosen))
        share = share_of(self.sparsity) * total / available
        if share >= 1:
            raise ConfigError(
                f"sparsity={self.sparsity}: the {len(chosen)} blocks that are pruned hold {available / total:.3f} of "
                "the weights; choose a smaller sparsity, or smaller method.keep_first and keep_last"
            )
        counts = [self._of_block(layer, share) for layer in chosen]
        if not any(any(count.values()) for count in counts):
            raise ConfigError(
                f"sparsity={self.sparsity}: removes no head and no channel of blocks this narrow; choose a larger one"
            )
        return counts

    def _of_block(self, layer: Layer, share: float) -> dict[Kind, int]:
        each = {kind: units.weights_each(layer.module) for kind, units in layer.units.items()}
        counts: dict[Kind, int] = {}
        channels = layer.units["channels"].count
        if self.heads:
            units = layer.units["heads"]
            features = len(units.columns) // units.queries  # of the key/value heads
            size = features // units.count
            counts["heads"] = min((features - _floor(features * (1 - share))) // size, units.count - 1)
        if self.fill:
            wanted = share * layer.weights - counts.get("heads", 0) * each.get("heads", 0)
            counts["channels"] = max(round(wanted / each["channels"]), 0)
        else:
            counts["channels"] = min(channels - _floor(channels * (1 - share)), channels - 1)
        if counts["channels"] >= channels:
            raise ConfigError(
                f"sparsity={self.sparsity}: {layer.name} would lose all of its {channels} channels; choose a smaller "
                "sparsity, smaller method.keep_first and keep_last, or method.fill=false"
            )
        if self.round_to > 1:
            left = self.round_to * max(1, round((channels - counts["channels"]) / self.round_to))
            counts["channels"] = max(channels - left, 0)
        return counts


def share_of(sparsity: float | str) -> float:
    """The share that is removed. Raises ConfigError for N:M, which names single weights."""
    pattern = Pattern.parse(sparsity)
    if pattern.of is not None:
        raise ConfigError(f"sparsity={sparsity}: heads and channels are removed whole; give a share as in 0.2")
    return pattern.share


def _floor(value: float) -> int:
    """⌊value⌋ for the decimal that was meant: 0.7 · 10 is 7, though less in binary."""
    return int(value + 1e-9 * max(value, 1.0))


def lowest_units(scores: Tensor, count: int) -> Tensor:
    """Which units stay, bool [N], when the `count` with the lowest scores [N] go, the first of equals before others."""
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    kept[scores.argsort(stable=True)[:count]] = False
    return kept


def removed_share(layers: Sequence[Layer]) -> float:
    """Which share of the weights that the blocks' linears once had is gone."""
    left = sum(linear.weight.numel() for layer in layers for linear in linears_in(layer.module, layer.name).values())
    return 1 - left / sum(layer.weights for layer in layers)


def report_removed(layers: Sequence[Layer], sparsity: float, bench: Bench) -> None:
    """Say what whole units made of the share that was asked for, in the run's log; loudly when they missed it."""
    reached = removed_share(layers)
    bench.log.point(REMOVED_SHARE, 0, reached)
    for kind in layers[0].units:
        left = sum(layer.units[kind].count for layer in layers)
        bench.log.point(f"{kind} left", 0, left)
    if abs(reached - share_of(sparsity)) > 0.01:
        log.warning("sparsity=%s was asked for, whole units made it %.3f", sparsity, reached)
