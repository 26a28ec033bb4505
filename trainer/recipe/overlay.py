"""A recipe put together from several texts: a file, the files that it `extends`, and `--set` over
them."""

from __future__ import annotations

import copy
import os
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.convert.reading import YAML_ENDINGS
from trainer.convert.tools import command_for
from trainer.errors import RecipeError
from trainer.files.paths import expanded, wrong_with
from trainer.files.reading import RECIPE_BYTES, read_bytes, told
from trainer.recipe.json_reader import JSONSyntaxError, Reader
from trainer.recipe.marks import KeyPath, Mark, Problem, dotted, kind, path_of
from trainer.redaction import shown
from trainer.schema import Recipe

# The first line of an object in YAML, behind comments.
YAML = re.compile(r"(?:[ \t]*(?:#[^\n]*|---)?\n)*[A-Za-z_][\w-]*:(?:[ \t\n]|$)")
MAX_CHAIN = 32  # files: in a longer chain nobody could tell where a value comes from


@dataclass
class Layer:
    """The content read so far: the merged value, the place of each part of it, and what was wrong
    with the text."""

    value: dict[str, Any]
    marks: dict[KeyPath, Mark]
    sources: list[Path]
    problems: list[Problem] = field(default_factory=list)

    def put_over(self, base: Layer) -> Layer:
        """Return this layer over another one: objects are merged, lists and scalars replaced."""
        merged = copy.deepcopy(base.value)
        marks = dict(base.marks)
        _merge(merged, self.value, (), marks)
        return Layer(merged, marks | self.marks, [*base.sources, *self.sources], [*base.problems, *self.problems])

    def set(self, override: str, order: int) -> None:
        """Apply one `a.b=value`. A value that is not JSON is taken as a string."""
        name, equals, text = override.partition("=")
        path, mark = _parse_path(name), Mark(order, 0, 0, f"--set {name}")
        if not equals or path is None:
            self.problems.append(Problem(mark, "write --set section.key=value, or --set data.sources[0].path=value"))
            return
        reader = Reader(text)
        try:
            value = reader.document()
        except JSONSyntaxError:
            value = text
        container = self._container(path, mark)
        if container is None:
            return
        container[path[-1]] = value
        _forget(self.marks, path)
        for length in range(1, len(path) + 1):
            self.marks.setdefault(path[:length], mark)
        self.marks |= {path + inner: mark for inner in reader.places}

    def _container(self, path: KeyPath, mark: Mark) -> Any:
        """Return the object or list that holds the last part of `path`, created if absent; None if
        it cannot be."""
        here: Any = self.value
        for depth, part in enumerate(path):
            if isinstance(part, int) != isinstance(here, list) or (isinstance(part, int) and part > len(here)):
                holds = f"a list of {len(here)}" if isinstance(here, list) else "an object, not a list"
                self.problems.append(Problem(mark, f"{dotted(path[:depth])} is {holds}; it has no {part}"))
                return None
            if isinstance(here, list) and part == len(here):
                here.append({})
            if depth == len(path) - 1:
                break
            if isinstance(here, dict) and not isinstance(here.get(part), dict | list):
                here[part] = _default_list(path[: depth + 1]) if isinstance(path[depth + 1], int) else {}
            here = here[part]
        return here

    def named_marks(self) -> dict[str, Mark]:
        """Return the marks by dotted key; "" is the recipe itself, for what is written nowhere."""
        nowhere = Mark(len(self.sources), 0, 0, str(self.sources[-1]))
        return {"": nowhere} | {dotted(path): mark for path, mark in self.marks.items()}


def read_chain(path: Path, below: list[Path]) -> Layer:
    """Return the file over the files that it extends. `below`: the files that led here."""
    if len(below) > MAX_CHAIN:
        raise RecipeError(f"{below[0]}: more than {MAX_CHAIN} files that extend one another: merge some")
    if any(_same_file(path, other) for other in below):
        raise RecipeError(f"{below[-1]}: extends forms a circle: {' → '.join(map(str, [*below, path]))}")
    layer = read_file(path, below)
    if "extends" not in layer.value:
        return layer
    parent = layer.value.pop("extends")
    mark = layer.marks.pop(("extends",))
    if not isinstance(parent, str) or not parent:
        raise RecipeError(f"{mark}: extends = {shown(parent)}: must be the name of one recipe file, a string")
    if fault := wrong_with(parent):
        raise RecipeError(f"{mark}: extends = {shown(parent)} {fault}")
    base = read_chain(Path(os.path.normpath(path.parent / expanded(parent))), [*below, path])
    return layer.put_over(base)


def read_file(path: Path, below: list[Path]) -> Layer:
    named = f"{below[-1]}: extends {path}: " if below else f"{path}: "
    try:
        data = read_bytes(path, RECIPE_BYTES)
    except FileNotFoundError as error:
        raise RecipeError(f"{named}no such file") from error
    except OSError as error:
        raise RecipeError(f"{named}{told(error)}") from error
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path}:1:1: starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    # Layers count from the deepest base, so that problems are listed in the order in which values
    # are laid over.
    return _parse(text, str(path), path, layer=-len(below))


def _parse(text: str, name: str, path: Path, layer: int) -> Layer:
    ends = [match.start() for match in re.finditer("\n", text)]

    def mark(position: int) -> Mark:
        line = bisect_left(ends, position)
        return Mark(layer, line + 1, position - (ends[line - 1] if line else -1), name)

    reader = Reader(text)
    try:
        value = reader.document()
    except JSONSyntaxError as error:
        if path.suffix.lower() in YAML_ENDINGS or YAML.match(text):
            raise RecipeError(f"{name} is YAML, and a recipe is JSON: {command_for(path)}") from None
        raise RecipeError(f"{mark(error.position)}: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{name}:1:1: a recipe is one JSON object, not {kind(value)}")
    twice = [Problem(mark(at), f"key {dotted(key)} is given twice; remove one") for key, at in reader.duplicates]
    return Layer(value, {key: mark(at) for key, at in reader.places.items()}, [path], twice)


def _same_file(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _merge(base: dict[str, Any], top: Mapping[str, Any], path: KeyPath, marks: dict[KeyPath, Mark]) -> None:
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, (*path, key), marks)
        else:
            _forget(marks, (*path, key))
            base[key] = copy.deepcopy(value)


def _forget(marks: dict[KeyPath, Mark], path: KeyPath) -> None:
    if path not in marks:
        return
    for old in [old for old in marks if old[: len(path)] == path]:
        del marks[old]


def _parse_path(name: str) -> KeyPath | None:
    if not re.fullmatch(r"[^.\[\]=]+(\[[0-9]{1,4}\]|\.[^.\[\]=]+)*", name):
        return None
    return path_of(name)


def _default_list(path: KeyPath) -> list[Any]:
    """Return the default of a list, to change one part of it."""
    here: Any = Recipe().model_dump()
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    return here if isinstance(here, list) else []
