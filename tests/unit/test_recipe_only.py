"""Keys that are used only with another: what the schema says of each holds of every recipe that writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from trainer.recipe import json_schema
from trainer.recipe.only import keys_only_with, only_findings
from trainer.schema import Parallel, Recipe, Section, only

VALUES: dict[str, Any] = {  # that a key may have, where its schema has no default to write
    **{"path": "corpus.txt", "fields": {}, "shape": "prompt", "balance": [2], "targets": ["mlp"], "quantize": "nf4"},
    **{"decay_steps": 1, "sequence_parallel": True, "overlap": True, "bos": True, "merge": True, "trust_remote_code": True},
    **{"pipeline_read": True, "pipeline_write": True, "betas": [0.9, 0.9], "patience": 2},
    **{"matmul": "tf32", "schedule": "gpipe", "virtual_stages": 2},
}


def fields(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every field that hangs on another, with its keys from the recipe down."""
    for name, field in section.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "only" in extra:
            yield (*path, name), extra
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, (*path, name))


HANGING = {".".join(path): extra for path, extra in fields(Recipe)}


def recipe_with(given: Mapping[str, Any]) -> Recipe:
    """A recipe with these values at their dotted keys, and the defaults."""
    values = Recipe().model_dump()
    for dotted, value in given.items():
        *sections, name = dotted.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[name] = value
    return Recipe.model_validate(values)


def default_of(key: str) -> Any:
    value: Any = Recipe()
    for part in key.split("."):
        value = getattr(value, part)
    return value


def met(legal: Any) -> Any:
    return legal["minimum"] if isinstance(legal, Mapping) else legal[0]


def unmet(other: str, legal: Any) -> Any:
    """A value of the other key at which the first is not used."""
    if isinstance(legal, Mapping):
        return legal["minimum"] - 1
    node: Any = Recipe
    *sections, name = other.split(".")
    for section in sections:
        node = node.model_fields[section].annotation
    schema = node.model_json_schema()["properties"][name]
    choices = next((one["enum"] for one in (schema, *schema.get("anyOf", ())) if "enum" in one), ["gpt2"])
    return next(choice for choice in choices if choice not in legal)


def test_there_are_such_keys_in_every_section_that_has_them() -> None:
    assert len(HANGING) > 30
    assert {key.partition(".")[0] for key in HANGING} >= {
        "data",
        "parallel",
        "zero",
        "optimizer",
        "schedule",
        "tuning",
        "guard",
    }


@pytest.mark.parametrize("key", [key for key in HANGING if key != "tuning"])
def test_it_is_refused_elsewhere_and_only_there(key: str) -> None:
    around = [".".join(key.split(".")[: n + 1]) for n in range(key.count(".") + 1)]
    (*outer, (other, legal)) = [next(iter(HANGING[one]["only"].items())) for one in around if one in HANGING]
    named = {of: met(wanted) for of, wanted in outer if wanted}
    value = VALUES.get(key.rpartition(".")[2], default_of(key))
    if isinstance(value, Section):  # one of its keys for all of them
        inner = next(iter(type(value).model_fields))
        key, value = f"{key}.{inner}", getattr(value, inner) or 1.0
    written = {key: "x" if value is None else value}
    assert list(only_findings(recipe_with(named | {other: met(legal)} | written), written.keys())) == []
    (finding,) = only_findings(recipe_with(named | {other: unmet(other, legal)} | written), written.keys())
    assert finding.keys == (key, other)
    assert finding.message.startswith(f"{key} is used only with {other}")


def test_all_of_tuning_hangs_on_a_method() -> None:
    recipe = recipe_with({"tuning.merge": True})
    (finding,) = only_findings(recipe, {"tuning.merge"})
    assert finding.message == "tuning.merge is used only with tuning.method: give one, or remove it"


def test_rows_of_a_source_are_looked_into() -> None:
    recipe = Recipe.model_validate({"data": {"sources": [{"path": "a"}, {"path": "b", "fields": {"source": "en"}}]}})
    (finding,) = only_findings(recipe, {"data", "data.sources", "data.sources[1].fields.source", "data.sources[1].path"})
    assert finding.message.startswith('data.sources[1].fields.source is used only with data.task "sft", "preference"')
    translated = recipe.model_copy(update={"data": recipe.data.model_copy(update={"task": "translate"})})
    assert list(only_findings(translated, {"data.sources[1].fields.source"})) == []
    learned = recipe.model_copy(update={"data": recipe.data.model_copy(update={"task": "sft"})})
    (finding,) = only_findings(learned, {"data.sources[1].fields.source"})
    assert finding.message == 'data.sources[1].fields.source is used only with data.task "translate", not "sft": remove it'


def test_null_and_an_idle_value_ask_for_nothing() -> None:
    recipe = Recipe.model_validate({"parallel": {"sequence_parallel": False, "balance": None}})
    assert list(only_findings(recipe, {"parallel.sequence_parallel", "parallel.balance"})) == []
    assert keys_only_with(Parallel, "parallel.tensor") == {"sequence_parallel", "overlap"}


def test_editors_read_it_too() -> None:
    properties = json_schema()["$defs"]["Data"]["properties"]
    assert properties["mask_fraction"]["only"] == {"data.task": ["mlm"]}
    assert only("a.b", least=2, idle=False) == {"only": {"a.b": {"minimum": 2}}, "idle": False}
