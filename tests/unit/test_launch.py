import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from parallel.mesh import Mesh
from parallel.topology import Layout
from tests.spawn import spawn
from trainer.errors import DataError, RecipeError, UserError
from trainer.launch.ports import held_port
from trainer.launch.ranks import PeerFailed, Place, join, together
from trainer.launch.rendezvous import meet

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}


def test_without_a_launcher_it_is_one_process() -> None:
    place = Place.from_environment({"PATH": "/bin"})
    assert (place.rank, place.world_size, place.local_world_size) == (0, 1, 1)
    assert place.is_first
    assert place.how == "no launcher: one process"


def test_torchrun() -> None:
    place = Place.from_environment(TORCHRUN)
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (3, 1, 4, 2)
    assert (place.master_addr, place.master_port) == ("node7", 29500)
    assert not place.is_first


def test_the_deepspeed_launcher_says_local_size() -> None:
    environment = {**TORCHRUN, "LOCAL_SIZE": "2"}
    del environment["LOCAL_WORLD_SIZE"]
    assert Place.from_environment(environment).local_world_size == 2


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_launcher_is_one_line_naming_what_is_missing(missing: str) -> None:
    environment = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(RecipeError) as caught:
        Place.from_environment(environment)
    assert len(caught.value.lines) == 1
    assert missing in caught.value.lines[0]
    assert "torchrun" in caught.value.lines[0]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("RANK", "one", "RANK='one' is not a whole number"), ("RANK", "4", "RANK=4 is outside WORLD_SIZE=4")],
)
def test_garbage_and_contradictions(name: str, value: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Place.from_environment({**TORCHRUN, name: value})


def fail_on(mesh: Mesh, ranks: list[int]) -> tuple[str, int, list[str]]:
    try:
        with together():
            if mesh.rank in ranks:
                raise DataError(f"rank {mesh.rank} found damage")
    except (DataError, PeerFailed) as error:
        return type(error).__name__, error.exit_code, error.lines
    dist.barrier()
    return "nothing", 0, []


def test_a_failure_on_one_rank_ends_the_part_everywhere_and_is_said_once() -> None:
    assert spawn(fail_on, Layout(dp=3), [1]) == [
        ("PeerFailed", 65, []),
        ("DataError", 65, ["rank 1 found damage"]),
        ("PeerFailed", 65, []),
    ]
    names = [name for name, _, _ in spawn(fail_on, Layout(dp=3), [1, 2])]
    assert names == ["PeerFailed", "DataError", "PeerFailed"], "the first speaks for all"
    assert spawn(fail_on, Layout(dp=2), []) == [("nothing", 0, [])] * 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"RANK": "-1"}, "RANK=-1 is outside WORLD_SIZE=4"),
        ({"WORLD_SIZE": "0"}, "RANK=3 is outside WORLD_SIZE=0"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0' is not a whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2 do not fit WORLD_SIZE=4"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 and LOCAL_WORLD_SIZE=2 do not fit WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=5 do not fit WORLD_SIZE=4"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' is not a whole number"),
        ({"LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "two"}, "LOCAL_SIZE='two' is not a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        ({"MASTER_ADDR": ""}, "RANK is set but MASTER_ADDR is not"),
    ],
)
def test_every_variable_is_checked(change: dict[str, str], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Place.from_environment({**TORCHRUN, **change})
    assert len(caught.value.lines) == 1
    assert says in caught.value.lines[0]
    assert caught.value.exit_code == 78


def test_without_a_local_size_all_ranks_are_on_this_node() -> None:
    environment = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"}
    assert Place.from_environment(environment).local_world_size == 4


def test_a_held_port_is_free_for_a_store_and_for_nobody_else() -> None:
    with held_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("", port))
        assert TCPStore("127.0.0.1", port, 1, is_master=True, wait_for_workers=False).port == port


def test_two_lone_processes_have_stores_of_their_own() -> None:
    place = Place.from_environment({})
    stores = [meet(place, timedelta(seconds=5))[0] for _ in range(2)]
    assert stores[0].port != stores[1].port


def fail_with(mesh: Mesh, kinds: list[type[UserError]]) -> int:
    try:
        with together():
            raise kinds[mesh.rank]("x")
    except UserError as error:
        return error.exit_code


def test_all_ranks_end_with_the_code_of_the_first_failure() -> None:
    """The launcher reports one of the ranks, no matter which."""
    assert spawn(fail_with, Layout(dp=2), [RecipeError, DataError]) == [78, 78]
    assert spawn(fail_with, Layout(dp=2), [DataError, RecipeError]) == [65, 65]


SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n1",
}


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)


def test_more_tasks_than_gpus_name_the_line_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1)
    with pytest.raises(RecipeError, match="2 ranks on this node, but 1 GPUs are visible: change #SBATCH --ntasks-per-node"):
        Place.from_environment(SRUN)
    with_gpus(monkeypatch, 2)
    assert Place.from_environment(SRUN).device.index == 1
    with_gpus(monkeypatch, 0)
    assert Place.from_environment(SRUN).device.type == "cpu"


def test_a_task_that_sees_only_its_own_gpu_uses_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1)
    place = Place.from_environment({**SRUN, "SLURM_GPUS_PER_TASK": "1"})
    assert (place.local_rank, place.device.index) == (1, 0)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70])
def test_a_host_that_nobody_knows_is_one_line(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.setenv(name, "")  # what `join` sets goes with the test
    place = Place.from_environment({**TORCHRUN, "MASTER_ADDR": host})
    with pytest.raises(RecipeError) as caught:
        join(place, timedelta(seconds=5))
    assert len(caught.value.lines) == 1
    assert f"MASTER_ADDR={host}" in caught.value.lines[0]
    assert "finds no such host" in caught.value.lines[0]


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    """In a process of its own: joining binds the process to its cores."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        info = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = subprocess.run(
            [sys.executable, "-m", "trainer", "train", "ds_configs/quickstart.json", "--run-dir", str(tmp_path / "run")],
            env=os.environ | info,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode == 78
    assert f"port {port} of this machine, on which the ranks would meet" in ended.stderr
    assert "Traceback" not in ended.stderr
