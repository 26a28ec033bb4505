"""`triaxis eval`: measure a model on data."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import path, path_name, whole
from trainer.commands.output import open_console
from trainer.errors import EXIT_OK, RecipeError
from trainer.redaction import redact

if TYPE_CHECKING:
    from trainer.inference.evaluation import Request

SUMMARY = "Measure a checkpoint or a Hugging Face folder on data; alone or under a launcher, in any layout."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights", type=path_name, metavar="WEIGHTS", help="a checkpoint's folder, a run's, or a Hugging Face folder"
    )
    parser.add_argument("files", nargs="*", type=path_name, metavar="FILE", help="default: what the run held out")
    parser.add_argument(
        "--target", type=path_name, metavar="FILE", help="of a translation, where FILE has one text on a line: the other side"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe that the weights were saved with, as in --set parallel.tensor=2, which is 1 otherwise",
    )
    parser.add_argument(
        "--sequences", type=whole(1), metavar="N", help="at most; default: all of FILE; of the harness: examples of each task"
    )
    parser.add_argument(
        "--translations", type=whole(0), metavar="N", help="texts to translate for BLEU and chrF; default: all; 0: none"
    )
    parser.add_argument(
        "--harness", action="append", metavar="TASK", help="a task of lm-evaluation-harness, in place of FILE; may be repeated"
    )
    parser.add_argument("--harness-path", type=path, metavar="DIR", help="with tasks of your own for --harness")
    parser.add_argument("--few-shot", type=whole(0), metavar="N", help="examples before each question of --harness")
    parser.add_argument("--chat", action="store_true", help="write the questions of --harness as conversations")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from trainer.inference.evaluation import evaluate, table

    found = _with_harness(arguments) if arguments.harness else evaluate(_request(arguments))
    if found is None:
        return EXIT_OK
    if arguments.json:
        sys.stdout.write(json.dumps(redact(found), indent=2) + "\n")
    else:
        console = open_console()
        for part in table(found):
            console.print(part)
    return EXIT_OK


def _with_harness(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from importlib.util import find_spec

    given = {"--target": arguments.target, "--translations": arguments.translations}
    if unread := [*arguments.files, *(flag for flag, value in given.items() if value is not None)]:
        raise RecipeError(f"--harness brings its own data: remove {unread[0]}")
    if find_spec("lm_eval") is None:
        raise RecipeError("--harness needs lm-evaluation-harness: pip install lm-eval")
    from trainer.inference.harness import run_harness

    return run_harness(
        arguments.weights,
        arguments.set,
        tasks=arguments.harness,
        folder=arguments.harness_path,
        few_shot=arguments.few_shot,
        limit=arguments.sequences,
        chat=arguments.chat,
    )


def _request(arguments: argparse.Namespace) -> Request:
    from trainer.inference.evaluation import Request

    given = {"--harness-path": arguments.harness_path, "--few-shot": arguments.few_shot, "--chat": arguments.chat or None}
    if unread := [flag for flag, value in given.items() if value is not None]:
        raise RecipeError(f"{unread[0]} is used only with --harness: remove it")
    files = tuple({"path": path} for path in arguments.files)
    if arguments.target is not None:
        if len(files) != 1:
            raise RecipeError(f"--target is the other side of one FILE, not of {len(files)}: give one")
        files = ({**files[0], "target_path": arguments.target},)
    return Request(arguments.weights, files, tuple(arguments.set), arguments.sequences, arguments.translations)
