"""`triaxis plan`: show the memory of every rank and the time of a step before anything is started,
and find the layout that is best."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import add_recipe, path, positive, tokens
from trainer.commands.network import known_network
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, EXIT_RECIPE, RecipeError
from trainer.planner.items import GIB

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.model.config import TransformerConfig
    from trainer.planner.devices import Device
    from trainer.planner.memory import RankMemory
    from trainer.planner.search.worlds import World
    from trainer.recipe import ResolvedRecipe

SUMMARY = "Show what each rank needs, whether it fits a device, and the layouts that are best; needs no GPU and no torch."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, required=False)
    parser.add_argument(
        "--gpus",
        type=numbers,
        metavar="N",
        help="GPUs, a rank on each; default: those of one model; 24..32 or 8,16,32: what each number costs",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="of which kind they are, such as h100-80g; default: the site's, or this machine's"
    )
    parser.add_argument("--site", type=path, metavar="FILE", help="the settings of a cluster, which may name its device")
    parser.add_argument(
        "--search", action="store_true", help="find the best layout for N GPUs; without --gpus: for one node, two, four, …"
    )
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="with --search: write the best layout as a recipe that extends it"
    )
    parser.add_argument("--tokens", type=tokens, metavar="N", help="of the whole training, as 15T; default: train.steps'")
    parser.add_argument(
        "--mtbf-hours",
        type=positive,
        metavar="H",
        help="mean time between failures of one device, for the best checkpoint interval",
    )
    parser.add_argument(
        "--disk-rate", type=positive, default=1.0, metavar="GB/S", help="at which a checkpoint is written; default: 1"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--calibrate", type=path, metavar="RUN", help="instead of a recipe: take the factor of its device from a finished run"
    )


def numbers(text: str) -> list[int]:
    from trainer.planner.search.worlds import read_worlds

    try:
        return read_worlds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: argparse.Namespace) -> int:
    if arguments.calibrate is not None:
        return _calibrate(arguments)
    if arguments.recipe is None:
        raise RecipeError("plan: give a RECIPE, or --calibrate and the folder of a finished run")
    from trainer.cluster.submit import read_site
    from trainer.planner.verdict import chosen_device
    from trainer.recipe import load

    several = arguments.gpus is not None and len(arguments.gpus) > 1
    if arguments.out and (not arguments.search or several or arguments.gpus is None):
        raise RecipeError("--out FILE takes the best layout for one number of GPUs: give --search and --gpus N with it")
    resolved = load(arguments.recipe, arguments.set)
    network = _network(arguments, resolved)
    device = chosen_device(arguments.device, read_site(arguments.site).device)
    if not several and not arguments.search:
        return _plan(arguments, resolved, network, device)
    if device is None:
        from trainer.planner.devices import sheets

        raise RecipeError(
            f"layouts are compared on a device: give --device NAME, or a --site that names it; legal: {', '.join(sheets())}"
        )
    if several or arguments.gpus is None:
        return _worlds(arguments, resolved, network, device)
    return _search(arguments, resolved, network, device)


def _network(arguments: argparse.Namespace, resolved: ResolvedRecipe) -> TransformerConfig:
    from trainer.model.auto_rules import AUTO

    network = known_network(resolved)
    if network is not None:
        return network
    if resolved.recipe.model.family == AUTO:
        raise RecipeError(
            f'{arguments.recipe}: model.family "{AUTO}" has no plan: transformers builds its model, and only the layers that '
            "are built here are counted; name a family, where the model is of one"
        )
    raise RecipeError(
        f"{arguments.recipe}: its network is not known before the tokenizer or the hub is opened: give folders, or a family"
    )


# ---------------------------------------------------------------------------- one layout


def _plan(arguments: argparse.Namespace, resolved: ResolvedRecipe, network: TransformerConfig, device: Device | None) -> int:
    from trainer.planner.explain import Failures, explain
    from trainer.planner.memory import checkpoint_bytes, disk_bytes
    from trainer.planner.prediction import predict, with_format_of
    from trainer.planner.shown import show_ranks
    from trainer.planner.verdict import verdict, ways_to_fit

    recipe = with_format_of(resolved.recipe, device)
    parallel = recipe.parallel
    gpus = arguments.gpus[0] if arguments.gpus else parallel.tensor * parallel.pipeline * parallel.context
    prediction = predict(recipe, network, gpus, device)
    hours = arguments.mtbf_hours
    failures = Failures(mtbf_hours=hours, disk_rate=arguments.disk_rate * 1e9) if hours else None
    explained = explain(recipe, network, prediction, tokens=arguments.tokens, failures=failures)
    stored = {"checkpoint": checkpoint_bytes(recipe, network), "disk": disk_bytes(recipe, network)}
    ways = ways_to_fit(resolved, network, prediction) if prediction.fits is False else []
    if arguments.json:
        told = {
            **_facts(prediction.ranks, stored),
            "step": explained.as_json(),
            "fits": prediction.fits,
            "device": device and device.name,
            "ways_to_fit": ways,
        }
        _print_json(told)
    else:
        console = open_console()
        say(console, prediction.batch.line)
        show_ranks(console, prediction.ranks)
        say(console, f"checkpoint: {stored['checkpoint'] / GIB:,.2f} GiB each; {stored['disk'] / GIB:,.2f} GiB of disk in all")
        say(console, "\n".join(explained.lines()))
        for line in filter(None, (verdict(prediction), *ways)):
            say(console, line)
        if device is not None:
            _say_calibrated(console, device)
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


# ---------------------------------------------------------------------------- many layouts


def _search(arguments: argparse.Namespace, resolved: ResolvedRecipe, network: TransformerConfig, device: Device) -> int:
    from trainer.planner.search.facts import facts_of_search
    from trainer.planner.search.find import Search
    from trainer.planner.search.text import write_recipe
    from trainer.planner.search.worlds import require_one
    from trainer.planner.shown import show_search

    search = Search(resolved, network, arguments.gpus[0], device)
    best = require_one(search)
    settings = best.choice.settings(resolved)
    if arguments.out:
        write_recipe(arguments.out, arguments.recipe, arguments.set, settings)
    command = shlex.join(["triaxis", "check", str(arguments.recipe), "--world-size", str(search.world_size)])
    command += "".join(f" --set {shlex.quote(setting)}" for setting in [*arguments.set, *settings])
    if arguments.json:
        _print_json({**facts_of_search(search), "command": command, "written": arguments.out and str(arguments.out)})
        return EXIT_OK
    console = open_console()
    show_search(console, search)
    say(console, "")
    say(console, command if settings else f"the recipe has the best layout already: {command}")
    if arguments.out:
        say(console, f"written to {arguments.out}")
    return EXIT_OK


def _worlds(arguments: argparse.Namespace, resolved: ResolvedRecipe, network: TransformerConfig, device: Device) -> int:
    from trainer.planner.search.facts import facts_of_world
    from trainer.planner.search.worlds import doubling, worlds
    from trainer.planner.shown import show_worlds

    sizes = arguments.gpus
    found = [*_watched(worlds(resolved, network, sizes, device) if sizes else doubling(resolved, network, device))]
    if arguments.json:
        _print_json({"device": device.name, "worlds": [facts_of_world(world, resolved) for world in found]})
    else:
        show_worlds(open_console(), found)
    return EXIT_OK if any(world.best for world in found) else EXIT_RECIPE


def _watched(found: Iterable[World]) -> Iterable[World]:
    """Yield what each number of devices costs, and say on a terminal how far the search is."""
    for world in found:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{world.world_size:,} devices done ")
            sys.stderr.flush()
        yield world
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")


def _print_json(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
