"""Data that a thread reads while the step before it is computed."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

Read = TypeVar("Read")


class Ahead(Generic[Read]):
    """Numbered data, taken one after another: while one is used, a thread reads the next.

    What is read for a number does not depend on who reads it, so the data are the same. An error
    of the thread is raised where its number is taken. The thread ends when it has read, so between
    two calls there is at most one.
    """

    def __init__(self, read: Callable[[int], Read]) -> None:
        """Take `read`, which gives the data of a number."""
        self._read = read
        self._next: _Reading[Read] | None = None

    def take(self, number: int, *, more: bool) -> Read:
        """Return the data of a number, and begin to read those of the next one if there are
        `more`."""
        reading, self._next = self._next, None
        # Another number than the next is taken after a rewind.
        found = reading.result() if reading is not None and reading.number == number else self._read(number)
        if more:
            self._next = _Reading(self._read, number + 1)
        return found

    def end(self) -> None:
        """Wait for a thread that reads; what it reads is not wanted any more."""
        reading, self._next = self._next, None
        if reading is not None:
            reading.wait()


class _Reading(Generic[Read]):
    """The reading of one number's data by a thread."""

    def __init__(self, read: Callable[[int], Read], number: int) -> None:
        self.number = number
        self._found: Read
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(read,), name="next step's data", daemon=True)
        self._thread.start()

    def result(self) -> Read:
        self.wait()
        if self._error is not None:
            raise self._error
        return self._found

    def wait(self) -> None:
        self._thread.join()

    def _run(self, read: Callable[[int], Read]) -> None:
        try:
            self._found = read(self.number)
        except BaseException as error:  # whatever it is, it belongs to who takes the number
            self._error = error
