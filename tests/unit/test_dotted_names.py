"""Every name of ours that a test or a tool writes as a string is the name of something: a rename leaves none behind.

Such strings are read by `monkeypatch.setattr`, by programs that a test starts, and by people.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from trainer.recipe import known_keys

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"(?<![\w./-])(?:trainer|parallel)(?:\.[A-Za-z_]\w*)+")


def names_in(source: str) -> Iterator[str]:
    """Yield our dotted names in all strings of a source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from NAME.findall(node.value)


def exists(name: str) -> bool:
    """Return whether this is a module, something in one, or a key of recipes, whose section is called `parallel` too."""
    if name in known_keys():
        return True
    module, _, rest = name.partition(".")
    found, attributes = import_module(module), rest.split(".")
    while attributes and find_spec(f"{module}.{attributes[0]}"):
        module = f"{module}.{attributes.pop(0)}"
        found = import_module(module)
        if not hasattr(found, "__path__"):  # a module, in which find_spec may not look for more
            break
    for attribute in attributes:
        if not hasattr(found, attribute):
            return False
        found = getattr(found, attribute)
    return True


def test_every_dotted_name_exists() -> None:
    files = [path for folder in ("tests", "tools") for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    named = {name: path for path in files for name in names_in(path.read_text(encoding="utf-8"))}
    assert len(named) > 60, "the names were not found"
    assert [f"{path.relative_to(ROOT)}: {name}" for name, path in sorted(named.items()) if not exists(name)] == []


@pytest.mark.parametrize("name", ["trainer.session", "trainer.loop.trian", "trainer.engine.group.Mesh.built", "parallel.tensr"])
def test_a_name_of_nothing_is_found(name: str) -> None:
    assert list(names_in(f"patch('{name}', 1)\ntext = f'import {name} as x'")) == [name, name]
    assert not exists(name)


@pytest.mark.parametrize("name", ["trainer.loop", "trainer.engine.group.Mesh.build", "trainer.track.console.time.monotonic"])
def test_a_name_of_something_is_let_pass(name: str) -> None:
    assert exists(name)
