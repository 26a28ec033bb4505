"""Content hashes of files, remembered together with the file system's record of the file.

A second start must notice a changed file without reading terabytes again. The content is hashed
once; afterwards a file with the same size, modification time, change time and inode is taken to
have the same content. No program can set the change time, so a file rewritten with its old size and
old modification time is noticed too.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DataError
from trainer.files.durable import make_private, write_json
from trainer.files.locks import Lock
from trainer.files.reading import open_regular, read_json, require_regular

CHUNK_BYTES = 1 << 20
# Kernels stamp files by a coarse clock: a write this soon may leave the stamp unchanged.
RACY_S = 2.0


@dataclass(frozen=True)
class Stamp:
    """The file system's record of a file, which every write changes."""

    size: int  # [bytes]
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Stamp:
        """Return the stamp of a file now. DataError if the file cannot be inspected."""
        try:
            require_regular(path)
            status = os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def require_unchanged(self, path: str | os.PathLike[str]) -> None:
        """Raise DataError if the file at `path` is no longer the one that was stamped."""
        now = Stamp.of(path)
        if now != self:
            raise DataError(
                f"{path}: changed while it was being read ({self.size} bytes before, {now.size} now); "
                "start again when nothing writes to it"
            )


def unreadable(path: str | os.PathLike[str], error: OSError) -> DataError:
    """Return the error for a file that the operating system cannot read."""
    return DataError(f"{path}: cannot be read: {error.strerror or error}; fix its permissions or remove it from the source")


def fingerprint_of(facts: object) -> str:
    """Return the fingerprint of JSON-able facts: 32 hexadecimal digits, the same for equal
    facts."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


class Digests:
    """The content hashes of files, remembered in one JSON file. If it is lost or damaged, files are
    read again."""

    def __init__(self, cache_dir: Path) -> None:
        make_private(cache_dir)
        self._path = cache_dir / "digests.json"
        self._lock = Lock(cache_dir / "digests.lock")

    def of(self, paths: list[str]) -> list[tuple[Stamp, str]]:
        """Return the stamp and content hash of each file. One process hashes at a time, so ranks
        that start together read each file once."""
        with self._lock.held():
            memory = self._recall()
            found = [self._digest(path, memory) for path in paths]
            learned = memory | self._settled(paths, found)
            if learned != memory:
                write_json(self._path, learned)
        return found

    def _digest(self, path: str, memory: dict[str, list[object]]) -> tuple[Stamp, str]:
        stamp = Stamp.of(path)
        remembered = memory.get(path)
        if remembered and remembered[:-1] == [stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode]:
            return stamp, str(remembered[-1])
        digest = _hash_content(path)
        stamp.require_unchanged(path)
        return stamp, digest

    @staticmethod
    def _settled(paths: list[str], found: list[tuple[Stamp, str]]) -> dict[str, list[object]]:
        """Return the entries that may be remembered: files last written so long ago that their next
        write must change the stamp."""
        settled_ns = time.time_ns() - int(RACY_S * 1e9)
        return {
            path: [stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode, digest]
            for path, (stamp, digest) in zip(paths, found, strict=True)
            if stamp.ctime_ns < settled_ns
        }

    def _recall(self) -> dict[str, list[object]]:
        try:
            memory = read_json(self._path)
        except (OSError, ValueError):
            return {}
        return {path: entry for path, entry in memory.items() if isinstance(entry, list) and len(entry) == 5}


def _hash_content(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_regular(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()
