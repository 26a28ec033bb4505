"""The results of a search as JSON. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from trainer.planner.search.find import Search
from trainer.planner.search.planned import Planned
from trainer.planner.search.worlds import World
from trainer.recipe import ResolvedRecipe


def facts_of(planned: Planned, resolved: ResolvedRecipe) -> dict[str, Any]:
    """Return a layout: what it is, also as settings of --set, what it needs, how long it takes."""
    batch = planned.prediction.batch
    return {
        "settings": planned.choice.settings(resolved),
        "layout": {**asdict(planned.choice), "data": batch.dp, "micro_batches": batch.num_micro_batches},
        "step_s": planned.seconds,
        "tokens_per_s": planned.tokens_per_s,
        "parts_s": planned.time.parts,
        "device_bytes": planned.num_bytes,
        "host_bytes": planned.host_bytes,
        "fits": planned.prediction.fits,
    }


def facts_of_search(search: Search) -> dict[str, Any]:
    """Return all that a search has found: lists of layouts begin with the best."""
    resolved = search.resolved
    best, own = search.best, search.own
    return {
        "gpus": search.world_size,
        "device": search.device.name,
        "best": best and facts_of(best, resolved),
        "recipe": own and facts_of(own, resolved),
        "ranked": [facts_of(one, resolved) for one in search.ranked],
        "neighbours": [
            {
                **facts_of(one.planned, resolved),
                "key": one.key,
                "slower": one.reason.slower,
                "parts_slower": one.reason.parts,
                "reason": one.reason.text,
            }
            for one in search.neighbours
        ],
        "front": [facts_of(one, resolved) for one in search.front],
        "planned": [facts_of(one, resolved) for one in search.planned],
    }


def facts_of_world(world: World, resolved: ResolvedRecipe) -> dict[str, Any]:
    """Return what a number of devices costs, or why no layout is there for it."""
    return {
        "gpus": world.world_size,
        "best": world.best and facts_of(world.best, resolved),
        "tokens_per_s_each": world.tokens_per_s_each,
        "device_hours_per_billion_tokens": world.device_hours_per_billion,
        "why_none": world.why or None,
    }
