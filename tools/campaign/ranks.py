"""Real runs of the trainer by the thousand: ranks forked from one process that has imported
everything.

There are as many as a layout has, each with a launcher's environment of its own. A run that takes
six seconds to start takes a fraction of one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trainer.launch.ports import held_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tools.campaign.preload"])


@dataclass(frozen=True)
class Ended:
    """The end of a run's ranks: exit codes (negative: the signal), their output, and the time it
    took."""

    codes: tuple[int, ...]
    said: str
    wall_s: float


def train(arguments: Sequence[str]) -> int:
    """Run `python -m trainer train …` on this rank, without what it measures and draws for people,
    and with an empty report.

    These take 1.8 of the 2.3 s of a run of six steps.
    """
    import trainer.run.session
    import trainer.track.report
    from trainer.cli import main

    trainer.track.report._render = lambda *history: ""
    trainer.run.session.device_peak = lambda device, dtype: (1e12, "not measured")
    return main(["train", *arguments])


def run_ranks(
    body: Callable[..., int],
    *arguments: Any,
    world_size: int,
    log: Path,
    timeout_s: float = 120.0,
    around: Callable[[list[int]], None] | None = None,
) -> Ended:
    """Run body(*arguments) on that many ranks. `around`: called with the started ranks' process
    ids."""
    started = time.monotonic()
    with held_port() as port:
        ranks = start_ranks(body, world_size, port, log, *arguments)
        try:
            if around is not None:
                around([int(rank.pid or 0) for rank in ranks])
            deadline = started + timeout_s
            for rank in ranks:
                rank.join(max(0.0, deadline - time.monotonic()))
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                rank.join()
    said = "".join(path.read_text(errors="replace") for path in sorted(log.glob("rank-*.txt")))
    return Ended(tuple(int(rank.exitcode or 0) for rank in ranks), said, time.monotonic() - started)


def start_ranks(body: Callable[..., int], world_size: int, port: int, log: Path, *arguments: Any) -> list[BaseProcess]:
    log.mkdir(parents=True, exist_ok=True)
    ranks = [
        _context.Process(target=_rank, args=(body, rank, world_size, port, str(log / f"rank-{rank}.txt"), arguments))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return list(ranks)


def _rank(body: Callable[..., int], rank: int, world_size: int, port: int, output: str, arguments: Sequence[Any]) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the fork server
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    code = body(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
