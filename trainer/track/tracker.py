"""The protocol of trackers, with one that does nothing for most ranks and one of several for the
writing rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from trainer import schema
from trainer.track.run_info import RunInfo

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A listener to a run, on the one rank that writes.

    A training record has `step` (optimizer steps done) and the keys that `metrics.jsonl` promises;
    an evaluation has `step` and what the task measures (`measures.py`), `eval_loss` first. After
    `rewind` the steps after `step` come again and replace those logged before. `finish` is called
    once, also when the run ends early.
    """

    def start(self, run: RunInfo) -> None: ...

    def log(self, record: Mapping[str, float | int | None]) -> None: ...

    def evaluate(self, record: Mapping[str, float | int | None]) -> None: ...

    def note(self, line: str) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, summary: Mapping[str, object]) -> None: ...


class NullTracker:
    """The tracker of every rank that does not write, so that the loop needs no rank test."""

    def start(self, run: RunInfo) -> None: ...

    def log(self, record: Mapping[str, float | int | None]) -> None: ...

    def evaluate(self, record: Mapping[str, float | int | None]) -> None: ...

    def note(self, line: str) -> None: ...

    def rewind(self, step: int) -> None: ...

    def finish(self, summary: Mapping[str, object]) -> None: ...


class BestEffort:
    """A mirror that may fail: its first exception becomes one warning line, and it is not called
    any more."""

    def __init__(self, name: str, mirror: Tracker, warn: Callable[[str], None]) -> None:
        self._name, self._mirror, self._warn = name, mirror, warn
        self._works = True

    def start(self, run: RunInfo) -> None:
        self._try(self._mirror.start, run)

    def log(self, record: Mapping[str, float | int | None]) -> None:
        self._try(self._mirror.log, record)

    def evaluate(self, record: Mapping[str, float | int | None]) -> None:
        self._try(self._mirror.evaluate, record)

    def note(self, line: str) -> None:
        self._try(self._mirror.note, line)

    def rewind(self, step: int) -> None:
        self._try(self._mirror.rewind, step)

    def finish(self, summary: Mapping[str, object]) -> None:
        self._try(self._mirror.finish, summary)

    def _try(self, call: Callable[[Any], None], argument: object) -> None:
        if not self._works:
            return
        try:
            call(argument)
        except Exception as error:
            self._works = False
            logger.warning("%s failed", self._name, exc_info=True)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"warning: {self._name} stopped ({reason}); the run goes on, metrics.jsonl has the whole history")


class CompositeTracker:
    """A group of trackers as one. `finish` finishes all of them, then raises the first error."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def start(self, run: RunInfo) -> None:
        for tracker in self._trackers:
            tracker.start(run)

    def log(self, record: Mapping[str, float | int | None]) -> None:
        for tracker in self._trackers:
            tracker.log(record)

    def evaluate(self, record: Mapping[str, float | int | None]) -> None:
        for tracker in self._trackers:
            tracker.evaluate(record)

    def note(self, line: str) -> None:
        for tracker in self._trackers:
            tracker.note(line)

    def rewind(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.rewind(step)

    def finish(self, summary: Mapping[str, object]) -> None:
        errors: list[Exception] = []
        for tracker in self._trackers:
            try:
                tracker.finish(summary)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


def make_tracker(tracking: schema.Tracking, run: RunInfo, writing_rank: bool) -> Tracker:
    """Return the tracker of this rank's loop, already started. Only the writing rank touches disk,
    terminal and W&B."""
    if not writing_rank:
        return NullTracker()
    from trainer.track.console import ConsoleTracker
    from trainer.track.jsonl import JsonlTracker

    console = ConsoleTracker()
    trackers: list[Tracker] = [JsonlTracker()]
    if tracking.tensorboard:
        from trainer.track.tensorboard import TensorBoardTracker

        trackers.append(BestEffort("TensorBoard", TensorBoardTracker(), console.note))
    if tracking.wandb.mode != "disabled":
        from trainer.track.wandb import WandbTracker

        trackers.append(BestEffort("W&B", WandbTracker(tracking.wandb, console.note), console.note))
    # The console last: its closing table ends the output.
    tracker = CompositeTracker(*trackers, console)
    tracker.start(run)
    return tracker
