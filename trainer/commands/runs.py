"""`triaxis runs`: list runs, with what they reached and the keys in which they differ."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import path
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_DATA, EXIT_OK

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.track.runs import Run

SUMMARY = "List the runs in a folder: state, step, loss, best, and the keys in which they differ."
NARROW = 90  # columns of a terminal; below, a run is a block of lines instead of a row
UNSET = ("null", "–")  # another run has a value there
MOST_SHOWN = 40  # characters of a value in the table; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, nargs="?", default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each run, all values included")


def run(arguments: argparse.Namespace) -> int:
    from trainer.track.runs import differing, runs_below

    runs, faults = runs_below(arguments.folder)
    if arguments.json:
        for one in runs:
            sys.stdout.write(json.dumps(_facts(one) | {"values": dict(one.values)}) + "\n")
    else:
        console = open_console()
        (_show_blocks if console.width < NARROW else _show_table)(console, runs, differing(runs))
    for line in faults:
        say(open_console(), f"damaged: {line}")
    return EXIT_DATA if faults else EXIT_OK


def _facts(one: Run) -> dict[str, object]:
    best = one.best
    return {
        "run": one.name,
        "folder": str(one.folder.path),
        "state": one.state,
        "step": one.step,
        "steps": one.total_steps,
        "loss": one.loss,
        "best": best and {one.aim.figure: best[1], "step": best[0]},
    }


def _words(one: Run) -> tuple[str, ...]:
    from trainer.track.text import short

    step = f"{one.step:,}" + (f" of {one.total_steps:,}" if one.total_steps else "")
    best = f"{one.aim.figure} {short(one.best[1])} at {one.best[0]:,}" if one.best else "–"
    return one.name, one.state, step, short(one.loss), best


TITLES = ("run", "state", "step", "loss", "best")


def _show_table(console: Console, runs: Sequence[Run], differ: dict[str, list[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in (*TITLES, "differs in"):
        table.add_column(title, overflow="fold", justify="right" if title in ("step", "loss") else "left")
    for index, one in enumerate(runs):
        own = ", ".join(f"{key}={_cut(values[index])}" for key, values in differ.items() if values[index] not in UNSET)
        table.add_row(*(Text(cell) for cell in (*_words(one), own)))
    console.print(table)


def _cut(value: str) -> str:
    return value if len(value) <= MOST_SHOWN else f"{value[: MOST_SHOWN - 1]}…"


def _show_blocks(console: Console, runs: Sequence[Run], differ: dict[str, list[str]]) -> None:
    for index, one in enumerate(runs):
        name, *cells = _words(one)
        say(console, name)
        rows = [*zip(TITLES[1:], cells, strict=True), *((key, values[index]) for key, values in differ.items())]
        for title, cell in rows:
            say(console, f"  {title}: {cell}")
