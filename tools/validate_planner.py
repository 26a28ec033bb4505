"""The accuracy of the planner: what others measured, next to what it computes for their programs.

    python -m tools.validate_planner             write the tables of the planner's guide anew
    python -m tools.validate_planner --check     say where they have drifted, with code 1
    python -m tools.validate_planner --rows      print each published figure beside ours
    TRIAXIS_DATA=folder python -m tools.validate_planner --print     the tables of other files

The null model takes each row at the mean rate of the others: of FLOPs for each second, or of
parameters for each byte. A planner that is no better knows nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tools import validate_here
from tools.published import hardware, memory, pipeline, regret, sharded, step_times
from tools.published.comparison import FOLDER, Accuracy, Compared, Table, given_folder

GUIDE = Path(__file__).parents[1] / "trainer" / "planner" / "README.md"
BEGIN, END = "<!-- written by python -m tools.validate_planner -->", "<!-- end of what it writes -->"
HERE = "here_validation.json"  # what validate_here has written of one machine
MEMORY = (*memory.TABLES, pipeline.PEAKS)
TIME = (*step_times.TABLES, *pipeline.TIMES, *sharded.TABLES)
BUBBLES = (pipeline.BUBBLES,)


@cache
def compared(table: Table, folder: Path) -> list[Compared]:
    return table.compared(folder)


@cache
def regret_of(table: Table, folder: Path) -> regret.Regret | None:
    """Return what following the planner costs; the row that gives the scalar is a layout too."""
    return regret.regret(table.every(folder))


def accuracy(table: Table, folder: Path) -> Accuracy | None:
    """Return the errors over a folder's rows, or None if it has none of this table."""
    rows = compared(table, folder)
    return Accuracy.of(rows, absolute=table.absolute) if rows else None


def tables(folder: Path) -> list[str]:
    """Return the lines of all tables."""
    lines: list[str] = []
    for name, chosen in (("memory", MEMORY), ("time", TIME), ("schedule", BUBBLES)):
        head = f"| {name} | of | rows | mean error | largest | signed | rank | null model | taken from its rows |"
        lines += [head, "|---|---|---|---|---|---|---|---|---|", *_rows(chosen, folder), ""]
    lines += [*regret.lines({table.title: regret_of(table, folder) for table in TIME}), ""]
    return [*lines, *hardware.lines(folder), "", *validate_here.lines_of(folder / HERE)]


def _rows(chosen: tuple[Table, ...], folder: Path) -> Iterator[str]:
    for table in chosen:
        found = accuracy(table, folder)
        if found is not None:
            errors = " | ".join(_errors(found, absolute=table.absolute))
            rank = "" if found.rank is None else f"{found.rank:.2f}"
            null = "" if found.null is None else f"{found.null:.1%}"
            fitted = table.fitted.format(scalar=table.scalar)
            yield f"| {table.title} | {table.what} | {found.rows} | {errors} | {rank} | {null} | {fitted} |"


def _errors(found: Accuracy, *, absolute: bool) -> tuple[str, str, str]:
    form = ".5f" if absolute else ".1%"
    signed = format(found.signed, "+" + form)
    return format(found.mean, form), format(found.largest, form), signed.replace("-", "−")


def guide_with(text: str, lines: list[str]) -> str:
    """Return the guide's text with these lines between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *lines, "", END]) + after


def print_rows(folder: Path) -> None:
    for table in (*MEMORY, *TIME, *BUBBLES):
        print(f"{table.title}, {table.what}")
        for row in compared(table, folder):
            error = f"{row.ours - row.published:+10.5f}" if table.absolute else f"{row.error:+10.1%}"
            print(f"  {row.what:<72} {row.published:>12.4f} {row.ours:>12.4f} {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; code 1 if the guide's tables have drifted")
    parser.add_argument("--print", action="store_true", help="print the tables; change nothing")
    parser.add_argument("--rows", action="store_true", help="print every row; change nothing")
    arguments = parser.parse_args()
    if arguments.rows:
        print_rows(given_folder())
        return 0
    if arguments.print:
        print("\n".join(tables(given_folder())))
        return 0
    text = GUIDE.read_text(encoding="utf-8")
    anew = guide_with(text, tables(FOLDER))
    if arguments.check:
        drifted = set(anew.splitlines()) ^ set(text.splitlines())
        print("\n".join(sorted(drifted)) if anew != text else f"{GUIDE}: as the planner computes it")
        return int(anew != text)
    GUIDE.write_text(anew, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
