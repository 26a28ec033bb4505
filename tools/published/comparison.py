"""Published rows, and how near the planner comes to them.

The folder of the tables is TRIAXIS_DATA, else the copy among the tests.
"""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import correlation, mean

FOLDER = Path(__file__).parents[2] / "tests" / "published"
Row = dict[str, str]
# Two rows are always in one of two orders, so a correlation of ranks says something from here on.
SWEEP = 4


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A published figure, and ours, in the same unit.

    `work`: what the null model takes it to be proportional to. `sweep`: what the rows have in
    common of which one setting is varied; "" of a row that is alone.
    """

    what: str
    published: float
    ours: float
    work: float = 0.0
    sweep: str = ""

    @property
    def error(self) -> float:
        return self.ours / self.published - 1


@dataclass(frozen=True)
class Reference:
    """The row that gives a scalar: its published figure over ours. It is read in the copy among the
    tests, so that other rows are given the same."""

    rows: Callable[[Path], Iterable[Compared]]
    what: str

    @cached_property
    def scalar(self) -> float:
        row = next(row for row in self.rows(FOLDER) if row.what == self.what)
        return row.published / row.ours


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one source, which `rows` reads from a folder. `reference` gives a scalar for all of
    them, and is left out if it is one of them; `fitted` says in words what else is taken from rows.

    `what`: of each row, with its unit. `absolute`: the errors are differences, not shares.
    """

    title: str
    what: str
    rows: Callable[[Path], Iterable[Compared]]
    fitted: str = "nothing"
    reference: Reference | None = None
    absolute: bool = False

    @property
    def scalar(self) -> float:
        return self.reference.scalar if self.reference else 1.0

    def every(self, folder: Path) -> list[Compared]:
        """Return the rows of a folder's file; [] if it has no such file."""
        try:
            rows = list(self.rows(folder))
        except FileNotFoundError:
            return []
        return [replace(row, ours=self.scalar * row.ours) for row in rows]

    def compared(self, folder: Path) -> list[Compared]:
        """Return the same without the reference."""
        left_out = self.reference.what if self.reference and self.reference.rows is self.rows else None
        return [row for row in self.every(folder) if row.what != left_out]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The errors over a table's rows. `rank`: Spearman's correlation of ours and the
    published within a sweep, averaged over sweeps. `null`: the mean error of the null model."""

    rows: int
    mean: float
    largest: float
    signed: float
    rank: float | None
    null: float | None

    @classmethod
    def of(cls, rows: Sequence[Compared], *, absolute: bool = False) -> Accuracy:
        errors = [row.ours - row.published if absolute else row.error for row in rows]
        return cls(
            rows=len(rows),
            mean=mean(map(abs, errors)),
            largest=max(map(abs, errors)),
            signed=mean(errors),
            rank=within_sweeps(rows),
            null=null_error(rows),
        )


def given_folder() -> Path:
    return Path(os.environ.get("TRIAXIS_DATA", FOLDER))


def rows_of(folder: Path, name: str) -> list[Row]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def null_error(rows: Sequence[Compared]) -> float | None:
    """Return the mean error of taking each row at the mean rate of the others, of work for each
    published unit: the model that knows nothing but the work."""
    if len(rows) < 2 or not all(row.work for row in rows):
        return None
    rates = [row.work / row.published for row in rows]
    return mean(abs(rate * (len(rates) - 1) / (sum(rates) - rate) - 1) for rate in rates)


def sweeps(rows: Sequence[Compared], least: int) -> dict[str, list[Compared]]:
    """Return the sweeps that have at least so many rows."""
    found = defaultdict(list)
    for row in rows:
        if row.sweep:
            found[row.sweep].append(row)
    return {sweep: members for sweep, members in found.items() if len(members) >= least}


def within_sweeps(rows: Sequence[Compared]) -> float | None:
    found = []
    for members in sweeps(rows, SWEEP).values():
        ours, published = ranks([row.ours for row in members]), ranks([row.published for row in members])
        if len(set(ours)) > 1 and len(set(published)) > 1:
            found.append(correlation(ours, published))
    return mean(found) if found else None


def ranks(values: Sequence[float]) -> list[float]:
    """Return each value's place in ascending order; equal ones share the mean of their places."""
    places = defaultdict(list)
    for place, value in enumerate(sorted(values)):
        places[value].append(place)
    return [mean(places[value]) for value in values]
