"""`triaxis schedule`: draw a recipe's pipeline."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trainer.commands.arguments import add_recipe, number, path, whole
from trainer.commands.network import known_network, show_stages
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, RecipeError

if TYPE_CHECKING:
    from parallel.simulator import Costs

SUMMARY = "Draw a recipe's pipeline: who works when, bubbles, micro-batches in flight."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--gpus", type=whole(1), metavar="N", help="default: one data-parallel replica")
    parser.add_argument(
        "--costs",
        type=_costs,
        default="1,1,1",
        metavar="F,I,W",
        help="one stage's forward, gradient of its input and gradient of its weights, in any unit of time",
    )
    parser.add_argument("--latency", type=number, default=0.0, metavar="T", help="of a message between ranks, in that unit")
    parser.add_argument("--out", type=path, metavar="FILE", help="a picture (.svg, .png), or the table of actions (.csv)")


def _costs(text: str) -> Costs:
    from parallel.simulator import Costs

    durations = [number(part) for part in text.split(",")]
    if len(durations) != 3 or min(durations) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not three durations above 0, as in 1,1,1")
    forward, input_grad, weight_grad = durations
    return Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad)


def run(arguments: argparse.Namespace) -> int:
    from parallel.simulator import simulate
    from trainer.commands.timeline import check_size, draw, save, summary
    from trainer.recipe import load
    from trainer.recipe.batch_plan import BatchPlan
    from trainer.recipe.pipeline import schedule_table

    resolved = load(arguments.recipe, arguments.set)
    recipe, parallel = resolved.recipe, resolved.recipe.parallel
    if parallel.pipeline == 1:
        raise RecipeError("parallel.pipeline = 1: there is no pipeline to draw; legal: 2 or more")
    replica = parallel.tensor * parallel.pipeline * parallel.context
    plan = BatchPlan.from_recipe(recipe, arguments.gpus or replica, "--gpus")
    check_size(parallel.pipeline * parallel.virtual_stages, plan.num_micro_batches)
    table, network = schedule_table(recipe, plan), known_network(resolved)
    timeline = simulate(table, arguments.costs, latency=arguments.latency)
    title = (
        f"{parallel.schedule}: pipeline {parallel.pipeline} × virtual_stages {parallel.virtual_stages}, "
        f"{plan.num_micro_batches} micro-batches"
    )
    if arguments.out is not None:
        save(arguments.out, table, timeline, title)
    console = open_console()
    say(console, title)
    for line in draw(timeline, table, console.width):
        console.print(line, no_wrap=True, crop=False)
    console.print(summary(timeline, table))
    show_stages(console, resolved, network)
    if arguments.out is not None:
        say(console, str(arguments.out))
    return EXIT_OK
