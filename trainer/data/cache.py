"""Folders made once by one process and opened by many: trained tokenizers, token stores.

A folder is named by the fingerprint of all that decides its content, so one that exists is the
right one. The builder makes it under a lock, next to its final place, and renames it. The other
ranks wait for the name to appear, without a collective. The outcome file that the builder leaves
tells them if it never will.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from trainer.errors import EXIT_RECIPE, DataError, RecipeError, UserError
from trainer.files.decoding import read_as
from trainer.files.durable import make_private, sync_folder, write_json
from trainer.files.locks import Lock
from trainer.files.reading import told
from trainer.launch.stop_request import Interrupted
from trainer.redaction import redact

POLL_S = 0.2
REMIND_S = 30.0  # a waiting rank says this often that it still waits
STALE_S = 120.0  # an earlier run's outcome counts after this time: no builder came to remove it
SETTLE_S = 60.0  # a network file system may show a new folder this much later


class Progress(Protocol):
    """A callback that takes what is done, the total, and a line that says what; 0 of 0 if there is
    nothing to count."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


class Cache:
    """A set of folders under `root`, by fingerprint. With `build` this process makes what is
    missing; otherwise it waits."""

    def __init__(self, root: Path, *, request: str, build: bool, progress: Progress) -> None:
        """Create `root` and find the outcome file of `request`.

        `request`: the fingerprint of what the recipe asks for; the builder and the waiting ranks of
        one recipe meet under it.
        """
        self.root = root
        self._build = build
        self._progress = progress
        try:
            make_private(root)
            self._begun = _file_system_time(root)
        except OSError as error:
            raise RecipeError(f"data.cache_dir: {root}: {error.strerror}; name a folder that can be written") from None
        self._outcome = _outcome_file(root, request)

    def folder(self, fingerprint: str, make: Callable[[Path], None], *, what: str) -> Path:
        """Return the folder of a fingerprint, made by `make(staging)` if it is missing.

        A killed build leaves its staging folder behind, and the next `make` may use what it finds
        there. Raises the UserError that `make` raises, here or on the building rank.
        """
        final = self.root / fingerprint[:16]
        if final.is_dir():
            return final
        if not self._build:
            self._wait_for(final, what)
            return final
        lock = Lock(final.with_name(f"{final.name}.lock"))
        with lock.held(lambda: self._progress(0, 0, f"waiting for another process that is {what}"), every_s=REMIND_S):
            if not final.is_dir():
                staging = make_private(final.with_name(f"{final.name}.building"))
                make(staging)
                sync_folder(staging)
                os.rename(staging, final)
                sync_folder(self.root)
        return final

    def has(self, fingerprint: str, name: str) -> bool:
        """Return whether the folder of a fingerprint is there already, with a folder of that name
        in it."""
        return (self.root / fingerprint[:16] / name).is_dir()

    @contextmanager
    def reporting_outcome(self) -> Iterator[None]:
        """Report the outcome of the work inside, success or failure, to those who wait.

        Errors in reading sources have types of their own by then. Any other OSError means that the
        cache cannot be written, and becomes a DataError.
        """
        try:
            if self._build:
                self._outcome.unlink(missing_ok=True)
            yield
        except OSError as error:
            failure = DataError(f"{error.filename or self.root}: {told(error)}; make room there, or set data.cache_dir")
            self._leave_word(failure)
            raise failure from error
        except BaseException as error:
            self._leave_word(error)
            raise
        self._leave_word(None)

    def _leave_word(self, failure: BaseException | None) -> None:
        if not self._build:
            return
        lines, exit_code = [f"{type(failure).__name__}: {failure}"], UserError.exit_code
        if isinstance(failure, UserError | Interrupted):
            lines, exit_code = failure.lines, failure.exit_code
        # A full disk has no room for this either; the launcher ends those who wait.
        with suppress(OSError):
            write_json(self._outcome, {"failed": redact(lines) if failure else [], "exit_code": exit_code})

    def _wait_for(self, final: Path, what: str) -> None:
        started_s = time.monotonic()
        reminded_s = float("-inf")
        built_s: float | None = None  # the time at which the builder was seen to have finished
        while not final.is_dir():
            now_s = time.monotonic()
            outcome = self._read_outcome()
            if outcome and (outcome.written >= self._begun or now_s - started_s > STALE_S):
                outcome.raise_failure()
                built_s = built_s or now_s
                if now_s - built_s > SETTLE_S:
                    raise DataError(
                        f"data.sources: the building rank finished, but without {final}: this machine sees other files than "
                        "it does; give both the same sources and the same data.cache_dir"
                    )
            if now_s - reminded_s > REMIND_S:
                self._progress(0, 0, f"waiting for the building rank, which is {what}")
                reminded_s = now_s
            time.sleep(POLL_S)

    def _read_outcome(self) -> Outcome | None:
        try:
            return Outcome(**read_as(_Word, self._outcome), written=self._outcome.stat().st_mtime)
        except (OSError, ValueError):
            return None


def was_built(root: Path, *, request: str) -> bool:
    """Return whether the last build of that request reported success."""
    try:
        return not read_as(_Word, _outcome_file(root, request))["failed"]
    except (OSError, ValueError):
        return False


def _outcome_file(root: Path, request: str) -> Path:
    return root / f"{request[:16]}.outcome.json"


class _Word(TypedDict):
    failed: list[str]
    exit_code: int


@dataclass(frozen=True)
class Outcome:
    """The end of a builder's work: the lines of what it raised, if anything, and when they were
    written, by the file system's clock [s]."""

    failed: list[str]
    exit_code: int
    written: float

    def raise_failure(self) -> None:
        """Raise what the builder raised, if it failed."""
        if self.failed:
            kinds = {EXIT_RECIPE: RecipeError, DataError.exit_code: DataError}
            failure = kinds.get(self.exit_code, UserError)(self.failed)
            failure.exit_code = self.exit_code
            raise failure


def _file_system_time(folder: Path) -> float:
    """Return the time now [s] by the clock that stamps files in `folder`. Another machine's clock
    may differ from ours."""
    os.utime(folder)
    return folder.stat().st_mtime
