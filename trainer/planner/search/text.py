"""A layout as text that a recipe takes: settings of --set, or a recipe that extends it. No
torch."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError
from trainer.files.durable import private_file, sync_folder
from trainer.files.reading import told
from trainer.recipe import ResolvedRecipe, load
from trainer.recipe.overlay import Layer


def write_recipe(out: Path, recipe: Path, overrides: Sequence[str], settings: Sequence[str]) -> None:
    """Write a recipe that extends another one with a command line's settings and further ones. It
    has been read back when it appears, whole. RecipeError if something is there already."""
    expected = load(recipe, [*overrides, *settings])
    draft = out.with_name(f".{out.name}.tmp")
    try:
        draft.unlink(missing_ok=True)
        for content in (_extending(out, recipe, overrides, settings, expected), expected.given):
            with private_file(draft) as file:
                file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
            if load(draft).recipe == expected.recipe:
                break
        os.link(draft, out)
        sync_folder(out.absolute().parent)
    except FileExistsError:
        raise RecipeError(f"--out {out}: something is there already, and is not overwritten: name another file") from None
    except OSError as error:
        raise RecipeError(f"--out {out}: {told(error)}") from error
    finally:
        draft.unlink(missing_ok=True)


def _extending(
    out: Path, recipe: Path, overrides: Sequence[str], settings: Sequence[str], expected: ResolvedRecipe
) -> dict[str, Any]:
    """Return a recipe that names the other one, by its path from here, and what is new."""
    layer = Layer({}, {}, [recipe])
    for order, setting in enumerate([*overrides, *settings], 1):
        layer.set(setting, order)
    new = {key: _as_given(value, expected.given.get(key)) for key, value in layer.value.items()}
    return {"extends": os.path.relpath(recipe, out.absolute().parent), **new}


def _as_given(new: Any, given: Any) -> Any:
    """Return a new value; a list whole, as it is in the recipe, because lists are replaced."""
    if isinstance(new, Mapping) and isinstance(given, Mapping):
        return {key: _as_given(value, given.get(key)) for key, value in new.items()}
    return copy.deepcopy(given)
