"""`triaxis plan`: show the memory of every rank before anything is started."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import add_recipe, path, whole
from trainer.commands.network import known_network
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, EXIT_RECIPE, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.planner.devices import Device
    from trainer.planner.memory import RankMemory

SUMMARY = "Show what memory each rank needs, item by item, and whether it fits a device; needs no GPU and no torch."
GIB = 1 << 30
COLUMNS = 6  # ranks of the pipeline that are shown beside each other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, required=False)
    parser.add_argument("--gpus", type=whole(1), metavar="N", help="GPUs, a rank on each; default: those of one model")
    parser.add_argument(
        "--device", metavar="NAME", help="of which kind they are, such as h100-80g; default: the site's, or this machine's"
    )
    parser.add_argument("--site", type=path, metavar="FILE", help="the settings of a cluster, which may name its device")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--calibrate", type=path, metavar="RUN", help="instead of a recipe: take the factor of its device from a finished run"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.calibrate is not None:
        return _calibrate(arguments)
    if arguments.recipe is None:
        raise RecipeError("plan: give a RECIPE, or --calibrate and the folder of a finished run")
    from trainer.cluster.submit import read_site
    from trainer.planner.memory import checkpoint_bytes, disk_bytes
    from trainer.planner.prediction import predict
    from trainer.planner.verdict import chosen_device, verdict
    from trainer.recipe import load

    resolved = load(arguments.recipe, arguments.set)
    recipe, network = resolved.recipe, known_network(resolved)
    if network is None:
        raise RecipeError(
            f"{arguments.recipe}: its network is not known before the tokenizer or the hub is opened: give folders, or a family"
        )
    if recipe.precision.dtype is None:
        recipe = recipe.with_format("bf16")
    parallel = recipe.parallel
    gpus = arguments.gpus or parallel.tensor * parallel.pipeline * parallel.context
    prediction = predict(recipe, network, gpus, chosen_device(arguments.device, read_site(arguments.site).device))
    stored = {"checkpoint": checkpoint_bytes(recipe, network), "disk": disk_bytes(recipe, network)}
    if arguments.json:
        sys.stdout.write(json.dumps(_facts(prediction.ranks, stored), indent=2) + "\n")
    else:
        console = open_console()
        say(console, prediction.batch.line)
        _show(console, prediction.ranks)
        say(console, f"checkpoint: {stored['checkpoint'] / GIB:,.2f} GiB each; {stored['disk'] / GIB:,.2f} GiB of disk in all")
        if prediction.device is not None:
            say(console, verdict(prediction))
            _say_calibrated(console, prediction.device)
    return EXIT_RECIPE if prediction.fits is False else EXIT_OK


def _say_calibrated(console: Console, on: Device) -> None:
    from trainer.planner.calibration import said_of

    if line := said_of(on.name, os.environ):
        say(console, line)


def _calibrate(arguments: argparse.Namespace) -> int:
    from trainer.planner.calibration import calibrate

    if arguments.recipe is not None:
        raise RecipeError(f"--calibrate {arguments.calibrate}: a run has its own recipe: leave {arguments.recipe} out")
    say(open_console(), calibrate(arguments.calibrate, os.environ))
    return EXIT_OK


def _show(console: Console, ranks: Sequence[RankMemory]) -> None:
    from rich.table import Table
    from rich.text import Text

    from trainer.planner.items import Place

    shown = ranks if len(ranks) <= COLUMNS else [*ranks[: COLUMNS - 1], ranks[-1]]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("GiB of a rank")
    for rank in shown:
        table.add_column(f"stage {', '.join(map(str, rank.stages))}", justify="right")
    for place in Place:
        names = dict.fromkeys(item.name for rank in shown for item in rank.items if item.place is place)
        if not names:
            continue
        for name in names:
            sizes = [sum(i.num_bytes for i in rank.items if (i.name, i.place) == (name, place)) for rank in shown]
            table.add_row(*(Text(cell) for cell in (f"  {name}", *(f"{size / GIB:,.3f}" for size in sizes))))
        peaks = (f"{rank.peak(place) / GIB:,.3f}" for rank in shown)
        table.add_row(*(Text(cell, style="bold") for cell in (f"{place.value}, at the fullest moment", *peaks)))
    console.print(table)
    if len(shown) < len(ranks):
        say(console, f"and {len(ranks) - len(shown)} more ranks of the pipeline between the last two; --json has all")


def _facts(ranks: Sequence[RankMemory], stored: dict[str, int]) -> dict[str, Any]:
    from trainer.planner.items import Place

    return {
        "ranks": [
            {
                "rank": rank.rank,
                "stages": list(rank.stages),
                "peak": {place.value: rank.peak(place) for place in Place},
                "items": [
                    {
                        "name": item.name,
                        "bytes": item.num_bytes,
                        "place": item.place.value,
                        "phase": item.phase.value,
                        "note": item.note,
                    }
                    for item in rank.items
                ],
            }
            for rank in ranks
        ],
        **{f"{name}_bytes": size for name, size in stored.items()},
    }
