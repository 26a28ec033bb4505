"""`triaxis data`: prepare tokenized data, verify it, and show what is learned of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import add_overrides, add_recipe, path, whole
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.inspection.sequences import Inspection, Shown

SUMMARY = "Prepare tokenized data, or show what is learned of it."
ROWS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    tokenize = "Tokenize a recipe's sources now, before a queue."
    prepare = actions.add_parser("prepare", help=tokenize, description=tokenize, allow_abbrev=False)
    add_recipe(prepare)
    prepare.set_defaults(action=_prepare)
    look = "Show sequences as training takes them, with what is learned; or verify a folder of tokenized data."
    inspect = actions.add_parser("inspect", help=look, description=look, allow_abbrev=False)
    inspect.add_argument("path", type=path, metavar="RECIPE", help="a recipe; or a folder of tokenized data, such as runs/data")
    add_overrides(inspect)
    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--rows", type=whole(1), metavar="K", help=f"show the first K sequences of step 1 on; default {ROWS}")
    which.add_argument(
        "--row",
        type=whole(1),
        metavar="N",
        help="show what became of row N of data.sources, counted from 1, and its neighbours",
    )
    inspect.add_argument("--out", type=path, metavar="PAGE.html", help="write a page instead")
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
    if arguments.path.is_dir() or not arguments.path.exists():
        given = {"--set": arguments.set, "--rows": arguments.rows, "--row": arguments.row, "--out": arguments.out}
        if wrong := [flag for flag, value in given.items() if value]:
            raise RecipeError(f"{wrong[0]} needs a recipe, and {arguments.path} is none: give its file")
        return _verify(arguments.path)
    from trainer.recipe import load
    from trainer.track.progress import work_progress

    resolved = load(arguments.path, arguments.set)
    from trainer.inspection.account import account
    from trainer.inspection.opening import inspection_of

    with work_progress(shown=True) as progress:
        inspection, remarks = inspection_of(resolved, progress)
    lines = [*remarks, *(f"data: {line}" for line in account(resolved.recipe.data, inspection.prepared))]
    found, said = _chosen(inspection, arguments)
    console = open_console()
    if arguments.out is None:
        _show(console, [*lines, *said], found)
        return EXIT_OK
    from trainer.inspection.page import write_page

    write_page(arguments.out, resolved.recipe, [*lines, *said], found)
    say(console, f"{arguments.out}: {len(found)} sequence{'s' if len(found) != 1 else ''}")
    return EXIT_OK


def _chosen(inspection: Inspection, arguments: argparse.Namespace) -> tuple[list[Shown], list[str]]:
    """Return the sequences to show, and remarks on the row that was asked for."""
    if arguments.row is not None:
        return inspection.row(arguments.row)
    return list(inspection.first(arguments.rows or ROWS)), []


def _show(console: Console, lines: Iterable[str], found: Iterable[Shown]) -> None:
    from trainer.inspection.pieces import visible
    from trainer.inspection.terminal import Terminal

    terminal = Terminal(colour=console.is_terminal and not (console.no_color or console.color_system is None))
    for line in lines:
        say(console, visible(line))
    console.print(terminal.legend(), soft_wrap=True)
    for shown in found:
        for text in terminal.lines(shown):
            console.print(text, soft_wrap=True)


def _verify(folder: Path) -> int:
    """Read every store below the folder in full. DataError (exit 65) at the first that is
    damaged."""
    from trainer.data.store import TokenStore

    headers = sorted(folder.rglob("header.json"))
    if not headers:
        raise RecipeError(f"{folder}: no tokenized data (header.json) there; give a recipe, or a folder such as runs/data")
    for header in headers:
        store = TokenStore.open(header.parent, verify="full")
        held = f"{store.num_documents:,} documents, {store.num_tokens:,} tokens"
        if packing := store.packing:
            rows = store.num_tokens // packing.row_tokens
            held = (
                f"{packing.examples:,} examples in {rows:,} sequences of {packing.row_tokens:,} tokens, {packing.targets:,} of "
                f"them targets, {packing.filler:,} to fill up sequences"
            )
        say(open_console(), f"{header.parent}: {held}, vocabulary {store.contents.vocab_size:,}: intact")
    return EXIT_OK
