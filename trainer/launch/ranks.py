"""The way from a launcher's environment to this process's place: rank, device, backend, threads.

The `deepspeed` launcher and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; `srun` and `mpirun` have variables of their own (`environment.py`). Without any of them
the run is one process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from trainer.errors import RecipeError, UserError
from trainer.exhausted import exhausted
from trainer.launch.binding import bind
from trainer.launch.environment import RankInfo, check_launcher_in_step, in_a_step, rank_info_of_srun_or_mpirun
from trainer.launch.processes import Process
from trainer.launch.rendezvous import meet

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ANY_PORT = 0  # the store of one process listens on a port that the kernel chooses


@dataclass(frozen=True)
class Place(RankInfo):
    """A rank with its device."""

    own_gpu: bool = False  # srun shows each task only its own GPU

    @property
    def gpu(self) -> int:
        """The number of its GPU among those that this process sees."""
        return 0 if self.own_gpu else self.local_rank

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.gpu) if torch.cuda.is_available() else torch.device("cpu")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Place:
        """Read the place. RecipeError if only some of the launcher's variables are set, or one has
        an illegal value."""
        _check_accelerator(environment)
        if not environment.get("RANK") and (info := rank_info_of_srun_or_mpirun(environment)):
            return cls(**vars(info), own_gpu=_fits_the_gpus(info, environment))
        given = [name for name in LAUNCHER_VARIABLES if environment.get(name)]
        if not given:
            return cls(0, 0, 1, 1, "127.0.0.1", ANY_PORT, "no launcher: one process")
        missing = [name for name in LAUNCHER_VARIABLES if name not in given]
        if missing:
            raise RecipeError(
                f"{given[0]} is set but {', '.join(missing)} is not: start with `deepspeed --no_local_rank --module trainer "
                "train RECIPE` or `torchrun -m trainer train RECIPE`, or unset it to run one process"
            )
        rank, local_rank, world_size, port = (
            _integer(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        )
        if not 0 <= rank < world_size:
            raise RecipeError(f"RANK={rank} is outside WORLD_SIZE={world_size}: the launcher's variables contradict each other")
        if not 0 < port < 65536:
            raise RecipeError(f"MASTER_PORT={port} is not a port: legal are 1 to 65535")
        local_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environment.get(name)), "WORLD_SIZE")
        local_world_size = _integer(environment, local_name)
        if not 0 <= local_rank < local_world_size <= world_size:
            raise RecipeError(
                f"LOCAL_RANK={local_rank} and {local_name}={local_world_size} do not fit WORLD_SIZE={world_size}: "
                "the launcher's variables contradict each other"
            )
        check_launcher_in_step(environment, world_size, f"WORLD_SIZE={world_size} of the launcher")
        how = f"RANK={rank} and WORLD_SIZE={world_size} of the launcher"
        return cls(rank, local_rank, world_size, local_world_size, environment["MASTER_ADDR"], port, how)


# Variables that are set if one of srun's flags gives each task a GPU of its own.
GPU_BINDING = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK")


def _fits_the_gpus(info: RankInfo, environment: Mapping[str, str]) -> bool:
    """Return whether this process sees only its own GPU. RecipeError if a node has more ranks than
    GPUs."""
    if not torch.cuda.is_available():
        return False
    visible = torch.cuda.device_count()
    if visible == 1 and info.local_world_size > 1 and any(environment.get(name) for name in GPU_BINDING):
        return True
    if info.local_world_size > visible:
        change = "#SBATCH --ntasks-per-node or --gpus-per-node" if in_a_step(environment) else "mpirun's processes per node"
        raise RecipeError(
            f"{info.local_world_size} ranks on this node, but {visible} GPUs are visible: change {change}, one rank to a GPU"
        )
    return False


def _check_accelerator(environment: Mapping[str, str]) -> None:
    """Raise RecipeError if DeepSpeed is told to compute elsewhere than torch will."""
    named, there = environment.get("DS_ACCELERATOR"), "cuda" if torch.cuda.is_available() else "cpu"
    if not named or named == there:
        return
    if named == "cuda":
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device here"
        raise RecipeError(f"DS_ACCELERATOR=cuda, but {why}: unset it to compute on the CPU, or start where there is a GPU")
    if named == "cpu":
        raise RecipeError(
            "DS_ACCELERATOR=cpu, but torch finds CUDA devices here: unset it, or hide them (CUDA_VISIBLE_DEVICES=)"
        )
    raise RecipeError(f"DS_ACCELERATOR={named!r} is not supported; legal: cuda, cpu; or unset it")


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise RecipeError(f"{name}={environment[name]!r} is not a whole number: the launcher must set it") from None


class Neighbour(NamedTuple):
    """The next rank of this node, and its process."""

    rank: int
    process: Process


def join(place: Place, timeout: timedelta) -> Neighbour | None:
    """Bind the device, share the cores among this node's ranks, and join the process group.

    Its collectives wait for `timeout` at most. The neighbour is known before anybody is in the
    group, because the loss of a process that was never heard of could not be noticed.
    """
    check_host(place)
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    bind(place, _pci_address(place.device))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))
    store, processes = meet(place, timeout)
    for name, value in zip(
        LAUNCHER_VARIABLES,
        (place.rank, place.gpu, place.world_size, place.master_addr, store.port),
        strict=True,
    ):
        os.environ[name] = str(value)  # DeepSpeed reads them, LOCAL_RANK as the number of the GPU
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if place.device.type == "cuda" else "gloo",
        store=PrefixStore("default_pg", store),  # the prefix that init_process_group itself uses
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    return _neighbour(place.rank, processes)


def _neighbour(rank: int, processes: Sequence[Process]) -> Neighbour | None:
    """Return the next rank, in a circle, among those whose processes this one can see; None if it
    is alone.

    A node's ranks need not be consecutive.
    """
    beside = [other for other, process in enumerate(processes) if process.is_beside(processes[rank])]
    if len(beside) == 1:
        return None
    following = beside[(beside.index(rank) + 1) % len(beside)]
    return Neighbour(following, processes[following])


def _pci_address(device: torch.device) -> str | None:
    """Return a GPU's address as in /sys; None for a CPU."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    return f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"  # type: ignore[attr-defined]


def check_host(place: Place) -> None:
    """Raise RecipeError if the first rank's host has no address here: the store would try for
    `timeout`, without naming it."""
    try:
        socket.getaddrinfo(place.master_addr, place.master_port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: a name that no host can have
        raise RecipeError(
            f"MASTER_ADDR={place.master_addr} ({place.how}): this machine finds no such host ({error}): set MASTER_ADDR to a "
            "name or address of the first node that every node resolves"
        ) from None


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(place: Place, timeout: timedelta) -> Iterator[Neighbour | None]:
    """Join the group, and leave it in the end. The environment is then as before, for whatever this
    process does next."""
    before = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
    try:
        yield join(place, timeout)
    finally:
        leave()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class PeerFailed(UserError):
    """The error of a rank that only ends, because another one stopped the run and reports why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@contextmanager
def together(doing: Callable[[], str] = lambda: "the set-up") -> Iterator[None]:
    """Run a part of the set-up that ends on all ranks or on none.

    A UserError on any rank ends the part everywhere: on the first such rank with its message,
    elsewhere with `PeerFailed`, so that it is reported once. Without this the others would wait in
    their next collective until its timeout. A machine that runs out of a resource ends it in the
    same way; `doing` says in what. A signal does not wait for the others: they notice that this
    rank is gone.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    except Exception as error:
        if not (failure := exhausted(error, f"rank {dist.get_rank()}: {doing()}")):
            raise
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    codes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    codes[dist.get_rank()] = failure.exit_code if failure else 0
    dist.all_reduce(codes)
    failed = codes.nonzero().flatten().tolist()
    if failure and failed[0] == dist.get_rank():
        raise failure
    if failed:
        raise PeerFailed(int(codes[failed[0]]))
