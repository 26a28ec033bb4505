"""Reading files that others may have put there: regular files only, up to a sensible size. No
torch.

A name may lead to a pipe, on which a reader waits, or to a device, which never ends. A library that
waits on one may also hold the interpreter, so that not even the watchdog can report it. Every file
that a user names, or that lies in a user's folder, is therefore opened here, or checked here before
a library opens it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

RECIPE_BYTES = 1 << 20  # a recipe, or a table that goes with it, is a page of text
RECORD_BYTES = 64 << 20  # a program's record of a model or a run: more than a million labels

AnyPath = str | os.PathLike[str]

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class NotAFile(OSError):
    """The error that a pipe, a device or a folder was found in place of a file."""


def open_regular(path: AnyPath, *, follow: bool = True) -> FileIO:
    """Open a file to read, unbuffered. OSError for anything else, without waiting on a pipe.
    `follow`: follow links."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    with _nameable(path):
        descriptor = os.open(path, flags)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
    except OSError:
        os.close(descriptor)
        raise
    return FileIO(descriptor, "r")


def open_to_append(path: AnyPath) -> FileIO:
    """Open a regular file to append to, unbuffered, and create it if it is missing. OSError for
    anything else."""
    with suppress(FileNotFoundError):
        require_regular(path)
    return FileIO(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY, 0o666), "a")


def require_regular(path: AnyPath) -> None:
    """Raise OSError unless a regular file is there, perhaps behind links, before a library opens
    it."""
    with _nameable(path):
        _require_regular(os.stat(path).st_mode, path)


def require_regular_below(folder: Path) -> None:
    """Raise OSError if a folder has something other than files and folders, before a library opens
    whatever it wants there."""
    for path in folder.iterdir():
        if path.exists() and not path.is_dir():
            require_regular(path)


def read_bytes(path: AnyPath, limit: int = RECORD_BYTES, *, follow: bool = True) -> bytes:
    """Return the content of a file. OSError if it cannot be read, or has more than `limit`
    bytes."""
    content = bytearray()
    with open_regular(path, follow=follow) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(path, limit)
        while chunk := file.read(min(1 << 20, limit + 1 - len(content))):
            content += chunk
    if len(content) > limit:  # it grew meanwhile, or is one of /proc, which have no size
        raise _too_large(path, limit)
    return bytes(content)


def read_text(path: AnyPath, limit: int = RECORD_BYTES) -> str:
    """Return the text in a file. OSError if it cannot be read, ValueError if it is not UTF-8."""
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: AnyPath, limit: int = RECORD_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. OSError if it cannot be read, ValueError if it holds no
    JSON object."""
    try:
        value = json.loads(read_bytes(path, limit))
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def told(error: Exception) -> str:
    """Return the description of an error, for a line that names the file itself."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _too_large(path: AnyPath, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"larger than {limit >> 20} MiB", str(path))


def _require_regular(mode: int, path: AnyPath) -> None:
    if not stat.S_ISREG(mode):
        raise NotAFile(errno.EINVAL, f"{KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file", str(path))


@contextmanager
def _nameable(path: AnyPath) -> Iterator[None]:
    """Report a name that no file system can have as an OSError, like a name that is not there."""
    try:
        yield
    except ValueError as error:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, f"not a possible file name ({error})", str(path)) from None
