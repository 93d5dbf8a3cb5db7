"""Decoding steps of fixed shape: a cache allocated once, and on a GPU one CUDA graph that is replayed for every token.

A small model's step on a GPU is hundreds of kernels of a few microseconds each, and launching them from Python takes
longer than running them. A graph launches all of them at once. It needs memory that stays in place: a cache of the
final length, a buffer for the token. What reads the whole of such a cache reads its empty places too, masked.

Prompts are captured in a graph of their own as long as launching outlasts their arithmetic, so that the time to first
token is the model's and not the host's.

A large model's step is bound by memory, and what lies between its matrix products (norms, rotations, activations) is
compiled into fewer kernels on request. That takes a minute or two for every shape of request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch

from harness.engines.attention import ONE_QUERY

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

    from harness.engines.transformers import TransformersEngine

GRAPHS_ON = ("cuda",)  # kinds of devices
WARM_UP_STEPS = 3  # libraries allocate work space at first use, which a graph must not record
PROMPT_TOKENS = 2**12  # of all prompts of a batch; for more, arithmetic outlasts launching, and a graph keeps memory


_Reader = tuple[str, "Callable[[Tensor], Tensor]"]  # what the row says, and what reads ids [B, P]


@dataclass
class _Slot:
    """Memory of requests of one shape; `step` reads `token` [B, W] and answers with the next of each."""

    cache: Cache
    held: Tensor  # how many tokens the cache holds
    token: Tensor
    mask: Tensor | None  # [B, places], 0 where a row is padded at its start; None where no row is
    step: Callable[[], Tensor]
    prompts: dict[int, _Reader] = field(default_factory=dict)  # by length, with the state to name them by


class CheckedRequest:
    """A request that reads several tokens at once and may take some of them back: what guessing ahead needs.

    first: [B], what follows the prompt.
    """

    def __init__(self, slot: _Slot, first: Tensor) -> None:
        self._slot = slot
        self.first = first

    def likeliest(self, ids: Tensor) -> Tensor:
        """What follows each of the next tokens: ids [B, at most W] -> ids of the same shape, on the model's device."""
        count = ids.shape[1]
        self._slot.token[:, :count].copy_(ids)  # what stands behind them is read too, and taken back
        return self._slot.step()[:, :count].clone()

    def keep(self, count: int) -> None:
        """Of the tokens read last only the first `count` stay."""
        self._slot.held.sub_(self._slot.token.shape[1] - count)


class CapturedSteps:
    """Greedy decoding with a static cache; memory and graph are those of the latest shape of request.

    A model that cannot be captured is left to plain steps, and `state` says why.

    compiler: backend of torch.compile for the step, "inductor"; None runs the model as it is written. Requests with
        padding have many shapes and are never compiled.
    """

    def __init__(self, engine: TransformersEngine, compiler: str | None = None) -> None:
        self._engine = engine
        self._compiler = compiler
        self._shape: tuple[int, int, int] | None = None
        self._slot: _Slot | None = None
        self.state = self.name(engine.module.device, compiler)

    @staticmethod
    def name(device: torch.device, compiler: str | None) -> str:
        """For the row."""
        name = "CUDA graph" if device.type == "cuda" else "static cache"
        return name if compiler is None else f"compiled, {name}"

    def generate(self, prompt: Tensor, new_tokens: int, mask: Tensor | None = None) -> Iterator[Tensor] | None:
        """What the engine's plain steps yield: ids [B, P] -> one tensor of ids [B] per step.

        None where this model takes plain steps, and `state` says why.

        mask: [B, P], 0 where a row is padded at its start. Nothing is kept of such a request.
        """
        if mask is not None:
            self.forget()
            slot = self._made(len(prompt), prompt.shape[1] + new_tokens, padded=True)
            return None if slot is None else self._padded(slot, prompt, new_tokens, mask)
        slot = self._slot_for(len(prompt), prompt.shape[1] + new_tokens)
        return None if slot is None else self._answers(slot, prompt, new_tokens)

    def checked(self, prompt: Tensor, new_tokens: int, width: int) -> CheckedRequest | None:
        """A request whose passes read `width` tokens: ids [B, P]. None where this model takes plain steps.

        The last pass may read `width` - 1 tokens behind the answer, which must have places, too.
        """
        longest = prompt.shape[1] + new_tokens + width - 1
        most = self._engine.context_tokens
        if most is not None and longest > most:
            self.state = f"plain steps: guesses behind the answer would need {longest} of {most} positions"
            return None
        slot = self._slot_for(len(prompt), longest, width)
        return None if slot is None else CheckedRequest(slot, self._prompt_reader(slot, prompt)(prompt)[:, 0])

    def _answers(self, slot: _Slot, prompt: Tensor, new_tokens: int) -> Iterator[Tensor]:
        step = self._prompt_reader(slot, prompt)(prompt)
        yield step[:, 0]
        yield from self._steps(slot, step, new_tokens - 1)

    def _padded(self, slot: _Slot, prompt: Tensor, new_tokens: int, mask: Tensor) -> Iterator[Tensor]:
        slot.mask[:, : mask.shape[1]] = mask
        step = self._read(slot, prompt)
        yield step[:, 0]
        yield from self._steps(slot, step, new_tokens - 1)

    def generate_after_noise(self, rows: int, held: int, new_tokens: int) -> Iterator[Tensor] | None:
        """Steps of `rows` sequences whose cache holds `held` tokens of noise; None where they cannot be captured."""
        slot = self._slot_for(rows, held + new_tokens)
        if slot is None:
            return None
        self.state = self.name(self._engine.module.device, self._compiler)  # no prompt is read
        slot.cache.reset()
        self._engine.fill_with_noise(slot.cache, rows, held)
        slot.held.add_(held)
        return self._steps(slot, torch.zeros_like(slot.token), new_tokens)

    def forget(self) -> bool:
        """Give back the memory of the latest shape of request; whether there was any."""
        held = self._slot is not None
        self._shape = self._slot = None
        return held

    def _prompt_reader(self, slot: _Slot, prompt: Tensor) -> Callable[[Tensor], Tensor]:
        """What reads prompts [B, P] of this shape into the emptied cache and answers with the first token [B, 1]."""
        length = prompt.shape[1]

        def read(ids: Tensor) -> Tensor:
            return self._read(slot, ids)

        name = self.name(prompt.device, self._compiler)
        if prompt.device.type not in GRAPHS_ON or prompt.numel() > PROMPT_TOKENS:
            self.state = name
            return read
        if length not in slot.prompts:
            slot.prompts[length] = self._captured_prompt(name, read, prompt.clone())
        self.state, reader = slot.prompts[length]
        return reader

    def _read(self, slot: _Slot, prompt: Tensor) -> Tensor:
        """The first token [B, 1] after prompts [B, P], which the emptied cache then holds."""
        slot.cache.reset()
        answer = self._engine.advance(prompt, slot.cache, mask=slot.mask, held=slot.held).argmax(-1)
        slot.held.add_(prompt.shape[1])
        return answer

    @staticmethod
    def _captured_prompt(name: str, read: Callable[[Tensor], Tensor], held: Tensor) -> _Reader:
        """`read` as one CUDA graph that reads from `held`, or as it is where it cannot be captured."""
        try:
            replay = _capture(lambda: read(held), warm_up=1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"{name}, prompts plain ({str(error).splitlines()[0]})", read

        def reader(ids: Tensor) -> Tensor:
            held.copy_(ids)
            return replay().clone()

        return f"{name}, prompts too", reader

    @staticmethod
    def _steps(slot: _Slot, step: Tensor, count: int) -> Iterator[Tensor]:
        for _ in range(count):
            slot.token.copy_(step)
            step = slot.step().clone()
            yield step[:, 0]

    def _slot_for(self, rows: int, longest: int, width: int = 1) -> _Slot | None:
        if self._shape != (rows, longest, width):
            self.forget()  # the memory of the shape before goes first
            self._slot = self._made(rows, longest, padded=False, width=width)
            self._shape = rows, longest, width
        return self._slot

    def _made(self, rows: int, longest: int, padded: bool, width: int = 1) -> _Slot | None:
        module, compiler = self._engine.module, None if padded else self._compiler
        if self._engine.attention not in ("eager", "sdpa", ONE_QUERY):
            self.state = f"plain steps: {self._engine.attention} attention does not mask a static cache"
            return None
        if not module._can_compile_fullgraph:
            self.state = f"plain steps: transformers does not give {type(module).__name__} a static cache"
            return None
        made = static_cache(module, longest)
        if made is None:
            self.state = "plain steps: layers with windows of their own change shape"
            return None
        if self._refusal is not None:
            self.state = f"plain steps: no static cache ({self._refusal})"
            return None
        cache, held = made
        token = torch.zeros(rows, width, dtype=torch.long, device=module.device)
        mask = torch.ones(rows, longest, dtype=torch.long, device=module.device) if padded else None
        reader = module
        if compiler is not None:
            torch.compiler.reset()  # torch gives up on a function after a few shapes, and says nothing
            # at batch 1 this makes matrix products loops of ours, which read faster than the library's
            options = {"coordinate_descent_tuning": True} if compiler == "inductor" else None
            reader = torch.compile(module, backend=compiler, dynamic=False, options=options)

        def step() -> Tensor:
            answer = self._engine.advance(token, cache, keep=width, mask=mask, held=held, reader=reader).argmax(-1)
            held.add_(width)
            return answer

        self.state = self.name(module.device, compiler)
        if module.device.type not in GRAPHS_ON:
            return _Slot(cache, held, token, mask, step)
        try:
            return _Slot(cache, held, token, mask, _capture(step, min(WARM_UP_STEPS, (longest - 1) // width)))
        except torch.OutOfMemoryError:
            if not padded:
                raise  # plain steps would need as much
            self.state = "plain steps: a cache for the longest answers of all rows does not fit"
            return None  # plain ones leave out rows that have ended
        except RuntimeError as error:
            self.state = f"plain steps: no CUDA graph ({str(error).splitlines()[0]})"
            return None

    @cached_property
    def _refusal(self) -> str | None:
        """Why this model cannot read a cache with empty places; None where it can.

        A model that adds to the mask of attention itself (ALiBi) makes it as long as the text. One token would not
        show that: a mask of one place fits any number.
        """
        cache, held = static_cache(self._engine.module, 4)
        try:
            self._engine.advance(torch.zeros(1, 2, dtype=torch.long, device=held.device), cache, held=held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return None


def static_cache(module: PreTrainedModel, longest: int) -> tuple[Cache, Tensor] | None:
    """A cache of fixed shape, and the number of tokens it holds; None where layers have windows of their own.

    Whoever reads tokens into it counts them. transformers' own layers count each for itself, by a kernel a layer.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    held = torch.zeros((), dtype=torch.long, device=module.device)

    class Uncounted(StaticLayer):
        """Writes behind the `held` tokens."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            places = torch.arange(key_states.shape[-2], device=self.device) + self.cumulative_length
            self.keys.index_copy_(2, places, key_states)
            self.values.index_copy_(2, places, value_states)
            return self.keys, self.values

    cache = StaticCache(config=module.config, max_cache_len=longest)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        return None
    cache.layers = [Uncounted(longest) for _ in cache.layers]
    for layer in cache.layers:
        layer.cumulative_length = held
    return cache, held


@cache
def _side_stream(_device: int) -> torch.cuda.Stream:
    """The stream of all warm-ups and captures: matrix products have 32 MiB of work space on every stream they meet."""
    return torch.cuda.Stream()


def _capture(step: Callable[[], Tensor], warm_up: int) -> Callable[[], Tensor]:
    """The step as one CUDA graph: what it returns writes its answer into the same memory every time."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        answer = step()

    def replay() -> Tensor:
        graph.replay()
        return answer

    return replay
