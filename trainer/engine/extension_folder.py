"""The folder in which torch compiles extensions, and the locks that killed builds leave there. No
torch.

torch's lock is a file that exists. It holds no process number, and whoever waits for it waits for
ever; but the process that builds keeps the file open.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from trainer.files.mounts import mount_of

LOCKS = ("*/lock", "*/*/lock", "*/*/*/lock")  # FOLDER/py311_cu128/NAME/lock, and without the middle
# A build takes minutes. On a disk that other machines write to, one of them may hold a lock.
SHARED_LOCK_S = 30 * 60


def extensions_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder above all extensions of this user."""
    if named := environment.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    home = Path(environment.get("HOME") or "~").expanduser()
    return Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "torch_extensions"


def locks(folder: Path, name: str | None = None) -> Iterator[Path]:
    """Yield the locks below the folder; of one extension if it is named."""
    for path in sorted(path for pattern in LOCKS for path in folder.glob(pattern)):
        if name in (None, path.parent.name):
            yield path


def break_stale_locks(folder: Path, name: str | None = None) -> list[Path]:
    """Remove the locks that no build holds, of one extension if it is named, and return their
    paths."""
    stale = [lock for lock in locks(folder, name) if is_stale(lock)]
    for lock in stale:
        with suppress(FileNotFoundError):  # another rank was faster
            lock.unlink()
    return stale


def is_stale(lock: Path) -> bool:
    """Return whether no build holds the lock."""
    try:
        age = time.time() - lock.stat().st_mtime
    except OSError:  # gone
        return False
    return holder_of(lock) is None and (age > SHARED_LOCK_S or not mount_of(lock).is_shared)


def holder_of(lock: Path) -> int | None:
    """Return a process of this machine that has the file open."""
    wanted = os.path.realpath(lock)
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            files = os.listdir(process / "fd")
        except OSError:  # another user's, or gone
            continue
        if any(_leads_to(process / "fd" / file) == wanted for file in files):
            return int(process.name)
    return None


def _leads_to(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""
