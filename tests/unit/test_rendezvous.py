"""How ranks meet: they say for whom they wait, hear signals, give up by themselves, and know whom they can look after."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from trainer.launch import rendezvous
from trainer.launch.environment import RankInfo
from trainer.launch.processes import Process
from trainer.launch.ranks import Neighbour, _neighbour
from trainer.launch.rendezvous import NeverCame, meet
from trainer.launch.stop_request import Interrupted, StopRequest

ROOT = str(Path(__file__).parents[2])
TRAINS = [sys.executable, "-m", "trainer", "train"]


def info(rank: int, world_size: int, port: int) -> RankInfo:
    return RankInfo(rank, rank, world_size, world_size, "127.0.0.1", port, "a test")


def test_ranks_that_come_late_are_met(port: int) -> None:
    found = dict[int, object]()
    stores = []  # the first rank's holds what the others read

    def come(rank: int) -> None:
        time.sleep(0.3 * (2 - rank))  # the first rank comes last
        store, found[rank] = meet(info(rank, 3, port), timedelta(seconds=30))
        stores.append(store)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {rank: [Process.own()] * 3 for rank in range(3)}


@pytest.mark.parametrize(("rank", "whom"), [(0, "rank 1 of 2"), (1, "the store of rank 0 at 127.0.0.1:")])
def test_a_signal_ends_the_wait_at_once(rank: int, whom: str, port: int) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, StopRequest()._heard)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(Interrupted, match=f"SIGUSR1: ended while rank {rank} waited for {whom}") as caught:
            meet(info(rank, 2, port), timedelta(seconds=5))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught.value.exit_code == 75


def test_the_wait_ends_by_itself_and_says_for_whom_it_was(
    port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "FIRST_WORD_S", 0.2)
    with pytest.raises(NeverCame) as caught:
        meet(info(0, 12, port), timedelta(seconds=0.8))
    assert caught.value.exit_code == 124
    line = "rank 0: ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more of 12 did not come within 1 s; start the run again"
    assert caught.value.lines == [line]
    assert capfd.readouterr().err.count("triaxis: rank 0 waits for ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more of 12") == 1


def test_a_neighbour_is_the_next_rank_whose_process_can_be_seen() -> None:
    """Ranks that are dealt to the hosts in turn, and containers of one host, which count their processes themselves."""
    processes = [Process(f"n{rank % 2}", "boot", 100 + rank, rank) for rank in range(4)]
    assert [_neighbour(rank, processes) for rank in range(4)] == [Neighbour(other, processes[other]) for other in (2, 3, 0, 1)]
    contained = [Process("n0", f"boot pid:[{rank}]", 1, rank) for rank in range(2)]
    assert [_neighbour(rank, contained) for rank in range(2)] == [None, None]
    assert _neighbour(0, [Process.own()]) is None


def test_this_process_can_see_itself() -> None:
    own = Process.own()
    assert own.state in ("R", "S")
    assert own.is_beside(own)
    assert own.pid == os.getpid()


def test_a_training_that_waits_for_a_rank_hears_sigterm(port: int, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(
        '{"model": {"family": "gpt2", "config": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}},'
        ' "data": {"seq_len": 32}}'
    )
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **place, "MASTER_PORT": str(port), "PYTHONPATH": ROOT}
    process = subprocess.Popen(
        [*TRAINS, "recipe.json"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not _listens(int(place["RANK"]), environment) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75
    # The store answers a moment before this rank knows that it does.
    whom = r"(rank 1 of 2|the store of rank 0 at [\d.:]+)"
    assert re.fullmatch(f"triaxis: error: SIGTERM: ended while rank 0 waited for {whom}; start the run again\n", error)


def _listens(rank: int, environment: dict[str, str]) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(environment["MASTER_PORT"]))) == 0
