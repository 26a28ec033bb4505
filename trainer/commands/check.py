"""`triaxis check`: validate a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import add_recipe, path, whole
from trainer.commands.network import known_network, show_model, show_stages, show_template
from trainer.commands.output import open_console, say
from trainer.commands.ranks import divide
from trainer.errors import EXIT_OK, RecipeError
from trainer.fine_tuning import BY_DEVICE
from trainer.redaction import redact

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.model.config import TransformerConfig
    from trainer.passes import Passes
    from trainer.planner.prediction import Prediction
    from trainer.recipe import ResolvedRecipe
    from trainer.recipe.batch_plan import BatchPlan
    from trainer.schema import Recipe

SUMMARY = "Validate a recipe and show what it says, with origins; needs no GPU and no torch."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--world-size", type=whole(1), metavar="N", help="also check the batch arithmetic for N ranks")
    parser.add_argument("--device", metavar="NAME", help="to plan for, as h100-80g; default: the site's, or this machine's")
    parser.add_argument("--site", type=path, metavar="FILE", help="the settings of a cluster, which may name its device")
    parser.add_argument("--all", action="store_true", help="show defaults too")
    parser.add_argument("--json", action="store_true", help="print all values as JSON, instead of a table")


def run(arguments: argparse.Namespace) -> int:
    from trainer.planner.summary import facts, summary
    from trainer.recipe import load
    from trainer.recipe.epochs import as_tokenized

    resolved, passes = as_tokenized(load(arguments.recipe, arguments.set))
    network = known_network(resolved)
    plan = config = None
    if arguments.world_size is not None:
        plan, config = divide(resolved.recipe, network, arguments.world_size, "--world-size")
    elsewhere = _config_elsewhere(resolved, network, arguments.world_size)
    prediction = None if network is None else _prediction(arguments, resolved.recipe, network)
    if arguments.json:
        shown = resolved.as_resolved_json(config) | ({"deepspeed_config_elsewhere": redact(elsewhere)} if elsewhere else {})
        if network is not None and prediction is not None:
            shown["plan"] = facts(resolved.recipe, network, prediction)
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
        return EXIT_OK
    console = open_console()
    _show_what_matters(console, resolved, plan, network, passes)
    if network is not None and prediction is not None:
        for line in summary(resolved.recipe, network, prediction):
            say(console, line)
    console.print()
    _show_values(console, resolved, everything=arguments.all)
    if config is not None:
        console.print()
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


def _prediction(arguments: argparse.Namespace, recipe: Recipe, network: TransformerConfig) -> Prediction | None:
    """Return the plan on so many ranks, or on those of one model; None where only another number of
    ranks, or another machine than this one, can train it."""
    from trainer.cluster.submit import read_site
    from trainer.planner.prediction import predict
    from trainer.planner.verdict import chosen_device

    named = arguments.device or read_site(arguments.site).device
    ranks = arguments.world_size or _ranks_of_one_model(recipe)
    try:
        return predict(recipe, network, ranks, chosen_device(arguments.device, named), "--world-size")
    except RecipeError:
        if named or arguments.world_size:
            raise
        return None


def _show_what_matters(
    console: Console,
    resolved: ResolvedRecipe,
    plan: BatchPlan | None,
    network: TransformerConfig | None,
    passes: Passes | None,
) -> None:
    say(console, _step(resolved.recipe, plan))
    say(console, _layout(resolved.recipe, plan))
    show_model(console, resolved, network)
    show_stages(console, resolved, network)
    show_template(console, resolved.recipe)
    for line in _passes(resolved.recipe, passes):
        say(console, line)


def _step(recipe: Recipe, plan: BatchPlan | None) -> str:
    """Return the batch line, without a world size as far as it is the same for each."""
    from trainer.recipe.batch_plan import BatchPlan

    if plan is not None:
        return plan.line
    alone = BatchPlan.from_recipe(recipe, _ranks_of_one_model(recipe), "those of one model")
    return (
        f"step: {alone.global_sequences} sequences = micro {alone.micro_sequences} × {alone.num_micro_batches} micro-batches, "
        f"shared by the data-parallel ranks; {alone.tokens_per_step:,} tokens"
    )


def _layout(recipe: Recipe, plan: BatchPlan | None) -> str:
    parallel, ranks = recipe.parallel, _ranks_of_one_model(recipe)
    axes = f"tensor {parallel.tensor} × pipeline {parallel.pipeline}"
    axes += f" × context {parallel.context}" * (parallel.context > 1)
    if plan is not None:
        return f"layout: {ranks * plan.dp} ranks = {axes} × data-parallel {plan.dp}; ZeRO-{recipe.zero.stage}"
    legal = "any number of ranks" if ranks == 1 else f"{ranks} ranks or a multiple"
    return f"layout: {axes} × data-parallel, on {legal}; ZeRO-{recipe.zero.stage}"


def _ranks_of_one_model(recipe: Recipe) -> int:
    return recipe.parallel.tensor * recipe.parallel.pipeline * recipe.parallel.context


def _passes(recipe: Recipe, passes: Passes | None) -> Iterator[str]:
    """Yield how often the steps pass over the data, as far as it is known without tokenizing."""
    if passes is not None:
        yield from passes.lines(recipe)
        return
    known = "are known after `triaxis data prepare` with this recipe"
    if recipe.train.steps is None:
        yield f"train.epochs {recipe.train.epochs:g}: its steps {known}"
    else:
        sequences = recipe.train.steps * recipe.batch.global_sequences
        yield f"{recipe.train.steps:,} steps draw {sequences:,} sequences; the passes over the data {known}"


def _show_values(console: Console, resolved: ResolvedRecipe, *, everything: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("key", "value", "origin"):
        table.add_column(title, overflow="fold")
    entries: dict[str, Any] = resolved.as_resolved_json()["values"]
    chosen = {key: entry for key, entry in entries.items() if entry["origin"] != "default"}
    for key, entry in (entries if everything else chosen).items():
        # Escapes control characters, so that a recipe cannot drive the terminal.
        shown = entry.get("at_start") or json.dumps(entry["value"])
        table.add_row(*(Text(cell, style="" if key in chosen else "dim") for cell in (key, shown, entry["origin"])))
    console.print(table)
    if not everything:
        say(console, f"and {len(entries) - len(chosen)} defaults, which --all shows")
