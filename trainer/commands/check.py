"""`triaxis check`: validate a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import add_recipe, whole
from trainer.commands.network import known_network, show_model, show_stages
from trainer.commands.output import open_console, say
from trainer.commands.ranks import divide
from trainer.errors import EXIT_OK
from trainer.fine_tuning import BY_DEVICE
from trainer.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.model.config import TransformerConfig
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
    elsewhere = _config_elsewhere(resolved, network, arguments.world_size)
    if arguments.json:
        shown = resolved.as_resolved_json(config) | ({"deepspeed_config_elsewhere": redact(elsewhere)} if elsewhere else {})
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return EXIT_OK
    console = open_console()
    _show_values(console, resolved)
    console.print()
    show_model(console, resolved, network)
    show_stages(console, resolved, network)
    if plan is not None:
        say(
            console,
            f"step: {plan.global_sequences} sequences = micro {plan.micro_sequences} × data-parallel {plan.dp} × "
            f"{plan.num_micro_batches} micro-batches; {plan.tokens_per_step:,} tokens",
        )
        say(console, f"DeepSpeed gets{f' ({BY_DEVICE}; here with bf16)' if elsewhere else ''}:")
        say(console, json.dumps(redact(config), indent=2))
    return EXIT_OK


def _config_elsewhere(
    resolved: ResolvedRecipe, network: TransformerConfig | None, world_size: int | None
) -> dict[str, Any] | None:
    """Return what DeepSpeed gets on devices without bf16, where they decide the compute format."""
    if world_size is None or resolved.recipe.precision.dtype is not None:
        return None
    return divide(resolved.recipe.with_format("fp32"), network, world_size, "--world-size")[1]


def _show_values(console: Console, resolved: ResolvedRecipe) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("key", "value", "origin"):
        table.add_column(title, overflow="fold")
    for key, entry in resolved.as_resolved_json()["values"].items():
        style = "dim" if entry["origin"] == "default" else ""
        # Escapes control characters, so that a recipe cannot drive the terminal.
        shown = entry.get("at_start") or json.dumps(entry["value"])
        table.add_row(*(Text(cell, style=style) for cell in (key, shown, entry["origin"])))
    console.print(table)
