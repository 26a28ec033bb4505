"""Run a plain function on several gloo processes, as an ordinary test.

    def body(mesh, ...): ...      # at module level; raises to fail, returns something picklable
    results = spawn(body, Layout(dp=2), ...)

Processes come from a fork server that has imported torch and DeepSpeed once, so a spawn costs a
fraction of a second. Every rank's failure is in one report, a rank that does not come back in time
shows its stack, and no process outlives the call.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tools.campaign.ranks  # noqa: F401 - it names less for the same fork server to import, which must not come last
from parallel.topology import Layout

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


class RanksFailed(AssertionError):
    """The reports of all failing ranks."""


def spawn(body: Callable[..., Any], layout: Layout, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run body(mesh, *args) on every rank of `layout`, and return the results in the order of the
    ranks."""
    with tempfile.TemporaryDirectory(prefix="spawn-") as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(layout.world_size)]
        ranks = [
            _context.Process(target=_rank_main, args=(body, layout, rank, folder, pipes[rank][1], args))
            for rank in range(layout.world_size)
        ]
        orderly = False
        try:
            for process, (_, write_end) in zip(ranks, pipes, strict=True):
                process.start()
                write_end.close()
            outcomes = _collect([read_end for read_end, _ in pipes], timeout_s)
            orderly = all(outcome is not None and outcome[0] for outcome in outcomes)
            late = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
            for rank in late:
                os.kill(ranks[rank].pid, signal.SIGUSR1)  # writes its stack
            if late:
                time.sleep(0.5)
        finally:
            for process in ranks:
                process.join(timeout=10.0 if orderly else 0.0)
                if process.is_alive():
                    process.kill()
                process.join()
        _raise_failures(outcomes, Path(folder))
        return [outcome[1] for outcome in outcomes if outcome is not None]


def _collect(pipes: list[Connection], timeout_s: float) -> list[tuple[bool, Any] | None]:
    """Return (succeeded, result or traceback) per rank; None for those that were still running.

    When one rank fails the others get 5 s: enough to report their own failure, too short to wait
    out a collective's timeout.
    """
    outcomes: list[tuple[bool, Any] | None] = [None] * len(pipes)
    deadline = time.monotonic() + timeout_s
    waiting = set(range(len(pipes)))
    while waiting and time.monotonic() < deadline:
        for rank in list(waiting):
            if not pipes[rank].poll(0.005):
                continue
            waiting.discard(rank)
            try:
                outcomes[rank] = pipes[rank].recv()
            except EOFError:
                outcomes[rank] = (False, "the process died without a word\n")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + 5.0)
    return outcomes


def _raise_failures(outcomes: list[tuple[bool, Any] | None], folder: Path) -> None:
    report = []
    for rank, outcome in enumerate(outcomes):
        if outcome is None:
            stack = (folder / f"stack-{rank}").read_text() or "no stack (not even a signal got through)\n"
            report.append(f"--- rank {rank}: did not come back; it was at\n{stack}")
        elif not outcome[0]:
            report.append(f"--- rank {rank}\n{outcome[1]}")
    if report:
        raise RanksFailed("\n".join(["", *report]))


def _rank_main(body: Callable[..., Any], layout: Layout, rank: int, folder: str, pipe: Connection, args: Any) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the fork server
    stack = open(Path(folder) / f"stack-{rank}", "w")  # noqa: SIM115 - faulthandler keeps it for the process's life
    faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
    import torch
    import torch.distributed as dist

    from parallel.mesh import Mesh

    torch.set_num_threads(1)
    random.seed(rank)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": layout.world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        store = dist.FileStore(f"{folder}/rendezvous", layout.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world_size)
        result = body(Mesh.build(layout), *args)
        dist.barrier()
        pipe.send((True, result))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
