"""The groups into which a rank cuts its trained parameters. No torch, so that the planner can count
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trainer.schema import Recipe

Item = TypeVar("Item")


@dataclass(frozen=True)
class Tiling:
    """The way trained parameters are cut into groups.

    ZeRO reduces a norm for each group, and at stage 3 for each of the tiles that it cuts groups
    into, one after another over the ranks of the replica; a rank with fewer tiles would leave the
    others waiting. Ranks differ: a stage of a pipeline may have only matrices to train where the
    first and the last have rows of new tokens, or fewer elements than another. So the tiles of
    stage 3 are cut here as DeepSpeed would cut them, and then merged or divided until their number
    is the same everywhere.

    `tile` [elements of this rank]: a tile ends with the parameter that fills it; None: each kind of
    parameters is one group. `num_groups`: the number to reach; None: any.
    """

    tile: int | None = None
    num_groups: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Tiling:
        """Return the tiling of this rank alone."""
        divided = recipe.zero.stage == 3 and recipe.parallel.pipeline > 1
        return cls(recipe.zero.sub_group_size if divided else None)

    def together(self, groups: Sequence[int], trained: Sequence[int]) -> Tiling:
        """Return the tiling of ranks that have so many groups alone, and trained parameters.

        Each has as many groups as the rank with the most has alone, but no more than the rank with
        the fewest trained parameters can fill.
        """
        return replace(self, num_groups=min(max(groups), min(trained)))

    def groups(self, kinds: Sequence[Sequence[Item]], elements: Callable[[Item], int]) -> list[list[Item]]:
        """Return the items in groups, which never have items of two kinds. `elements`: of an item
        on this rank."""
        tile = self.tile
        found = cut(kinds, tile, elements)
        while tile is not None and self.num_groups is not None and len(found) > self.num_groups:
            tile *= 2
            found = cut(kinds, tile, elements)
        while len(found) < (self.num_groups or 0):
            found.append([max(found, key=len).pop()])
        return found


ALONE = Tiling()  # each kind of parameters is one group


def cut(kinds: Sequence[Sequence[Item]], tile: int | None, elements: Callable[[Item], int]) -> list[list[Item]]:
    """Return tiles of each kind, each as large as `tile` or a little larger but the last."""
    found = []
    for kind in filter(None, kinds):
        group: list[Item] = []
        held = 0
        for item in kind:
            group.append(item)
            held += elements(item)
            if tile is not None and held >= tile:
                found.append(group)
                group, held = [], 0
        found += [group] if group else []
    return found
