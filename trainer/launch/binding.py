"""The choice of cores for a rank, those near its GPU or its share of the machine's memory nodes,
and a line about it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.launch.environment import RankInfo

SYS = Path("/sys")


def bind(info: RankInfo, pci_address: str | None, sys: Path = SYS) -> None:
    """Bind this process to the cores of one memory node (NUMA), because memory of another node is
    half as fast.

    Nothing is bound on a machine with one node, or if the launcher has bound the process already.
    `pci_address`: that of its GPU.
    """
    nodes = memory_nodes(sys)
    mine = os.sched_getaffinity(0)
    # One node, or srun or numactl has chosen.
    if len(nodes) < 2 or mine < set().union(*nodes.values()):
        return
    cores = nodes[node_of(info, pci_address, nodes, sys)] & mine
    if cores:
        os.sched_setaffinity(0, cores)


def node_of(info: RankInfo, pci_address: str | None, nodes: Mapping[int, set[int]], sys: Path = SYS) -> int:
    """Return the memory node that the GPU is attached to; without a GPU, or if the system does not
    tell, an equal share by rank."""
    numbers = sorted(nodes)
    if pci_address is not None:
        number = _number(sys / "bus" / "pci" / "devices" / pci_address.lower() / "numa_node")
        if number in nodes:
            return number
    return numbers[info.local_rank * len(numbers) // info.local_world_size]


def memory_nodes(sys: Path = SYS) -> dict[int, set[int]]:
    """Return the cores of each memory node that has some; {} if the system does not tell."""
    nodes = {}
    for folder in sorted((sys / "devices" / "system" / "node").glob("node[0-9]*")):
        try:
            cores = cores_of((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if cores:
            nodes[int(folder.name.removeprefix("node"))] = cores
    return nodes


def cores_of(text: str) -> set[int]:
    """Return the cores in a list such as 0-3,8 → {0, 1, 2, 3, 8}."""
    spans = [span.partition("-") for span in text.strip().split(",") if span]
    return {core for first, _, last in spans for core in range(int(first), int(last or first) + 1)}


def placed(rank: int, device: str) -> str:
    """Return a line such as "rank 3 on node7: cuda:1, 8 threads, cores 0–15"."""
    cores = sorted(os.sched_getaffinity(0))
    spans = (
        f"{cores[0]}–{cores[-1]}" if len(cores) > 1 and len(cores) == cores[-1] - cores[0] + 1 else ", ".join(map(str, cores))
    )
    threads = torch.get_num_threads()
    return f"rank {rank} on {socket.gethostname()}: {device}, {threads} thread{'s' if threads > 1 else ''}, cores {spans}"


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1
