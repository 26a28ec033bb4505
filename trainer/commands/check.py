"""`triaxis check`: validate a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from trainer.commands.arguments import add_recipe, whole
from trainer.commands.network import known_network, show_model, show_stages, show_template
from trainer.commands.output import open_console, say
from trainer.commands.ranks import divide
from trainer.errors import EXIT_OK
from trainer.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.recipe import ResolvedRecipe

SUMMARY = "Validate a recipe and show every value with its origin; needs no GPU and no torch."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--world-size", type=whole(1), metavar="N", help="also check the batch arithmetic for N ranks")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load

    resolved = load(arguments.recipe, arguments.set)
    network = known_network(resolved)
    plan = config = None
    if arguments.world_size is not None:
        plan, config = divide(resolved.recipe, network, arguments.world_size, "--world-size")
    if arguments.json:
        sys.stdout.write(json.dumps(resolved.as_resolved_json(config), indent=2) + "\n")
        return EXIT_OK
    console = open_console()
    _show_values(console, resolved)
    console.print()
    show_model(console, resolved, network)
    show_stages(console, resolved, network)
    show_template(console, resolved.recipe)
    if plan is not None:
        say(
            console,
            f"step: {plan.global_sequences} sequences = micro {plan.micro_sequences} × data-parallel {plan.dp} × "
            f"{plan.num_micro_batches} micro-batches; {plan.tokens_per_step:,} tokens",
        )
        say(console, "DeepSpeed gets:")
        say(console, json.dumps(redact(config), indent=2))
    return EXIT_OK


def _show_values(console: Console, resolved: ResolvedRecipe) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("key", "value", "origin"):
        table.add_column(title, overflow="fold")
    for key, entry in resolved.as_resolved_json()["values"].items():
        style = "dim" if entry["origin"] == "default" else ""
        # Escapes control characters, so that a recipe cannot drive the terminal.
        shown = json.dumps(entry["value"])
        table.add_row(*(Text(cell, style=style) for cell in (key, shown, entry["origin"])))
    console.print(table)
