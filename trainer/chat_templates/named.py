"""The chat template that a recipe chooses, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from typing_extensions import TypedDict

from trainer.errors import RecipeError
from trainer.files.decoding import read_as
from trainer.files.reading import read_text, told

KEY = "data.chat_template"
HERE = Path(__file__).parent
SUFFIX = ".jinja"


class _Template(TypedDict):
    tokens: list[str]
    source: str


@cache
def _table() -> dict[str, _Template]:
    return read_as(dict[str, _Template], HERE / "templates.json")


def names() -> tuple[str, ...]:
    """Return the names that a recipe may give."""
    return tuple(_table())


def is_file(chosen: str) -> bool:
    """Return whether a value of the key is a path of the user's."""
    return chosen.endswith(SUFFIX)


def tokens_of(chosen: str | None) -> tuple[str, ...]:
    """Return the special tokens that a template writes around turns; () for a user's file."""
    return tuple(_table()[chosen]["tokens"]) if chosen in _table() else ()


def source_of(chosen: str) -> str:
    """Return the template's text. RecipeError if the user's file cannot be read."""
    path = Path(chosen) if is_file(chosen) else HERE / f"{chosen}{SUFFIX}"
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{KEY}: {path}: not readable as UTF-8 text: {told(error)}; correct the path, or the file") from None


def said(chosen: str | None, *, has_own: bool | None) -> str:
    """Return the line that says which template is taken, and why. `has_own`: the tokenizer brings
    one; None if it is not opened yet."""
    if chosen is not None:
        instead = ", instead of the tokenizer's own" if has_own else ""
        return f"data: chat template: {chosen} ({KEY}){instead}"
    plain = f"a plain one (role, newline, content, end of document); {KEY} names another: {', '.join(names())}"
    if has_own is None:
        return f"data: chat template: the tokenizer's own; if it has none, {plain}"
    return (
        f"data: chat template: the tokenizer's own ({KEY} is not set)"
        if has_own
        else (f"data: chat template: the tokenizer has none: {plain}")
    )


@contextmanager
def template_named(chosen: str | None) -> Iterator[None]:
    """Have what is wrong with a chosen template said of this key, and not of the tokenizer."""
    try:
        yield
    except RecipeError as error:
        if chosen is None:
            raise
        raise RecipeError(
            [line.replace("data.tokenizer: its chat template", f"{KEY}: {chosen}") for line in error.lines]
        ) from None


def require_tokens(chosen: str | None, known: Sequence[str]) -> None:
    """Raise RecipeError for special tokens that the template writes and the tokenizer lacks.
    `known`: the spellings of its added tokens."""
    if lacking := [token for token in tokens_of(chosen) if token not in known]:
        raise RecipeError(
            f"{KEY}: {chosen} writes {', '.join(lacking)}, which data.tokenizer does not have: "
            f'add to data: "new_tokens": {json.dumps(lacking)}'
        )
