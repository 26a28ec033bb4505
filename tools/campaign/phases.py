"""The phase of a run that a rank is in, by name, and the number of calls it has made there: moments
that recur in every run.

The names are those of the trainer's stopwatch, and of the functions in `PARTS` for finer parts. A
moment is a phase, the number of the rank's visit to it, and the number of the call, Python's or
C's, that its thread makes there.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from trainer.stopwatch import Stopwatch

# Innermost first: the time of `renaming a save` does not belong to `committing a save`.
PARTS = {
    "joining the group": "trainer.launch.ranks.join",
    "making the groups": "trainer.engine.group.Mesh.build",
    "claiming the folder": "trainer.run.opening.claim",
    "clearing the way": "trainer.run.session.clear_the_way",
    "ending for a signal": "trainer.loop.interrupt",
    "copying for a save": "trainer.checkpoint.save.Saver.save",
    "agreeing on a save": "trainer.checkpoint.save.Saver._write",
    "beginning a draft": "trainer.checkpoint.save.Saver._begin",
    "writing a file of a save": "trainer.checkpoint.save.write_tensor_file",
    "writing beside a save": "trainer.checkpoint.save._write_beside",
    "committing a save": "trainer.checkpoint.save.Saver._commit",
    "renaming a save": "trainer.checkpoint.folder.CheckpointFolder.commit",
    "reading a save back": "trainer.checkpoint.save.Saver._make_room",
    "removing an older save": "trainer.checkpoint.folder.CheckpointFolder.prune",
    "closing": "trainer.run.session.Session.finish",
    "writing the report": "trainer.run.session.write_report",
    "closing the engine": "trainer.engine.engine.Engine.close",
    "leaving the group": "trainer.launch.ranks.leave",
}


@dataclass(frozen=True)
class Moment:
    """A moment of a run. `entry` counts from 1; `call` 0 is before the first."""

    phase: str
    entry: int
    call: int


@dataclass
class _Visit:
    """A stay in a phase."""

    phase: str
    entry: int
    calls: int = 0


class Phases:
    """A counter, planted into the trainer on one rank: it counts the calls of each visit, or kills
    the process at a moment.

    If a visit ends before its moment, because fewer calls were made than in the counted run, the
    process dies with its end.
    """

    def __init__(self, moment: Moment | None = None) -> None:
        self.visits: dict[str, list[_Visit]] = defaultdict(list)
        self._moment = moment
        self._of_thread = threading.local()

    def plant(self) -> None:
        for phase, path in PARTS.items():
            owner, _, name = path.rpartition(".")
            _replace(pkgutil.resolve_name(owner), name, functools.partial(self._within, phase))
        real_init, real_begin, real_call = Stopwatch.__init__, Stopwatch.begin, Stopwatch.__call__

        def init(watch: Stopwatch, *args: Any) -> None:
            real_init(watch, *args)
            self._begin(watch.phase)

        def begin(watch: Stopwatch, phase: str) -> None:
            self._begin(phase)
            real_begin(watch, phase)

        @contextmanager
        def call(watch: Stopwatch, phase: str) -> Iterator[None]:
            with real_call(watch, phase), self._inside(phase):
                yield

        Stopwatch.__init__, Stopwatch.begin, Stopwatch.__call__ = init, begin, call  # type: ignore[assignment, method-assign]

    @property
    def calls(self) -> dict[str, list[int]]:
        """The calls of each visit, by phase."""
        return {phase: [visit.calls for visit in visits] for phase, visits in self.visits.items()}

    def _within(self, phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def within(*args: Any, **named: Any) -> Any:
            with self._inside(phase):
                return real(*args, **named)

        return within

    @property
    def _stack(self) -> list[_Visit]:
        """The open visits of this thread; the first is the one that lasts until the next one
        begins."""
        stack: list[_Visit] = self._of_thread.__dict__.setdefault("stack", [])
        return stack

    def _begin(self, phase: str) -> None:
        if self._stack:
            self._leave(self._stack[0])
        self._stack[:1] = [self._come_to(phase)]
        self._listen()

    @contextmanager
    def _inside(self, phase: str) -> Iterator[None]:
        self._stack.append(self._come_to(phase))
        self._listen()
        try:
            yield
        finally:
            sys.setprofile(None)
            self._leave(self._stack.pop())
            self._listen()

    def _come_to(self, phase: str) -> _Visit:
        visit = _Visit(phase, len(self.visits[phase]) + 1)
        self.visits[phase].append(visit)
        if self._moment == Moment(phase, visit.entry, 0):
            die()
        return visit

    def _leave(self, visit: _Visit) -> None:
        if self._is_it(visit):
            die()

    def _is_it(self, visit: _Visit) -> bool:
        return self._moment is not None and (visit.phase, visit.entry) == (self._moment.phase, self._moment.entry)

    def _listen(self) -> None:
        """Have Python report each of this thread's calls while it is in a visit that counts."""
        wanted = self._stack and (self._moment is None or self._is_it(self._stack[-1]))
        sys.setprofile(self._hear if wanted else None)

    def _hear(self, frame: FrameType, event: str, what: Any) -> None:
        if event in ("call", "c_call"):
            visit = self._stack[-1]
            visit.calls += 1
            if self._moment is not None and visit.calls >= self._moment.call:
                die()


def _replace(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    setattr(owner, name, change(getattr(owner, name)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
