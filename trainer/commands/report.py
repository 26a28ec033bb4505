"""`triaxis report`: write the page of a run."""

from __future__ import annotations

import argparse

from trainer.commands.arguments import path
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK

SUMMARY = "Write report.html into a run folder."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR")


def run(arguments: argparse.Namespace) -> int:
    from trainer.track.report import write_report

    say(open_console(), str(write_report(arguments.run_dir)))
    return EXIT_OK
