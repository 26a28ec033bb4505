"""`triaxis report`: write the page of a run, or the comparison of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.commands.arguments import path
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, RecipeError

SUMMARY = "Write report.html into a run folder, or one page that compares several runs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=path, nargs="+", metavar="RUN_DIR")
    parser.add_argument(
        "--out", type=path, metavar="PAGE", help="with several runs: the page to write; default: comparison.html here"
    )


def run(arguments: argparse.Namespace) -> int:
    run_dirs: list[Path] = list(dict.fromkeys(arguments.run_dirs))
    if len(run_dirs) == 1:
        if arguments.out is not None:
            raise RecipeError(f"--out {arguments.out}: the report of one run is its report.html; give several, or no --out")
        from trainer.track.report import write_report

        written = write_report(run_dirs[0])
    else:
        from trainer.track.comparison import write_comparison

        written = write_comparison(run_dirs, arguments.out or Path("comparison.html"))
    say(open_console(), str(written))
    return EXIT_OK
