"""The file systems of this machine: which one holds a path, and whether it is shared over a
network. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

TABLE = Path("/proc/self/mountinfo")
# Shared by machines over a network. Locks and many small files are slow there, or not seen at once.
NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "panfs", "wekafs", "pvfs2"}
)
NETWORK_OF_USERS = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.ceph")


class Mount(NamedTuple):
    """A mounted file system: its folder, and its type as the kernel names it."""

    folder: str
    kind: str

    @property
    def is_shared(self) -> bool:
        """Return whether other machines write to it too."""
        return self.kind in NETWORK or self.kind in NETWORK_OF_USERS


def mount_of(path: Path) -> Mount:
    """Return the file system that holds a path, or would hold it."""
    whole = os.path.realpath(path)
    found = Mount("/", "")
    try:
        lines = TABLE.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        folder = _unescaped(before.split()[4])
        if (whole + "/").startswith(folder.rstrip("/") + "/") and len(folder) >= len(found.folder):
            found = Mount(folder, after.split()[0])
    return found


def _unescaped(text: str) -> str:
    """Return a name of the table, in which a space is written \\040."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    whole = path.absolute()
    return next((one for one in (whole, *whole.parents) if one.exists()), Path("/"))
