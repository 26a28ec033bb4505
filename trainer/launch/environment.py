"""The place of this process among all, from the variables that srun and mpirun set, read strictly.
No torch.

`srun` starts a step and gives each task SLURM_PROCID, SLURM_LOCALID and the step's counts. An
sbatch script and an salloc shell have most of those names too but are no rank. Only SLURM_STEP_ID
tells: there it is missing, or a reserved number.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainer.errors import RecipeError

# Batch scripts, interactive and external steps have numbers from here on.
FIRST_RESERVED_STEP = 0xFFFFFFF0
# Below Linux's ephemeral ports (32,768 and up), which any program may get.
PORTS = range(20_000, 30_000)
MOST_HOSTS = 65_536
HOST_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]*")
LIST_CHARACTERS = re.compile(r"[A-Za-z0-9._\-\[\],]+")

Environment = Mapping[str, str]


@dataclass(frozen=True)
class RankInfo:
    """The place of this process among the others. `how` says where it is known from, for
    messages."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    how: str

    @property
    def is_first(self) -> bool:
        """Return whether this process speaks and writes for the run."""
        return self.rank == 0


def rank_info_of_srun_or_mpirun(environment: Environment) -> RankInfo | None:
    """Return the place, or None if neither started this process. RecipeError if the variables
    contradict each other.

    mpirun is checked first: on other nodes it starts its own daemons by srun, whose variables its
    ranks inherit.
    """
    if environment.get("OMPI_COMM_WORLD_RANK") or environment.get("OMPI_COMM_WORLD_SIZE"):
        return _of_mpirun(environment, "OMPI_COMM_WORLD_", "RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    if environment.get("MPI_LOCALRANKID"):
        return _of_mpirun(environment, "", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if in_a_step(environment):
        return _of_srun(environment)
    if environment.get("PMI_RANK") or environment.get("PMI_SIZE"):
        raise RecipeError(
            "PMI_RANK or PMI_SIZE is set but MPI_LOCALRANKID is not: start with MPICH's mpirun (Hydra), which sets all three, "
            "or with srun; or unset them to run one process"
        )
    _refuse_many_tasks_without_srun(environment)
    return None


def in_a_step(environment: Environment) -> bool:
    """Return whether srun started this process, or an ancestor of it."""
    if not environment.get("SLURM_STEP_ID"):
        return False
    return whole(environment, "SLURM_STEP_ID") < FIRST_RESERVED_STEP


def speaks_first(environment: Environment) -> bool:
    """Return whether this process reports what every rank finds wrong alike before the ranks have
    met."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", *(("SLURM_PROCID",) if in_a_step(environment) else ()))
    return next((environment[name] for name in names if environment.get(name)), "0") == "0"


def job_name(environment: Environment) -> str:
    """Return the name of the job. An array task has a job id of its own, except that one of them
    has that of the whole array."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID", "")


def check_launcher_in_step(environment: Environment, world_size: int, what: str) -> None:
    """Raise RecipeError unless torchrun or mpirun inside srun run once per node, instead of once in
    each task."""
    if not in_a_step(environment):
        return
    tasks, here = _tasks(environment), _tasks_here(environment)
    if here > 1 and world_size != tasks:
        raise RecipeError(
            f"{what} says {world_size} processes, but srun started {tasks} tasks, {here} of them on this node, and each "
            "started its own: use #SBATCH --ntasks-per-node=1 (srun --ntasks-per-node=1) with torchrun or mpirun, or srun alone"
        )


def _of_srun(environment: Environment) -> RankInfo:
    world_size, rank, local_rank = _tasks(environment), whole(environment, "SLURM_PROCID"), whole(environment, "SLURM_LOCALID")
    here = _tasks_here(environment)
    if not rank < world_size:
        raise RecipeError(
            f"SLURM_PROCID={rank} is outside SLURM_NTASKS={world_size}: the step's variables contradict each other; start "
            "the ranks with srun itself, with no other variables passed on"
        )
    if not local_rank < here <= world_size:
        raise RecipeError(
            f"SLURM_LOCALID={local_rank} does not fit {here} tasks on this node of {world_size} in all: the step's variables "
            "contradict each other (is #SBATCH --ntasks-per-node that of the step?)"
        )
    _must_agree(environment, "WORLD_SIZE", world_size, f"SLURM_NTASKS={world_size}", "#SBATCH --ntasks")
    _must_agree(environment, "LOCAL_RANK", local_rank, f"SLURM_LOCALID={local_rank}", "srun")
    restarts = whole(environment, "SLURM_RESTART_COUNT") if environment.get("SLURM_RESTART_COUNT") else 0
    step = whole(environment, "SLURM_STEP_ID")
    port = _port(environment) or step_port(whole(environment, "SLURM_JOB_ID"), step, restarts)
    how = f"SLURM_PROCID={rank} and SLURM_NTASKS={world_size} of srun"
    return RankInfo(rank, local_rank, world_size, here, _first_host(environment, world_size), port, how)


def _first_host(environment: Environment, world_size: int) -> str:
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    if world_size == 1:
        return "127.0.0.1"  # no other process has to find it
    name = _first_set(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next(hosts(environment[name], name))


def _tasks(environment: Environment) -> int:
    """Return the tasks of the step, which may be fewer than the job's: `srun -n 3` in a job of
    4."""
    return whole(environment, _first_set(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), least=1)


def _tasks_here(environment: Environment) -> int:
    """Return the step's tasks on this node. SLURM_STEP_TASKS_PER_NODE is like "2(x3),1", in the
    order of the nodes."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if not environment.get(name):
        return whole(environment, _first_set(environment, "SLURM_NTASKS_PER_NODE", name), least=1)
    counts = list(_counts(environment[name], name))
    node = whole(environment, "SLURM_NODEID")
    if node >= len(counts):
        raise RecipeError(
            f"SLURM_NODEID={node}, but {name}={environment[name]} lists {len(counts)} nodes: start with srun itself"
        )
    return counts[node]


def _counts(text: str, name: str) -> Iterator[int]:
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part, re.ASCII)
        if not match:
            raise RecipeError(f"{name}={text!r} is not a list of counts, such as 2(x3),1: srun must set it")
        yield from [int(match[1])] * int(match[2] or 1)


def step_port(job: int, step: int, restarts: int = 0) -> int:
    """Return a port on which the ranks of a step meet.

    Each job has ten, so that these do not collide: jobs that share a node (unless their numbers are
    a multiple of 1,000 apart), the steps of a job, and a step with what is left of its job's
    earlier start.
    """
    return PORTS[(10 * job + (step + restarts) % 10) % len(PORTS)]


def _of_mpirun(environment: Environment, prefix: str, *names: str) -> RankInfo:
    rank_name, size_name, local_rank_name, local_size_name = (prefix + name for name in names)
    rank, world_size = whole(environment, rank_name), whole(environment, size_name, least=1)
    local_rank, here = whole(environment, local_rank_name), whole(environment, local_size_name, least=1)
    if not (rank < world_size and local_rank < here <= world_size):
        raise RecipeError(
            f"{rank_name}={rank}, {local_rank_name}={local_rank} and {local_size_name}={here} do not fit {size_name}="
            f"{world_size}: the variables contradict each other; start with mpirun itself"
        )
    _must_agree(environment, "WORLD_SIZE", world_size, f"{size_name}={world_size}", "mpirun -n")
    check_launcher_in_step(environment, world_size, f"{size_name}={world_size} of mpirun")
    address, port = environment.get("MASTER_ADDR"), _port(environment)
    if here < world_size and not (address and port):
        raise RecipeError(
            f"mpirun started {world_size} processes on several nodes, {here} here, and does not say where rank 0 is: give it "
            "`-x MASTER_ADDR=HOST -x MASTER_PORT=29500` (MPICH: `-genv MASTER_ADDR HOST -genv MASTER_PORT 29500`)"
        )
    # Something that only this mpirun has, so that two of them on one machine do not collide.
    namesake = environment.get("PMIX_NAMESPACE") or environment.get("PMI_PORT") or "mpirun"
    port = port or PORTS[zlib.crc32(namesake.encode()) % len(PORTS)]
    how = f"{rank_name}={rank} and {size_name}={world_size} of mpirun"
    return RankInfo(rank, local_rank, world_size, here, address or "127.0.0.1", port, how)


def _refuse_many_tasks_without_srun(environment: Environment) -> None:
    """Raise RecipeError in an sbatch script or salloc shell of several tasks: it runs once, so only
    one rank would train."""
    if not environment.get("SLURM_JOB_ID"):
        return
    name = next((name for name in ("SLURM_NTASKS", "SLURM_NPROCS") if environment.get(name)), None)
    tasks = whole(environment, name) if name else 1
    if tasks > 1:
        raise RecipeError(
            f"{name}={tasks}, but this is the job's script or shell and not one of its tasks: start with srun, as in "
            "`srun python -m trainer train RECIPE`; for one process set #SBATCH --ntasks=1"
        )


def _must_agree(environment: Environment, name: str, expected: int, what: str, change: str) -> None:
    if environment.get(name) and whole(environment, name) != expected:
        raise RecipeError(
            f"{name}={environment[name]} contradicts {what}: unset {name}, or change `{change}`; only one launcher may set it"
        )


def _first_set(environment: Environment, *names: str) -> str:
    for name in names:
        if environment.get(name):
            return name
    raise RecipeError(f"{names[0]} is not set, which srun sets: pass it on (apptainer --cleanenv and env -i take it away)")


def whole(environment: Environment, name: str, *, least: int = 0) -> int:
    """Return a whole number of at least `least`. RecipeError if the variable is missing or has
    another value."""
    text = environment.get(name, "")
    if not text:
        raise RecipeError(
            f"{name} is not set, though the launcher sets it: pass it on (apptainer --cleanenv and env -i take it away)"
        )
    if not re.fullmatch(r"\d{1,15}", text, re.ASCII) or int(text) < least:
        raise RecipeError(f"{name}={text!r} is not a whole number of at least {least}: the launcher must set it")
    return int(text)


def _port(environment: Environment) -> int | None:
    if not environment.get("MASTER_PORT"):
        return None
    port = whole(environment, "MASTER_PORT")
    if not 0 < port < 65536:
        raise RecipeError(f"MASTER_PORT={port} is not a port: legal are 1 to 65535")
    return port


def hosts(text: str, name: str = "node list") -> Iterator[str]:
    """Yield the hosts of a node list in SLURM's syntax, in order: n1, n[1-3,7], a[01-03]b[1-2],
    lists of these.

    RecipeError if it is not one, because a host's name goes to the network and into scripts.
    """
    if not LIST_CHARACTERS.fullmatch(text):
        raise _no_list(text, name, "characters other than letters, digits, '.', '_', '-', ',' and '[]'")
    found = 0
    for part in _parts(text, name):
        for host in _expand(part, text, name):
            found += 1
            if found > MOST_HOSTS:
                raise _no_list(text, name, f"more than {MOST_HOSTS:,} hosts")
            if not HOST_NAME.fullmatch(host):
                raise _no_list(text, name, f"{host!r} is not a host name")
            yield host


def _parts(text: str, name: str) -> list[str]:
    """Return the list divided at the commas outside brackets."""
    parts = re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text:
        raise _no_list(text, name, "brackets or commas are out of place")
    return parts


def _expand(part: str, text: str, name: str) -> Iterator[str]:
    """Yield the hosts of one part; the first bracket changes slowest."""
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    ranges, _, tail = rest.partition("]")
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item, re.ASCII)
        if not match:
            raise _no_list(text, name, f"[{ranges}] holds {item!r}, not a number or a range of numbers")
        low, high = match[1], match[2] or match[1]
        if int(high) < int(low):
            raise _no_list(text, name, f"[{ranges}] holds {item!r}, which runs backwards")
        for number in range(int(low), int(high) + 1):
            for end in _expand(tail, text, name):
                yield f"{head}{number:0{len(low)}d}{end}"


def _no_list(text: str, name: str, why: str) -> RecipeError:
    return RecipeError(f"{name}={text[:200]!r} is not a node list ({why}): legal as in n1,n[2-4]; or set MASTER_ADDR")
