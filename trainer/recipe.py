"""The strict door: a JSON file becomes a validated recipe, or every thing wrong with it is said at once.

In order: read JSON with the place of each key (`_Reader`), lay files named by `extends` and `--set` over each other
(`_Layer`), check keys, types and ranges against `sections.py`, then combinations. No torch here: a recipe is checked on
a login node in a fraction of a second.
"""

from __future__ import annotations

import copy
import json
import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from json.decoder import scanstring  # type: ignore[attr-defined]  # the C scanner, in json since 2.6
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.deepspeed_config import REFUSED, refusal, zero_findings
from trainer.errors import RecipeError
from trainer.model.families import FAMILIES, TransformerConfig, read_config
from trainer.schedule import decay_steps, schedule_findings
from trainer.sections import Finding, Recipe, Section, nearest

MAX_BYTES = 1 << 20  # a recipe is a page of text; a larger file is another file
MAX_DEPTH = 32
MAX_VALUES = 2000
MAX_LINES = 100  # of problems shown

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Mark:
    """Where a value was written; sorts in the order in which the user reads."""

    layer: int
    line: int
    column: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name

    @property
    def origin(self) -> str:
        return f"file {self.name}" if self.line else "--set"


@dataclass(frozen=True)
class Problem:
    mark: Mark
    message: str

    def __str__(self) -> str:
        return f"{self.mark}: {self.message}"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe that passed the door.

    `origins`: dotted key of every value → "default", "file NAME", "--set" or "derived". `given`: what was written, after
    `extends` and `--set`. `sources`: the files read, the one named by the user last. `hf_config`: the network in Hugging
    Face's names, None while it is still on the hub.
    """

    recipe: Recipe
    origins: dict[str, str]
    given: dict[str, Any]
    sources: tuple[Path, ...]
    hf_config: dict[str, Any] | None

    def network(self, *, vocab_size: int | None, pretrained: Mapping[str, Any] | None = None) -> TransformerConfig:
        """What to build. `vocab_size`: symbols of the tokenizer, taken when the config names none; `pretrained`: the
        config.json that came from the hub. RecipeError when it does not translate or the tokenizer does not fit."""
        hf_config = {**pretrained, **self.recipe.model.config} if pretrained is not None else self.hf_config
        if hf_config is None:
            raise RecipeError("model.from_pretrained is a hub name: its config.json must be fetched first")
        family = self.recipe.model.family or str(hf_config.get("model_type"))
        config, findings = _translate(family, hf_config, vocab_size)
        if config is None or findings:
            raise RecipeError([f"model.config: {finding.message}" for finding in findings])
        return config

    def as_resolved_json(self, deepspeed_config: dict[str, Any] | None = None) -> dict[str, Any]:
        """For resolved.json: every value with its origin, and, once the world size is known, DeepSpeed's dict."""
        values = {
            _dotted(path): {"value": value, "origin": self.origins[_dotted(path)]}
            for path, value in _leaves(self.recipe.model_dump())
        }
        return {"values": values} | ({} if deepspeed_config is None else {"deepspeed_config": deepspeed_config})


def load(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Read, merge and validate. RecipeError holds one line for each thing that is wrong, in the order of the file."""
    layer = _read_chain(Path(path), [])
    for order, override in enumerate(overrides, len(layer.sources)):
        layer.set(override, order)
    marks = layer.named_marks()
    recipe, problems, faulty = _validate(layer.value, marks)
    hf_config, findings = _model(recipe)
    rules = (
        *_section_findings(recipe, marks.keys()),
        *_path_findings(recipe),
        *findings,
    )
    # A rule about a key that is itself wrong would only repeat or mislead.
    sound = [finding for finding in rules if not any(_under(key, bad) for key in finding.keys for bad in faulty)]
    problems += [Problem(_first_mark(finding.keys, marks), finding.message) for finding in sound]
    if problems := [*layer.problems, *problems]:
        lines = [str(p) for p in dict.fromkeys(sorted(problems, key=lambda p: (p.mark, p.message)))]
        more = len(lines) - MAX_LINES
        raise RecipeError(lines[:MAX_LINES], [f"and {more} more"] * (more > 0))
    return _resolve(recipe, layer, hf_config)


def _resolve(recipe: Recipe, layer: _Layer, hf_config: dict[str, Any] | None) -> ResolvedRecipe:
    derived: dict[tuple[str, str], Any] = {}
    if recipe.data.cache_dir is None:
        derived["data", "cache_dir"] = str(Path(recipe.run.dir) / "data")
    if recipe.schedule.name == "wsd" and recipe.schedule.decay_steps is None:
        derived["schedule", "decay_steps"] = decay_steps(recipe.schedule, recipe.train.steps)
    if recipe.model.family is None and hf_config is not None:
        derived["model", "family"] = hf_config["model_type"]
    values = recipe.model_dump()
    for (section, key), value in derived.items():
        values[section][key] = value
    resolved = Recipe.model_validate(values)
    origins = {
        _dotted(path): "derived" if path in derived else layer.marks[path].origin if path in layer.marks else "default"
        for path, _ in _leaves(resolved.model_dump())
    }
    return ResolvedRecipe(resolved, origins, layer.value, tuple(layer.sources), hf_config)


# --- JSON with places ------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
WORDS = {"true": True, "false": False, "null": None}
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null", "TRUE": "true", "FALSE": "false", "NULL": "null"}
NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf")


class _SyntaxError(Exception):
    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


class _Reader:
    """JSON as RFC 8259 has it, and stricter: no duplicate keys, no number outside float64, bounded depth.

    `json.loads` keeps the last of two equal keys, accepts NaN, and forgets where anything stood.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: dict[KeyPath, int] = {}
        self.duplicates: list[tuple[KeyPath, int]] = []

    def document(self) -> Any:
        value = self._value(())
        self._skip()
        if self.at < len(self.text):
            self._fail("more text after the end of the value")
        return value

    def _value(self, path: KeyPath) -> Any:
        self._skip()
        if len(path) > MAX_DEPTH:
            self._fail(f"nested deeper than {MAX_DEPTH}: not a recipe")
        if len(self.places) > MAX_VALUES:
            self._fail(f"more than {MAX_VALUES} values: not a recipe")
        match self._peek():
            case "{":
                return self._object(path)
            case "[":
                return self._list(path)
            case '"':
                return self._string()
            case _:
                return self._scalar()

    def _object(self, path: KeyPath) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for place in self._items("}", "key"):
            if self._peek() != '"':
                self._fail("a key in double quotes is expected here")
            key = self._string()
            self._skip()
            if self._peek() != ":":
                self._fail(f"':' is expected after the key {json.dumps(key)}")
            self.at += 1
            if key in value:
                self.duplicates.append(((*path, key), place))
            self.places[*path, key] = place
            value[key] = self._value((*path, key))
        return value

    def _list(self, path: KeyPath) -> list[Any]:
        value: list[Any] = []
        for place in self._items("]", "value"):
            self.places[*path, len(value)] = place
            value.append(self._value((*path, len(value))))
        return value

    def _items(self, end: str, what: str) -> Iterator[int]:
        """The place of each item between brackets; the caller reads the item before asking for the next."""
        self.at += 1
        self._skip()
        if self._peek() == end:
            self.at += 1
            return
        while True:
            yield self.at
            self._skip()
            if self._peek() == end:
                self.at += 1
                return
            if self._peek() != ",":
                self._fail(f"',' or '{end}' is expected here" + (": the file ends too early" if not self._peek() else ""))
            comma = self.at
            self.at += 1
            self._skip()
            if self._peek() == end:
                raise _SyntaxError(comma, f"trailing comma: no {what} follows; remove it")

    def _string(self) -> str:
        try:
            value, end = scanstring(self.text, self.at + 1, True)
        except json.JSONDecodeError as error:
            raise _SyntaxError(error.pos, error.msg.rstrip(" at").lower()) from None
        if any("\ud800" <= char <= "\udfff" for char in value):
            self._fail("half of a surrogate pair is not a character")
        self.at = end
        return str(value)

    def _scalar(self) -> Any:
        for word, meaning in WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning
        number = NUMBER.match(self.text, self.at)
        if number is None:
            self._fail_scalar()
        value = float(number.group())
        if value in (float("inf"), float("-inf")):
            self._fail("number too large for a float64")
        self.at = number.end()
        return value if number.group(1) or number.group(2) else int(number.group())

    def _fail_scalar(self) -> NoReturn:
        rest = self.text[self.at : self.at + 16]
        for word in NOT_NUMBERS:
            if rest.startswith(word):
                self._fail(f"{word} is not a JSON number; write a finite one")
        for word, json_word in PYTHON_WORDS.items():
            if rest.startswith(word):
                self._fail(f"{word} is Python; JSON writes {json_word}")
        if rest.startswith("'"):
            self._fail("strings take double quotes")
        self._fail("a value is expected here" if rest else "the file ends where a value is expected")

    def _skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        if self._peek() in ("/", "#"):
            self._fail('JSON has no comments; write them in "description"')

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _fail(self, message: str) -> NoReturn:
        raise _SyntaxError(self.at, message)


# --- layers: extends and --set ---------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """What was written so far: the merged value, where each part of it stands, and what was wrong with the text."""

    value: dict[str, Any]
    marks: dict[KeyPath, Mark]
    sources: list[Path]
    problems: list[Problem] = field(default_factory=list)

    def put_over(self, base: _Layer) -> _Layer:
        """Objects are merged, lists and scalars replaced."""
        merged = copy.deepcopy(base.value)
        marks = dict(base.marks)
        _merge(merged, self.value, (), marks)
        return _Layer(merged, marks | self.marks, [*base.sources, *self.sources], [*base.problems, *self.problems])

    def set(self, override: str, order: int) -> None:
        """Apply one `a.b=value`; a value that is not JSON is taken as a string."""
        name, equals, text = override.partition("=")
        path, mark = _parse_path(name), Mark(order, 0, 0, f"--set {name}")
        if not equals or path is None:
            self.problems.append(Problem(mark, "write --set section.key=value, or --set data.sources[0].path=value"))
            return
        reader = _Reader(text)
        try:
            value = reader.document()
        except _SyntaxError:
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
        """The object or list that holds the last part of `path`, made where it is absent; None where it cannot be."""
        here: Any = self.value
        for depth, part in enumerate(path):
            if isinstance(part, int) != isinstance(here, list) or (isinstance(part, int) and part > len(here)):
                holds = f"a list of {len(here)}" if isinstance(here, list) else "an object, not a list"
                self.problems.append(Problem(mark, f"{_dotted(path[:depth])} is {holds}; it has no {part}"))
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
        """Marks by dotted key; "" is the recipe itself, for what is written nowhere."""
        nowhere = Mark(len(self.sources), 0, 0, str(self.sources[-1]))
        return {"": nowhere} | {_dotted(path): mark for path, mark in self.marks.items()}


def _first_mark(keys: Sequence[str], marks: Mapping[str, Mark]) -> Mark:
    """Where the first written one of these keys stands."""
    return next(marks[key] for key in (*keys, "") if key in marks)


def _read_chain(path: Path, below: list[Path]) -> _Layer:
    """The file over the files that it extends; `below` are the files that led here."""
    if any(_same_file(path, other) for other in below):
        raise RecipeError(f"{below[-1]}: extends makes a circle: {' → '.join(map(str, [*below, path]))}")
    layer = _read_file(path, below)
    if "extends" not in layer.value:
        return layer
    parent = layer.value.pop("extends")
    mark = layer.marks.pop(("extends",))
    if not isinstance(parent, str) or not parent:
        raise RecipeError(f"{mark}: extends = {_shown(parent)}: must be the name of one recipe file, a string")
    base = _read_chain(Path(os.path.normpath(path.parent / parent)), [*below, path])
    return layer.put_over(base)


def _read_file(path: Path, below: list[Path]) -> _Layer:
    named = f"{below[-1]}: extends {path}: " if below else f"{path}: "
    try:
        if not path.is_file():
            raise RecipeError(f"{named}" + ("not a file" if path.exists() else "no such file"))
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{named}{getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_BYTES >> 20} MiB: not a recipe")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path}:1:1: starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    # Layers count from the deepest base, so that problems are listed in the order in which values are laid over.
    return _parse(text, str(path), path, layer=-len(below))


def _parse(text: str, name: str, path: Path, layer: int) -> _Layer:
    ends = [match.start() for match in re.finditer("\n", text)]

    def mark(position: int) -> Mark:
        line = bisect_left(ends, position)
        return Mark(layer, line + 1, position - (ends[line - 1] if line else -1), name)

    reader = _Reader(text)
    try:
        value = reader.document()
    except _SyntaxError as error:
        raise RecipeError(f"{mark(error.position)}: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{name}:1:1: a recipe is one JSON object, not {_kind(value)}")
    twice = [Problem(mark(at), f"key {_dotted(key)} is given twice; remove one") for key, at in reader.duplicates]
    return _Layer(value, {key: mark(at) for key, at in reader.places.items()}, [path], twice)


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
    if not re.fullmatch(r"[^.\[\]=]+(\[\d{1,4}\]|\.[^.\[\]=]+)*", name):
        return None
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", name))


def _default_list(path: KeyPath) -> list[Any]:
    """The default of a list, to change one part of it."""
    here: Any = Recipe().model_dump()
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    return here if isinstance(here, list) else []


def _dotted(path: KeyPath) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{_printable(part)}" for part in path]
    return "".join(parts).removeprefix(".")


def _printable(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key)


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value with its path; objects and lists of objects are opened, other lists are values."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


# --- keys, types and ranges ------------------------------------------------------------------------------------------


def _validate(given: Mapping[str, Any], marks: Mapping[str, Mark]) -> tuple[Recipe, list[Problem], set[str]]:
    """The recipe without its faulty keys, the problems, and the dotted names of keys that must not be judged further."""
    value = copy.deepcopy(dict(given))
    problems: list[Problem] = []
    faulty: set[str] = set()
    while True:
        try:
            return Recipe.model_validate(value), problems, faulty
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                path: KeyPath = tuple(detail["loc"])
                message, meant = _explain(detail)
                places = [_dotted(path[:length]) for length in range(len(path), 0, -1)]
                problems.append(Problem(_first_mark(places, marks), message))
                faulty |= {_dotted(path), *(key for key in meant if key not in marks)}
                _drop(value, path)


def _drop(value: Any, path: KeyPath) -> None:
    """Remove the faulty key, or the whole list that it is in."""
    index = next((n for n, part in enumerate(path) if isinstance(part, int)), len(path))
    for part in path[: index - 1]:
        value = value.get(part, {})
    value.pop(path[index - 1], None)


def _explain(detail: ErrorDetails) -> tuple[str, list[str]]:
    """One line for one error of pydantic, and the keys that were probably meant."""
    path: KeyPath = tuple(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path)
    node = _schema_at(path)
    if detail["type"] == "missing":
        return f"{_dotted(path)} is missing: {node.get('description', '')}", []
    value = detail["input"]
    message = f"{_dotted(path)} = {_shown(value)}: must be {_wanted(node)}"
    if not _fits_type(value, node):
        message += f", not {_kind(value)}"
    return message + _remedy(value, node), []


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "null")


@cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe file, for editors: the sections and `extends`."""
    schema = copy.deepcopy(_schema())
    extends = {"type": "string", "description": "A recipe that this one changes; relative to this file."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _schema_at(path: KeyPath) -> dict[str, Any]:
    """JSON Schema of one key: what it must be, in words that are already there."""
    node = _schema()
    for part in path:
        inherited = {"required key": part in node.get("required", ())}
        node = node["items"] if isinstance(part, int) else node["properties"][part]
        inherited["description"] = node.get("description", "")
        node = next((n for n in node.get("anyOf", ()) if n.get("type") != "null"), node)
        if "$ref" in node:
            node = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
        node = {**node, **inherited}
    return node


def _choices(node: Mapping[str, Any]) -> list[Any]:
    return [node["const"]] if "const" in node else list(node.get("enum", ()))


def _wanted(node: Mapping[str, Any]) -> str:
    if choices := _choices(node):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(json.dumps, choices))
    match node.get("type"):
        case "integer" | "number":
            return ("a whole number" if node["type"] == "integer" else "a number") + _range(node)
        case "string":
            if "pattern" in node:
                return f"a string that matches {node['pattern']}"
            return "a string that is not empty" if node.get("minLength") else "a string"
        case "boolean":
            return "true or false"
        case "array":
            least, most = node.get("minItems", 0), node.get("maxItems")
            return f"a list of {least}" if least == most else f"a list of at least {least}" if least else "a list"
        case _:
            return "an object"


def _range(node: Mapping[str, Any]) -> str:
    bounds = []
    for name, word in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        if name in node:
            bounds.append(f"{word} {node[name]:.15g}")
    return " " + " and ".join(bounds) if bounds else ""


def _fits_type(value: Any, node: Mapping[str, Any]) -> bool:
    types: dict[str, tuple[type, ...]] = {
        "integer": (int,),
        "number": (int, float),
        "string": (str,),
        "boolean": (bool,),
        "array": (list,),
    }
    wanted = types.get(node.get("type", ""), (dict,))
    return isinstance(value, wanted) and (not isinstance(value, bool) or wanted == (bool,))


def _remedy(value: Any, node: Mapping[str, Any]) -> str:
    wanted = node.get("type")
    if value is None:
        return "" if node["required key"] else "; remove the key to get the default"
    if isinstance(value, str) and wanted in ("integer", "number", "boolean"):
        text = value.strip().lower() if wanted == "boolean" else value.strip()
        try:
            meant = _Reader(text).document()
        except _SyntaxError:
            return ""
        return f"; write {text} without quotes" if _fits_type(meant, node) else ""
    if isinstance(value, float) and wanted == "integer" and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(value, int | float) and wanted == "string":
        return f'; write "{json.dumps(value)}"'
    choices = [choice for choice in _choices(node) if isinstance(choice, str)]
    if isinstance(value, str) and (meant_choice := nearest(value, choices)):
        return f"; did you mean {json.dumps(meant_choice)}?"
    if wanted == "array" and not isinstance(value, list | dict):
        return f"; write [{json.dumps(value)}]"
    return ""


# --- unknown keys ----------------------------------------------------------------------------------------------------

# Names that other systems have for our keys.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "min_lr": "schedule.min_lr_ratio",
    "lr_scheduler": "schedule.name",
    "scheduler": "schedule.name",
    "batch_size": "batch.global_sequences",
    "global_batch_size": "batch.global_sequences",
    "micro_batch_size": "batch.micro_sequences",
    "per_device_train_batch_size": "batch.micro_sequences",
    "sequence_length": "data.seq_len",
    "seq_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_steps": "train.steps",
    "train_steps": "train.steps",
    "max_grad_norm": "train.clip_norm",
    "grad_clip": "train.clip_norm",
    "gradient_checkpointing": "train.recompute",
    "tp": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "output_dir": "run.dir",
    "mixed_precision": "precision.dtype",
    "zero_stage": "zero.stage",
}


@cache
def known_keys() -> tuple[str, ...]:
    """The dotted name of every key; items of a list of objects as [0]."""
    return ("extends", *_keys_of(Recipe, ()))


def _keys_of(section: type[Section], path: KeyPath) -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        here: KeyPath = (*path, name)
        keys.append(_dotted(here))
        item = next((t for t in get_args(info.annotation) if isinstance(t, type) and issubclass(t, Section)), None)
        inner = info.annotation
        if item is not None:
            keys += _keys_of(item, (*here, 0))
        elif isinstance(inner, type) and issubclass(inner, Section):
            keys += _keys_of(inner, here)
    return keys


def _unknown_key(path: KeyPath) -> tuple[str, list[str]]:
    """What to say of a key that is not in `sections.py`, and the keys that were probably meant.

    A slip of one letter in this section comes first, then a key written into the wrong section, then wider guesses.
    """
    section, key = path[:-1], str(path[-1])
    generic = re.sub(r"\[\d+\]", "[0]", _dotted(section))
    siblings = [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == generic]
    unknown = f"unknown key {_dotted(path)}"
    if reason := refusal(generic, key):
        return f"{unknown}: DeepSpeed's {key} does not belong here: {reason}", []
    if meant := nearest(key, siblings, within=1):
        return f"{unknown}; did you mean {_dotted((*section, meant))}?", [_dotted((*section, meant))]
    homes = [name for name in known_keys() if name.rpartition(".")[2] == key]
    if homes := homes or [home for name, home in ELSEWHERE.items() if name == key]:
        return f"{unknown}: {_belongs(key, homes)}", []
    if meant := nearest(key, siblings):
        return f"{unknown}; did you mean {_dotted((*section, meant))}?", [_dotted((*section, meant))]
    theirs = (
        [name for where in ("deepspeed", "zero") for name in REFUSED[where]] if generic in ("deepspeed", "zero", "") else []
    )
    if meant := nearest(key, theirs, within=2):
        return f"{unknown}; did you mean DeepSpeed's {meant}? It does not belong here: {refusal(generic, meant)}", []
    if meant := nearest(key, [name.rpartition(".")[2] for name in known_keys()]):
        return f"{unknown}; did you mean {' or '.join(n for n in known_keys() if n.rpartition('.')[2] == meant)}?", []
    return f"{unknown}; legal here: {', '.join(siblings)}", []


def _belongs(key: str, homes: list[str]) -> str:
    sections = " or ".join(f'"{home.rpartition(".")[0]}"' for home in homes)
    return f"{json.dumps(key)} belongs in {sections}: write {' or '.join(homes)}"


def _under(key: str, faulty: str) -> bool:
    return key == faulty or key.startswith((f"{faulty}.", f"{faulty}["))


# --- combinations ----------------------------------------------------------------------------------------------------

# Which update rules read which key.
OPTIMIZER_KEYS = {"betas": ("adamw", "adam", "lion"), "eps": ("adamw", "adam"), "momentum": ("sgd",)}
# Axes that are in the recipe's format but not yet in the engine.
SINGLE_DEGREE = ("parallel.tensor", "parallel.pipeline", "parallel.context")


def _section_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """Combinations that cannot work, and keys that nothing would read; `given` holds the dotted keys that were written."""
    yield from zero_findings(recipe)
    yield from schedule_findings(recipe.schedule, recipe.train, given)
    yield from _parallel_findings(recipe)
    yield from _precision_findings(recipe, given)
    yield from _optimizer_findings(recipe, given)
    yield from _evaluation_findings(recipe, given)


def _parallel_findings(recipe: Recipe) -> Iterator[Finding]:
    for key in SINGLE_DEGREE:
        degree = getattr(recipe.parallel, key.rpartition(".")[2])
        if degree > 1:
            yield Finding((key,), f"{key} = {degree}: this version trains with data parallelism and ZeRO; legal: 1")


def _precision_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    scale_keys = sorted(key for key in given if key.startswith("precision.loss_scale."))
    if recipe.precision.dtype != "fp16":
        for key in scale_keys:
            yield Finding(
                (key, "precision.dtype"),
                f'{key} is used only with precision.dtype "fp16", not "{recipe.precision.dtype}": remove it',
            )
    elif recipe.precision.loss_scale.static is not None:
        for key in scale_keys:
            if key != "precision.loss_scale.static":
                message = f"{key} is for dynamic scaling, but precision.loss_scale.static is given: remove one of them"
                yield Finding((key, "precision.loss_scale.static"), message)


def _optimizer_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    for key, users in OPTIMIZER_KEYS.items():
        if f"optimizer.{key}" in given and recipe.optimizer.name not in users:
            yield Finding(
                (f"optimizer.{key}", "optimizer.name"),
                f"optimizer.{key} is used by {', '.join(users)}, not by {recipe.optimizer.name}: remove it",
            )


def _evaluation_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    data = recipe.data
    if recipe.train.eval_every and not data.eval_fraction and not data.eval_sources:
        yield Finding(
            ("train.eval_every", "data.eval_fraction", "data.eval_sources"),
            f"train.eval_every = {recipe.train.eval_every} needs held-out documents: set data.eval_fraction above 0, or "
            "data.eval_sources; or train.eval_every 0",
        )
    if data.eval_sources and "data.eval_fraction" in given and data.eval_fraction:
        yield Finding(
            ("data.eval_fraction", "data.eval_sources"),
            "data.eval_fraction holds out documents of data.sources, but data.eval_sources is given: remove one of them",
        )


# --- names of files, folders and the hub -----------------------------------------------------------------------------

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
DATA_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".arrow", ".csv", ".gz", ".zst")
SMALLEST_BPE = 257  # 256 bytes and the end of a document
LARGEST_BPE = 1 << 24


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path: not of the form NAME or OWNER/NAME, or with a data file's ending."""
    return not HUB_NAME.fullmatch(name) or name.endswith(DATA_SUFFIXES)


def tokenizer_vocab_size(tokenizer: str) -> int | None:
    """Symbols of a tokenizer that is named in full by the recipe; None for one that must be opened to know."""
    if tokenizer == "bytes":
        return SMALLEST_BPE
    size = tokenizer.removeprefix("bpe:")
    return int(size) if size != tokenizer and size.isascii() and size.isdecimal() else None


def _path_findings(recipe: Recipe) -> Iterator[Finding]:
    for group in ("sources", "eval_sources"):
        for index, source in enumerate(getattr(recipe.data, group)):
            yield from _missing(f"data.{group}[{index}].path", source.path, ("stdlib",))
    yield from _tokenizer_findings(recipe.data.tokenizer)
    if recipe.model.from_pretrained is not None:
        yield from _missing("model.from_pretrained", recipe.model.from_pretrained, ())
        if recipe.model.revision is not None and _exists(recipe.model.from_pretrained):
            message = f"model.revision is for hub names, but {recipe.model.from_pretrained} is a folder here: remove it"
            yield Finding(("model.revision", "model.from_pretrained"), message)
    elif recipe.model.revision is not None:
        yield Finding(("model.revision", "model.from_pretrained"), "model.revision needs model.from_pretrained, a hub name")
    for name in ("offload_optimizer", "offload_param"):
        path = getattr(recipe.zero, name).nvme_path
        if path is not None and not _exists(str(Path(path).absolute().parent)):
            message = (
                f"zero.{name}.nvme_path = {json.dumps(path)}: its parent folder does not exist; mount the drive or create it"
            )
            yield Finding((f"zero.{name}.nvme_path",), message)


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # too long for a file system; ~ of nobody
        return False


def _missing(key: str, name: str, words: tuple[str, ...]) -> Iterator[Finding]:
    if name in words or _exists(name):
        return
    said = f"{key} = {json.dumps(name)}"
    if meant := nearest(name, words, within=1):
        yield Finding((key,), f"{said} does not exist here; did you mean {json.dumps(meant)}?")
    elif looks_local(name):
        yield Finding((key,), f"{said} does not exist (looked from {Path.cwd()})")


def _tokenizer_findings(name: str) -> Iterator[Finding]:
    if not name.startswith("bpe:"):
        yield from _missing("data.tokenizer", name, ("bytes",))
        return
    size = tokenizer_vocab_size(name)
    if size is None or not SMALLEST_BPE <= size <= LARGEST_BPE:
        legal = f"bpe:{SMALLEST_BPE} (256 bytes and the end of a document) to bpe:{LARGEST_BPE}"
        yield Finding(("data.tokenizer",), f"data.tokenizer = {json.dumps(name)}: legal: {legal}")


# --- the network -----------------------------------------------------------------------------------------------------


def _model(recipe: Recipe) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The network in Hugging Face's names, as far as it is known without the hub, and what is wrong with it."""
    model = recipe.model
    if model.from_pretrained is None:
        return _from_config(recipe)
    findings: list[Finding] = []
    config, family = _pretrained_config(model.from_pretrained, findings)
    if family is not None and model.family not in (None, family):
        message = f"model.family = {json.dumps(model.family)}, but model.from_pretrained holds a {family}: remove model.family"
        findings.append(Finding(("model.family", "model.from_pretrained"), message))
    for candidate in FAMILIES.values():
        if candidate.name == (family or model.family):
            findings.extend(_override_findings(model.config, candidate.overridable))
    if config is None or findings:
        return None, findings
    merged = {**config, **model.config}
    _, wrong = _translate(str(family), merged, tokenizer_vocab_size(recipe.data.tokenizer))
    place = Path(model.from_pretrained) / "config.json"
    findings += [Finding(("model.from_pretrained", *_config_keys(f)), f"{place}: {f.message}") for f in wrong]
    findings += _position_findings(recipe, str(family), merged)
    return merged, findings


def _from_config(recipe: Recipe) -> tuple[dict[str, Any] | None, list[Finding]]:
    model = recipe.model
    if model.family is None:
        legal = f"model.family ({', '.join(FAMILIES)}) with model.config, or model.from_pretrained"
        return None, [Finding(("model.family", "model.from_pretrained", "model"), f"no model: give {legal}")]
    findings = [
        Finding((f"model.config.{key}",), f"model.config.{key}: number formats have one owner: write precision.dtype")
        for key in ("dtype", "torch_dtype")
        if key in model.config
    ]
    _, wrong = _translate(model.family, model.config, tokenizer_vocab_size(recipe.data.tokenizer))
    for finding in wrong:
        section = "model.config" if model.family in FAMILIES else "model.family"
        findings.append(Finding((*_config_keys(finding), "model.family"), f"{section}: {finding.message}"))
    findings += _position_findings(recipe, model.family, model.config)
    return dict(model.config), findings


def _translate(
    family: str, hf_config: Mapping[str, Any], vocab_size: int | None
) -> tuple[TransformerConfig | None, list[Finding]]:
    """The network with the tokenizer's number of symbols where the config gives none."""
    if vocab_size is not None:
        hf_config = {"vocab_size": vocab_size, **hf_config}
    config, findings = read_config(family, hf_config)
    if config is not None and vocab_size is not None and config.vocab_size < vocab_size:
        message = (
            f"vocab_size = {config.vocab_size} is less than the tokenizer's {vocab_size} symbols; legal: {vocab_size} or more"
        )
        findings.append(Finding(("vocab_size",), message))
    return config, findings


def _config_keys(finding: Finding) -> tuple[str, ...]:
    return tuple(f"model.config.{_printable(key)}" for key in finding.keys)


def _position_findings(recipe: Recipe, family: str, hf_config: Mapping[str, Any]) -> Iterator[Finding]:
    config, _ = read_config(family, hf_config)
    if config is None or config.max_positions >= recipe.data.seq_len:
        return
    name = next(name for name, rule in FAMILIES[family].keys.items() if "max_positions" in rule.fields)
    yield Finding(
        (f"model.config.{name}", "data.seq_len", "model.from_pretrained"),
        f"model.config.{name} = {config.max_positions} is less than data.seq_len = {recipe.data.seq_len}; legal: "
        f"model.config.{name} of at least {recipe.data.seq_len}, or data.seq_len of at most {config.max_positions}",
    )


def _override_findings(config: Mapping[str, Any], overridable: Collection[str]) -> Iterator[Finding]:
    for key in config:
        if key not in overridable:
            legal = ", ".join(sorted(overridable))
            yield Finding(
                (f"model.config.{_printable(key)}", "model.from_pretrained"),
                f"model.config.{_printable(key)} is fixed by the weights of model.from_pretrained; legal here: {legal}",
            )


def _pretrained_config(name: str, findings: list[Finding]) -> tuple[dict[str, Any] | None, str | None]:
    """config.json of a folder and its family; (None, None) for a hub name."""
    if not _exists(name):
        return None, None
    folder = Path(name).expanduser()
    keys = ("model.from_pretrained",)
    try:
        config = _read_file(folder / "config.json", []).value
    except RecipeError as error:
        findings.extend(Finding(keys, f"model.from_pretrained: {line}") for line in error.lines)
        return None, None
    family = config.get("model_type")
    if family not in FAMILIES:
        message = f"{folder / 'config.json'}: model_type = {_shown(family)} is not a supported family; legal: "
        findings.append(Finding(keys, message + ", ".join(FAMILIES)))
        return None, None
    return config, str(family)
