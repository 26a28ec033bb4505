"""`triaxis convert`: write a recipe from another tool's config."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import path, whole
from trainer.errors import EXIT_OK, RecipeError
from trainer.redaction import redact_text

if TYPE_CHECKING:
    from trainer.convert.draft import Draft

SUMMARY = (
    "Write a recipe from a config of DeepSpeed, transformers' Trainer, LLaMA-Factory or axolotl, or from a recipe in YAML."
)
KINDS = ("deepspeed", "trainer", "llamafactory", "axolotl", "recipe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=path, metavar="CONFIG", help="a JSON or YAML file")
    parser.add_argument("out", type=path, nargs="?", metavar="OUT", help="the recipe's file; default: stdout")
    parser.add_argument("--from", dest="kind", choices=KINDS, help="whose config it is; default: recognised by its keys")
    parser.add_argument("--world-size", type=whole(1), default=1, metavar="N", help="ranks, for batches per device (default 1)")
    parser.add_argument("--replace", action="store_true", help="write over OUT if it is there")


def run(arguments: argparse.Namespace) -> int:
    from trainer.convert.reading import read_mapping
    from trainer.convert.tools import RECIPE, TOOLS, converted, recipe_of, recognised

    _require_free(arguments.out, arguments.replace)
    given = read_mapping(arguments.config)
    kind = arguments.kind or recognised(given)
    if kind is None:
        legal = ", ".join(KINDS)
        raise RecipeError(
            f"{arguments.config}: no tool that is known here has one of its keys; say whose it is: --from {legal}"
        )
    if kind == RECIPE:
        recipe = given
        _say(f"{arguments.config}: a recipe")
    else:
        draft = converted(given, TOOLS[kind], world_size=arguments.world_size, folder=arguments.config.parent)
        recipe = recipe_of(draft)
        _report(arguments.config, draft)
    text = json.dumps(recipe, indent=2, ensure_ascii=False, default=str) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        _write(arguments.out, text)
    _check(recipe, arguments.out or arguments.config)
    if arguments.out is not None:
        _say(f"{arguments.out} is written: triaxis check {shlex.quote(str(arguments.out))}")
    return EXIT_OK


def _require_free(out: Path | None, replace: bool) -> None:
    if out is not None and not replace and os.path.lexists(out):
        raise RecipeError(f"{out} is there already, and is not overwritten: name another file, or give --replace")


def _write(out: Path, text: str) -> None:
    from trainer.files.durable import replacing_file

    try:
        with replacing_file(out) as file:
            file.write(text.encode())
    except OSError as error:
        raise RecipeError(f"{out}: {error.strerror}: name a file that can be written") from None


def _check(recipe: dict[str, Any], where: Path) -> None:
    """Raise RecipeError with what `triaxis check` would refuse."""
    from trainer.recipe import load, load_given

    try:
        if "extends" in recipe:
            load(where)
        else:
            load_given(recipe, where)
    except RecipeError as error:
        raise RecipeError(f"{where}: `triaxis check` refuses the recipe until this is mended:", error.lines) from None


def _report(config: Path, draft: Draft) -> None:
    """Say where each value came from, and then what did not come."""
    _say(f"{config}: a config of {draft.tool.title}")
    order = [key for key in draft.origins if key in draft.values]
    width = max(map(len, order), default=0)
    for key in order:
        _say(f"  {key:{width}}  {json.dumps(draft.values[key], ensure_ascii=False, default=str)}  <- {draft.origins[key]}")
    if draft.missed:
        _say("without counterpart, or with one that differs:")
    for remark in draft.missed:
        _say(f"  {remark}")
    if draft.open:
        _say("to look at:")
    for remark in draft.open:
        _say(f"  {remark}")


def _say(line: str) -> None:
    shown = redact_text(line)
    sys.stderr.write("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + "\n")
