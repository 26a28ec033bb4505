"""The record of a run's plan beside what was measured: an entry of `summary.json`. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import Field, with_config
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on

from trainer.files.decoding import OPEN
from trainer.track.text import duration

UNKNOWN = "–"
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0.0, lt=1e9)]


@with_config(OPEN)
class Figures(TypedDict):
    """The memory of the rank that took most [bytes], and the median time of a step [s]; None: not
    known."""

    memory_bytes: Bytes | None
    step_time_s: Seconds | None


@with_config(OPEN)
class PlanRecord(TypedDict):
    """The figures by the plan, and those that were measured. `device`: the sheet that the time was
    planned by; `calibration`: the factor that it was planned with."""

    device: str | None
    calibration: Seconds
    predicted: Figures
    measured: Figures


class Row(NamedTuple):
    """A figure as it is shown."""

    label: str
    planned: str
    measured: str
    difference: str


def rows_of(record: PlanRecord) -> list[Row]:
    """Return the figures of which at least one is known."""
    planned, measured = record["predicted"], record["measured"]
    found = [
        _row("memory of a rank", planned["memory_bytes"], measured["memory_bytes"], _gib),
        _row("time of a step", planned["step_time_s"], measured["step_time_s"], duration),
    ]
    return [row for row in found if (row.planned, row.measured) != (UNKNOWN, UNKNOWN)]


def _row(label: str, planned: float | None, measured: float | None, say: Callable[[float], str]) -> Row:
    before, after = (UNKNOWN if value is None else say(value) for value in (planned, measured))
    return Row(label, before, after, f"{measured / planned - 1:+.1%}" if planned and measured else UNKNOWN)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def line_of(record: PlanRecord) -> str:
    """Return the line that says how far the run was from its plan; "" where nothing was planned."""
    said = [
        f"{row.label} {row.planned}, measured {row.measured} ({row.difference})"
        for row in rows_of(record)
        if UNKNOWN not in (row.planned, row.measured)
    ]
    return f"plan: {'; '.join(said)}" if said else ""
