"""The meeting of a run's ranks in a store at the first rank's address, where each records its
process.

torch's own rendezvous waits in C++ for all ranks, up to an hour, without a message, and does not
react to signals. Here the main thread only polls whether a rank is there yet, and what may block
runs in a thread beside it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.errors import EXIT_HANG, RecipeError, UserError
from trainer.launch.environment import RankInfo
from trainer.launch.processes import Process
from trainer.launch.stop_request import Interrupted

POLL_S = 0.1
FIRST_WORD_S = 10.0  # until this rank first says for whom it waits
WORD_EVERY_S = 60.0  # and between its later messages
NAMED_RANKS = 8


class NeverCame(UserError):
    """The error that a rank did not come."""

    exit_code = EXIT_HANG


def meet(info: RankInfo, timeout: timedelta) -> tuple[TCPStore, list[Process]]:
    """Return the store of the run, and the process of each rank.

    NeverCame if one does not come within `timeout`; RecipeError for a port that is taken. When a
    signal interrupts, the error says for whom this rank waited.
    """
    waiting = _Waiting(info, timeout)
    store = _connected(info, timeout, waiting)
    store.set(_key(info.rank), json.dumps(asdict(Process.own())))
    keys = [_key(rank) for rank in range(info.world_size)]
    while not store.check(keys):
        waiting.go_on(lambda: _named([rank for rank, key in enumerate(keys) if not store.check([key])], info.world_size))
    return store, [Process(**json.loads(text)) for text in store.multi_get(keys)]


class _Waiting:
    """A rank's wait for others, with its limit and its messages."""

    def __init__(self, info: RankInfo, timeout: timedelta) -> None:
        self._seat = info
        self._began = time.monotonic()
        self._limit_s = timeout.total_seconds()
        self._next_word_s = FIRST_WORD_S

    def go_on(self, for_whom: Callable[[], str]) -> None:
        """Wait a little more. Now and then the first rank of each node says for whom."""
        waited_s, rank = time.monotonic() - self._began, self._seat.rank
        if waited_s > self._limit_s:
            raise NeverCame(f"rank {rank}: {for_whom()} did not come within {waited_s:.0f} s; start the run again")
        if waited_s > self._next_word_s and self._seat.local_rank == 0:
            sys.stderr.write(f"triaxis: rank {rank} waits for {for_whom()} ({waited_s:.0f} s)\n")
            sys.stderr.flush()
            self._next_word_s = waited_s + WORD_EVERY_S
        try:
            time.sleep(POLL_S)
        except Interrupted as signal:
            raise Interrupted(signal.name, f"while rank {rank} waited for {for_whom()}") from None


def _connected(info: RankInfo, timeout: timedelta, waiting: _Waiting) -> TCPStore:
    """Return the store, which the first rank holds, or under torchrun its agent."""
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    answers: list[TCPStore | Exception] = []

    def connect() -> None:
        try:
            answers.append(
                TCPStore(
                    info.master_addr,
                    info.master_port,
                    info.world_size,
                    is_master=info.rank == 0 and not has_agent,
                    timeout=timeout,
                    wait_for_workers=False,
                    multi_tenant=True,  # a process may hold several runs in turn, as in tests
                )
            )
        except Exception as error:
            answers.append(error)

    threading.Thread(target=connect, name="connecting to the store", daemon=True).start()
    while not answers:
        waiting.go_on(lambda: f"the store of rank 0 at {info.master_addr}:{info.master_port}")
    answer = answers[0]
    if isinstance(answer, dist.DistNetworkError) and "EADDRINUSE" in str(answer):
        raise RecipeError(
            f"port {info.master_port} of this machine, on which the ranks would meet ({info.how}), is taken by another "
            "process: set MASTER_PORT to a free one, the same for all ranks"
        ) from answer
    if isinstance(answer, Exception):
        raise answer
    return answer


def _key(rank: int) -> str:
    return f"process of rank {rank}"


def _named(ranks: list[int], world_size: int) -> str:
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    plural = "s" if len(ranks) > 1 else ""
    return f"rank{plural} {', '.join(map(str, ranks[:NAMED_RANKS]))}{more} of {world_size}"
