"""Data that a thread reads ahead: the same, in the same order, with errors where they belong."""

from __future__ import annotations

import threading
import time

import pytest

from trainer.data.ahead import Ahead

THREAD = "next step's data"


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


def test_the_next_is_read_by_a_thread_while_one_is_used() -> None:
    readers: dict[int, str] = {}
    begun = threading.Event()

    def read(number: int) -> int:
        readers[number] = threading.current_thread().name
        if number == 1:
            begun.set()
        return number * 10

    ahead = Ahead(read)
    assert ahead.take(0, more=True) == 0
    assert begun.wait(10.0), "nobody reads the next while this one is used"
    assert [ahead.take(1, more=True), ahead.take(2, more=False)] == [10, 20]
    assert readers == {0: threading.main_thread().name, 1: THREAD, 2: THREAD}
    assert not reading()


def test_each_number_is_read_once_and_another_than_the_next_anew() -> None:
    read: list[int] = []
    ahead = Ahead(lambda number: read.append(number) or number)
    # back after 5, as a rewind goes
    taken = [ahead.take(number, more=True) for number in (4, 5, 2, 3)]
    ahead.end()
    assert taken == [4, 5, 2, 3]
    assert sorted(read) == [2, 3, 4, 4, 5, 6]  # 4 and 6 were read ahead, and 6 not taken


def test_an_error_is_raised_at_the_number_that_it_belongs_to() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise ValueError("token 7 is damaged")
        return number

    ahead = Ahead(read)
    assert [ahead.take(0, more=True), ahead.take(1, more=True)] == [0, 1]
    with pytest.raises(ValueError, match="token 7 is damaged"):
        ahead.take(2, more=True)
    assert not reading()


def test_a_stall_is_waited_for_and_the_end_leaves_no_thread() -> None:
    go_on = threading.Event()
    ahead = Ahead(lambda number: go_on.wait(10.0) if number else True)
    ahead.take(0, more=True)
    assert reading()
    threading.Timer(0.1, go_on.set).start()
    start = time.monotonic()
    assert ahead.take(1, more=True)
    assert time.monotonic() - start > 0.05
    ahead.end()
    ahead.end()
    assert not reading()
