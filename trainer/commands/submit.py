"""`triaxis submit`: submit a recipe as a SLURM job."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import add_recipe, path, path_name, whole
from trainer.commands.network import known_network
from trainer.commands.output import open_console, say
from trainer.commands.ranks import divide
from trainer.errors import EXIT_OK
from trainer.redaction import redact_text

if TYPE_CHECKING:
    from trainer.cluster.submit import Order
    from trainer.planner.devices import Device
    from trainer.recipe import ResolvedRecipe

SUMMARY = "Write the sbatch script of a recipe for N nodes, check it, and hand it in to SLURM."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--nodes", type=whole(1), required=True, metavar="N")
    parser.add_argument("--ranks-per-node", type=whole(1), required=True, metavar="R", help="one for each GPU")
    parser.add_argument("--template", metavar="NAME", help="of slurm/; default: single-node, or multi-node with several nodes")
    parser.add_argument("--site", type=path, metavar="FILE", help="partition, account, modules, … as JSON; see slurm/README.md")
    parser.add_argument("--time", default="00:30:00", metavar="HH:MM:SS", help="of one job, which is queued again until done")
    parser.add_argument("--grace", type=whole(1), default=120, metavar="S", help="to save in, before the time is over")
    parser.add_argument(
        "--sweep", type=path, metavar="FILE", help="for --template array: a JSON list of KEY=VALUE on each line"
    )
    parser.add_argument("--run-dir", type=path_name, metavar="DIR", help="the run folder; default: run.dir/run.name")
    parser.add_argument(
        "--no-plan-check", action="store_true", help="submit, and start, also what does not fit the site's device by its plan"
    )
    parser.add_argument("--dry-run", action="store_true", help="write and print the script; submit nothing")


def run(arguments: argparse.Namespace) -> int:
    from trainer.cluster.submit import Order, hand_in, read_site, read_sweep, rehearse, render, task_folder, write_script
    from trainer.planner.devices import device
    from trainer.recipe import load
    from trainer.run_folder import RunFolder

    site, sweep = read_site(arguments.site), read_sweep(arguments.sweep) if arguments.sweep else ()
    on = None if site.device is None else device(site.device, "the site's device")
    resolved = load(arguments.recipe, arguments.set)
    recipe = resolved.recipe
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
        plan_check=not arguments.no_plan_check,
    )
    text = render(order, site)
    of_sweep = (load(arguments.recipe, [*arguments.set, *settings]) for settings in sweep)
    tasks = [(task, task_folder(order, number)) for number, task in enumerate(of_sweep)] or [(resolved, order.run_dir)]
    # Tasks of a sweep rarely differ in what a layout depends on: one search is enough.
    looked = [_look_before(task, order, folder, on, compares=number == 0) for number, (task, folder) in enumerate(tasks)]
    if all(done for done, _ in looked):
        say(open_console(), "\n".join(done for done, _ in looked))
        return EXIT_OK
    for remark in dict.fromkeys(remark for _, remarks in looked for remark in remarks):
        _remark(remark)
    script = write_script(order, text)
    if not arguments.dry_run or shutil.which("sbatch"):
        _remark(rehearse(script, site))
    if arguments.dry_run:
        sys.stdout.write(text)
    else:
        say(open_console(), f"job {hand_in(script, site)}: {script}")
    return EXIT_OK


def _look_before(
    resolved: ResolvedRecipe, order: Order, run_dir: Path, on: Device | None, *, compares: bool
) -> tuple[str, list[str]]:
    """Return, for one task, a line if the run has ended already (else "") and remarks."""
    from trainer.checkpoint.resume_check import Resume, finished
    from trainer.cluster.preflight import of_plan, remarks
    from trainer.recipe.epochs import as_tokenized

    done = finished(resolved, str(run_dir), Resume())
    resolved, passes = as_tokenized(resolved)
    warnings = [] if passes is None else [*passes.warnings(resolved.recipe)]
    network = known_network(resolved)
    ranks = order.nodes * order.ranks_per_node
    divide(resolved.recipe, network, ranks, "--nodes × --ranks-per-node")
    if network is not None and on is not None and not done:
        warnings += of_plan(resolved, network, ranks, on, refuses=order.plan_check, compares=compares)
    return done, [*warnings, *remarks(resolved.recipe, network, run_dir)]


def _remark(line: str) -> None:
    sys.stderr.write(f"triaxis: {redact_text(line)}\n")  # stdout may be the script
