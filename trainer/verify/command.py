"""`triaxis verify`: the recipe in one process and in each layout, compared."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.errors import RecipeError
from trainer.launch.ports import held_port
from trainer.recipe import ResolvedRecipe, load
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import check_micro_batches
from trainer.verify.compare import Comparison, Outcome, compare
from trainer.verify.job import Job
from trainer.verify.layouts import ONE_PROCESS, NamedLayout, parse, recipe_in, up_to
from trainer.verify.processes import run_ranks
from trainer.verify.twin import full_size, scaled_down

STEPS = 3  # with the recipe's own optimizer
DEFAULT_PROCESSES = (4, 8)  # the second if the machine has as many cores or GPUs
MOST_PROCESSES = 16  # on CPUs, where they may share cores


@dataclass(frozen=True)
class Row:
    """The result for one layout: a comparison, or why it was not run."""

    name: str
    processes: int
    comparison: Comparison | None = None
    refused: str = ""

    @property
    def agrees(self) -> bool:
        return self.comparison is not None and self.comparison.agrees


@dataclass(frozen=True)
class Report:
    """The result for all layouts. `changes`: how the trained recipe differs from the user's.
    `initial_hash`: of one process's weights."""

    changes: list[str]
    initial_hash: str
    rows: list[Row]

    @property
    def agrees(self) -> bool:
        """Return whether every layout is the same training; one that could not be run is not."""
        return all(row.agrees for row in self.rows)


def verify(
    resolved: ResolvedRecipe, names: Sequence[str], *, full: bool, timeout_s: float, say: Callable[[str], None]
) -> Report:
    """Compare layouts with one process at ZeRO-0. Without `names`: all layouts that fit this
    machine and divide the model.

    `say` is told which layout is running. LayoutFailed if a process dies or hangs.
    """
    with tempfile.TemporaryDirectory(prefix="triaxis-verify-") as folder:
        gpus = torch.cuda.device_count()
        bench = Bench(Path(folder), gpus if gpus > 1 else 0, timeout_s, say)
        layouts = list(dict.fromkeys(map(parse, names))) or bench.default_layouts(resolved.given)
        refused = {named: bench.refusal(resolved.given, named) for named in layouts}
        if not names:
            layouts = [named for named in layouts if not refused[named]]
        sizes = [named.layout for named in (ONE_PROCESS, *layouts) if not refused.get(named)]
        twin = full_size(resolved) if full else scaled_down(resolved, sizes)
        refused = {named: refused[named] or bench.refusal(twin.given, named, batch=True) for named in layouts}
        expected = bench.train({**twin.given, "zero": {}}, ONE_PROCESS)
        if not all(map(math.isfinite, expected.ranks[0].losses)):
            raise RecipeError(f"one process alone has losses {expected.ranks[0].losses}: there is nothing to compare with")
        rows = [
            Row(str(named), named.layout.world_size, refused=refused[named])
            if refused[named]
            else Row(str(named), named.layout.world_size, compare(bench.train(twin.given, named), expected))
            for named in layouts
        ]
        return Report(twin.changes, expected.initial_hash, rows)


@dataclass(frozen=True)
class Bench:
    """A machine, with a folder for the files of each layout. `gpus`: 0 if there are too few for two
    ranks, which then share the CPUs."""

    folder: Path
    gpus: int
    timeout_s: float
    say: Callable[[str], None]

    def default_layouts(self, given: Mapping[str, Any]) -> list[NamedLayout]:
        few, many = DEFAULT_PROCESSES
        places = self.gpus or len(os.sched_getaffinity(0))
        processes = many if places >= many else min(few, self.gpus or few)
        layouts = up_to(processes, sequence=given.get("parallel", {}).get("sequence_parallel") is not False)
        if not given.get("train", {}).get("compile"):
            return layouts
        return [replace(named, compiles=True) for named in (ONE_PROCESS, *layouts)]

    def refusal(self, given: Mapping[str, Any], named: NamedLayout, *, batch: bool = False) -> str:
        """Return why this layout cannot be run, because the recipe's checks or the machine refuse
        it; "" if it can.

        `batch`: also check how the batch divides.
        """
        world_size = named.layout.world_size
        if world_size > (self.gpus or MOST_PROCESSES):
            have = f"has {self.gpus} GPUs" if self.gpus else f"runs up to {MOST_PROCESSES} on its CPUs"
            return f"{world_size} processes: this machine {have}"
        file = self._write_recipe(given, named)
        try:
            recipe = load(file).recipe
            if batch:
                check_micro_batches(recipe, BatchPlan.from_recipe(recipe, world_size, f"layout {named}"))
        except RecipeError as error:
            place = re.compile(re.escape(str(file)) + r"(:\d+)*: ")
            return "; ".join(place.sub("", line) for line in error.lines)
        return ""

    def train(self, given: Mapping[str, Any], named: NamedLayout) -> Outcome:
        self.say(f"{named}: {named.layout.world_size} process{'es' if named.layout.world_size > 1 else ''}")
        folder = self._write_recipe(given, named).parent
        with held_port() as port:
            Job(asdict(named.layout), port, STEPS).write(folder / "job.json")
            run_ranks(str(named), folder, named.layout.world_size, gpus=self.gpus > 0, timeout_s=self.timeout_s)
        return Outcome.read(folder, named.layout.world_size)

    def _write_recipe(self, given: Mapping[str, Any], named: NamedLayout) -> Path:
        path = self.folder / str(named).replace(" ", "-") / "recipe.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(recipe_in(given, named)), encoding="utf-8")
        return path
