"""The message about a key that no section has: where it belongs, or which key was probably
meant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from trainer.convert.deepspeed_keys import REFUSED, refusal
from trainer.convert.words import Meaning, meaning, words
from trainer.recipe.marks import KeyPath, dotted, path_of
from trainer.recipe.suggestions import accepted, meant_values, offer
from trainer.recipe.wording import schema_at, wanted
from trainer.schema import Recipe, Section
from trainer.spelling import nearest


@cache
def known_keys() -> tuple[str, ...]:
    """Return the dotted name of every key; items of a list of objects as [0]."""
    return ("extends", *_keys_of(Recipe, ()))


def _keys_of(section: type[Section], path: KeyPath) -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        here: KeyPath = (*path, info.alias or name)
        keys.append(dotted(here))
        item = next((t for t in get_args(info.annotation) if isinstance(t, type) and issubclass(t, Section)), None)
        inner = info.annotation
        if item is not None:
            keys += _keys_of(item, (*here, 0) if get_origin(info.annotation) is list else here)
        elif isinstance(inner, type) and issubclass(inner, Section):
            keys += _keys_of(inner, here)
    return keys


def unknown_key(path: KeyPath, value: Any, given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the message about a key that is not in `schema.py`, and the keys that were probably
    meant.

    A slip of one letter in this section comes first, then a key written into the wrong section,
    then a word of another tool, then wider guesses.
    """
    section, key = path[:-1], str(path[-1])
    generic = re.sub(r"\[\d+\]", "[0]", dotted(section))
    siblings = [name.rpartition(".")[2] for name in known_keys() if name.rpartition(".")[0] == generic]
    unknown = f"unknown key {dotted(path)}"
    theirs = meaning(key, value)
    # DeepSpeed's bf16 is an object, that of a Trainer a switch.
    if theirs and not theirs.why and isinstance(value, bool) and generic not in REFUSED:
        return _of_another_tool(path, theirs, value, given)
    if reason := refusal(generic, key):
        return f"{unknown}: DeepSpeed's {key} does not belong here: {_offered(reason, value)}", []
    if meant := nearest(key, siblings, within=1):
        return _did_you_mean(path, (*section, meant), value, given)
    homes = [name for name in known_keys() if name.rpartition(".")[2] == key]
    if homes := [home for home in homes if accepted(path_of(home), value)] or homes[:1]:
        return f"{unknown}: {_belongs(key, homes, value, given)}", []
    if theirs:
        return _of_another_tool(path, theirs, value, given)
    if meant := nearest(key, siblings):
        return _did_you_mean(path, (*section, meant), value, given)
    refused = [name for where in ("deepspeed", "zero") for name in REFUSED[where]]
    if generic in ("deepspeed", "zero", "") and (meant := nearest(key, refused, within=2)):
        reason = _offered(refusal(generic, meant) or "", value)
        return f"{unknown}; did you mean DeepSpeed's {meant}? It does not belong here: {reason}", []
    if (meant := nearest(key, [word for word in words() if word[:1] == key[:1]], within=1)) and (
        theirs := meaning(meant, value)
    ):
        return _of_another_tool(path, theirs, value, given)
    if meant := nearest(key, [name.rpartition(".")[2] for name in known_keys()]):
        homes = [name for name in known_keys() if name.rpartition(".")[2] == meant]
        return f"{unknown}; did you mean {' or '.join(offer(path_of(home), value, given) for home in homes)}?", []
    return f"{unknown}; legal here: {', '.join(siblings)}", []


def _did_you_mean(path: KeyPath, meant: KeyPath, value: Any, given: Mapping[str, Any]) -> tuple[str, list[str]]:
    return f"unknown key {dotted(path)}; did you mean {offer(meant, value, given)}?", [dotted(meant)]


def _belongs(key: str, homes: list[str], value: Any, given: Mapping[str, Any]) -> str:
    sections = " or ".join(f'"{home.rpartition(".")[0]}"' for home in homes)
    offers = " or ".join(offer(path_of(home), value, given) for home in homes)
    return f"{json.dumps(key)} belongs in {sections}: write {offers}"


def _of_another_tool(path: KeyPath, theirs: Meaning, value: Any, given: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the message about a word of another tool, with its value where that is another one
    here."""
    unknown = f"unknown key {dotted(path)}"
    if theirs.why:
        return f"{unknown}: {theirs.title} has it, and there is no counterpart: {theirs.why}", []
    if not theirs.values:
        return f"{unknown}: it asks for nothing here: remove it", []
    values = theirs.values.items()
    several = len(values) > 1
    offers = [
        offer(path_of(home), ours, given, with_value=several or not _same(ours, value), beside=theirs.values)
        for home, ours in values
    ]
    return f"{unknown}; did you mean {' and '.join(offers)}?", list(theirs.values)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def _offered(reason: str, value: Any) -> str:
    """Return a reason that names a key to write, and what that key takes where it is not the given
    value."""
    written = re.search(r"write ([a-z_]+\.[a-z_]+(?:\.[a-z_]+)*)\b(?! [\"{])", reason)
    if written is None or written[1] not in known_keys() or accepted(path_of(written[1]), value):
        return reason
    node = schema_at(path_of(written[1]))
    if not reason.endswith(written[1]):
        return f"{reason}; {written[1]} takes {wanted(node)}"
    if better := meant_values(path_of(written[1]), value, node):
        return f"{reason} = {json.dumps(better[0])}"
    return f"{reason}, {wanted(node)}"
