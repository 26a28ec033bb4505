"""The processes that tokenize: plain subprocesses that speak JSON lines.

They import neither torch nor the program that started them, nothing is pickled, and they end when
their input does, so that they never outlive the process that started them. Their side is
`worker.py`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trainer
from trainer.data.readers import Shard
from trainer.errors import DataError, RecipeError, UserError

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # one core per worker
    "USE_TORCH": "0",  # for datasets, which otherwise imports torch to stream a file
}
KINDS = {kind.exit_code: kind for kind in (UserError, DataError, RecipeError)}


def tokenize_shards(
    shards: dict[int, Shard], *, tokenizer: Path, into: Path, workers: int, task: str, settings: dict[str, Any]
) -> Iterator[int]:
    """Have numbered shards tokenized by the tokenizer saved in a folder; yield each number when its
    shard is durable.

    `into` receives one folder per shard. `settings`: those of the task's writer of texts or
    examples. Raises the first UserError that a worker meets, and ends the others.
    """
    waiting = iter(shards.items())
    pool = [Worker(tokenizer, into, task, settings) for _ in range(min(workers, len(shards)))]
    try:
        for worker in pool:
            worker.hand(*next(waiting))
        busy = {worker.replies: worker for worker in pool}
        while busy:
            for replies in select.select(list(busy), [], [])[0]:
                yield busy[replies].take_reply()
                if (shard := next(waiting, None)) is None:
                    del busy[replies]
                else:
                    busy[replies].hand(*shard)
    finally:
        for worker in pool:
            worker.end()


class Worker:
    """A process `python -m trainer.data.worker`, seen from outside. It sends one reply for each
    task."""

    def __init__(self, tokenizer: Path, into: Path, task: str, settings: dict[str, Any]) -> None:
        package_root = str(Path(trainer.__file__).parent.parent)
        inherited = os.environ.get("PYTHONPATH")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.data.worker", str(tokenizer), str(into), task, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | ENVIRONMENT
            | {"PYTHONPATH": os.pathsep.join([package_root, inherited] if inherited else [package_root])},
            start_new_session=True,  # Ctrl-C reaches only us, and we end the workers
        )
        assert self._process.stdin
        assert self._process.stdout
        self._tasks, self.replies = self._process.stdin, self._process.stdout

    def hand(self, number: int, shard: Shard) -> None:
        with suppress(BrokenPipeError):  # it died; the missing reply will show it
            self._tasks.write(json.dumps({"number": number, "shard": asdict(shard)}).encode() + b"\n")
            self._tasks.flush()

    def take_reply(self) -> int:
        """Return the number of the finished shard, or raise the UserError that the worker met."""
        line = self.replies.readline()
        if not line:
            raise _ended(self._process.wait())
        reply = json.loads(line)
        if "failed" in reply:
            raise KINDS[reply["exit_code"]](reply["failed"])
        return int(reply["number"])

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.replies.close()
        with suppress(BrokenPipeError):
            self._tasks.close()


def _ended(code: int) -> UserError:
    """Return the error for a tokenizing process that ended without a reply.

    Rust aborts if it gets no memory; a system that runs out of memory kills.
    """
    what = f"data: a tokenizing process ended with code {code}"
    if code == -signal.SIGABRT:
        return RecipeError(
            f"{what} (native code gave up, mostly for lack of memory): look for what grows texts in the tokenizer.json of "
            "data.tokenizer, or lower data.workers, and start again: finished shards are kept"
        )
    lines = f"{what} (-9: killed, often for lack of memory); lower data.workers and start again: finished shards are kept"
    return RecipeError(lines) if code == -signal.SIGKILL else UserError(lines)
