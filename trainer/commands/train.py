"""`triaxis train`: train a recipe."""

from __future__ import annotations

import argparse
import os

from trainer.commands.arguments import add_recipe, path_name
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, UserError

SUMMARY = "Train; start it alone, or under the deepspeed launcher, torchrun or srun."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--run-dir", type=path_name, metavar="DIR", help="the run folder; default: run.dir/run.name")
    parser.add_argument(
        "--resume",
        type=path_name,
        default="auto",
        metavar="HOW",
        help="auto (default): go on from the run's newest whole checkpoint, if it has any; never: a new run, an old one of the "
        "same name moves aside; or a checkpoint's folder",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        choices=("precision", "optimizer", "tokenizer", "data"),
        help="let this differ from what the checkpoint was saved with; may be repeated",
    )
    parser.add_argument(
        "--no-plan-check", action="store_true", help="start also where the plan needs more memory than there is"
    )


def run(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.resume_check import Resume, finished
    from trainer.launch.environment import speaks_first
    from trainer.launch.stop_request import Interrupted, StopRequest
    from trainer.recipe import load

    stop = StopRequest()
    stop.listen()
    resume = Resume(arguments.resume, tuple(arguments.allow_change))
    try:
        resolved = load(arguments.recipe, arguments.set)
        done = finished(resolved, arguments.run_dir, resume)
    except UserError as error:
        if not speaks_first(os.environ):
            # Rank 0 reads the same files and reports what is wrong with them.
            return error.exit_code
        raise
    if done:
        if speaks_first(os.environ):
            say(open_console(), done)
        return EXIT_OK
    # Otherwise torch's C++ writes 25 lines of frames to stderr when a peer is gone; we write one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from trainer.loop import train

    try:
        return train(resolved, arguments.run_dir, resume, stop, plan_check=not arguments.no_plan_check)
    except Interrupted as error:
        if not speaks_first(os.environ):
            return error.exit_code
        raise
    finally:
        stop.deafen()
