"""The ranks of a layout as processes of this machine: started together, watched, and gone when the
call returns.

They come from a fork server, which on CPUs has imported torch and DeepSpeed once for all of them (5
s each otherwise). Only the job's folder and the rank are passed to them; everything else is in
files.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from trainer.errors import EXIT_HANG, EXIT_INTERNAL, UserError
from trainer.verify.job import Failure

# DeepSpeed and torch's optimizers import the last two when they are first used, 5 s together.
PRELOADED = ["trainer.verify.rank", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
LAST_WORDS_S = 2.0  # the time for other ranks to report why they failed: the first to fail is named
STACK_S = 0.5  # the time for a rank to write its stack
PR_SET_PDEATHSIG = 1
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class LayoutFailed(UserError):
    """The error that a layout could not be trained."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def run_ranks(name: str, folder: Path, world_size: int, *, gpus: bool, timeout_s: float) -> None:
    """Run the job in `folder` on `world_size` ranks. LayoutFailed names layout and rank if one
    fails, or none comes back."""
    context = multiprocessing.get_context("forkserver")
    # CUDA may not be touched before a fork.
    context.set_forkserver_preload([] if gpus else PRELOADED)
    ranks = [context.Process(target=_rank_main, args=(str(folder), rank), daemon=True) for rank in range(world_size)]
    try:
        with nullcontext() if gpus else _without_gpus():
            for process in ranks:
                process.start()
        _watch(name, folder, ranks, timeout_s)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


@contextmanager
def _without_gpus() -> Iterator[None]:
    """Hide all GPUs from processes that start inside the context."""
    before = os.environ.get(VISIBLE_GPUS)
    os.environ[VISIBLE_GPUS] = ""
    try:
        yield
    finally:
        del os.environ[VISIBLE_GPUS]
        if before is not None:
            os.environ[VISIBLE_GPUS] = before


def _watch(name: str, folder: Path, ranks: Sequence[BaseProcess], timeout_s: float) -> None:
    """Wait until all ranks came back well."""
    deadline = time.monotonic() + timeout_s
    running = list(ranks)
    while running:
        wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        running = [process for process in ranks if process.exitcode is None]
        if any(process.exitcode for process in ranks):
            wait_until = time.monotonic() + LAST_WORDS_S
            for process in running:
                process.join(max(0.0, wait_until - time.monotonic()))
            raise _failure(name, folder, ranks)
        if running and time.monotonic() >= deadline:
            late = "; ".join(f"rank {rank} {place}" for rank, place in _places(folder, ranks).items())
            raise LayoutFailed(f"layout {name}: not done after {timeout_s:g} s (--timeout): {late}", EXIT_HANG)


def _places(folder: Path, ranks: Sequence[BaseProcess]) -> dict[int, str]:
    """Return where in our code each rank is that still runs."""
    late = {rank: process.pid for rank, process in enumerate(ranks) if process.exitcode is None}
    for pid in late.values():
        if pid is not None:
            os.kill(pid, signal.SIGUSR1)  # it writes its stack
    time.sleep(STACK_S)
    root = Path(__file__).parents[2]
    places = {}
    for rank in late:
        path = folder / f"stack-{rank}"
        frames = re.findall(r'File "(.+)", line (\d+) in (\w+)', path.read_text()) if path.is_file() else []
        ours = [f"at {file}:{line} in {name}" for file, line, name in frames if Path(file).is_relative_to(root)]
        places[rank] = next(iter(ours), "nowhere in our code")
    return places


def _failure(name: str, folder: Path, ranks: Sequence[BaseProcess]) -> LayoutFailed:
    """Return the report of the first rank to fail. One that died without a report was before those
    that missed it."""
    told = {}
    for rank, process in enumerate(ranks):
        path = folder / f"failure-{rank}.json"
        if path.is_file():
            told[rank] = Failure.read(path)
        elif process.exitcode:
            how = f"killed by {signal.Signals(-process.exitcode).name}" if process.exitcode < 0 else "died"
            return LayoutFailed(f"layout {name}, rank {rank}: {how} without a word", EXIT_INTERNAL)
    rank, first = min(told.items(), key=lambda item: item[1].time)
    return LayoutFailed(f"layout {name}, rank {rank}: {first.reason}", first.exit_code)


def _rank_main(folder: str, rank: int) -> None:
    path = Path(folder)
    _die_with_parent()
    log = os.open(path / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stack = (path / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    try:
        from trainer.verify.rank import run

        run(path, rank)
    except BaseException as error:
        _explain(error).write(path / f"failure-{rank}.json")
        os._exit(1)  # an orderly end would wait for the others


def _explain(error: BaseException) -> Failure:
    if isinstance(error, UserError):
        return Failure(time.time(), error.exit_code, "; ".join(error.lines))
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = str(error).partition("\n")[0]
    return Failure(time.time(), EXIT_INTERNAL, f"{type(error).__name__}: {said} ({place.filename}:{place.lineno})")


def _die_with_parent() -> None:
    """Have the system kill this process with its parent: if the command is killed, the fork server
    ends and the ranks with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
