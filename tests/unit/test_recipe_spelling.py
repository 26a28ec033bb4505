"""Mutation: one character wrong in any key of any shipped recipe is refused, with the right suggestion."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer import recipe
from trainer.errors import RecipeError
from trainer.recipe.marks import dotted
from trainer.spelling import edit_distance, nearest

RECIPES = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
DAMAGES_PER_KEY = 9
WANTED_RIGHT = 0.95


def key_paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(key, str):
            yield (*path, key)
        yield from key_paths(inner, (*path, key))


def damages(key: str, stream: random.Random) -> list[str]:
    """Some of the ways to lose, swap, replace or double one character."""
    at = range(len(key))
    ways = {key[:i] + key[i + 1 :] for i in at}
    ways |= {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in at[:-1]}
    ways |= {key[:i] + stream.choice("abcdefghijklmnopqrstuvwxyz_0") + key[i + 1 :] for i in at}
    ways |= {key[:i] + key[i] + key[i:] for i in at}
    return stream.sample(sorted(ways - {key, ""}), min(DAMAGES_PER_KEY, len(ways - {key, ""})))


def with_key(value: dict[str, Any], path: tuple[str | int, ...], wrong: str) -> dict[str, Any]:
    """The same recipe with the last key of `path` renamed, in its place."""
    damaged: Any = copy.deepcopy(value)
    here = damaged
    for part in path[:-1]:
        here = here[part]
    entries = [(wrong if key == path[-1] else key, inner) for key, inner in here.items()]
    here.clear()
    here.update(entries)
    return dict(damaged)


@pytest.mark.parametrize("source", RECIPES, ids=lambda path: path.stem)
def test_every_key_damaged_by_one_character(source: Path, tmp_path: Path) -> None:
    for other in RECIPES:
        (tmp_path / other.name).write_bytes(other.read_bytes())
    value = json.loads(source.read_text())
    stream = random.Random(f"spelling of {source.name}")
    total, wrong_suggestions = 0, []
    for key_path in key_paths(value):
        right = dotted(key_path)
        for wrong in damages(str(key_path[-1]), stream):
            path = tmp_path / f"damaged-{total}.json"  # a file that is written anew waits for the disk: 2 ms
            path.write_text(json.dumps(with_key(value, key_path, wrong)))
            with pytest.raises(RecipeError) as refused:
                recipe.load(path)
            suggestion = str(key_path[-1]) if key_path[:2] == ("model", "config") and len(key_path) > 2 else right
            total += 1
            if not any(f"did you mean {suggestion}?" in line for line in refused.value.lines):
                wrong_suggestions.append(f"{wrong} for {right}: {refused.value.lines}")
    share = 1 - len(wrong_suggestions) / total
    assert share >= WANTED_RIGHT, f"{share:.1%} of {total} damaged keys got the right suggestion; not: {wrong_suggestions}"


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("", "", 0),
        ("lr", "rl", 1),
        ("lr", "l", 1),
        ("steps", "stpes", 1),
        ("steps", "stepz", 1),
        ("abc", "", 3),
        ("ab", "ba1", 2),
    ],
)
def test_edit_distance(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == edits


def test_nearest_prefers_the_same_first_letter_and_gives_up_in_time() -> None:
    assert nearest("dr", ["ir", "dir"]) == "dir"
    assert nearest("completely", ["different", "words"]) is None
    assert nearest("x", []) is None
