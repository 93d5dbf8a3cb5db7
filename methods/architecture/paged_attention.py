"""PagedAttention: a cache of keys and values in blocks, allocated as a text grows (Kwon et al. 2023).

https://arxiv.org/abs/2309.06180, Section 4. Memory is a pool of blocks of `block_tokens` places. A sequence has a
table: its k-th block of tokens lies in block table[k] of the pool. Blocks are counted by who holds them: a copy of a
sequence (parallel samples, beams) shares all of its blocks, and only when one of the two writes into a shared block is
that one block copied. A sequence wastes less than one block; contiguous memory wastes what the longest text might need.

This is the reference: it shows the mechanism and counts what it wastes. Attention reads blocks gathered in order, so
its answers are those of a contiguous cache to the bit, and no faster. `paged_attention` reads them one by one, as the
paper's kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from harness.errors import ConfigError, RunError
from methods.architecture.flash_attention import Running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.method import Bench, LanguageModel


class BlockPool:
    """Which blocks are free, who holds the others, and which tokens full blocks hold. No keys and values here.

    blocks: None lets the pool grow as needed.
    """

    def __init__(self, block_tokens: int, blocks: int | None = None) -> None:
        self.block_tokens = block_tokens
        self.limit = blocks
        self.holders: list[int] = []  # of each block that exists
        self._free: list[int] = []
        self.known: dict[tuple, int] = {}  # full blocks by their tokens and all before them
        self._content: dict[int, tuple] = {}

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return len(self.holders) - len(self._free)

    @property
    def free(self) -> int | None:
        """Blocks that can still be had; None where the pool grows."""
        return None if self.limit is None else self.limit - self.used

    def take(self) -> int:
        """A block of one's own. Raises RunError when none is left."""
        if self._free:
            block = self._free.pop()
        elif self.limit is None or len(self.holders) < self.limit:
            block = len(self.holders)
            self.holders.append(0)
        else:
            raise RunError(f"all {self.limit} blocks of {self.block_tokens} tokens are in use; finish a sequence first")
        self.holders[block] = 1
        self.forget(block)
        return block

    def share(self, block: int) -> int:
        """Hold a block that somebody holds already."""
        self.holders[block] += 1
        return block

    def release(self, block: int) -> None:
        """Let go of a block; it is free when nobody holds it."""
        self.holders[block] -= 1
        if self.holders[block] == 0:
            self._free.append(block)
            self.forget(block)

    def name_content(self, block: int, tokens: tuple) -> None:
        """Say what a full block holds: all tokens from the start of the text to its end, so that others may find it."""
        self.forget(block)
        if tokens not in self.known:
            self.known[tokens] = block
            self._content[block] = tokens

    def forget(self, block: int) -> None:
        """Nobody finds this block by its tokens any more."""
        tokens = self._content.pop(block, None)
        if tokens is not None:
            del self.known[tokens]


@dataclass
class Text:
    """One sequence in the pool: its table of blocks and its length in tokens."""

    pool: BlockPool
    table: list[int]
    length: int = 0

    def grow(self, tokens: int) -> list[tuple[int, int]]:
        """Make room for more tokens. Returns copies to make, (from block, to block), before anything is written.

        Raises RunError, with nothing changed, when the pool has too few blocks left.
        """
        size = self.pool.block_tokens
        copies = []
        needed = ceil((self.length + tokens) / size) - len(self.table)
        shared = tokens > 0 and self.length % size > 0 and self.pool.holders[self.table[-1]] > 1
        if self.pool.free is not None and needed + shared > self.pool.free:
            raise RunError(
                f"{needed + shared} blocks are needed and {self.pool.free} are free; finish a sequence first"
            )
        if shared:  # copy on write, of this block alone
            old = self.table[-1]
            self.table[-1] = self.pool.take()
            self.pool.release(old)
            copies.append((old, self.table[-1]))
        elif tokens > 0 and self.length % size > 0:
            self.pool.forget(self.table[-1])  # a cut left it half full: others must not find what it held
        self.table += [self.pool.take() for _ in range(needed)]
        self.length += tokens
        return copies

    def fork(self) -> Text:
        """The same text once more, in the same blocks."""
        return Text(self.pool, [self.pool.share(block) for block in self.table], self.length)

    def cut(self, length: int) -> None:
        """Keep the first tokens only, and the blocks that hold them."""
        keep = ceil(length / self.pool.block_tokens)
        for block in self.table[keep:]:
            self.pool.release(block)
        del self.table[keep:]
        self.length = length

    def adopt(self, tokens: Sequence[int]) -> int:
        """Start an empty text with full blocks that others hold; how many of its tokens need not be computed.

        At least the last token is left: a model must read something to answer.
        """
        size = self.pool.block_tokens
        while self.length + size < len(tokens):
            block = self.pool.known.get(tuple(tokens[: self.length + size]))
            if block is None:
                break
            self.table.append(self.pool.share(block))
            self.length += size
        return self.length

    def publish(self, tokens: Sequence[int]) -> None:
        """Let others find this text's full blocks."""
        size = self.pool.block_tokens
        for index in range(self.length // size):
            self.pool.name_content(self.table[index], tuple(tokens[: (index + 1) * size]))


def waste(sequences: Sequence[Text]) -> float:
    """Share of the places in used blocks that hold no token. What several share counts once."""
    pool = sequences[0].pool
    filled: dict[int, int] = {}
    for sequence in sequences:
        for index, block in enumerate(sequence.table):
            filled[block] = min(pool.block_tokens, sequence.length - index * pool.block_tokens)
    return 1 - sum(filled.values()) / (len(filled) * pool.block_tokens) if filled else 0.0


class PagedLayer(DynamicLayer):
    """Keys and values of one layer in blocks: [blocks, block_tokens, H, D]. All layers share the rows' tables."""

    is_croppable = True

    def __init__(self, rows: _Rows) -> None:
        super().__init__()
        self.rows = rows
        self.written = 0  # tokens of this layer; the tables are ahead of it within a step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, T, D] into blocks; return all of every row, in order: [B, H, all, D]."""
        length = key_states.shape[2]
        places = self.rows.places(self, len(key_states), self.written + length, key_states.device)
        for name, states in (("keys", key_states), ("values", value_states)):
            pool = self._pool(name, states)
            new = places[:, self.written :].flatten()
            pool.flatten(0, 1)[new] = states.transpose(1, 2).flatten(0, 1)
        self.written += length
        return tuple(pool.flatten(0, 1)[places].transpose(1, 2) for pool in (self.keys, self.values))

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy on write: what shared blocks hold goes into blocks of one's own."""
        for old, new in copies:
            for name in ("keys", "values"):
                pool = self._pool(name, getattr(self, name))
                pool[new] = pool[old]

    def _pool(self, name: str, like: Tensor) -> Tensor:
        """Memory of the blocks that exist; it grows with the pool."""
        held = getattr(self, name)
        blocks = len(self.rows.pool.holders)
        if held is None or len(held) < blocks:
            heads, width = (like.shape[1], like.shape[3]) if held is None else held.shape[2:]
            room = max(blocks, 0 if held is None else ceil(1.5 * len(held)))
            grown = like.new_zeros(room, self.rows.pool.block_tokens, heads, width)
            if held is not None:
                grown[: len(held)] = held
            setattr(self, name, grown)
            self.is_initialized = True
        return getattr(self, name)

    def held(self) -> list[Tensor]:
        """Blocks that hold tokens; free ones belong to whoever needs them next."""
        return [] if self.keys is None else [self.keys[: self.rows.pool.used], self.values[: self.rows.pool.used]]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.written

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens (a negative number of them)."""
        self.written += tokens_to_remove
        self.rows.cut(self.written)


class _Rows:
    """The sequences of a batch, one a row; whoever writes first in a step makes room for all layers."""

    def __init__(self, block_tokens: int, blocks: int | None) -> None:
        self.pool = BlockPool(block_tokens, blocks)
        self.sequences: list[Text] = []
        self.layers: WeakSet[PagedLayer] = WeakSet()  # layers hold the rows: memory goes with the last use, not later
        self._places: Tensor | None = None

    def places(self, layer: PagedLayer, rows: int, length: int, device: torch.device) -> Tensor:
        """Where in the pool each token of every row lies: [B, length]."""
        if not self.sequences:
            self.sequences = [Text(self.pool, []) for _ in range(rows)]
        if self.sequences[0].length < length:
            copies = [copy for s in self.sequences for copy in s.grow(length - s.length)]
            if copies:
                for other in self.layers:
                    other.copy_blocks(copies)
            self._places = None
        if self._places is None:
            size = self.pool.block_tokens
            tables = torch.tensor([s.table for s in self.sequences], device=device)
            tokens = torch.arange(length, device=device)
            self._places = tables[:, tokens // size] * size + tokens % size
        return self._places

    def cut(self, length: int) -> None:
        """Keep the first tokens of every row."""
        for sequence in self.sequences:
            if sequence.length > length:
                sequence.cut(length)
                self._places = None


class PagedCacheState(Cache):
    """transformers' cache of paged layers, and what can be done with rows beyond it."""

    def __init__(self, layers: int, block_tokens: int, blocks: int | None = None) -> None:
        self.rows = _Rows(block_tokens, blocks)
        super().__init__(layers=[PagedLayer(self.rows) for _ in range(layers)])
        self.rows.layers.update(self.layers)

    def fork(self, copies: int) -> None:
        """Every row `copies` times, one after the other, in the same blocks: nothing is copied until one writes."""
        forked = []
        for sequence in self.rows.sequences:
            forked += [sequence, *(sequence.fork() for _ in range(copies - 1))]
        self.rows.sequences, self.rows._places = forked, None

    def free(self) -> None:
        """Give all blocks back."""
        for sequence in self.rows.sequences:
            sequence.cut(0)
        self.rows.sequences, self.rows._places = [], None
        for layer in self.layers:
            layer.written = 0


def paged_attention(query: Tensor, keys: Tensor, values: Tensor, table: Sequence[int], length: int) -> Tensor:
    """One token's attention over blocks where they lie, merged as they come (the paper, Section 4.1, Equation 4).

    query: [H, D]; keys, values: [blocks, block_tokens, H_kv, D]; table: the sequence's blocks; length: its tokens.
    -> [H, D].
    """
    size, kv_heads = keys.shape[1:3]
    grouped = query.view(kv_heads, -1, query.shape[-1])  # [H_kv, heads of the group, D]
    running = Running.start(grouped, values.shape[-1])
    for index, block in enumerate(table[: ceil(length / size)]):
        here = slice(0, min(size, length - index * size))
        key, value = (t[block, here].transpose(0, 1).to(running.out.dtype) for t in (keys, values))
        running.add(grouped.to(key.dtype) @ key.mT * query.shape[-1] ** -0.5, value)
    return running.finish(query.dtype)[0].view(query.shape)


@dataclass(frozen=True)
class PagedCache:
    """The engine's cache in blocks.

    block_tokens: places of a block.
    """

    block_tokens: int

    chunk: ClassVar[int | None] = None
    endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.block_tokens, int) or self.block_tokens < 1:
            raise ConfigError(f"method.block_tokens={self.block_tokens}: must be at least 1")

    @property
    def name(self) -> str:
        """For the row."""
        return f"paged cache, blocks of {self.block_tokens}, gathered (reference)"

    def new_cache(self, module: PreTrainedModel) -> PagedCacheState:
        """An empty cache. Raises ConfigError for layers that hold other things than all keys and values."""
        layers = DynamicCache(config=module.config).layers
        others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
        if others or not layers:
            raise ConfigError(
                f"this model's cache has layers that are not all keys and values ({', '.join(others) or 'none'}); "
                "the reference of paged attention takes models that attend to everything"
            )
        return PagedCacheState(len(layers), self.block_tokens)

    def reading(self, cache: Cache, length: int) -> dict[str, Any]:
        """Nothing to tell the model: all tokens are there, in order."""
        return {}

    def slots(self, tokens: int, longest: int) -> int:
        """Whole blocks, as many as there are tokens for."""
        return ceil(tokens / self.block_tokens) * self.block_tokens

    def as_dict(self) -> dict[str, Any]:
        """Arguments that make this kind again."""
        return asdict(self)


@dataclass(frozen=True)
class PagedAttention:
    """Leaves the weights alone and keeps keys and values in blocks of `block_tokens` places."""

    block_tokens: int

    def __post_init__(self) -> None:
        PagedCache(self.block_tokens)

    def compress(self, base: LanguageModel, bench: Bench) -> LanguageModel:
        """The same model with another cache."""
        cache = PagedCache(self.block_tokens)
        cache.new_cache(base.module)  # refuse what cannot be cached this way before anything runs
        base.engine = base.engine.changed(cache=cache)
        return base
