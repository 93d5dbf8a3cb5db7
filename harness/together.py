"""Processes that train one student together: the first says which runs it trains, the others wait for its word.

Whether a run is trained the first process finds out as it goes: a record or a compressed model may be there already,
the dense baseline may fail, another sweep may be at it. Who began alone would wait for the other in a process group,
for ever. What is said goes through the store that the launcher keeps for its processes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

from harness.environment import process_rank, training_processes
from harness.errors import ConfigError, RunError

TRAIN, NOTHING = "train", "nothing to train"
CONNECT_SECONDS = 60
MEET_SECONDS = 1800  # the slowest to load its model, and then the slowest in a step
POLL_SECONDS = 0.2
_turns: Counter[str] = Counter()  # how often each run ended in this process: every launched one counts alike


@contextmanager
def turn(run: str) -> Iterator[None]:
    """A run, from its start to its end, in each of the processes; `run` names it, the same in all of them.

    What the first process has not said to train by the end, however that comes about, is not trained. Raises
    ConfigError when there is no launcher that the processes could talk through.
    """
    store = _store()
    try:
        yield
    finally:
        if process_rank() == 0:
            with suppress(RuntimeError):  # the launcher is gone, and with it all who wait
                store.compare_set(_key(run), "", NOTHING)
        _turns[run] += 1


def call_others(run: str) -> str:
    """Let the others begin, because the first process is about to train this run; returns what `meet` wants."""
    _store().set(_key(run), TRAIN)
    return _key(run)


def await_call(run: str) -> str:
    """What `call_others` returns in the first process, once it does; empty when the run is not trained.

    Raises RunError when the launcher has ended.
    """
    try:
        while not _store().check([_key(run)]):
            time.sleep(POLL_SECONDS)  # no blocking wait: Ctrl-C is answered, and no limit of time is needed
        return _key(run) if _store().get(_key(run)).decode() == TRAIN else ""
    except RuntimeError as error:
        raise RunError(f"the launcher of these {training_processes()} processes has ended") from error


def meet(called: str, device: str) -> None:
    """Make the process group of one training; each has its own, because addresses of an earlier one are void."""
    from torch.distributed import PrefixStore, init_process_group

    patience = timedelta(seconds=MEET_SECONDS)
    store = PrefixStore(called, _store())
    store.set_timeout(patience)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    init_process_group(backend, store=store, rank=process_rank(), world_size=training_processes(), timeout=patience)


def _key(run: str) -> str:
    return f"{run}/{_turns[run]}"


@cache
def _store() -> Any:
    """The launcher's store, under a prefix of this start: neither process groups nor earlier starts write there."""
    try:
        if os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True":
            raise KeyError("TORCHELASTIC_USE_AGENT_STORE")
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        from torch.distributed import PrefixStore, TCPStore

        patience = timedelta(seconds=CONNECT_SECONDS)
        store = TCPStore(*place, is_master=False, timeout=patience, wait_for_workers=False)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE={training_processes()}: processes that train together need a launcher that they can talk "
            "through: accelerate launch --num_processes 2 -m harness …, or torchrun --nproc_per_node 2 -m harness …; "
            "for one process, unset WORLD_SIZE and RANK"
        ) from error
    start = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))
    return PrefixStore("/".join(("harness", *start)), store)
