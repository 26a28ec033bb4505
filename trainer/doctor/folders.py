"""The check of folders: can they be written, how fast, is there room, does their clock agree. No
torch."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.doctor.case import Case
from trainer.doctor.findings import Finding, broken, fallback, ready
from trainer.files.mounts import existing, mount_of
from trainer.files.reading import told

TRIAL_BYTES = 4 << 20
TRIALS = 4
SLOW_BYTES_PER_S = 30e6  # a checkpoint of 1 GB would take half a minute
SLOW_FILE_S = 0.05  # to create, sync and remove one
LEAST_FREE = 1 << 30
LEAST_INODES = 10_000
SKEW_S = 2.0  # file systems without fractions of seconds are within 1


class Place(NamedTuple):
    """A folder that a run writes to.

    `elsewhere`: the command that names another one. `needed`: whether the run fails without it.
    `alone`: why it should be on a disk of this machine alone; "" where that does not matter.
    """

    name: str
    path: Path
    elsewhere: str
    needed: bool = True
    alone: str = ""


def check_folders(case: Case) -> Iterator[Finding]:
    """Yield a finding for each folder: written, fast enough, with room."""
    for place in places(case):
        yield _look_at(place)


def places(case: Case) -> Iterator[Place]:
    """Yield the folders that a run of this case writes to."""
    yield Place("run folder", case.run_dir, 'triaxis train RECIPE --set run.dir="$HOME/runs"')
    if case.recipe and case.recipe.data.cache_dir:
        yield Place("data cache", Path(case.recipe.data.cache_dir), 'triaxis train RECIPE --set data.cache_dir="$HOME/data"')
    for path, key in case.nvme_paths.items():
        change = f'triaxis train RECIPE --set {key}="/tmp/nvme-$(id -u)"'
        yield Place("NVMe", Path(path), change, alone="every step reads and writes the state")
    temporary = case.environment.get("TMPDIR") or "/tmp"
    yield Place("temporary files", Path(temporary), 'mkdir -p "$HOME/tmp" && export TMPDIR="$HOME/tmp"')
    yield Place("home", case.home, 'export XDG_CACHE_HOME="/tmp/cache-$(id -u)"', needed=False)
    change = 'export TORCH_EXTENSIONS_DIR="/tmp/extensions-$(id -u)"'
    yield Place("extensions", case.extensions, change, needed=False, alone="a build's lock there stops all machines")


def _look_at(place: Place) -> Finding:
    above = existing(place.path)
    try:
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in its place")
        write_s, file_s = _tried(above)
    except OSError as error:
        return _unusable(place, f"{place.path} cannot be written: {above}: {told(error)}")
    if lack := lack_of_room(above):
        return _unusable(place, f"{place.path}: {lack}")
    rate, mount = TRIAL_BYTES / write_s, mount_of(above)
    seen = (
        f"{place.path}, {mount.kind or 'unknown file system'}, {rate / 1e6:,.0f} MB/s, {free_bytes(above) / 1e9:,.0f} GB free"
    )
    if place.alone and mount.is_shared:
        return fallback(place.name, f"{seen}: shared by machines, and {place.alone}", place.elsewhere)
    if rate < SLOW_BYTES_PER_S or file_s > SLOW_FILE_S:
        return fallback(place.name, f"slow: {seen}, {file_s * 1e3:,.0f} ms for a file", place.elsewhere)
    return ready(place.name, seen)


def _unusable(place: Place, seen: str) -> Finding:
    if place.needed:
        return broken(place.name, seen, place.elsewhere)
    return fallback(place.name, seen, place.elsewhere)


def _tried(folder: Path) -> tuple[float, float]:
    """Return the seconds of a file of `TRIAL_BYTES`, and of an empty one, both synced: the least of
    a few, as others use the disk too. OSError if there can be none."""
    with tempfile.TemporaryDirectory(prefix=".triaxis-doctor-", dir=folder) as trial:
        file = Path(trial) / "file"
        large, empty = (min(_written_s(file, size) for _ in range(TRIALS)) for size in (TRIAL_BYTES, 0))
        return large, empty


def _written_s(path: Path, size: int) -> float:
    content = bytes(size)
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    return time.perf_counter() - start


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def lack_of_room(folder: Path) -> str:
    """Return what there is too little of on the folder's disk; "" for nothing."""
    found = os.statvfs(folder)
    if (free := found.f_bavail * found.f_frsize) < LEAST_FREE:
        return f"{free / 1e6:,.0f} MB are free, less than 1 GiB"
    if found.f_files and found.f_favail < LEAST_INODES:
        return f"{found.f_favail:,} more files can be made there (inodes; df -i)"
    return ""


def check_clock(case: Case) -> Iterator[Finding]:
    """Yield whether the disk of the run folder stamps files with this machine's time."""
    above = existing(case.run_dir)
    try:
        with tempfile.NamedTemporaryFile(prefix=".triaxis-doctor-", dir=above) as file:
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError:
        return  # said of the folder already
    if abs(skew) <= SKEW_S:
        yield ready("clock", f"agrees with that of {above}, to {max(abs(skew), 0.1):.1f} s")
    else:
        yield fallback(
            "clock",
            f"{abs(skew):,.0f} s {'behind' if skew > 0 else 'before'} that of {above}: the times of logs, and builds of "
            "extensions, which go by them, are wrong",
            "sudo chronyc makestep",
        )
