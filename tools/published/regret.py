"""The cost of following the planner: of each published model that was measured in several layouts
on as many GPUs with the same batch, the layout that it ranks first against the best measured one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from tools.published.comparison import Compared, sweeps


@dataclass(frozen=True)
class Regret:
    """The slowdown of the planner's pick against the best measured layout, and that of a layout at
    random, each the mean over sweeps; `worst` is the largest of the picks'."""

    sweeps: int
    layouts: int
    pick: float
    worst: float
    random: float


def regret(rows: Sequence[Compared]) -> Regret | None:
    """Return the regret over the rows' sweeps, or None without a sweep."""
    found = []
    for members in sweeps(rows, 2).values():
        seconds = measured(members)
        if len(seconds) > 1:
            best = min(seconds.values())
            found.append((seconds[min(seconds)] / best - 1, mean(seconds.values()) / best - 1, len(seconds)))
    if not found:
        return None
    picks = [pick for pick, _, _ in found]
    return Regret(
        sweeps=len(found),
        layouts=sum(layouts for _, _, layouts in found),
        pick=mean(picks),
        worst=max(picks),
        random=mean(random for _, random, _ in found),
    )


def measured(members: Sequence[Compared]) -> dict[float, float]:
    """Return the mean measured seconds by the computed ones: what we compute alike is one layout,
    however often it was measured."""
    times = defaultdict(list)
    for row in members:
        times[row.ours].append(row.published)
    return {ours: mean(published) for ours, published in times.items()}


def lines(found: Mapping[str, Regret | None]) -> Iterator[str]:
    """Yield the table of regrets by the titles of their tables."""
    yield "| search | sweeps | layouts | slowdown of the pick | largest | of a layout at random |"
    yield "|---|---|---|---|---|---|"
    for title, one in found.items():
        if one is not None:
            yield f"| {title} | {one.sweeps} | {one.layouts} | {one.pick:.2%} | {one.worst:.1%} | {one.random:.1%} |"
