"""Recipes drawn at random, planned and searched: nothing but a clean line may go wrong.

    python -m tools.campaign.plans --cases 10000 --searched 300 --seed 0

Each drawn recipe is planned as it is and in variants of other sizes, layouts and devices, up to
models and numbers of devices that no machine here has. A plan must be numbers that make sense. A
search must show nothing that `check --world-size` refuses. The longest plan and the longest search
are reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parallel.schedules import SCHEDULES
from tools.campaign.cases import report
from tools.campaign.recipe_draw import draw
from tools.campaign.recipe_supplies import Supplies
from trainer.commands.network import known_network
from trainer.commands.ranks import divide
from trainer.errors import UserError
from trainer.model.config import TransformerConfig
from trainer.model.families import FAMILIES
from trainer.planner.devices import device, sheets
from trainer.planner.items import Place
from trainer.planner.prediction import predict
from trainer.planner.search.find import Search
from trainer.planner.search.remedies import remedies
from trainer.recipe import ResolvedRecipe, load
from trainer.recipe.batch_plan import divisors

REPORTED_EVERY = 20  # drawn recipes
VARIANTS = 40  # of a drawn recipe, which takes longer to draw than to plan
MOSTLY = 0.9  # of the plans are for a number of devices over which the batch divides
WORLDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 100, 128, 256, 512, 1000, 1024, 4096, 8192, 10000)
GROWTH = (1, 4, 16, 64, 256, 512)
FACTORS = {"hidden_size": 1, "ffn_size": 1, "num_layers": 0, "encoder_layers": 0, "decoder_layers": 0, "head_dim": 1}
LAYERS = (1, 3, 8, 20, 40)
VALUES: dict[str, tuple[Any, ...]] = {
    "parallel.tensor": (1, 1, 2, 4, 8),
    "parallel.pipeline": (1, 1, 2, 3, 4, 8, 16),
    "parallel.schedule": (*SCHEDULES,),
    "parallel.virtual_stages": (1, 2, 3, 4),
    "batch.global_sequences": (1, 2, 8, 12, 64, 512, 2048, 10000),
    "batch.micro_sequences": (1, 1, 2, 4, 16),
    "zero.stage": (0, 1, 2, 3),
    "zero.offload_optimizer.device": ("none", "cpu"),
    "zero.offload_param.device": ("none", "cpu"),
    "precision.dtype": ("bf16", "fp16", "fp32"),
    "train.recompute": ("none", "selective", "full"),
    "data.seq_len": (64, 512, 4096),
}


class Counts:
    """The counts of a campaign, the processor's time for its longest plan and search [s], and its
    faults."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.longest = {"plan": 0.0, "search": 0.0}
        self.faults: list[dict[str, Any]] = []

    def took(self, what: str, since: float) -> None:
        """Keep the time of this process since then: other programs take turns on the machine."""
        self.longest[what] = max(self.longest[what], time.process_time() - since)

    def facts(self) -> dict[str, Any]:
        return {
            **self.totals,
            **{f"longest_{what}_s": round(s, 2) for what, s in self.longest.items()},
            "faults": len(self.faults),
        }


def variants(recipe: dict[str, Any], stream: random.Random) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield the recipe as it is, and larger or otherwise divided ones, with settings."""
    yield recipe, []
    for _ in range(VARIANTS - 1):
        settings = [f"{key}={value}" for key, value in _chosen(stream)]
        yield _grown(recipe, stream), settings


def _chosen(stream: random.Random) -> list[tuple[str, Any]]:
    keys = stream.sample([*VALUES], stream.randint(0, 5))
    if "parallel.schedule" in keys or "parallel.virtual_stages" in keys:
        keys.append("parallel.pipeline")
    return [(key, stream.choice(VALUES[key])) for key in dict.fromkeys(keys)]


def _grown(recipe: dict[str, Any], stream: random.Random) -> dict[str, Any]:
    """Return the recipe with a wider and deeper network, where it has a config of a family's."""
    grown = copy.deepcopy(recipe)
    family = FAMILIES.get(grown.get("model", {}).get("family", ""))
    if family is None:
        return grown
    wider, deeper = stream.choice(GROWTH), stream.choice(LAYERS)
    for name, rule in family.keys.items():
        value, field = grown["model"]["config"].get(name), rule.fields[0]
        if field in FACTORS and isinstance(value, int) and not isinstance(value, bool):
            grown["model"]["config"][name] = value * (wider if FACTORS[field] else deeper)
        if field == "max_positions" and name in grown["model"]["config"]:
            grown["model"]["config"][name] = 8192
    return grown


def plan_one(
    path: Path, settings: list[str], stream: random.Random, found: Counts
) -> tuple[ResolvedRecipe, TransformerConfig] | None:
    """Return a recipe and its network if they can be planned; it is, for a random number of random
    devices."""
    found.totals["recipes"] += 1
    try:
        resolved = load(path, settings)
    except UserError:
        found.totals["refused by check"] += 1
        return None
    network = known_network(resolved)
    if network is None:
        found.totals["without a network"] += 1
        return None
    parallel = resolved.recipe.parallel
    batch = resolved.recipe.batch
    data = stream.choice(sorted(divisors(batch.global_sequences // batch.micro_sequences)) or [1])
    gpus = parallel.tensor * parallel.pipeline * (data if stream.random() < MOSTLY else stream.choice(WORLDS))
    on = device(stream.choice([*sheets()]))
    began = time.process_time()
    try:
        prediction = predict(resolved.recipe, network, gpus, on)
    except UserError:
        found.totals["refused for its number of devices"] += 1
        return resolved, network
    found.took("plan", began)
    found.totals["planned"] += 1
    assert all(item.num_bytes > 0 for rank in prediction.ranks for item in rank.items)
    assert all(rank.peak(place) >= 0 for rank in prediction.ranks for place in Place)
    assert prediction.time is None or (math.isfinite(prediction.time.total) and prediction.time.total > 0)
    if prediction.fits is False:
        for remedy in remedies(resolved, network, prediction):
            _require_legal(path, [*settings, *remedy.settings], gpus)
            found.totals["changes that fit"] += 1
    return resolved, network


def search_one(
    path: Path, settings: list[str], resolved: ResolvedRecipe, network: TransformerConfig, gpus: int, on: str, found: Counts
) -> None:
    """Count a search for the layouts of a recipe; `check` must accept all that is shown."""
    began = time.process_time()
    try:
        search = Search(resolved, network, gpus, device(on))
    except UserError:
        found.totals["search refused"] += 1
        return
    shown = [*search.ranked, *search.front, *(one.planned for one in search.neighbours)]
    shown += [search.best] if search.best else []
    found.took("search", began)
    found.totals["searched"] += 1
    found.totals["searched without a layout"] += search.best is None
    for one in shown:
        _require_legal(path, [*settings, *one.choice.settings(resolved)], gpus)
    found.totals["layouts shown"] += len(shown)


def _require_legal(path: Path, settings: list[str], gpus: int) -> None:
    """Raise what `check --world-size` says of a recipe."""
    resolved = load(path, settings)
    divide(resolved.recipe, known_network(resolved), gpus, "--world-size")


def campaign(cases: int, searched: int, seed: int, supplies: Supplies, found: Counts) -> None:
    """Count the plans of so many recipes, and searches of some of them, spread evenly."""
    stream = random.Random(f"plans {seed}")
    every = max(1, cases // max(1, searched))
    number = 0
    while found.totals["planned"] < cases:
        drawn = draw(seed, number, supplies)
        for content, settings in variants(drawn.recipe, stream):
            path = supplies.folder / "planned.json"
            path.write_text(json.dumps(content))
            gpus, on = stream.choice(WORLDS), stream.choice([*sheets()])
            try:
                plannable = plan_one(path, settings, stream, found)
                due = found.totals["planned"] >= every * (found.totals["searched"] + found.totals["search refused"] // 4)
                if plannable and due and found.totals["searched"] < searched:
                    search_one(path, settings, *plannable, gpus, on, found)
            except Exception as error:
                found.faults.append(
                    {
                        "case": number,
                        "error": repr(error)[:500],
                        "settings": settings,
                        "gpus": gpus,
                        "device": on,
                        "recipe": content,
                    }
                )
                report(campaign="plans", **found.faults[-1])
        number += 1
        if number % REPORTED_EVERY == 0:
            report(campaign="plans", drawn=number, **found.facts())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--searched", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = Counts()
    with tempfile.TemporaryDirectory(prefix="triaxis-plans-") as scratch:
        campaign(options.cases, options.searched, options.seed, Supplies(Path(scratch) / "supplies"), found)
    report(campaign="plans", seed=options.seed, **found.facts())
    return int(bool(found.faults))


if __name__ == "__main__":
    raise SystemExit(main())
