"""`triaxis doctor`: what works on this machine, what does not, and the command against it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import path
from trainer.commands.network import known_network
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_OK, EXIT_RECIPE, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.doctor.case import Case
    from trainer.doctor.findings import Finding

SUMMARY = "Say what works on this machine, and give one command for each thing that does not."
COLUMNS = 80
NAME_COLUMNS = 21  # of the longest name that is usual


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, nargs="?", metavar="RECIPE", help="also look for what this recipe needs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one value of the recipe")
    parser.add_argument("--build", action="store_true", help="compile DeepSpeed's extensions that Triaxis uses, for later runs")
    parser.add_argument("--measure", action="store_true", help="measure this machine, for the planner; about a minute")
    parser.add_argument(
        "--sheet", type=path, metavar="FILE", help="where --measure writes; default: ~/.config/triaxis/here.json"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    from trainer.doctor.checks import examine

    if arguments.sheet and not arguments.measure:
        raise RecipeError("--sheet FILE is where --measure writes: give both, or neither")
    if arguments.set and not arguments.recipe:
        raise RecipeError("--set overrides a value of RECIPE, which is not given: triaxis doctor RECIPE --set KEY=VALUE")

    case = _case(arguments)
    if arguments.build:
        from trainer.doctor.build import build_all

        if build_all(case, _progress):
            case = _case(arguments)
    findings = examine(case)
    told: dict[str, Any] = {"findings": [finding.as_json() for finding in findings]}
    if not arguments.json:
        _show(open_console(), findings)
    if arguments.measure:
        told |= _measured(arguments, case)
    if arguments.json:
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    return EXIT_RECIPE if any(finding.stops for finding in findings) else EXIT_OK


def _case(arguments: argparse.Namespace) -> Case:
    from trainer.doctor.case import Case
    from trainer.doctor.looking import start_looking
    from trainer.recipe import load

    resolved = load(arguments.recipe, arguments.set) if arguments.recipe else None
    network = known_network(resolved) if resolved else None
    return Case(dict(os.environ), start_looking(os.environ), resolved, network, arguments.recipe)


def _measured(arguments: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Measure this machine, write its sheet, and show what is in it."""
    from trainer.doctor.measure import measure
    from trainer.doctor.sheet import summary, write_sheet
    from trainer.files.paths import here_sheet

    file: Path = arguments.sheet or here_sheet(os.environ)
    sheet = measure(case.run_dir, _progress)
    write_sheet(file, sheet)
    if not arguments.json:
        console = open_console()
        say(console, "")
        for line in summary(sheet):
            say(console, line)
        say(console, f"written to {file}")
    return {"sheet": str(file), **sheet}


def _progress(line: str) -> None:
    sys.stderr.write(f"triaxis: {line}\n")
    sys.stderr.flush()


def _show(console: Console, findings: Sequence[Finding]) -> None:
    for finding in findings:
        for line in lines_of(finding):
            say(console, line)
    say(console, "")
    say(console, _verdict(findings))


def lines_of(finding: Finding) -> list[str]:
    """Return a finding as lines of at most 80 columns; its command on a line of its own, whole."""
    head = f"{finding.state.value:<10}{finding.name:<{NAME_COLUMNS}}"
    lines = textwrap.wrap(
        finding.seen,
        COLUMNS,
        initial_indent=head + " " * (len(head) > 10 + NAME_COLUMNS),
        subsequent_indent=" " * (10 + NAME_COLUMNS),
        break_on_hyphens=False,
    )
    return [*lines, *([f"{'':<10}→ {finding.fix}"] if finding.fix else [])]


def _verdict(findings: Sequence[Finding]) -> str:
    stopping = [finding.name for finding in findings if finding.stops]
    if stopping:
        return f"a run here would fail: {', '.join(dict.fromkeys(stopping))}"
    counts = {state: sum(finding.state.value == state for finding in findings) for state in ("broken", "fallback")}
    if not any(counts.values()):
        return "a run can start here"
    return f"a run can start here; {counts['fallback']} fallbacks, {counts['broken']} broken and not needed"
