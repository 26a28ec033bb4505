"""The comparison of several runs, on one page: their curves over each other, what they reached, and
the keys in which they differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import RecipeError
from trainer.files.durable import replacing_file
from trainer.model.measures import LOSS
from trainer.track.page import page
from trainer.track.runs import Run, differing, runs_at
from trainer.track.text import duration, scaled, short

MARK = "Comparison of runs"  # in the page; another file in its place is not replaced
NONE = "–"


@dataclass(frozen=True)
class Line:
    """A run in the page's tables and legend. `href`: its own report, relative to the page; "" if it
    has none."""

    name: str
    colour: str
    dash: int
    href: str
    cells: tuple[str, ...]


COLUMNS = ("State", "Step", "Loss", "Best", "Tokens/s", "Peak memory", "Wall time")


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page, whole or not at all, and return its path.

    RecipeError if a folder holds no run, or the file is something else; DataError if a run's files
    are damaged.
    """
    from trainer.track.comparison_plots import MOST_RUNS, colour_of, comparison_figures, dash_of

    if len(run_dirs) > MOST_RUNS:
        raise RecipeError(f"{len(run_dirs)} runs: at most {MOST_RUNS} can be told apart on one page; `triaxis runs` lists more")
    _require_own(path)
    runs = runs_at(run_dirs)
    lines = [
        Line(run.name, colour_of(index), dash_of(index), _report_of(run, path), _cells(run)) for index, run in enumerate(runs)
    ]
    text = page("comparison.html.j2").render(
        mark=MARK,
        title=" · ".join(run.name for run in runs),
        num_runs=len(runs),
        columns=COLUMNS,
        lines=lines,
        figures=comparison_figures(runs),
        differing=differing(runs),
    )
    with replacing_file(path) as file:
        file.write(text.encode())
    return path


def _cells(run: Run) -> tuple[str, ...]:
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    best, of_what = run.best, "" if run.aim.figure == LOSS else f" ({run.aim.figure})"
    memory = run.history.largest("memory_gib")
    return (
        run.state,
        f"{run.step:,}{of}",
        short(run.loss),
        f"{short(best[1])} at step {best[0]:,}{of_what}" if best else NONE,
        scaled(run.tokens_per_s),
        f"{memory:.2f} GiB" if memory is not None else NONE,
        duration(run.summary.get("wall_s")),
    )


def _report_of(run: Run, path: Path) -> str:
    report = run.folder.report
    return Path(os.path.relpath(report.resolve(), path.resolve().parent)).as_posix() if report.is_file() else ""


def _require_own(path: Path) -> None:
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: its folder is not there: make it, or give another --out")
    if path.is_dir():
        raise RecipeError(f"{path} is a folder: give the name of a page, such as {path / 'comparison.html'}")
    if path.exists() and MARK.encode() not in path.read_bytes():
        raise RecipeError(f"{path} is there and is no comparison of runs: remove it, or give another --out")
