"""`triaxis data`: prepare and inspect tokenized data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from trainer.commands.arguments import add_recipe, path
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, RecipeError

SUMMARY = "Prepare or inspect tokenized data."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    tokenize, look = "Tokenize a recipe's sources now, before a queue.", "Show and verify a folder of tokenized data."
    prepare = actions.add_parser("prepare", help=tokenize, description=tokenize, allow_abbrev=False)
    add_recipe(prepare)
    prepare.set_defaults(action=_prepare)
    inspect = actions.add_parser("inspect", help=look, description=look, allow_abbrev=False)
    inspect.add_argument("folder", type=path, metavar="FOLDER")
    inspect.set_defaults(action=_inspect)


def run(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    return action(arguments)


def _prepare(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load
    from trainer.recipe.epochs import settled
    from trainer.track.progress import work_progress

    resolved = load(arguments.recipe, arguments.set)
    recipe = resolved.recipe
    from trainer.data import prepare, prepare_summary

    with work_progress(shown=True) as progress:
        cache_dir = Path(str(recipe.data.cache_dir))
        prepared = prepare(recipe.data, seed=recipe.run.seed, cache_dir=cache_dir, build=True, progress=progress)
    for note in prepared.notes:
        say(open_console(), note)
    for row in prepare_summary(prepared):
        say(open_console(), str(row))
    for line in prepared.passes.lines(settled(resolved, prepared.passes).recipe):
        say(open_console(), line)
    return EXIT_OK


def _inspect(arguments: argparse.Namespace) -> int:
    """Read every store below the folder in full. DataError (exit 65) at the first that is
    damaged."""
    from trainer.data.store import TokenStore

    headers = sorted(arguments.folder.rglob("header.json"))
    if not headers:
        raise RecipeError(f"{arguments.folder}: no tokenized data (header.json) there; give a folder such as runs/data")
    for header in headers:
        store = TokenStore.open(header.parent, verify="full")
        targets = f"{store.packing.targets:,} of them targets, " if store.packing else ""
        say(
            open_console(),
            f"{header.parent}: {store.num_documents:,} documents, {store.num_tokens:,} tokens, {targets}"
            f"vocabulary {store.contents.vocab_size:,}: intact",
        )
    return EXIT_OK
