"""The reading of a tool's file, JSON or YAML, to one object; whatever cannot be read is one line.

YAML is read without its types of Python, and more strictly than PyYAML reads it: a key that is
given twice is a fault, and 1e-5 is a number, as in YAML 1.2.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError
from trainer.files.reading import RECIPE_BYTES, read_bytes, told

MAX_VALUES = 20_000  # with what aliases repeat; a file of a tool is a page of text
YAML_ENDINGS = (".yaml", ".yml")
NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
DATE = "tag:yaml.org,2002:timestamp"
MERGE = "tag:yaml.org,2002:merge"


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the object in a file. RecipeError names what is wrong with it."""
    try:
        text = read_bytes(path, RECIPE_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: {told(error)}") from None
    is_yaml = path.suffix.lower() in YAML_ENDINGS or not text.lstrip().startswith("{")
    try:
        value = _from_yaml(text, path) if is_yaml else _from_json(text, path)
        _require_bounded(value, path)
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply: not a config") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: holds no keys: a config is one object")
    return value


def _from_json(text: str, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RecipeError(f"{path}: key {twice} is given twice: remove one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg})") from None


def _from_yaml(text: str, path: Path) -> Any:
    import yaml

    loader = _strict(path)(text)
    try:
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(f"{path}{where}: not YAML ({error.problem or error.context})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not YAML ({error})") from None
    finally:
        loader.dispose()


def _strict(path: Path) -> Any:
    """Return PyYAML's safe loader, without dates, with numbers as in YAML 1.2, and without keys
    that are given twice."""
    import yaml

    class Strict(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
        pass

    def once(loader: Any, node: Any) -> Any:
        names = [key.value for key, _ in node.value if key.tag != MERGE]
        if twice := next((name for name in names if names.count(name) > 1), None):
            line = node.start_mark.line + 1
            raise RecipeError(f"{path}: key {twice} is given twice in the object of line {line}: remove one")
        return loader.construct_yaml_map(node)

    Strict.add_constructor("tag:yaml.org,2002:map", once)
    resolvers = {first: [pair for pair in pairs if pair[0] != DATE] for first, pairs in Strict.yaml_implicit_resolvers.items()}
    Strict.yaml_implicit_resolvers = resolvers
    Strict.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
    return Strict


def _require_bounded(value: Any, path: Path) -> None:
    """Raise RecipeError for more values than a config has: an alias of YAML repeats what it names,
    also itself."""
    rest, count = [value], 0
    while rest:
        inner = rest.pop()
        rest += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
        if (count := count + 1) > MAX_VALUES:
            raise RecipeError(f"{path}: more than {MAX_VALUES} values: not a config")
