"""The system's knowledge of a process: its identity, and whether it still runs. No torch."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ENDED = ("Z", "X")  # its parent has not asked for its exit code yet


@dataclass(frozen=True)
class Process:
    """The identity of a process among those of all hosts.

    `table`: the kernel's table in which `pid` is its number: the host's boot and the namespace,
    since a container numbers its processes itself. `started`: in clock ticks since the boot, so
    that it is not confused with a later process of the same number.
    """

    host: str
    table: str
    pid: int
    started: int

    @classmethod
    def own(cls) -> Process:
        """Return the identity of this process."""
        return cls(socket.gethostname(), _table(), os.getpid(), start_of(os.getpid()))

    def is_beside(self, other: Process) -> bool:
        """Return whether this process can be looked up where the other one can."""
        return (self.host, self.table) == (other.host, other.table)

    @property
    def state(self) -> str:
        """The system's letter for what it does; "" when it is gone. Only on a host and in a
        namespace beside it."""
        return state_of(self.pid, self.started)


def _table() -> str:
    boot, namespace = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{boot} {namespace}"


def state_of(pid: int, started: int) -> str:
    """Return the system's letter for what a process of this host does; "" when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[0] if int(fields[19]) == started and fields[0] not in ENDED else ""


def start_of(pid: int) -> int:
    """Return when a process of this host was started, in clock ticks since the boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
