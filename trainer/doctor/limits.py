"""The check of what the system allows a process: locale, limits, shared and page-locked memory. No
torch."""

from __future__ import annotations

import locale
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.doctor.case import Case
from trainer.doctor.findings import Finding, absent, broken, fallback, ready

SHM = "/dev/shm"
LEAST_SHM = 1 << 30  # Docker gives 64 MiB
INFINIBAND = Path("/sys/class/infiniband")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class Limit(NamedTuple):
    """A limit of processes. `least`: what a run wants; `why`: what happens with less."""

    name: str
    number: int
    option: str  # of ulimit
    unit: int  # of ulimit's figure [bytes, or items]
    least: int
    why: str


LIMITS = (
    Limit("open files", resource.RLIMIT_NOFILE, "-n", 1, 4096, "shards, sockets and workers need more: too many open files"),
    Limit("file size", resource.RLIMIT_FSIZE, "-f", 1024, 1 << 40, "a checkpoint's file ends there"),
    Limit("address space", resource.RLIMIT_AS, "-v", 1024, 1 << 40, "torch reserves more addresses than memory"),
    Limit("processes", resource.RLIMIT_NPROC, "-u", 1, 1024, "threads count too: cannot start new thread"),
)
MEMLOCK = Limit("locked memory", resource.RLIMIT_MEMLOCK, "-l", 1024, 1 << 40, "buffers cannot be page-locked")


def check_locale(_: Case) -> Iterator[Finding]:
    """Yield whether texts and names are UTF-8 where nothing else is said."""
    encodings = {sys.getfilesystemencoding().lower(), locale.getpreferredencoding(False).lower()}
    if encodings <= {"utf-8", "utf8"}:
        yield ready("locale", "UTF-8")
    else:
        yield fallback(
            "locale",
            f"{', '.join(sorted(encodings))}, not UTF-8: other programs of a job read and write our files wrongly",
            "export LC_ALL=C.UTF-8",
        )


def check_limits(case: Case) -> Iterator[Finding]:
    """Yield the limits that are lower than a run wants, and one finding if none is."""
    wanted = [*LIMITS, *([MEMLOCK] if case.nvme_paths or case.pins_memory or _has_infiniband() else [])]
    low = [limit for limit in wanted if _soft(limit) < limit.least]
    for limit in low:
        yield _low(limit)
    if _core_bytes() > LEAST_SHM:
        yield fallback("core dumps", "have no limit: a crash writes a process's whole memory to the disk", "ulimit -c 0")
    if not low:
        yield ready("limits", ", ".join(limit.name for limit in wanted) + ": enough")


def _low(limit: Limit) -> Finding:
    soft, hard = (_value(value) for value in resource.getrlimit(limit.number))
    seen = f"at most {soft:,} ({limit.why})" if limit.unit == 1 else f"at most {soft / 2**20:,.0f} MiB ({limit.why})"
    aim = "unlimited" if limit.unit > 1 else str(limit.least)
    if hard >= limit.least:
        if hard < sys.maxsize and limit.unit > 1:
            aim = str(hard // limit.unit)
        return fallback(limit.name, seen, f"ulimit -S {limit.option} {aim}")
    key = {"-n": "nofile", "-f": "fsize", "-v": "as", "-u": "nproc", "-l": "memlock"}[limit.option]
    line = f"* - {key} {aim}"
    return fallback(
        limit.name, f"{seen}; the hard limit is no higher", f"echo '{line}' | sudo tee -a /etc/security/limits.d/triaxis.conf"
    )


def _soft(limit: Limit) -> int:
    return _value(resource.getrlimit(limit.number)[0])


def _value(value: int) -> int:
    return sys.maxsize if value == resource.RLIM_INFINITY else value


def _core_bytes() -> int:
    return _value(resource.getrlimit(resource.RLIMIT_CORE)[0])


def _has_infiniband() -> bool:
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())


def check_shared_memory(case: Case) -> Iterator[Finding]:
    """Yield whether processes of this node can share enough memory."""
    try:
        found = os.statvfs(SHM)
    except OSError:
        yield fallback("shared memory", f"{SHM} is not there: ranks of one node talk over sockets, which is slower", _REMOUNT)
        return
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if free >= LEAST_SHM:
        yield ready("shared memory", f"{SHM}, {free / 2**30:,.1f} of {size / 2**30:,.1f} GiB free")
        return
    seen = f"{SHM} has {free / 2**20:,.0f} MiB free of {size / 2**20:,.0f}, less than 1 GiB"
    fix = "docker run --shm-size=8g IMAGE" if Path("/.dockerenv").exists() else _REMOUNT
    if len(case.gpus) > 1:
        yield broken("shared memory", f"{seen}: NCCL between the GPUs of this node needs it", fix)
    else:
        yield fallback("shared memory", f"{seen}: NCCL and loaders with workers need more", fix)


_REMOUNT = f"sudo mount -o remount,size=8G {SHM}"


def check_host(_: Case) -> Iterator[Finding]:
    """Yield the memory and the cores of the host that this process may use."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, cores, quota = memory_limit(there), len(os.sched_getaffinity(0)), core_quota()
    seen = f"{platform.node()}: {limit / 2**30:,.1f} GiB, {cores} core{'s' if cores > 1 else ''}"
    if limit < there:
        seen += f"; the machine has {there / 2**30:,.1f} GiB, of which the container or job gets that part"
    yield absent("host", f"{seen}: small models only") if limit < 4 * LEAST_SHM else ready("host", seen)
    if quota is not None and quota < cores and "OMP_NUM_THREADS" not in os.environ:
        yield fallback(
            "cores",
            f"the container or job gets the time of {quota:.3g} of {cores} cores, and a thread for each would be started",
            f"export OMP_NUM_THREADS={max(1, int(quota))}",
        )


def core_quota() -> float | None:
    """Return the number of cores of which this process's group gets the time; None for all."""
    try:
        most, _, period = CPU_QUOTA.read_text().strip().partition(" ")
        return int(most) / int(period)
    except (OSError, ValueError):  # not here, or "max"
        return None


def memory_limit(there: int) -> int:
    """Return the memory [bytes] that this process's group may use of what is there."""
    for path in CGROUP_LIMITS:
        try:
            return min(there, int(path.read_text()))
        except (OSError, ValueError):  # not here, or "max"
            continue
    return there
