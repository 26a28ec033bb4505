"""The harness itself: what it reports, and that nothing outlives it."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.topology import Layout
from tests.spawn import RanksFailed, spawn


def rank_and_pid(mesh: Mesh) -> tuple[int, int]:
    return mesh.rank, os.getpid()


def sum_of_ranks(mesh: Mesh) -> float:
    total = torch.tensor(float(mesh.rank))
    dist.all_reduce(total, group=mesh.reduction.handle)
    return float(total)


def fail_on_odd_ranks(mesh: Mesh) -> None:
    if mesh.rank % 2:
        raise ValueError(f"rank {mesh.rank} is odd")


def hang_on_rank_one(mesh: Mesh, path: str) -> None:
    with open(f"{path}/{mesh.rank}", "w") as file:
        file.write(str(os.getpid()))
    if mesh.rank == 1:
        stuck_here()


def stuck_here() -> None:
    while True:
        time.sleep(0.05)


def die(mesh: Mesh) -> None:
    os._exit(7)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_the_order_of_the_ranks() -> None:
    results = spawn(rank_and_pid, Layout(dp=3))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert not any(alive(pid) for _, pid in results)


def test_groups_communicate() -> None:
    assert spawn(sum_of_ranks, Layout(dp=2, tp=2)) == [2.0, 4.0, 2.0, 4.0]  # dp groups are {0, 2} and {1, 3}


def test_all_failing_ranks_are_in_one_report() -> None:
    with pytest.raises(RanksFailed) as caught:
        spawn(fail_on_odd_ranks, Layout(dp=4))
    report = str(caught.value)
    for rank in (1, 3):
        assert f"--- rank {rank}\n" in report
        assert f"ValueError: rank {rank} is odd" in report


def test_a_rank_that_hangs_is_reported_with_its_stack_and_ended(tmp_path) -> None:  # type: ignore[no-untyped-def]
    started = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        spawn(hang_on_rank_one, Layout(dp=2), str(tmp_path), timeout_s=3.0)
    assert time.monotonic() - started < 20
    assert "--- rank 1: did not come back" in str(caught.value)
    assert "stuck_here" in str(caught.value)
    assert not any(alive(int((tmp_path / str(rank)).read_text())) for rank in (0, 1))


def test_a_rank_that_dies_is_reported() -> None:
    with pytest.raises(RanksFailed, match="died without a word"):
        spawn(die, Layout(dp=1))


def unpicklable(mesh: Mesh) -> object:
    return lambda: mesh


def fail_beside_a_waiting_rank(mesh: Mesh) -> None:
    if mesh.rank == 0:
        raise ValueError("rank 0 says why")
    dist.barrier()


def test_a_result_that_cannot_be_sent_is_a_failure() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)--- rank 0\n.*pickle"):
        spawn(unpicklable, Layout(dp=1))


def test_a_rank_that_waits_for_a_failed_one_does_not_sit_out_its_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 0 says why"):
        spawn(fail_beside_a_waiting_rank, Layout(dp=2), timeout_s=60.0)
    assert time.monotonic() - started < 20
