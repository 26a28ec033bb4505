"""TensorBoard event files, written by the `tensorboard` package alone: no TensorFlow, no torch.

Records are framed by TensorBoard's own `RecordWriter` on a plain file. Its `EventFileWriter` would
import TensorFlow wherever that is installed (seconds, and GPU memory), and its worker thread fails
noisily on a full disk.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from trainer.track.run_info import RunInfo

FLUSH_EVERY_S = 5.0


class TensorBoardTracker:
    """The tracker of scalars `train/…` and `eval/…` by step, in `tensorboard/` of the run
    folder."""

    def start(self, run: RunInfo) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard finds files by "tfevents" and orders a run's files by this name, the time
        # first.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{run.start_step}"
        self._writer: Any = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        self._restart: Any = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        if run.start_step:
            self.rewind(run.start_step)
        self._flush()

    def log(self, record: Mapping[str, float | int | None]) -> None:
        self._scalars("train", record)

    def evaluate(self, record: Mapping[str, float | int | None]) -> None:
        self._scalars("eval", record)

    def note(self, line: str) -> None:
        """Do nothing: notes are for the console."""

    def rewind(self, step: int) -> None:
        """Tell TensorBoard to forget what was logged after that step."""
        self._write(step=step + 1, session_log=self._restart)

    def finish(self, summary: Mapping[str, object]) -> None:
        self._writer.close()

    def _scalars(self, group: str, record: Mapping[str, float | int | None]) -> None:
        values = [
            self._summary.Value(tag=f"{group}/{name.removeprefix('eval_')}", simple_value=value)
            for name, value in record.items()
            if value is not None and name not in ("step", "time")
        ]
        step = record["step"]
        assert step is not None
        self._write(step=int(step), wall_time=record.get("time"), summary=self._summary(value=values))
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self._flush()

    def _write(self, *, wall_time: float | None = None, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=wall_time or time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()
