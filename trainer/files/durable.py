"""Writing that survives a crash: private, fsynced files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

DIR_MODE = 0o700
FILE_MODE = 0o600
# With O_NONBLOCK a pipe in its place is an error instead of a wait.
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


def make_private(folder: Path) -> Path:
    """Make the folder, and missing ones above it, readable by the owner only. Existing folders stay
    as they are."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=DIR_MODE, exist_ok=True)
    return folder


@contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new content for a file. It is on disk and in place when the block ends, and dropped if
    the block fails."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.unlink(missing_ok=True)  # left by a kill, or put there by somebody
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def private_file(path: Path, *, must_be_new: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file of mode 0600, which is on disk (not only in its cache) when the block
    ends.

    It replaces what is there. With `must_be_new`, OSError if anything is there, even a symbolic
    link.
    """
    how = os.O_EXCL if must_be_new else os.O_TRUNC
    descriptor = os.open(path, NEW_FILE | how, FILE_MODE)
    with open(descriptor, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove whatever is there, and all below it; a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names inside the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def appearing_folder(final: Path) -> Iterator[Path]:
    """Open a folder to fill, renamed to `final` when the block ends. After a failure or a crash,
    `final` does not exist.

    If another process has made the same `final` meanwhile, that one stays and this one goes.
    """
    staging = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
    make_private(staging)
    try:
        yield staging
        sync_folder(staging)
        if not final.exists():
            os.rename(staging, final)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_new(folder: Path) -> None:
    """Raise FileExistsError if something other than an empty folder is there: a user's files are
    never overwritten."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "something is there already, and is not overwritten", str(folder))


@contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """Open a folder to fill, made durable and put in the place of `final` when the block ends.
    After a failure `final` is as before.

    What was there is removed, so it must be ours: a part of a run's folder, or `require_new`. It is
    renamed twice instead of deleted first, so that the old folder is gone only when the new one is
    there.
    """
    final = Path(os.path.abspath(final))
    ours = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    final.parent.mkdir(parents=True, exist_ok=True)
    # Left by a kill.
    for left in (path for path in final.parent.iterdir() if ours.fullmatch(path.name)):
        shutil.rmtree(left, ignore_errors=True)
    draft, aside = (final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.{word}") for word in ("tmp", "old"))
    draft.mkdir()
    try:
        yield draft
        for path in (path for path in draft.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(draft)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if final.exists():
        final.rename(aside)
    draft.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Replace the JSON file at `path` in one durable step.

    Writers take turns at one draft beside it, so that a killed one leaves nothing but the draft,
    which the next one takes over.
    """
    text = f"{json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)}\n"
    draft = path.with_name(f".{path.name}.tmp")
    with _turn_at(draft) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
        os.replace(draft, path)
    sync_folder(path.parent)


@contextmanager
def _turn_at(draft: Path) -> Iterator[BinaryIO]:
    """Open the draft, empty and for this writer alone. Others wait for it, and then find that it
    has been renamed."""
    while True:
        with open(os.open(draft, NEW_FILE, FILE_MODE), "wb") as file:
            with suppress(OSError):  # a file system without locks: there two writers must not meet
                fcntl.flock(file, fcntl.LOCK_EX)
            if draft.exists() and os.path.samestat(draft.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                yield file
                return
