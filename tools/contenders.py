"""Contenders are processes of their own, which take a step when they are told to.

DeepSpeed keeps state per process, and only so can the memory of each be told. One contender works
at a time: the others wait for a message on their pipes. A function that makes a contender returns
its loop, which begins each step at `Turns.begin` and ends it at `Turns.end`: a loop that belongs to
another library is so timed from inside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peak_memory import PeakMemory
from plain_loop import Numbers

from trainer.errors import UserError

HERE = Path(__file__).parent
# What contenders import, so that their memory is what they hold, not what they are made of.
IMPORTS = [
    "trainer.engine.engine",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "hugging_face_peer",
]
PATIENCE_S = 3.0  # for a process to leave when its pipe has closed
# A pool of torch.compile's compilers would go on beside the others' steps.
NO_POOL = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@dataclass(frozen=True)
class Answer:
    """The message of a process after a step; `failure` is its traceback."""

    numbers: Numbers = (0.0, 0.0)
    step_s: float = 0.0
    peak_bytes: int = 0
    failure: str | None = None


class Turns:
    """The end of the pipe in a contender's process: waits for a turn, and answers."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.memory = PeakMemory(device)
        self.began_s = 0.0
        self.is_built = False

    def begin(self) -> None:
        """Wait for the message to take a step, and for the other ranks. EOFError at the end."""
        if not self.is_built:
            self.is_built = True
            self.pipe.send(Answer())
        if not self.pipe.recv():
            raise EOFError
        self.memory.begin()
        dist.barrier()
        self.began_s = time.perf_counter()

    def seconds(self) -> float:
        """Return the time since `begin`, at the end of all that the device was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.began_s

    def end(self, numbers: Numbers, seconds: float) -> None:
        self.pipe.send(Answer(numbers, seconds, self.memory.bytes()))


Loop = Callable[[Turns], None]


def step_by_step(step: Callable[[], Numbers]) -> Loop:
    """Return a loop that calls a function for each turn."""

    def loop(turns: Turns) -> None:
        while True:
            turns.begin()
            numbers = step()
            turns.end(numbers, turns.seconds())

    return loop


@dataclass(frozen=True)
class Place:
    """The machine as a contender sees it."""

    ranks: int
    threads: int  # of each rank
    device: torch.device


def serve(rank: int, place: Place, make: Callable[[Path], Loop], folder: Path, pipe: Connection) -> None:
    """Run a rank: join, build, then take one step and send one answer per message, until the pipe
    closes."""
    torch.set_num_threads(place.threads)
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # DeepSpeed prints what it builds
    # torch's FSDP2 and DeepSpeed call collectives that torch has renamed.
    warnings.simplefilter("ignore", FutureWarning)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": place.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in variables.items()} | NO_POOL)
    try:
        store = dist.FileStore(str(folder / "rendezvous"), place.ranks)
        backend = "nccl" if place.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=place.ranks)
        turns = Turns(pipe, place.device)
        make(folder)(turns)
    except EOFError:
        pass
    except BaseException:
        pipe.send(Answer(failure=traceback.format_exc()))


class ContenderFailed(UserError):
    """The error that a contender could not be built or stepped."""


class Contender(Protocol):
    """A contender, seen from the process that times it."""

    def step(self) -> Answer:
        """Take one step. ContenderFailed if it cannot."""

    def close(self) -> None: ...


class Ranks:
    """The processes of one contender in this environment."""

    def __init__(self, name: str, make: Callable[[Path], Loop], place: Place, folder: Path) -> None:
        """Start them; it returns once all are built."""
        self.name, self.folder = name, folder
        folder.mkdir()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self.pipes, self.processes = [], []
        for rank in range(place.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, place, make, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        try:
            self._answers()
        except ContenderFailed:
            self.close()
            raise

    def _answers(self) -> list[Answer]:
        collected = []
        for rank, pipe in enumerate(self.pipes):
            try:
                collected.append(pipe.recv())
            except EOFError:
                collected.append(Answer(failure=f"rank {rank} died without a word"))
            if collected[-1].failure:
                raise ContenderFailed(f"{self.name}, rank {rank}:", *str(collected[-1].failure).splitlines())
        return collected

    def step(self) -> Answer:
        """Take one step on all ranks, and return the first one's numbers, and the seconds and bytes
        of the rank that takes most."""
        for pipe in self.pipes:
            pipe.send(True)
        answers = self._answers()
        peak = max(answer.peak_bytes for answer in answers)
        return Answer(answers[0].numbers, max(answer.step_s for answer in answers), peak)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(PATIENCE_S)
            process.kill()
            process.join()


class Elsewhere:
    """A contender in an environment of its own: a program that is given one JSON object, and then
    answers each line with the JSON of a step."""

    def __init__(self, name: str, python: Path, program: str, about: Mapping[str, Any], folder: Path) -> None:
        """Start it; it returns once it is built. It says what it likes to a file of `folder`."""
        self.name, self.said = name, folder / "said"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | NO_POOL
        command = [str(python), str(HERE / program)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self.said.open("w", encoding="utf-8") as said:
            self.process = subprocess.Popen(command, env=environment, stderr=said, **pipes)
        try:
            self._ask(about)
        except ContenderFailed:
            self.close()
            raise

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ContenderFailed(f"{self.name}:", *self.said.read_text(encoding="utf-8").splitlines()[-12:])
        return json.loads(line)

    def step(self) -> Answer:
        answer = self._ask({})
        return Answer((answer["loss"], answer["norm"]), answer["step_s"], answer["peak_bytes"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Opener = Callable[[Path], Contender]


@contextlib.contextmanager
def opened(openers: Mapping[str, Opener], disk: Path | None = None) -> Iterator[dict[str, Contender]]:
    """Open all contenders, built one after another, each with a folder of its own on `disk`
    (default: where temporary files are)."""
    contenders: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory(prefix="triaxis-bench-", dir=disk) as folder:
        try:
            for index, (name, opener) in enumerate(openers.items()):
                contenders[name] = opener(Path(folder) / str(index))
            yield contenders
        finally:
            for contender in contenders.values():
                contender.close()


def first_steps(contenders: Mapping[str, Contender], count: int) -> dict[str, Sequence[Numbers]]:
    """Return the losses and norms of each contender's first steps, which also warm it up."""
    return {name: [contender.step().numbers for _ in range(count)] for name, contender in contenders.items()}
