"""The check of the launcher's variables, the port and the network interfaces. No torch: a process
of its own has read the place as `train` would (`probe.py`)."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

from trainer.doctor.case import Case, Environment
from trainer.doctor.findings import Finding, absent, broken, fallback, ready
from trainer.launch.environment import in_a_step, job_name
from trainer.launch.ports import held_port

INTERFACES = {"GLOO_SOCKET_IFNAME": False, "NCCL_SOCKET_IFNAME": True}  # whether GPUs need it
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
WORD = re.compile(r"[A-Z][A-Z0-9_]+")


def check_launcher(case: Case) -> Iterator[Finding]:
    """Yield whether the launcher's variables are complete, agree with each other, and name a host
    and a port that there are."""
    place = case.seen.get("place", {})
    if wrong := place.get("wrong") or place.get("error"):
        yield broken("launcher", wrong.removesuffix("."), _against(wrong, case.environment))
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


def _against(wrong: str, environment: Environment) -> str:
    """Return the command against a line about the launcher's variables: a new start by srun, or
    their removal."""
    named = [name for name in WORD.findall(wrong) if name in environment]
    if named and named[0] in VARIABLES:
        in_step = in_a_step(environment) and named[0] != "DS_ACCELERATOR"
        others = [] if in_step or named[0] == "DS_ACCELERATOR" else [name for name in VARIABLES[:-1] if name in environment]
        return f"unset {' '.join(dict.fromkeys([named[0], *others]))}"
    if in_a_step(environment):
        return "srun python -m trainer train RECIPE"
    return "mpirun -n 2 python -m trainer train RECIPE"


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
    for variable, of_gpus in INTERFACES.items():
        named = case.environment.get(variable, "")
        wanted = [name.lstrip("^=").partition(":")[0] for name in named.split(",") if name]
        # NCCL takes the beginning of a name, and ^ excludes.
        missing = [name for name in wanted if not any(one.startswith(name) for one in here)]
        if missing and not named.startswith("^"):
            seen = f"{variable}={named}, and this machine has {', '.join(sorted(here))}"
            yield broken("network", seen, f"unset {variable}", needed=of_gpus == bool(case.gpus))
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
