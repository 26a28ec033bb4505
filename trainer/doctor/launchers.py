"""The check of the launcher's variables, the port and the network interfaces. No torch: a process
of its own has read the place as `train` would (`probe.py`)."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

from trainer.doctor.case import Case
from trainer.doctor.findings import Finding, absent, broken, fallback, ready
from trainer.launch.environment import in_a_step, job_name
from trainer.launch.ports import held_port

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LEADING = re.compile(r"^([A-Z][A-Z0-9_]*)=")
NAMED = re.compile(r"\b([A-Z][A-Z0-9_]{4,})(?:=| is)")


def check_launcher(case: Case) -> Iterator[Finding]:
    """Yield whether the launcher's variables are complete, agree with each other, and name a host
    and a port that there are."""
    place = case.seen.get("place", {})
    if wrong := place.get("wrong") or place.get("error"):
        yield broken("launcher", wrong.removesuffix("."), _unset(wrong))
        return
    if not place:
        return
    in_job = bool(case.environment.get("SLURM_JOB_ID"))
    if in_job and not in_a_step(case.environment):
        tasks = case.environment.get("SLURM_NTASKS") or case.environment.get("SLURM_NPROCS") or "1"
        yield ready(
            "launcher", f"the shell of SLURM job {job_name(case.environment)}: training starts with srun, in {tasks} tasks"
        )
    elif not in_job and any(name.startswith("SLURM_") for name in case.environment):
        names = sorted(name for name in case.environment if name.startswith("SLURM_"))
        yield fallback(
            "launcher",
            f"{', '.join(names[:3])} of SLURM, but no SLURM_JOB_ID: left over from a job",
            f"unset {' '.join(names)}",
        )
    else:
        yield ready("launcher", place["how"])
    if place["port"] and place["rank"] == 0 and (said := _taken(place["port"])):
        with held_port() as free:
            yield broken("port", f"MASTER_PORT={place['port']}: {said}", f"export MASTER_PORT={free}")


def _unset(wrong: str) -> str:
    """Return the command that takes away the variable at fault; for a step of SLURM a new start of
    it."""
    named = [name for name in NAMED.findall(wrong) if name in os.environ]
    if not named:
        return "env | grep -E 'RANK|WORLD_SIZE|MASTER_|SLURM_'"
    if named[0].startswith("SLURM_"):
        return "srun python -m trainer train RECIPE"
    return f"unset {named[0]}"


def _taken(port: int) -> str:
    """Return why nobody can listen on the port; "" if one can."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
            trial.listen(1)
        except OSError as error:
            return f"{error.strerror}, so the ranks could not meet"
    return ""


def check_network(case: Case) -> Iterator[Finding]:
    """Yield the variables that name a network interface which is not here."""
    here = {name for _, name in socket.if_nameindex()}
    for variable in INTERFACES:
        named = case.environment.get(variable, "")
        wanted = [name.lstrip("^=").partition(":")[0] for name in named.split(",") if name]
        # NCCL takes the beginning of a name, and ^ excludes.
        missing = [name for name in wanted if not any(one.startswith(name) for one in here)]
        if missing and not named.startswith("^"):
            yield broken("network", f"{variable}={named}, and this machine has {', '.join(sorted(here))}", f"unset {variable}")
    others = sorted(here - {"lo"})
    yield ready("network", ", ".join(others)) if others else absent("network", "no interface but the loopback: one machine")
    threads = case.environment.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0))
    if threads.isdecimal() and int(threads) > cores:
        yield fallback(
            "threads",
            f"OMP_NUM_THREADS={threads}, and this process has {cores} cores: they wait for each other",
            "unset OMP_NUM_THREADS",
        )
