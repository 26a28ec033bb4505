"""Layouts by name, and a recipe in one of them. No torch.

A name is degrees joined by x, whether sequence parallelism is on if that differs from the recipe,
and +compile where steps are compiled:

>>> parse("dp2xtp4-sp")
NamedLayout(layout=Layout(pp=1, dp=2, cp=1, tp=4), sequence=False, compiles=False)
>>> str(parse("dp2xtp4-sp"))
'tp4xdp2-sp'
>>> str(parse("compile"))
'one process+compile'
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from parallel.topology import Layout
from trainer.errors import RecipeError
from trainer.recipe.only import keys_only_with
from trainer.schema import Parallel

# The axes in the order of a name, with the recipe's key of each; dp has none.
AXES = {"pp": "pipeline", "cp": "context", "tp": "tensor", "dp": None}
DEGREES = {key for key in AXES.values() if key}
TENSOR_ONLY = keys_only_with(Parallel, "parallel.tensor")


@dataclass(frozen=True)
class NamedLayout:
    """A layout with sequence parallelism on or off (None: as in the recipe), and steps that are
    compiled or not."""

    layout: Layout
    sequence: bool | None = None
    compiles: bool = False

    def __str__(self) -> str:
        degrees = [f"{axis}{degree}" for axis in AXES if (degree := getattr(self.layout, axis)) > 1]
        sequence = {None: "", True: "+sp", False: "-sp"}[self.sequence]
        return ("x".join(degrees) or "one process") + sequence + "+compile" * self.compiles


ONE_PROCESS = NamedLayout(Layout())


def parse(name: str) -> NamedLayout:
    """Return the layout of a name. RecipeError says how a layout is written."""
    wrong = RecipeError(
        f"--layouts {json.dumps(name)}: not a layout; write degrees of {', '.join(AXES)} joined by x, as in tp2, dp4 or "
        "tp2xdp2, and +sp or -sp behind them to have sequence parallelism on or off, and +compile to compile steps; "
        "or compile, which is one process"
    )
    if name == "compile":
        return NamedLayout(Layout(), compiles=True)
    degree = rf"({'|'.join(AXES)})[1-9][0-9]{{0,5}}"
    written = re.fullmatch(rf"(?P<degrees>{degree}(x{degree})*)(?P<sequence>[+-]sp)?(?P<compiles>\+compile)?", name, re.ASCII)
    if written is None:
        raise wrong
    parts = [(part[:2], int(part[2:])) for part in written["degrees"].split("x")]
    degrees = dict(parts)
    if len(degrees) < len(parts):
        raise wrong
    layout = Layout(**degrees)
    sequence = None if written["sequence"] is None else written["sequence"] == "+sp"
    if layout.world_size == 1:
        raise RecipeError(f"--layouts {name}: that is one process, with which every layout is compared; legal: 2 or more")
    if sequence is not None and layout.tp == 1:
        raise RecipeError(f"--layouts {name}: sequence parallelism is over tensor ranks; legal: a tp of 2 or more with it")
    return NamedLayout(layout, sequence, compiles=written["compiles"] is not None)


def up_to(processes: int, *, sequence: bool) -> list[NamedLayout]:
    """Return all layouts of powers of two, small ones first; tp2 also with the opposite of the
    recipe's sequence parallelism."""
    powers = [2**n for n in range(processes.bit_length())]
    layouts = [Layout(pp=pp, tp=tp, dp=dp) for pp, dp, tp in product(powers, repeat=3) if 1 < pp * dp * tp <= processes]
    named = [NamedLayout(layout) for layout in sorted(layouts, key=lambda layout: layout.world_size)]
    if processes >= 2:
        named.insert(1, NamedLayout(Layout(tp=2), sequence=not sequence))
    return named


def recipe_in(given: Mapping[str, Any], named: NamedLayout) -> dict[str, Any]:
    """Return the recipe's file content in another layout, without keys that would be refused there
    as unused."""
    layout = named.layout
    parallel = {key: value for key, value in given.get("parallel", {}).items() if _is_used(key, layout)}
    parallel |= {key: getattr(layout, axis) for axis, key in AXES.items() if key}
    if named.sequence is not None:
        parallel["sequence_parallel"] = named.sequence
    return {**given, "parallel": parallel, "train": {**given.get("train", {}), "compile": named.compiles}}


def _is_used(key: str, layout: Layout) -> bool:
    if key in TENSOR_ONLY:
        return layout.tp > 1
    return key in DEGREES or layout.pp > 1  # the other keys belong to the pipeline
