"""The speed of a disk, measured by writing a file and reading it again. No torch."""

from __future__ import annotations

import os
import tempfile
import time
from io import FileIO
from pathlib import Path
from typing import Any

BLOCK = 8 << 20
MOST_BYTES = 512 << 20
MOST_S = 4.0  # of writing, and of reading
SHARE_OF_FREE = 8  # the file takes at most this part of what is free


def disk_speed(folder: Path) -> dict[str, Any]:
    """Return the bytes a second that a large file in the folder is written and read with, also as
    long as the system keeps it in memory, and the seconds until a small one is safe. OSError if
    there can be none."""
    free = os.statvfs(folder)
    most = min(MOST_BYTES, free.f_bavail * free.f_frsize // SHARE_OF_FREE)
    block = os.urandom(BLOCK)  # what compresses would be faster on some
    with tempfile.TemporaryDirectory(prefix=".triaxis-doctor-", dir=folder) as trial:
        path = Path(trial) / "file"
        with path.open("wb", buffering=0) as file:
            start = time.perf_counter()
            written = 0
            while written < max(BLOCK, most) and time.perf_counter() - start < MOST_S:
                written += file.write(block)
            os.fsync(file.fileno())
            write_s = time.perf_counter() - start
            cached_write_s = _rewritten_s(file, block, written)
            cached_read_s = _read(path)[1]
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is read
        read, read_s = _read(path)
        return {
            "folder": str(folder),
            "bytes": written,
            "write_bytes_per_s": written / write_s,
            "read_bytes_per_s": read / read_s,
            "cached_write_bytes_per_s": written / cached_write_s,
            "cached_read_bytes_per_s": written / cached_read_s,
            "sync_s": _sync_s(Path(trial) / "small"),
        }


def _rewritten_s(file: FileIO, block: bytes, size: int) -> float:
    """Return the seconds of writing what is there once more, as swapping does: nobody waits for the
    disk."""
    file.seek(0)
    start, written = time.perf_counter(), 0
    while written < size:
        written += file.write(block)
    return time.perf_counter() - start


def _read(path: Path) -> tuple[int, float]:
    read = 0
    into = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        start = time.perf_counter()
        while (count := file.readinto(into)) and time.perf_counter() - start < MOST_S:
            read += count
        return read, time.perf_counter() - start


def _sync_s(path: Path) -> float:
    times = []
    for _ in range(9):
        with path.open("wb", buffering=0) as file:
            start = time.perf_counter()
            file.write(b"x" * 4096)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
