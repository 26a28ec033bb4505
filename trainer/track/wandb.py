"""The mirror on Weights & Biases: a child process that the run never waits for.

    loop ── log() ──► bounded queue ──► thread ── pipe ──► child, which runs this module ──► W&B

W&B lives in a child because inside the training process its time cannot be bounded. With a server
that does not answer, `wandb.init` in a thread keeps the interpreter from exiting for 30 s (wandb
0.31, its exit hooks), and an abandoned init makes its run id unusable ("run ID is in use") until
the process ends. A child can be killed. It also keeps W&B's import (1 s), threads and hooks out of
the ranks' process, and when the run is killed it uploads the history and ends by itself.

If W&B is not ready in time, a second child keeps the run offline: what was queued meanwhile is
written to its folder, and `wandb sync` uploads it. Either way there is one W&B run, and its id is
kept in `wandb-id.json` for a requeued run.

Records carry `step` as a field and as the x-axis of every plot. W&B's own step counter would drop
what a resumed run logs again: "Step must only increase".
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from trainer import schema
from trainer.files.decoding import read_as
from trainer.files.durable import write_json
from trainer.files.reading import open_to_append
from trainer.redaction import redact, redact_text
from trainer.track.run_info import RunInfo

START_LIMIT_S = 30.0  # for W&B to accept the run; its own default is 90 s
START_LIMIT_AT_FINISH_S = 3.0  # the same, once the run has finished and only waits for W&B
UPLOAD_LIMIT_S = 6.0  # for the rest of the history to reach the server
FINISH_LIMIT_S = 12.0  # after this the child is killed, whatever it does
QUEUE_RECORDS = 10_000  # about 5 MB

READY = "ready "
_HISTORY = "metrics.jsonl has the whole history"


class WandbTracker:
    """The tracker that sends records to the child. No method waits for W&B, except `finish`, for at
    most `FINISH_LIMIT_S`."""

    def __init__(self, wandb: schema.Wandb, note: Callable[[str], None]) -> None:
        self._wandb, self._note = wandb, note
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUE_RECORDS)
        self._finishing = threading.Event()
        self._dropping = self._late = False
        self._child: _Child | None = None

    def start(self, run: RunInfo) -> None:
        self._folder = run.folder
        self._order = {
            "project": self._wandb.project,
            "entity": self._wandb.entity,
            "tags": redact(self._wandb.tags),
            "id": self._wandb.id or _kept_id(run.folder),
            "name": run.name,
            "dir": str(run.folder),
            "config": redact(run.recipe) | {"world_size": run.world_size, "devices": run.devices},
        }
        self._thread = threading.Thread(target=self._feed, name="wandb-mirror", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, float | int | None]) -> None:
        self._put({name if name == "step" else f"train/{name}": value for name, value in record.items() if value is not None})

    def evaluate(self, record: Mapping[str, float | int | None]) -> None:
        self._put(
            {
                name if name == "step" else f"eval/{name.removeprefix('eval_')}": value
                for name, value in record.items()
                if value is not None
            }
        )

    def rewind(self, step: int) -> None:
        """Do nothing: every plot is over the field `step`, so repeated steps are drawn over the
        earlier ones."""

    def note(self, line: str) -> None:
        """Do nothing: notes are for the console."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Let the child upload the rest. After `FINISH_LIMIT_S` give up and say how to upload it
        later."""
        self._put({"summary": {name: value for name, value in summary.items() if isinstance(value, int | float)}})
        self._finishing.set()
        self._thread.join(FINISH_LIMIT_S)
        if self._thread.is_alive() and self._child is not None:
            self._late = True
            self._child.kill()  # wakes the thread from any wait; the thread reports what happened
            self._thread.join(1.0)

    def _put(self, record: Mapping[str, object]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._lines.put_nowait(json.dumps(record).encode() + b"\n")
        except queue.Full:
            if not self._dropping:
                self._dropping = True
                self._note("warning: W&B is slower than the run and misses records; metrics.jsonl has them all")

    def _feed(self) -> None:
        try:
            child = self._open()
            while (line := self._next_line()) is not None:
                child.send(line)
            child.close()
            if child.offline and self._wandb.mode == "offline":
                self._note(f"W&B: run kept offline; {child.how_to_sync()}")
        except (OSError, _Stopped) as error:
            reason = f"no end within {FINISH_LIMIT_S:.0f} s" if self._late else error
            advice = self._child.how_to_sync() if self._child else _HISTORY
            self._note(f"warning: W&B stopped ({reason}); the run goes on, {advice}")
        finally:
            if self._child is not None:
                self._child.end()

    def _next_line(self) -> bytes | None:
        """Return the oldest record, or None when the run has finished and everything was sent."""
        while True:
            try:
                return self._lines.get(timeout=0.05)
            except queue.Empty:
                if self._finishing.is_set():
                    return None

    def _open(self) -> _Child:
        """Return a child that has its run open: as the recipe says, else offline."""
        try:
            return self._launch(self._wandb.mode)
        except _Stopped as refusal:
            if self._wandb.mode == "offline":
                raise
            child = self._launch("offline")
            self._note(f"warning: W&B cannot be reached ({refusal}); this run is kept offline, {child.how_to_sync()}")
            return child

    def _launch(self, mode: str) -> _Child:
        if self._child is not None:
            self._child.end()
        self._child = _Child(self._order | {"mode": mode}, self._folder)
        self._child.wait_ready(self._finishing)
        return self._child


class _Stopped(Exception):
    """The reason why the child cannot go on."""


class _Child:
    """The process that holds the W&B run. It answers `ready <folder>` once the run is open; if it
    fails it says why at its end."""

    def __init__(self, order: Mapping[str, Any], folder: Path) -> None:
        self.offline = order["mode"] == "offline"
        self._sync_folder = ""
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with open_to_append(logs / "wandb.log") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer.track.wandb"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"WANDB_ERROR_REPORTING": "false"} | dict(os.environ) | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C ends the run, and the child then uploads the rest
                bufsize=0,
            )
        self.send(json.dumps(order).encode() + b"\n")

    def send(self, line: bytes) -> None:
        """Send a line, waiting while the pipe is full. BrokenPipeError if the child has ended."""
        rest = memoryview(line)
        while rest:
            rest = rest[_pipe(self._process.stdin).write(rest) :]

    def wait_ready(self, finishing: threading.Event) -> None:
        """Return once the run is open. `_Stopped` if it cannot be opened, or takes too long."""
        give_up = time.monotonic() + START_LIMIT_S
        hurried = self.offline  # a local file needs no hurry: FINISH_LIMIT_S bounds it
        while not select.select([_pipe(self._process.stdout)], [], [], 0.05)[0]:
            if finishing.is_set() and not hurried:
                hurried = True
                give_up = min(give_up, time.monotonic() + START_LIMIT_AT_FINISH_S)
            if time.monotonic() > give_up:
                raise _Stopped("no answer" if hurried else f"no answer within {START_LIMIT_S:.0f} s")
        answer = self._answer()
        if not answer.startswith(READY):
            raise _Stopped(answer or "it ended without a word, see logs/wandb.log")
        self._sync_folder = answer.removeprefix(READY)

    def close(self) -> None:
        """Let the child upload the rest and end. `_Stopped` if it reports that it could not."""
        _pipe(self._process.stdin).close()
        problem = self._answer()
        code = self._process.wait()
        if problem or code:
            raise _Stopped(problem or f"exit status {code}")

    def kill(self) -> None:
        """End the child now. Safe from any thread."""
        self._process.kill()

    def end(self) -> None:
        """End the child if it has not ended, and leave nothing behind."""
        self._process.kill()
        self._process.wait()
        for end in (self._process.stdin, self._process.stdout):
            _pipe(end).close()

    def how_to_sync(self) -> str:
        if not self._sync_folder:
            return _HISTORY
        return f"upload it with: wandb sync {self._sync_folder}"

    def _answer(self) -> str:
        with_newline: bytes = _pipe(self._process.stdout).readline()
        return with_newline.decode(errors="replace").strip()


def _pipe(end: IO[bytes] | None) -> IO[bytes]:
    assert end is not None
    return end


class _KeptId(TypedDict):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


def _kept_id(folder: Path) -> str:
    """Return the W&B id of this run folder, made at its first start, so that a requeued run
    continues the same W&B run."""
    path = folder / "wandb-id.json"
    try:
        return read_as(_KeptId, path)["id"]
    except (OSError, ValueError):
        made = uuid.uuid4().hex[:8]
        write_json(path, {"id": made})
        return made


# ------------------------------------------------------------------------------------- in the child


def _serve() -> None:
    with tempfile.TemporaryDirectory(prefix="triaxis-wandb-", ignore_cleanup_errors=True) as folder:
        # W&B makes two more folders when it is imported, which its hook at exit would remove.
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        code = _mirror()
    os._exit(code)  # W&B's exit hooks would wait again for a server that has had its time


def _mirror() -> int:
    """Open the run that the first line of stdin describes, log the records of the other lines, end
    with stdin; return the exit code."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever W&B prints goes to the log
    signal.alarm(int(START_LIMIT_S) + 15)  # a blocked import or init must not outlive the parent
    try:
        run = _open_run(json.loads(sys.stdin.readline()))
        signal.alarm(0)
        answers.write(f"{READY}{Path(run.dir).parent}\n")
        finished = False
        for line in sys.stdin:
            record = json.loads(line)
            if finished := "summary" in record:
                run.summary.update(record["summary"])
            else:
                run.log(record)
        signal.alarm(int(FINISH_LIMIT_S))
        # A run that was killed closes the pipe without a summary.
        run.finish(exit_code=0 if finished else 1)
        code = 0
    except BaseException as error:
        answers.write(redact_text(" ".join(f"{type(error).__name__}: {error}".split()))[:300] + "\n")
        code = 1
    answers.flush()
    return code


def _open_run(order: Mapping[str, Any]) -> Any:
    import wandb

    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_save_requirements": False,
        "x_disable_meta": True,  # command line, host name, user, hardware
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "host": "",
        "init_timeout": START_LIMIT_S,
        "finish_timeout": UPLOAD_LIMIT_S,
        "finish_timeout_raises": True,
    }
    known = wandb.Settings.model_fields  # newer W&B has more of them than the oldest that we accept
    run = wandb.init(
        mode=order["mode"],
        project=order["project"],
        entity=order["entity"],
        tags=order["tags"],
        id=order["id"],
        name=order["name"],
        dir=order["dir"],
        config=order["config"],
        resume="allow" if order["mode"] == "online" else None,
        allow_val_change=True,
        settings=wandb.Settings(**{name: value for name, value in wanted.items() if name in known}),
    )
    run.define_metric("*", step_metric="step")
    return run


if __name__ == "__main__":
    _serve()
