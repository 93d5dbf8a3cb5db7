"""Decoder blocks: find them, run them one by one, and see what feeds what.

Nothing here knows an architecture. The blocks are the largest list of equal modules; what the model passes to each
of them is recorded while their forwards are bypassed; which linears share an input and which norm feeds them is read
off tensor identities during one call. Where looking shows that blocks cannot be run one by one, that is an error.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from harness.errors import ConfigError
from methods.streaming import ChunkStream, lent, lent_in_turn, pin, tensors_outside, to_wait, unpin

TRIAL_TOKENS = 8  # enough to tell what feeds what; costs nothing

See = Callable[[str, Tensor], None]


# ---------------------------------------------------------------------------------------------- finding the parts


def decoder_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Dotted name and list of the decoder blocks: the ModuleList of equal-class modules with most parameters.

    Raises ConfigError when the model has none.
    """
    best, best_size = None, 0
    others = tuple(f"{name}." for name, child in module.named_modules() if getattr(child, "is_another_model", False))
    for name, child in module.named_modules():
        if name.startswith(others):  # str.startswith(()) is False
            continue
        if isinstance(child, nn.ModuleList) and len(child) and len({type(block) for block in child}) == 1:
            size = sum(tensor.numel() for tensor in (*child.parameters(), *child.buffers()))
            if size > best_size:  # strictly: the outermost of nested lists comes first and wins
                best, best_size = (name, child), size
    if best is None:
        raise ConfigError(
            f"{type(module).__name__} has no list of equal decoder blocks; choose a decoder-only transformers model"
        )
    return best


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for every layer that a method put in its place."""
    return isinstance(module, nn.Linear) or hasattr(module, "compressed_tensors_scheme")


def block_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Full dotted name -> every linear, plain or replaced, inside the decoder blocks, in the model's order."""
    prefix, blocks = decoder_blocks(module)
    return linears_in(blocks, prefix)


def linears_in(module: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Full dotted name -> every linear below `module`, which is called `prefix`; not those inside another linear."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, child in module.named_modules(prefix=prefix):  # a module comes before what it contains
        if is_linear(child) and not name.startswith(inside or ("\0",)):
            found[name] = child
            inside = (f"{name}.",)
    return found


def plain_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks (see `block_linears`), for a method that is about to compress them.

    Raises ConfigError, naming the module and the way out, when a weight matrix of a block is not a plain nn.Linear.
    GPT-2's Conv1D stores its matrix transposed and fused experts are 3-D parameters: compressing "every linear"
    would silently skip most of such a model.
    """
    prefix, blocks = decoder_blocks(module)
    found: dict[str, nn.Linear] = {}
    for name, child in blocks.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear):
            found[name] = child
        elif is_linear(child):
            raise ConfigError(f"{name} is already compressed ({type(child).__name__}); compress a model once")
        elif not isinstance(child, nn.Embedding):
            _require_no_matrix(name, child)
    if not found:
        raise ConfigError(f"{prefix}: the blocks contain no nn.Linear; choose another model, or method=dense")
    return found


def _require_no_matrix(name: str, module: nn.Module) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2:
            kind = "fused experts" if parameter.ndim > 2 else type(module).__name__
            raise ConfigError(
                f"{name}: parameter {key} of shape {list(parameter.shape)} ({kind}) is not an nn.Linear and cannot be "
                "compressed layer by layer; choose a model whose blocks are made of nn.Linear, or method=dense"
            )


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name` below `root`."""
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, module)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """The parameters that `module` has now are float32 while inside, and what they were before afterwards."""
    kept = [(parameter, parameter.dtype) for parameter in module.parameters()]
    for parameter, _ in kept:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in kept:
            parameter.data = parameter.data.to(dtype)


# ------------------------------------------------------------------------------------------------ running blocks


@dataclass(frozen=True)
class Call:
    """What the model passes to a block besides the hidden states."""

    args: tuple[Any, ...]  # positional arguments after the hidden states
    kwargs: dict[str, Any]
    hidden_name: str | None  # None: the hidden states come first; else the keyword they are passed by

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, H] -> [B, T, H] through one block."""
        if self.hidden_name is None:
            return _first(block(hidden, *self.args, **self.kwargs))
        return _first(block(*self.args, **self.kwargs, **{self.hidden_name: hidden}))


def _in_float32(call: Call, seen: dict[int, Tensor]) -> Call:
    """The call with its tensors of floats in float32, each of them made once."""

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if id(value) not in seen:
            seen[id(value)] = value.float()
        return seen[id(value)]

    args, kwargs = tree_map(wide, (call.args, call.kwargs))
    return Call(args, kwargs, call.hidden_name)


@dataclass
class Block:
    """One decoder block and everything needed to run it alone."""

    name: str  # dotted, from the root of the model
    module: nn.Module
    calls: list[Call] = field(repr=False)  # one per chunk of calibration windows
    trial_call: Call = field(repr=False)
    trial_hidden: Tensor = field(repr=False)  # [1, few tokens, H], what the block met in a run of the whole model
    device: torch.device | None = None  # where to compute; None: where the block is

    def __call__(self, hidden: Sequence[Tensor], enough: type[Exception] | tuple = ()) -> list[Tensor]:
        """All chunks of hidden states [B, T, H] through the block; outputs wait where the chunks do.

        enough: an exception that a hook raises to end a chunk early; such a chunk has no output.
        """
        chunks = ChunkStream(hidden, next(self.module.parameters()).device)
        for index, chunk in enumerate(chunks):
            try:
                chunks.put(self.calls[index].run(self.module, chunk))
            except enough:
                continue
        return chunks.finish()

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Chunk `index` through the block: computed where the block is, returned to where the chunk was kept."""
        device = next(self.module.parameters()).device
        return self.calls[index].run(self.module, hidden.to(device)).to(hidden.device)

    def trial(self) -> Tensor:
        """The block's output [1, few tokens, H] on the trial input."""
        return self.trial_call.run(self.module, self.trial_hidden)

    @property
    def comes_from_host(self) -> bool:
        """Whether the block waits in host memory and is computed on a GPU."""
        home = next(self.module.parameters()).device
        return self.device is not None and self.device.type == "cuda" and home.type == "cpu"

    @contextmanager
    def visiting(self, pinned: bool = False) -> Iterator[Block]:
        """The block is where it is computed while inside, and with what it then consists of at home afterwards.

        pinned: leave it in pinned pages of host memory, which is faster.
        """
        home = next(self.module.parameters()).device
        if self.device is not None:
            self.module.to(self.device)
        try:
            yield self
        finally:
            if pinned:
                self.module._apply(lambda tensor: to_wait(tensor, home))
            else:
                self.module.to(home)

    def linears(self) -> dict[str, nn.Module]:
        """Full dotted name -> linear."""
        return linears_in(self.module, self.name)

    def copy_in_float32(self) -> Block:
        """A copy to be trained: its parameters, and what it is called with, in float32; hidden states must be, too."""
        seen: dict[int, Tensor] = {}  # by identity: calls share their masks
        calls = [_in_float32(call, seen) for call in self.calls]
        trial_call, trial_hidden = _in_float32(self.trial_call, seen), self.trial_hidden.float()
        return Block(self.name, copy.deepcopy(self.module).float(), calls, trial_call, trial_hidden)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the linear with this full dotted name."""
        replace_module(self.module, name.removeprefix(self.name + "."), module)


def one_at_a_time(blocks: Sequence[Block]) -> Iterator[Block]:
    """Every block in turn, where it is computed until the next one is asked for.

    Between host memory and a GPU weights travel in pinned pages. A thread brings those of the next block there, and
    those of the block before away from there, while one is computed on: it touches no block that is visiting.
    """
    if not all(block.comes_from_host for block in blocks):
        for block in blocks:
            with block.visiting():
                yield block
        return
    with ThreadPoolExecutor(1) as thread:
        moves = [thread.submit(pin, block.module) for block in blocks[:1]]
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            while moves:
                moves.pop().result()
            with block.visiting(pinned=True):
                if following is not None:
                    moves.append(thread.submit(pin, following.module))
                yield block
            moves.append(thread.submit(unpin, block.module))
    while moves:
        moves.pop().result()


@torch.no_grad()
def record_blocks(
    module: nn.Module,
    windows: Tensor,
    windows_per_chunk: int | None = None,
    keep_on: torch.device | str | None = None,
    compute_on: torch.device | str | None = None,
) -> tuple[list[Block], list[Tensor]]:
    """The decoder blocks, ready to be run one by one, and the hidden states that enter the first.

    windows: token ids [S, T]. They are cut into chunks of `windows_per_chunk` (None: one chunk).
    keep_on: where hidden states wait between blocks; None: where the model computes. "cpu" for large models.
    compute_on: where blocks are computed, each of them there only in its turn; None: where the model is.
    The model is put in evaluation mode. Every block has its own recorded call: block 0's mask is not block 1's
    where windows alternate (Gemma 2). Raises ConfigError when the model does more between two blocks than hand the
    hidden states on, because walking the blocks would then be silently wrong.
    """
    module.eval()
    prefix, blocks = decoder_blocks(module)
    home = next(blocks.parameters()).device
    device = home if compute_on is None else torch.device(compute_on)
    trial_windows = windows[:1, :TRIAL_TOKENS]
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]
    with ExitStack() as stack:
        if device != home:
            stack.enter_context(lent(tensors_outside(_backbone(module), blocks), device))
        with ExitStack() as trial_stack:
            if device != home:
                trial_stack.enter_context(lent_in_turn(blocks, device))
            trial = _observe(module, blocks, trial_windows)
        structures = [step.output for step in trial]
        _check_chain(prefix, trial)
        bypassed = _bypass(module, blocks, trial_windows, structures)
        for index, (step, (_, call)) in enumerate(zip(trial, bypassed, strict=True)):
            if not _same((step.call.args, step.call.kwargs), (call.args, call.kwargs)):
                raise ConfigError(
                    f"{prefix}.{index}: the model derives this block's arguments from the hidden states of earlier "
                    "blocks; blocks cannot be run one by one, so choose a method that does not calibrate (method=rtn)"
                )
        pool: list[Tensor] = []
        for chunk in windows.split(windows_per_chunk or len(windows)):
            recorded = _bypass(module, blocks, chunk, structures)
            hidden.append(to_wait(recorded[0][0], torch.device(keep_on or device)))
            seen: dict[int, Tensor] = {}  # by identity: a chunk's blocks are given the same tensors
            for index, (_, call) in enumerate(recorded):
                args, kwargs = (_shared(part, pool, seen) for part in (call.args, call.kwargs))
                calls[index].append(Call(args, kwargs, call.hidden_name))
    return [
        Block(f"{prefix}.{index}", block, calls[index], trial[index].call, trial[index].hidden, device)
        for index, block in enumerate(blocks)
    ], hidden


@dataclass
class _Step:
    hidden: Tensor
    call: Call
    output: Any  # as the block returned it


def _observe(module: nn.Module, blocks: nn.ModuleList, tokens: Tensor) -> list[_Step]:
    """Run the whole model on `tokens` [B, T] and note what every block receives and returns."""
    steps: list[_Step] = []

    def see(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden, call = _split(type(block).__name__, args, kwargs)
        steps.append(_Step(hidden, call, tree_map(_copied, output)))

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(see, with_kwargs=True).remove)
        _call_backbone(module, tokens)
    if len(steps) != len(blocks):
        raise ConfigError(
            f"{type(module).__name__} calls its {len(blocks)} blocks {len(steps)} times; blocks that are shared or "
            "skipped cannot be compressed one by one, so choose method=dense or another model"
        )
    return steps


def _bypass(module: nn.Module, blocks: nn.ModuleList, tokens: Tensor, structures: list[Any]) -> list[tuple]:
    """What the model passes to every block for `tokens` [B, T], without running a block: [(hidden, Call), ...].

    Each bypassed block hands its input on in the structure (tensor or tuple) of `structures`, so the hidden states
    are right for the first block only; the calls are right for all.
    """
    recorded: list[tuple[Tensor, Call]] = []

    def bypass(block: nn.Module, structure: Any) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(type(block).__name__, args, kwargs)
            recorded.append((hidden, call))
            if isinstance(structure, Tensor):
                return hidden
            return (hidden, *(None for _ in structure[1:]))

        return forward

    with ExitStack() as stack:
        for block, structure in zip(blocks, structures, strict=True):
            stack.callback(_restore_forward, block, block.__dict__.get("forward"))
            block.forward = bypass(block, structure)
        _call_backbone(module, tokens)
    return recorded


def _restore_forward(block: nn.Module, own: Callable | None) -> None:
    del block.forward
    if own is not None:  # a forward set on the instance, as accelerate does
        block.forward = own


def _call_backbone(module: nn.Module, tokens: Tensor) -> None:
    """Run the model without its head: logits of a calibration set would cost more than a block."""
    device = module.get_input_embeddings().weight.device
    _backbone(module)(input_ids=tokens.to(device), use_cache=False)


def _backbone(module: nn.Module) -> nn.Module:
    return getattr(module, "base_model", module)


def _split(kind: str, args: tuple, kwargs: dict) -> tuple[Tensor, Call]:
    """Tell the hidden states from the rest of a block's arguments."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 3:
        return args[0], Call(args[1:], dict(kwargs), None)
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor):
        return hidden, Call(
            args, {key: value for key, value in kwargs.items() if key != "hidden_states"}, "hidden_states"
        )
    raise ConfigError(f"{kind} is not called with hidden states [batch, tokens, width]; choose a decoder-only model")


def _check_chain(prefix: str, trial: list[_Step]) -> None:
    for index, (step, following) in enumerate(itertools.pairwise(trial)):
        if not torch.equal(_first(step.output), following.hidden):
            raise ConfigError(
                f"{prefix}.{index + 1}: the model changes the hidden states between blocks; blocks cannot be run one "
                "by one, so choose a method that does not calibrate (method=rtn)"
            )


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same(one: Any, other: Any) -> bool:
    leaves, spec = tree_flatten(one)
    others, other_spec = tree_flatten(other)
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(leaves, others, strict=True)
    )


def _shared(tree: Any, pool: list[Tensor], seen: dict[int, Tensor]) -> Any:
    """`tree` with every tensor that equals one already in `pool` replaced by that one: masks repeat.

    seen: id of a tensor -> the one in its place, for tensors that are alive; comparing costs a GPU a stop.
    """

    def share(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in seen:
            seen[id(value)] = _pooled(value, pool)
        return seen[id(value)]

    return tree_map(share, tree)


def _pooled(value: Tensor, pool: list[Tensor]) -> Tensor:
    for known in pool:
        alike = known.shape == value.shape and known.dtype == value.dtype and known.device == value.device
        if known is value or (alike and torch.equal(known, value)):
            return known
    pool.append(value)
    return value


# ---------------------------------------------------------------------------------------------- what feeds what


@contextmanager
def watching(linears: dict[str, nn.Module], see: See) -> Iterator[None]:
    """While active, `see(name, x)` gets every input of every linear, as [N, C_in]."""
    with ExitStack() as stack:
        for name, linear in linears.items():

            def hook(_module: nn.Module, args: tuple, name: str = name) -> None:
                see(name, args[0].flatten(0, -2))

            stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield


@torch.no_grad()
def input_groups(block: Block) -> list[list[str]]:
    """Names of the linears that read one and the same tensor, group by group in the order of their calls.

    Raises ConfigError for a linear that the block does not call exactly once: it cannot be calibrated.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    alive: list[Tensor] = []  # a freed tensor's address would be given to the next one

    def see(name: str, x: Tensor) -> None:
        alive.append(x)
        groups.setdefault(_identity(x), []).append(name)

    linears = block.linears()
    with watching(linears, see):
        block.trial()
    called = [name for group in groups.values() for name in group]
    for name in linears:
        if called.count(name) != 1:
            raise ConfigError(
                f"{name} is called {called.count(name)} times by its block, not once, and cannot be calibrated; choose "
                "a method that does not calibrate (method=rtn)"
            )
    return list(groups.values())


@torch.no_grad()
def norm_readers(block: Block) -> dict[str, list[str]]:
    """Dotted name of each norm -> names of the linears that read its output, found by tensor identity."""
    outputs: dict[tuple[int, int], str] = {}
    readers: dict[str, list[str]] = {}
    alive: list[Tensor] = []

    def see(name: str, x: Tensor) -> None:
        norm = outputs.get(_identity(x))
        if norm is not None:
            readers.setdefault(norm, []).append(name)

    def note(name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                outputs[_identity(output)] = name

        return hook

    with ExitStack() as stack:
        for name, child in block.module.named_modules(prefix=block.name):
            if is_norm(child):
                stack.callback(child.register_forward_hook(note(name)).remove)
        stack.enter_context(watching(block.linears(), see))
        block.trial()
    return readers


def is_norm(module: nn.Module) -> bool:
    """True for a module that only scales (and shifts) features: its one `weight` has one dimension."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and not any(module.children())


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float | None:
    """0.0 when the norm multiplies by w, 1.0 when by 1 + w (Gemma), None when by neither: set the weight and look."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    x = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    kept = weight.clone()
    answers = []
    for value in (0, 1):
        weight.fill_(value)
        answers.append(norm(x) - (0 if bias is None else bias))
    weight.copy_(kept)
    at_zero, at_one = answers
    if not at_zero.any():
        return 0.0
    return 1.0 if torch.allclose(at_one, 2 * at_zero, rtol=1e-2) else None


def _identity(x: Tensor) -> tuple[int, int]:
    """Address and size: views of one tensor count as that tensor."""
    return x.data_ptr(), x.numel()
