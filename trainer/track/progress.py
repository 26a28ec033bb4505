"""A bar for what happens before the first step: reading, training a tokenizer, tokenizing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from trainer.data.cache import Progress


@contextmanager
def work_progress(*, shown: bool) -> Iterator[Progress]:
    """Yield a callback (done, total, what) that gives each new `what` a bar of its own; it does
    nothing unless `shown`."""
    if not shown:
        yield lambda done, total, what: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(highlight=False)) as bars:
        tasks = {}

        def show(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield show
