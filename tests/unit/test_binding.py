"""On which cores a rank runs, read from a made-up machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.launch.binding import bind, cores_of, memory_nodes, node_of, placed
from trainer.launch.environment import RankInfo


def machine(root: Path, *lists: str) -> Path:
    for number, cores in enumerate(lists):
        folder = root / "devices" / "system" / "node" / f"node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    return root


def info(local_rank: int, ranks: int = 4) -> RankInfo:
    return RankInfo(local_rank, local_rank, ranks, ranks, "127.0.0.1", 29500, "test")


def test_lists_of_cores() -> None:
    assert cores_of("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert cores_of("\n") == set()


def test_nodes_without_cores_are_none(tmp_path: Path) -> None:
    assert memory_nodes(machine(tmp_path, "0-1", "", "2-3")) == {0: {0, 1}, 2: {2, 3}}
    assert memory_nodes(tmp_path / "absent") == {}


def test_ranks_share_the_nodes(tmp_path: Path) -> None:
    nodes = memory_nodes(machine(tmp_path, "0-7", "8-15"))
    assert [node_of(info(rank), None, nodes, tmp_path) for rank in range(4)] == [0, 0, 1, 1]
    assert [node_of(info(rank, 1), None, nodes, tmp_path) for rank in range(1)] == [0]


def test_a_gpu_decides_where_its_rank_runs(tmp_path: Path) -> None:
    nodes = memory_nodes(machine(tmp_path, "0-7", "8-15"))
    card = tmp_path / "bus" / "pci" / "devices" / "0000:1a:00.0"
    card.mkdir(parents=True)
    (card / "numa_node").write_text("1\n")
    assert node_of(info(0), "0000:1A:00.0", nodes, tmp_path) == 1
    (card / "numa_node").write_text("-1\n")  # a virtual machine does not tell
    assert node_of(info(0), "0000:1A:00.0", nodes, tmp_path) == 0


def test_a_rank_is_bound_where_nobody_has_bound_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    two = machine(tmp_path / "two", "0-7", "8-15")
    bind(info(3), None, two)
    assert bound == [set(range(8, 16))]
    bind(info(3), None, machine(tmp_path / "one", "0-15"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5})  # srun --cpu-bind
    bind(info(3), None, two)
    assert len(bound) == 1


def test_it_is_told() -> None:
    line = placed(3, "cuda:1")
    assert line.startswith("rank 3 on ")
    assert ": cuda:1, " in line
    assert f"cores {min(os.sched_getaffinity(0))}" in line
