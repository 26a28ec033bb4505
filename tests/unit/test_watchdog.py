"""When silence is a hang, who is named, what the page says, without ranks; that ranks end: end_to_end/test_lost_rank.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer.launch.processes import start_of, state_of
from trainer.stopwatch import Stopwatch
from trainer.watchdog.autopsy import Finding, Report, Scene, find, page
from trainer.watchdog.beats import DONE, SILENT_S, Beat, Limits, Roll
from trainer.watchdog.flight_recorder import Collective, usual_instead
from trainer.watchdog.slow import SlowRanks
from trainer.watchdog.stacks import (
    NO_PYTHON_S,
    innermost_of_ours,
    stack_of,
    stack_of_error,
    written_stack,
)

LIMITS = Limits(step_s=10, long_s=100)


def beat(rank: int, *, count: int = 1, phase: str = "backward", idle_s: float = 0.0, ended: str = "") -> Beat:
    limit_s = LIMITS.of(phase, settled=True)
    return Beat(rank, "host", "boot", 100 + rank, 1, count, 7, phase, "trainer/loop.py:3 train", idle_s, limit_s, ended=ended)


def test_a_beat_comes_back_as_it_was_sent() -> None:
    assert Beat.decode(beat(3).encode()) == beat(3)
    assert beat(3).at == "backward of step 7"
    assert replace(beat(3), step=0, phase="start").at == "start"


def test_limits() -> None:
    assert [LIMITS.of(phase, settled=True) for phase in ("data", "forward", "evaluation", "saving", "start")] == [
        10,
        10,
        100,
        100,
        100,
    ]
    assert LIMITS.of("forward", settled=False) == 100, "the first step compiles, reads, warms up"
    assert Limits(step_s=50, long_s=20).of("saving", settled=True) == 50, "never less patient there than in a step"


def roll(*beats: Beat, now: float = 0.0) -> Roll:
    made = Roll(LIMITS)
    made.hear(beats, now)
    return made


def test_nobody_gets_on() -> None:
    assert roll(beat(0, idle_s=10), beat(1, idle_s=11)).hang(0.0)


def test_a_silent_one_may_have_come_to_where_the_others_are() -> None:
    made = roll(beat(0, idle_s=1), beat(1, phase="start"))
    made.hear([beat(0, count=2, idle_s=10)], 9.0)
    assert not made.hang(9.0), "rank 1 was not silent for as long as rank 0 may take"
    made.hear([beat(0, count=3, idle_s=11)], 10.0)
    assert made.hang(10.0)
    made.hear([beat(0, count=4, idle_s=12), beat(1, count=2, phase="start", idle_s=11)], 11.0)
    assert not made.hang(11.0), "rank 1 beats, and may take longer"


def test_one_that_is_within_its_limit_may_be_what_the_others_wait_for() -> None:
    waiting = [beat(0, idle_s=60), beat(1, idle_s=60)]
    assert not roll(*waiting, beat(2, phase="saving", idle_s=60)).hang(0.0)
    assert not roll(*waiting, beat(2, idle_s=9)).hang(0.0)
    assert roll(*waiting, beat(2, phase="saving", idle_s=101)).hang(0.0)


def test_a_rank_that_says_nothing_stands_still_since_its_last_word() -> None:
    made = roll(beat(0), beat(1))
    made.hear([beat(0, count=2, idle_s=10), beat(1, count=1)], 10.0)  # rank 1: the same beat as before
    assert made.idle_s(1, 10.0) == 10.0
    assert made.silent(10.0) == [1]
    assert made.silent(SILENT_S) == []
    assert made.hang(10.0)


def test_a_rank_that_is_done_is_not_missed() -> None:
    made = roll(beat(0), beat(1, ended=DONE))
    assert made.silent(1000.0) == [0]
    assert not made.hang(9.0)
    assert not roll(beat(0, ended=DONE), beat(1, ended=DONE)).hang(1000.0)


def test_the_stopwatch_says_when_it_gets_on() -> None:
    watch = Stopwatch(torch.device("cpu"))
    before = watch.changed
    time.sleep(0.01)
    with watch("data"):
        assert watch.changed > before
        assert watch.doing == "data"
        inside = watch.changed
        time.sleep(0.01)
    assert watch.changed > inside, "the end of a part is one too"
    watch.begin_step(1)
    assert (watch.step, watch.settled, watch.doing) == (1, False, "boundary of step 1")
    watch.begin_step(2)
    assert watch.settled


# -------------------------------------------------------------------------------------------------------- who did it


def came_to(number: int, *, over: bool = False, group: str = "1", what: str = "all_reduce", usual: str = "") -> Collective:
    return Collective(group, "dp", (0, 1, 2), number, what, "[4]", "Float", over, 3.0, usual)


WAITING = ("torch/distributed/distributed_c10d.py:3252 all_reduce", "trainer/engine/engine.py:9 _update")
BUSY = ("numpy/core.py:1 read", "trainer/data/loader.py:77 micro_batches")


def says(
    rank: int, stack: Sequence[str], *collectives: Collective, phase: str = "backward", near: dict[int, str] | None = None
) -> Report:
    return Report(beat(rank, phase=phase), tuple(stack), collectives, near or {})


def scene(*reports: Report, silent: Sequence[Beat] = (), written: dict[int, Sequence[str]] | None = None) -> Scene:
    return Scene({r.beat.rank: r for r in reports}, {b.rank: b for b in silent}, written or {}, {})


def test_a_rank_that_is_not_in_the_collective() -> None:
    found = find(scene(says(0, WAITING, came_to(5)), says(1, BUSY, came_to(4, over=True)), says(2, WAITING, came_to(5))))
    assert found == Finding((1,), "has not come to it: at trainer/data/loader.py:77 micro_batches, in backward of step 7")


def test_a_receive_counts_as_waiting_though_it_is_not_recorded() -> None:
    receiving = ("torch/distributed/pipelining/schedules.py:683 _wait_batch_p2p", "parallel/pipeline.py:110 step")
    assert find(scene(says(0, receiving), says(1, BUSY))).ranks == (1,)


@pytest.mark.parametrize(
    ("state", "says_what"),
    [
        ("T", "is stopped (SIGSTOP"),
        ("S", "its interpreter does not run: something holds the GIL"),
        ("", "is gone"),
        (None, "does not answer"),
    ],
)
def test_a_silent_rank_and_how_its_host_sees_it(state: str | None, says_what: str) -> None:
    near = {} if state is None else {1: state}
    found = find(scene(says(0, WAITING, came_to(5), near=near), silent=[beat(1, phase="data")]))
    assert found.ranks == (1,)
    assert says_what in found.what
    assert found.what.endswith("last seen at trainer/loop.py:3 train, in data of step 7")


def test_the_stack_that_a_silent_rank_has_left() -> None:
    left = {1: ["ctypes/x.py:2 call", "trainer/engine/engine.py:50 step"]}
    found = find(scene(says(0, WAITING, came_to(5), near={1: "S"}), silent=[beat(1)], written=left))
    assert found.what.endswith("something holds the GIL: trainer/engine/engine.py:50 step, in backward of step 7")


def test_a_rank_that_ended_by_an_error_of_its_own() -> None:
    ended = beat(1, ended="ValueError: no such layer")
    found = find(scene(says(0, WAITING, came_to(5)), silent=[ended, beat(2)]))
    assert found == Finding((1,), "has ended: ValueError: no such layer, in backward of step 7")


def test_different_collectives_under_one_number() -> None:
    found = find(scene(*(says(rank, WAITING, came_to(5)) for rank in (0, 1)), says(2, WAITING, came_to(5, what="all_gather"))))
    assert found.ranks == (2,)
    assert found.what == "is in all_gather [4] Float, 5 of dp (ranks 0, 1, 2), while rank 0 is in all_reduce [4] Float"


def test_of_two_the_one_that_left_the_usual_order() -> None:
    """Two ranks, two collectives: only what they did before tells who is wrong."""
    odd = came_to(5, what="all_gather", usual="all_reduce [4] Float of dp")
    found = find(scene(says(0, WAITING, odd), says(1, WAITING, came_to(5))))
    assert found.ranks == (0,)
    assert "where all_reduce [4] Float of dp came before: a collective was left out, or is one too many" in found.what


def test_outside_of_steps_no_order_is_usual() -> None:
    odd = came_to(5, what="all_gather", usual="all_reduce [4] Float of dp")
    found = find(scene(says(0, WAITING, odd, phase="evaluation"), says(1, BUSY, phase="evaluation")))
    assert found.ranks == (1,)


def test_a_stopped_rank_is_the_culprit_whatever_the_others_are_in() -> None:
    odd = came_to(5, what="all_gather", usual="all_reduce [4] Float of dp")
    assert find(scene(says(0, WAITING, odd, near={1: "T"}), silent=[beat(1)])).ranks == (1,)
    assert find(scene(says(0, WAITING, odd, near={1: ""}), silent=[beat(1)])).ranks == (0,), (
        "gloo ends whom this rank surprised"
    )


def test_a_rank_that_waits_in_another_group() -> None:
    found = find(
        scene(says(0, WAITING, came_to(5)), says(1, WAITING, came_to(4, over=True), came_to(2, group="2")), says(2, WAITING))
    )
    assert found.ranks == (1, 2)
    assert found.what.startswith(
        "have not come to all_reduce [4] Float, 5 of dp (ranks 0, 1, 2): in all_reduce [4] Float, 2 of dp"
    )


def test_when_nobody_is_missing_it_says_so() -> None:
    assert find(scene(says(0, WAITING, came_to(5)), says(1, WAITING, came_to(5)))).ranks == ()


def test_one_process_is_named_by_where_it_is() -> None:
    assert find(scene(says(0, BUSY))) == Finding(
        (0,), "does not get on: at trainer/data/loader.py:77 micro_batches, in backward of step 7"
    )


def test_reports_travel_as_json() -> None:
    report = says(0, WAITING, came_to(5, usual="x"), near={1: "T"})
    assert Report.from_json(report.as_json()) == report


STEP = ["gather w1", "gather w2", "gather w2", "gather w2", "reduce g", "norm"]


@pytest.mark.parametrize(
    ("line", "usual"),
    [
        ([], ""),
        (STEP, ""),
        ([*STEP, *STEP], ""),
        ([*STEP, *STEP[:-2], "norm"], "reduce g"),  # left out
        ([*STEP, *STEP[:3], "reduce g"], "gather w2"),  # one layer less: only the longest match tells
        ([*STEP, *STEP[:4], "gather w2"], "reduce g"),  # one layer more
        ([*STEP, *STEP, "extra"], "gather w1"),
        (["a", "b", "c"], ""),
    ],
)
def test_the_usual_order(line: list[str], usual: str) -> None:
    assert usual_instead(line) == usual


def test_the_page_is_a_page() -> None:
    many = [says(rank, WAITING, replace(came_to(5), ranks=tuple(range(1000)))) for rank in range(1000) if rank != 617]
    found = find(Scene({r.beat.rank: r for r in many}, {617: beat(617)}, {}, {}))
    text = page("Autopsy", "rank 617 does not answer", Scene({r.beat.rank: r for r in many}, {617: beat(617)}, {}, {}), found)
    lines = text.splitlines()
    assert len(lines) < 100
    assert lines[2] == "rank 617 does not answer"
    assert any(line.startswith("0–616, 618–999") for line in lines), "ranks at one place share a row"
    assert any(line.startswith("617 ") for line in lines)


# --------------------------------------------------------------------------------------------------------------- stacks


def test_the_stack_of_another_thread() -> None:
    here, go = threading.Event(), threading.Event()

    def wait_here() -> None:
        here.set()
        go.wait(30)

    thread = threading.Thread(target=wait_here)
    thread.start()
    here.wait(30)
    stack = stack_of(thread.ident or 0)
    go.set()
    thread.join()
    assert innermost_of_ours(stack).startswith("tests/unit/test_watchdog.py:")
    assert innermost_of_ours(stack).endswith(" wait_here")
    assert stack_of(thread.ident or 0) == []


def test_the_stack_of_an_error() -> None:
    def fail() -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x") as caught:
        fail()
    assert stack_of_error(caught.value)[0].endswith(" fail")


HOLDER = """
import ctypes, sys, threading
from pathlib import Path
from trainer.watchdog.stacks import LastResort
def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(60)
LastResort(Path(sys.argv[1])).put_off()
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("here", flush=True)
hold_the_interpreter()
"""


def test_a_process_that_holds_its_interpreter_leaves_its_stack(tmp_path: Path) -> None:
    path = tmp_path / "rank.stack"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"here\n"
        deadline = time.monotonic() + NO_PYTHON_S + 30
        while not any("hold_the_interpreter" in line for line in written_stack(path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert written_stack(path)[0] == "<string>:6 hold_the_interpreter", path.read_text()
        started = start_of(holder.pid)
        assert state_of(holder.pid, started) in ("S", "R")
        assert state_of(holder.pid, started + 1) == "", "another process that got its number"
        os.kill(holder.pid, signal.SIGSTOP)
        while state_of(holder.pid, started) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(holder.pid, started) == "T"
    finally:
        holder.kill()
        holder.communicate()
    assert state_of(holder.pid, started) == ""
    assert written_stack(tmp_path / "none") == []


# ------------------------------------------------------------------------------------------------------------ slow ranks


def heard(
    slow: SlowRanks, windows: Sequence[Sequence[tuple[float, float]]], *, steps: int = 20, answer_s: Sequence[float] = ()
) -> list[list[str]]:
    """`windows`: of each, (data, compute) of each rank in seconds a step; what is said after each."""
    ranks = range(len(windows[0]))
    data, compute, said = [0.0 for _ in ranks], [0.0 for _ in ranks], []
    for number, window in enumerate([[(0.0, 0.0) for _ in ranks], *windows]):
        for rank, (on_data, computing) in enumerate(window):
            data[rank] += on_data * steps
            compute[rank] += computing * steps
        beats = [
            replace(beat(r, count=number), step=steps * number, data_s=data[r], compute_s=compute[r], answer_s=a)
            for r, a in zip(ranks, answer_s or [0.001 for _ in ranks], strict=True)
        ]
        said.append(slow.hear(beats, 30.0 * number))  # a step takes 1.5 s
    return said[1:]


EVEN = [(0.01, 0.8)] * 4


def test_a_rank_that_computes_for_longer_is_named_once() -> None:
    said = heard(SlowRanks([(0, 1, 2, 3)]), [[*EVEN[:2], (0.01, 1.3), EVEN[0]]] * 6)
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0, 0], "after three windows, and not again"
    assert said[2] == ["rank 2 is slow in computation: 1.3 s a step, where 0.8 s are usual"]


def test_a_rank_that_is_slow_in_its_data() -> None:
    said = heard(SlowRanks([(0, 1), (2, 3)]), [[*EVEN[:3], (0.4, 0.8)]] * 3)
    assert said[-1] == ["rank 3 is slow in its data: 0.4 s a step, where 0.01 s are usual"]


def test_a_rank_whose_messages_are_slow() -> None:
    said = heard(SlowRanks([(0, 1, 2, 3)]), [EVEN] * 3, answer_s=[0.001, 0.08, 0.001, 0.001])
    assert said[-1] == ["rank 1 is slow in communication: a message takes 0.08 s, where 0.001 s are usual"]


def test_slowness_that_wanders_is_nobodys() -> None:
    slow = [[(0.01, 1.4 if rank == number % 4 else 0.8) for rank in range(4)] for number in range(24)]
    assert not any(heard(SlowRanks([(0, 1, 2, 3)]), slow))


def test_stages_are_not_compared_with_each_other() -> None:
    uneven = [(0.01, 0.8), (0.01, 0.8), (0.01, 2.0), (0.01, 2.0)]
    assert not any(heard(SlowRanks([(0, 1), (2, 3)]), [uneven] * 6))


def test_a_stage_of_one_rank_is_compared_with_its_past() -> None:
    before, after = [(0.01, 0.8), (0.01, 1.0)], [(0.01, 0.8), (0.01, 1.6)]
    said = heard(SlowRanks([(0,), (1,)]), [before] * 4 + [after] * 3)
    assert said[-1] == ["rank 1 is slow in computation: 1.6 s a step, where 1 s are usual"]


def test_a_multiple_of_next_to_nothing_is_nothing() -> None:
    assert not any(heard(SlowRanks([(0, 1, 2, 3)]), [[*EVEN[:3], (0.05, 0.8)]] * 6))


def test_a_window_has_enough_steps() -> None:
    assert not any(heard(SlowRanks([(0, 1, 2, 3)]), [[*EVEN[:3], (0.01, 5.0)]] * 3, steps=1))
