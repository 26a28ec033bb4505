"""The decoding of our own files: JSON of a declared type, or one line that says where it is of
another.

Anybody may have edited or replaced what lies in a run folder, and sealed it again. A reader
declares what it needs of such a file as a dataclass or a TypedDict, and pydantic checks it, so that
no user of the value need check again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from trainer.files.reading import RECORD_BYTES, read_bytes

T = TypeVar("T")

OPEN = ConfigDict(extra="allow", strict=True)  # for a TypedDict that keeps other keys as they are
CLOSED = ConfigDict(extra="forbid")  # for a TypedDict without other keys


def read_as(kind: type[T], path: Path, limit: int = RECORD_BYTES) -> T:
    """Return the JSON in a file as `kind`. OSError if it cannot be read; ValueError says where it
    is something else."""
    content = read_bytes(path, limit)
    try:
        found: T = _adapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        raise _said(error) from None
    return found


def decode(kind: type[T], value: Any) -> T:
    """Return a value that was read from JSON as `kind`. ValueError says where it is something
    else."""
    try:
        found: T = _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise _said(error) from None
    return found


def _said(error: ValidationError) -> ValueError:
    detail = error.errors(include_url=False)[0]
    place = ".".join(map(str, detail["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    if detail["type"] == "json_invalid":
        message = f"not JSON ({detail['ctx']['error']})"
    return ValueError(f"{place}: {message}{more}" if place else message)


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
