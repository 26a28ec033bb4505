"""Write ds_configs/KEYS.md: every key of a recipe, from the JSON Schema that `triaxis schema`
prints.

    python tools/key_reference.py

A test compares the page with what this makes, so run it whenever a key has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.recipe import json_schema
from trainer.schema import Recipe

PAGE = Path(__file__).parents[1] / "ds_configs" / "KEYS.md"
HEAD = """# Key reference

All keys of a recipe, section by section. This page is written by `python tools/key_reference.py`, from the schema that
`triaxis schema` prints, so do not edit it. A key that is absent has its default. A dash in that column means that there is
none; the meaning then says what happens. Units stand in brackets.

"""
UNIT = re.compile(r" \[([^\[\]]+)\]\.?$")  # at the end of a description
BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
BEYOND_USE = 2**53  # an upper bound that only keeps numbers exact in JSON is not shown
REQUIRED = object()

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """A renderer of a schema as Markdown.

    `defaults` is a recipe with nothing written in it, as JSON, because the schema lacks defaults
    that are made when they are needed. `headings` collects the heading of each definition, so that
    a second use links to the first.
    """

    schema: Node
    defaults: Node
    headings: dict[str, str] = field(default_factory=dict)

    def page(self) -> str:
        """Return the whole page."""
        sections = {name: node for name, node in self.schema["properties"].items() if self._definition(node)}
        single = {name: node for name, node in self.schema["properties"].items() if name not in sections}
        links = " · ".join(f"[{name}](#{name})" for name in sections)
        tables = [self._table(single, "", self.defaults)]
        for name, node in sections.items():
            tables += self._section(name, node, self.defaults[name], level=2)
        return "\n".join([HEAD + links + "\n", *tables])

    def _section(self, key: str, node: Node, defaults: Any, *, level: int) -> Iterator[str]:
        """Yield the heading and the table of one object, then those of the objects in it."""
        definition = self.schema["$defs"][self._definition(node)]
        inside = [*self._new_objects(key, definition["properties"])]
        yield f"{'#' * level} {key}\n\n{' '.join([definition['description'], *_conditions(node)])}\n"
        yield self._table(definition["properties"], f"{key}.", defaults, definition.get("required", ()))
        for name, heading, inner in inside:
            below = defaults.get(name) if isinstance(defaults, Mapping) else None
            yield from self._section(heading, inner, below, level=3)

    def _new_objects(self, key: str, properties: Node) -> Iterator[tuple[str, str, Node]]:
        """Yield (name, heading, schema) of those keys of a section that hold objects without a
        table yet."""
        for name, node in properties.items():
            definition = self._definition(node)
            if definition is not None and definition not in self.headings:
                self.headings[definition] = f"{key}.{name}" + ("[]" if node.get("type") == "array" else "")
                yield name, self.headings[definition], node

    def _table(self, properties: Node, prefix: str, defaults: Any, required: Sequence[str] = ()) -> str:
        rows = ["| key | legal values | default | meaning |", "|---|---|---|---|"]
        for name, node in properties.items():
            meaning, unit = _without_unit(self._description(node))
            legal = self._legal(node) + (f" [{unit}]" if unit else "")
            default = REQUIRED if name in required else self._default(name, node, defaults)
            cells = (f"`{prefix}{name}`", legal, _shown(default), " ".join([meaning, *_conditions(node)]))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(rows) + "\n"

    def _description(self, node: Node) -> str:
        definition = self._definition(node)
        return str(node.get("description") or (self.schema["$defs"][definition]["description"] if definition else ""))

    def _default(self, name: str, node: Node, defaults: Any) -> Any:
        if isinstance(defaults, Mapping):
            found = defaults.get(name)
            return None if isinstance(found, Mapping) else found  # an object has a table of its own
        return node.get("default", [] if node.get("type") == "array" else None)

    def _definition(self, node: Node) -> str | None:
        """Return the name of the definition that a key, or each item of a list, refers to."""
        node = node.get("items", node)
        for choice in (node, *node.get("anyOf", ())):
            if "$ref" in choice:
                return str(choice["$ref"]).rpartition("/")[2]
        return None

    def _legal(self, node: Node) -> str:
        definition = self._definition(node)
        if definition is not None:
            heading = self.headings[definition]
            kind = "a list of objects" if node.get("type") == "array" else "an object"
            return f"{kind}: [{heading}](#{anchor(heading)})"
        choices = [choice for choice in node.get("anyOf", [node]) if choice.get("type") != "null"]
        null = " or null" if "anyOf" in node and node.get("default") is not None else ""
        return " or ".join(map(_values, choices)) + null


def anchor(heading: str) -> str:
    """Return the name by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _values(node: Node) -> str:
    """Say which values one alternative of a key may have."""
    if choices := node.get("enum") or ([node["const"]] if "const" in node else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    match node.get("type"):
        case "integer":
            return "whole number" + _range(node)
        case "number":
            return "number" + _range(node)
        case "boolean":
            return "true, false"
        case "array":
            least, most = node.get("minItems", 0), node.get("maxItems")
            length = f" of {least}" if least and least == most else f" of at least {least}" if least else ""
            return f"a list{length}, each: {_values(node['items'])}"
        case "string":
            return f"a string that matches `{node['pattern']}`" if "pattern" in node else "a string"
        case _:
            return "an object"


def _range(node: Node) -> str:
    stricter = {name.replace("exclusiveM", "m") for name in node if name.startswith("exclusive")}
    bounds = [f"{sign} {node[name]:,.15g}" for name, sign in BOUNDS if name in {*node} - stricter and node[name] < BEYOND_USE]
    bounds += [f"a multiple of {node['multipleOf']}"] if "multipleOf" in node else []
    return " " + " and ".join(bounds) if bounds else ""


def _without_unit(description: str) -> tuple[str, str]:
    """Divide a description into what it says and the unit in brackets at its end, "" where it has
    none."""
    unit = UNIT.search(description)
    return (description[: unit.start()] + ".", unit[1]) if unit else (description, "")


def _conditions(node: Node) -> Iterator[str]:
    """Yield a sentence for each key on which this one depends: at other values of that key it is
    refused."""
    for other, legal in node.get("only", {}).items():
        if isinstance(legal, Mapping):
            yield f"Only with `{other}` of {legal['minimum']} or more."
        elif not legal:
            yield f"Only with `{other}`."
        else:
            *most, last = (f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in legal)
            yield f"Only with `{other}` {', '.join(most)}{' or ' if most else ''}{last}."


def _shown(default: Any) -> str:
    if default is REQUIRED:
        return "required"
    if isinstance(default, list) and default and isinstance(default[0], dict):
        default = [{key: value for key, value in item.items() if value not in (None, [])} for item in default]
    return "–" if default in (None, "", []) else f"`{json.dumps(default)}`"


def reference() -> str:
    """Return the page of this version's keys."""
    return Reference(json_schema(), json.loads(Recipe().model_dump_json(by_alias=True))).page()


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
