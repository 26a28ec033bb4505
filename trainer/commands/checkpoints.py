"""`triaxis checkpoints`: list, verify and remove a run's checkpoints."""

from __future__ import annotations

import argparse

from trainer.commands.arguments import path, whole
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_DATA, EXIT_OK

SUMMARY = "List a run's checkpoints; verify every byte of them; remove old ones."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR")
    parser.add_argument("--verify", action="store_true", help="read and hash all files; exit 65 if one is damaged")
    parser.add_argument(
        "--prune", type=whole(1), metavar="KEEP", help="verify the newest, then keep only so many, and the best"
    )


def run(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.listing import prune, survey

    run = arguments.run_dir
    listing = survey(run, verify=arguments.verify)
    console = open_console()
    console.print(listing.table())
    if arguments.prune is not None:
        for gone in prune(run, arguments.prune):
            say(console, f"removed {gone.name}")
    return EXIT_DATA if listing.damaged else EXIT_OK
