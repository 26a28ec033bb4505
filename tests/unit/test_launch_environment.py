"""What srun, sbatch, salloc, torchrun and mpirun put into the environment, and what is made of it.

slurm_environments.json: "recorded" under SLURM 22.05; the others are written after one of those, or after a manual.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import RecipeError
from trainer.launch.environment import PORTS, hosts, speaks_first, step_port
from trainer.launch.ranks import Place

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "slurm_environments.json").read_text(encoding="utf-8"))
ONE_PROCESS = (0, 0, 1, 1, "127.0.0.1")


@pytest.mark.parametrize("case", [case for case in CASES if "error" not in case], ids=lambda case: case["name"])
def test_the_place(case: dict[str, Any]) -> None:
    place = Place.from_environment(case["environment"])
    info = (place.rank, place.local_rank, place.world_size, place.local_world_size, place.master_addr)
    if case["info"] is None:
        assert info == ONE_PROCESS
        assert place.how == "no launcher: one process"
        return
    *expected, port = case["info"]
    assert info == tuple(expected)
    assert place.master_port == port if port is not None else place.master_port in PORTS


@pytest.mark.parametrize("case", [case for case in CASES if "error" in case], ids=lambda case: case["name"])
def test_a_contradiction_is_one_line(case: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        Place.from_environment(case["environment"])
    assert len(caught.value.lines) == 1
    assert case["error"] in caught.value.lines[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.get("info")], ids=lambda case: case["name"])
def test_the_first_rank_alone_speaks_before_they_meet(case: dict[str, Any]) -> None:
    assert speaks_first(case["environment"]) == (case["info"][0] == 0)


def test_ranks_of_one_step_agree_and_jobs_on_one_node_do_not_meet() -> None:
    ports = [step_port(job, step) for job in range(41_230_000, 41_231_000) for step in range(10)]
    assert len(set(ports)) == len(ports) == len(PORTS)
    starts = [step_port(41_230_000, 0, restarts) for restarts in range(10)]
    assert sorted(starts) == ports[:10], "a start has not the port of one before it, whose ranks may live on"


NODE_LISTS = {
    "n1": ["n1"],
    "n1,n2": ["n1", "n2"],
    "n[1-3,7]": ["n1", "n2", "n3", "n7"],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "n[099-101]": ["n099", "n100", "n101"],
    "a[01-02]b[1-2]": ["a01b1", "a01b2", "a02b1", "a02b2"],
    "a[1-2].x,b,c-[3]": ["a1.x", "a2.x", "b", "c-3"],
    "[1-2]n": ["1n", "2n"],
    "node_a.cluster.org": ["node_a.cluster.org"],
}


@pytest.mark.parametrize("text", NODE_LISTS)
def test_node_lists(text: str) -> None:
    assert list(hosts(text)) == NODE_LISTS[text]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ",",
            "a,",
            ",a",
            "a,,b",
            "a[",
            "a]",
            "a[]",
            "a[1",
            "a[1-]",
            "a[-1]",
            "a[1,]",
            "a[x]",
            "a[2-1]",
            "a[[1]]",
            "a]1[",
            "a[1]]",
        ),
        *("-a", "a,-b", "a b", "a;b", "a$(b)", "a\nb", "a|b", "ä", "a[1-2", "a/b", "a[1-999999999]", "a[0-999][0-999]", "[-1]"),
    ],
)
def test_what_is_no_node_list_is_one_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        list(hosts(text))
    assert len(caught.value.lines) == 1
    assert "is not a node list" in caught.value.lines[0]


@given(st.text(alphabet="ab1-9[],.;$ \n-_", max_size=24))
def test_any_text_is_hosts_or_one_line(text: str) -> None:
    names = []
    with contextlib.suppress(RecipeError):
        names = list(hosts(text))
    assert all(name and not name.startswith("-") and set(name) <= set("ab19-._") for name in names)


def test_it_does_without_torch() -> None:
    ours = "trainer.launch.environment, trainer.cluster.requeue, trainer.cluster.submit"
    code = f"import sys, {ours}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
