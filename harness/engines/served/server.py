"""What answers in the other interpreter, whatever engine is behind it. Imports nothing of this project.

    python SCRIPT DESCRIPTOR          the socket to answer on; standard input is a pipe that closes with its owner

The first message starts the engine; then come questions, one at a time, until the connection closes:

    {"do": "start", ...settings}      -> {"facts": {...}}
    {"do": "score"}, tokens [B, T]    -> losses [B, T-1], nats
    {"do": "generate", "new_tokens": n}, prompt [B, P], lengths [B]
                                      -> n times {"step": k}, ids [B]; then {"done": true}, stamps [B, 1 + n]
                                         {"do": "stop"} in between ends it early
    {"do": "requests"}, prompts [R, P], new_tokens [R], arrivals [R]
                                      -> {"done": true, "preemptions": m}, stamps [R, 1 + max(new_tokens)], NaN behind

    anything that fails               -> {"error": reason}

stamps: seconds since the arrival of each request, which is column 0, at which each of its tokens was there.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from frames import receive, send

Event = tuple[int, int, float]  # request, token, seconds since the request's arrival


class Backend(Protocol):
    """An engine: facts about it, and what it does."""

    facts: dict[str, Any]
    preemptions: int  # of the requests that were run last

    def score(self, rows: Sequence[list[int]]) -> list[list[float]]:
        """Negative log-likelihood in nats of each token but the first, of every row."""

    def run(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int], arrivals: Sequence[float]
    ) -> Iterator[list[Event]]:
        """Answer greedily, every request handed in at its arrival (seconds from now), with exactly so many tokens.

        Yields what every step of the engine brought; closing the iterator gives up what is not finished.
        """


def serve(start: Callable[[dict[str, Any]], Backend]) -> None:
    """Entry of a script: answer until the other side is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = socket.socket(fileno=int(sys.argv[1]))
    backend: Backend | None = None
    while True:
        try:
            message, arrays = receive(connection)
        except (EOFError, OSError):
            end_group()
        try:
            if message["do"] == "stop":  # crossed the last answer on its way
                continue
            if message["do"] == "start":
                backend = start(message)
                send(connection, {"facts": backend.facts})
            else:
                ANSWERS[message["do"]](connection, backend, message, arrays)
        except (EOFError, ConnectionError):
            end_group()
        except Exception as error:  # whatever an engine raises is the other side's failed run
            traceback.print_exc()
            send(connection, {"error": reason_of(error)})


def reason_of(error: BaseException) -> str:
    """An exception in one line; programs that explain themselves over many lines do so in the first ones."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:600]}"


def _score(connection: socket.socket, backend: Backend, message: dict, arrays: dict[str, np.ndarray]) -> None:
    losses = backend.score(arrays["tokens"].tolist())
    send(connection, {"done": True}, losses=np.array(losses, np.float32))


def _generate(connection: socket.socket, backend: Backend, message: dict, arrays: dict[str, np.ndarray]) -> None:
    prompts = [row[-length:].tolist() for row, length in zip(arrays["prompt"], arrays["lengths"], strict=True)]
    count, rows = message["new_tokens"], len(prompts)
    stamps = np.full((rows, 1 + count), np.nan)
    stamps[:, 0] = 0
    tokens: list[list[int]] = [[] for _ in prompts]
    sent, stopped = 0, False
    events = backend.run(prompts, [count] * rows, [0.0] * rows)
    try:
        for step in events:
            for row, token, seconds in step:
                tokens[row].append(token)
                stamps[row, len(tokens[row])] = seconds
            while sent < min(map(len, tokens)):  # a step is there when every row has it
                send(connection, {"step": sent}, ids=np.array([row[sent] for row in tokens], np.int64))
                sent += 1
            if select.select([connection], [], [], 0)[0]:
                receive(connection)  # nothing but a stop is sent before the answer is done
                stopped = True
                break
    finally:
        events.close()
    if sent < count and not stopped:
        raise RuntimeError(f"the engine gave {sent} of {count} tokens")
    send(connection, {"done": True}, stamps=stamps)


def _requests(connection: socket.socket, backend: Backend, message: dict, arrays: dict[str, np.ndarray]) -> None:
    counts = arrays["new_tokens"].tolist()
    stamps = np.full((len(counts), 1 + max(counts)), np.nan)
    stamps[:, 0] = 0
    had = [0] * len(counts)
    for step in backend.run(arrays["prompts"].tolist(), counts, arrays["arrivals"].tolist()):
        for row, _token, seconds in step:
            had[row] += 1
            stamps[row, had[row]] = seconds
    if had != counts:
        raise RuntimeError(f"{sum(a != b for a, b in zip(had, counts, strict=True))} requests were not finished")
    send(connection, {"done": True, "preemptions": backend.preemptions}, stamps=stamps)


ANSWERS = {"score": _score, "generate": _generate, "requests": _requests}


def _end_with_parent() -> None:
    """Standard input closes when the process that asked is gone: do not go on computing for nobody."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter ends
        pass
    end_group()


def end_group() -> None:
    """End this process and all that it started; it leads a group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)
