"""The tools whose files are read, and the recognition of a file by its keys."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.convert.axolotl import AXOLOTL
from trainer.convert.deepspeed import DEEPSPEED
from trainer.convert.draft import Draft, Tool, flat
from trainer.convert.llamafactory import LLAMAFACTORY
from trainer.convert.schema_keys import nested
from trainer.convert.trainer_arguments import TRAINER
from trainer.schema import Recipe

RECIPE = "recipe"  # a recipe of Triaxis, in YAML
# Of tools that know equally many keys of a file, the first is taken: it knows fewer others.
TOOLS: Mapping[str, Tool] = {
    "deepspeed": DEEPSPEED,
    "trainer": TRAINER,
    "llamafactory": LLAMAFACTORY,
    "axolotl": AXOLOTL,
}
OF_A_RECIPE = frozenset({*Recipe.model_fields, "extends"})


def recognised(given: Mapping[str, Any]) -> str | None:
    """Return the name of the tool that knows most of a file's keys, `RECIPE` if a recipe has them;
    None if no tool knows one."""
    known = {name: _known(given, tool) for name, tool in TOOLS.items()}
    known = {RECIPE: sum(name in OF_A_RECIPE and isinstance(value, dict | str) for name, value in given.items()), **known}
    best = max(known, key=lambda name: known[name])
    return best if known[best] else None


def _known(given: Mapping[str, Any], tool: Tool) -> int:
    heads = {name.partition(".")[0] for name in tool.rows}
    return sum(name in heads for name in given)


def converted(given: Mapping[str, Any], tool: Tool, *, world_size: int, folder: Path) -> Draft:
    """Return the draft of a recipe from a file's keys. `folder`: where the file lies."""
    draft = Draft(tool, dict(flat(given, tool.rows)), world_size, folder)
    draft.fill()
    draft.drop_unread()
    return draft


def recipe_of(draft: Draft) -> dict[str, Any]:
    """Return the recipe of a draft."""
    return nested(draft.values)


def command_for(path: Path) -> str:
    """Return the command that makes a recipe of a file, under a name that is free."""
    names = (f"{path.stem}.json", "recipe.json", *(f"recipe-{number}.json" for number in range(2, 1000)))
    out = next(one for one in map(path.with_name, names) if not os.path.lexists(one))
    return f"triaxis convert {shlex.quote(str(path))} {shlex.quote(str(out))}"
