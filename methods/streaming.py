"""What a GPU need not hold: hidden states that wait in host memory, and decoder blocks that wait for their turn.

While a chunk is computed on, the next one arrives and the one before leaves, on a stream of their own, through two
buffers in each direction: however far the program runs ahead of the device, no more than those are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BUFFERS = 2  # one is read or written by a copy while the other one is computed on


class ChunkStream:
    """Chunks of hidden states [B, T, H] on their way to `device` and back to where they waited.

    Where chunks already are on the device, or the device is not a GPU, nothing is copied beside the work.
    """

    def __init__(self, chunks: Sequence[Tensor], device: torch.device) -> None:
        self.chunks, self.device = chunks, device
        self.outputs: list[Tensor] = []
        self.copies = None
        if device.type == "cuda" and any(chunk.device.type == "cpu" for chunk in chunks):
            self.copies = torch.cuda.Stream(device)
            largest = max(chunk.numel() for chunk in chunks)
            self.arriving = [_Buffer(largest, chunks[0].dtype, device) for _ in range(BUFFERS)]
            self.leaving: list[_Buffer] = []  # made when an output shows its type

    def __iter__(self) -> Iterator[Tensor]:
        """Each chunk on the device; it is overwritten when the one after the next is asked for."""
        if self.copies is None:
            for chunk in self.chunks:
                yield chunk.to(self.device)
            return
        self.copies.wait_stream(torch.cuda.current_stream(self.device))  # the buffers are new there
        for index in range(min(BUFFERS, len(self.chunks))):
            self._fetch(index)
        for index, chunk in enumerate(self.chunks):
            buffer = self.arriving[index % BUFFERS]
            torch.cuda.current_stream(self.device).wait_event(buffer.copied)
            yield buffer.view(chunk.shape)
            buffer.used.record(torch.cuda.current_stream(self.device))
            if index + BUFFERS < len(self.chunks):
                self._fetch(index + BUFFERS)

    def _fetch(self, index: int) -> None:
        chunk, buffer = self.chunks[index], self.arriving[index % BUFFERS]
        with torch.cuda.stream(self.copies):
            if index >= BUFFERS:
                self.copies.wait_event(buffer.used)
            buffer.view(chunk.shape).copy_(chunk, non_blocking=True)
            buffer.copied.record(self.copies)

    def put(self, output: Tensor) -> None:
        """Take the next chunk of outputs back to where its input waited."""
        home = self.chunks[len(self.outputs)].device
        if self.copies is None or home == output.device:
            self.outputs.append(output.to(home))
            return
        if not self.leaving:
            largest = max(chunk.numel() for chunk in self.chunks)
            self.leaving = [_Buffer(largest, output.dtype, self.device) for _ in range(BUFFERS)]
        index = len(self.outputs)
        buffer = self.leaving[index % BUFFERS]
        current = torch.cuda.current_stream(self.device)
        if index >= BUFFERS:
            current.wait_event(buffer.copied)
        staged = buffer.view(output.shape).copy_(output)
        buffer.used.record(current)
        waiting = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(buffer.used)
            waiting.copy_(staged, non_blocking=True)
            buffer.copied.record(self.copies)
        self.outputs.append(waiting)

    def finish(self) -> list[Tensor]:
        """All outputs, arrived."""
        if self.copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copies)  # before the buffers are given to others
            self.copies.synchronize()
        return self.outputs


class _Buffer:
    """Room for one chunk on the device, with the events that say when it may be read and overwritten."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self.copied, self.used = torch.cuda.Event(), torch.cuda.Event()

    def view(self, shape: torch.Size) -> Tensor:
        return self.flat[: shape.numel()].view(shape)


def to_wait(hidden: Tensor, place: torch.device) -> Tensor:
    """`hidden` where it will wait; from a GPU to host memory into pages that copies reach without the processor."""
    if place.type == "cpu" and hidden.device.type == "cuda":
        return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True).copy_(hidden)
    return hidden.to(place)


def pin(module: nn.Module) -> None:
    """Move parameters and buffers in host memory to pages that copies reach without the processor."""
    module._apply(lambda tensor: tensor.pin_memory())


def unpin(module: nn.Module) -> None:
    """The reverse of `pin`: such pages are few, and come in powers of two."""
    module._apply(lambda tensor: tensor.clone())


@contextmanager
def lent(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Parameters and buffers are copies on `device` while inside; afterwards the originals, so do not change them."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in kept:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def lent_in_turn(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Each of the modules is on `device` while its forward runs, and only then. Their calls must not nest."""
    present: list = []

    def arrive(module: nn.Module, _args: tuple) -> None:
        present.append(lent((*module.parameters(), *module.buffers()), device))
        present[-1].__enter__()

    def leave(_module: nn.Module, _args: tuple, _output: object) -> None:
        present.pop().__exit__(None, None, None)

    hooks = []
    try:
        for module in modules:
            hooks.append(module.register_forward_pre_hook(arrive, prepend=True))
            hooks.append(module.register_forward_hook(leave))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while present:  # a forward raised
            leave(None, (), None)


def tensors_outside(module: nn.Module, inner: nn.Module) -> list[Tensor]:
    """Parameters and buffers of `module` that are not those of `inner`, each once."""
    own = {id(tensor) for tensor in (*inner.parameters(), *inner.buffers())}
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in own]
