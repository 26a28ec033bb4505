"""A recipe as a SLURM job."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import add_recipe, whole
from trainer.commands.network import known_network
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK

if TYPE_CHECKING:
    from trainer.recipe import ResolvedRecipe

SUMMARY = "Write the sbatch script of a recipe for N nodes, check it, and hand it in to SLURM."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--nodes", type=whole(1), required=True, metavar="N")
    parser.add_argument("--ranks-per-node", type=whole(1), required=True, metavar="R", help="one for each GPU")
    parser.add_argument("--template", metavar="NAME", help="of slurm/; default: single-node, or multi-node with several nodes")
    parser.add_argument("--site", type=Path, metavar="FILE", help="partition, account, modules, … as JSON; see slurm/README.md")
    parser.add_argument("--time", default="00:30:00", metavar="HH:MM:SS", help="of one job, which is queued again until done")
    parser.add_argument("--grace", type=whole(1), default=120, metavar="S", help="to save in, before the time is over")
    parser.add_argument(
        "--sweep", type=Path, metavar="FILE", help="for --template array: a JSON list of KEY=VALUE on each line"
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the run folder; default: run.dir/run.name")
    parser.add_argument("--dry-run", action="store_true", help="write and print the script; submit nothing")


def run(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load
    from trainer.run_folder import RunFolder
    from trainer.submit import Order, hand_in, read_site, read_sweep, render, write_script

    site, sweep = read_site(arguments.site), read_sweep(arguments.sweep) if arguments.sweep else ()
    for settings in sweep or [()]:
        resolved = load(arguments.recipe, [*arguments.set, *settings])
        _check_division(resolved, arguments.nodes * arguments.ranks_per_node, "--nodes × --ranks-per-node")
    recipe = load(arguments.recipe, arguments.set).recipe
    order = Order(
        recipe=arguments.recipe.absolute(),
        run_dir=RunFolder.of(recipe, arguments.run_dir).path.absolute(),
        name=recipe.run.name,
        nodes=arguments.nodes,
        ranks_per_node=arguments.ranks_per_node,
        template=arguments.template or ("single-node" if arguments.nodes == 1 else "multi-node"),
        time=arguments.time,
        grace_s=arguments.grace,
        settings=tuple(arguments.set),
        sweep=sweep,
    )
    text = render(order, site)
    script = write_script(order, text)
    if arguments.dry_run:
        sys.stdout.write(text)
    else:
        say(open_console(), f"job {hand_in(script, site)}: {script}")
    return EXIT_OK


def _check_division(resolved: ResolvedRecipe, world_size: int, how: str) -> None:
    """RecipeError when that many ranks cannot train the recipe."""
    from trainer.batching import BatchPlan
    from trainer.deepspeed_config import deepspeed_config
    from trainer.model.config import largest_weight
    from trainer.recipe.pipeline import check_micro_batches

    plan, network = BatchPlan.from_recipe(resolved.recipe, world_size, how), known_network(resolved)
    check_micro_batches(resolved.recipe, plan)
    deepspeed_config(resolved.recipe, plan, largest_weight=largest_weight(network) if network is not None else None)
