"""`triaxis verify`: compare the layouts of a recipe with one process."""

from __future__ import annotations

import argparse

from trainer.commands.arguments import add_recipe, whole
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_DIFFERS, EXIT_OK

SUMMARY = "Train a few steps in one process and in other layouts on this machine: are they the same training? Exit 1 if not."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=[],
        metavar="LAYOUT",
        help="such as tp2 dp4 tp2xdp2 tp2-sp (without sequence parallelism) dp2+compile; default: all of up to 4 "
        "processes, or 8 where there are as many cores or GPUs, that divide the model",
    )
    parser.add_argument("--full", action="store_true", help="the recipe's own sizes instead of a scaled-down twin")
    parser.add_argument("--timeout", type=whole(1), default=600, metavar="S", help="for each layout, in seconds")


def run(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load

    resolved = load(arguments.recipe, arguments.set)
    from trainer.verify.command import STEPS, verify
    from trainer.verify.table import legend, table

    console = open_console()
    with console.status("one process") as status:
        report = verify(
            resolved, arguments.layouts, full=arguments.full, timeout_s=arguments.timeout, say=lambda text: status.update(text)
        )
    for change in report.changes:
        say(console, change)
    console.print(table(report))
    for line in legend(resolved.recipe.optimizer.name, resolved.recipe.zero.stage, STEPS):
        say(console, line)
    return EXIT_OK if report.agrees else EXIT_DIFFERS
