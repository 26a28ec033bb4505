"""A rank makes no more progress: is that seen in time, is the right rank named, do all ranks end?

    python -m tools.campaign.hangs --cases 200
    python -m tools.campaign.hangs --calm 50000   (false alarms: slow evaluations and saves)
    python -m tools.campaign.hangs --slow 20      (one rank is slow in its data or its computation,
                                                   or the slowness wanders)

Faults, on a rank and in a step drawn by the case's seed:

    stop   SIGSTOP                               gil    C code that never releases the GIL
    loop   Python that never ends, in the data   file   a read from a pipe without a writer
    skip   one collective left out               extra  one collective too many
    kill   SIGKILL

A case passes if every rank has ended within the limit and 5 s (a kill: within 5 s; another rank may
end the one at fault), the line names the rank at fault and no other, and the page is in the run
folder.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.campaign.cases import WAYS, arguments, report, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.engine.engine import Engine
from trainer.errors import EXIT_HANG, EXIT_OK, EXIT_REQUEUE
from trainer.run.step_data import StepData

LIMIT_S = 4
STEPS = 1_000_000
FAULTS = ("stop", "gil", "loop", "file", "skip", "extra", "kill")
PROMISED_S = 5.0
LAYOUTS = ("dp2-zero1", "dp2-zero3", "tp2", "pp2", "tp2xpp2")


def fall_silent(fault: str, pipe: str) -> None:
    """Hang on the rank at fault; never returns."""
    match fault:
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "gil":
            ctypes.PyDLL(None).sleep(10_000)
        case "loop":
            while True:
                pass
        case "file":
            os.open(pipe, os.O_RDONLY)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def leave_one_out(of: dist.ProcessGroup) -> None:
    """Make the next all-reduce of that group do nothing on this rank."""
    real = dist.all_reduce

    def once(tensor: torch.Tensor, *args: Any, group: dist.ProcessGroup | None = None, **named: Any) -> Any:
        if group is not of:
            return real(tensor, *args, group=group, **named)
        dist.all_reduce = real
        return None

    dist.all_reduce = once


def train_with_a_fault(words: Sequence[str], fault: str, at_fault: int, step: int, place: str, mark: str) -> int:
    """Run `train` with a fault on one rank: in its data or in its forward pass."""
    if int(os.environ["RANK"]) == at_fault:
        _plant(fault, step, place, mark)
    return train(words)


def _plant(fault: str, step: int, place: str, mark: str) -> None:
    def strike(run: Engine) -> None:
        Path(mark).write_text(repr(time.time()))
        if fault in ("skip", "extra"):
            group = next(
                g.handle for g in (run.mesh.reduction, run.mesh.tp, run.mesh.replica) if g.handle is not None and g.size > 1
            )
            if fault == "skip":
                leave_one_out(group)
            else:
                dist.all_reduce(torch.zeros(3), group=group)
        else:
            fall_silent(fault, f"{mark}.pipe")

    real_step, real_data = Engine.step, StepData.take

    engines: list[Engine] = []

    def step_with(self: Engine, micro_batches: Any, *, step: int, **named: Any) -> Any:
        engines[:] = [self]
        if step == planned and place == "step":
            strike(self)
        return real_step(self, micro_batches, step=step, **named)

    def data_with(self: StepData, number: int, **more: bool) -> Any:
        if number == planned and place == "data":
            strike(*engines)
        return real_data(self, number, **more)

    planned = step
    Engine.step, StepData.take = step_with, data_with  # type: ignore[method-assign]


def one_case(case: int, seed: int, names: Sequence[str], faults: Sequence[str], scratch: Path) -> dict[str, Any]:
    stream = random.Random(f"{seed} {case}")
    way = next(way for way in WAYS if way.name == names[case % len(names)])
    fault = faults[case // len(names) % len(faults)]
    at_fault, step = stream.randrange(way.processes), stream.randrange(3, 30)
    place = stream.choice(["data", "step"])
    folder = scratch / f"case-{case}"
    recipe = write_recipe(folder, steps=STEPS, every=0, keep=1, guard={"timeout_s": LIMIT_S})
    mark = folder / "mark"
    os.mkfifo(f"{mark}.pipe")
    ended = run_ranks(
        train_with_a_fault,
        arguments(recipe, folder / "run", way),
        *(fault, at_fault, step, place, str(mark)),
        world_size=way.processes,
        log=folder / "log",
        timeout_s=60.0,
    )
    outcome = judged(ended, fault, at_fault, folder)
    shutil.rmtree(folder)
    return {"case": case, "layout": way.name, "fault": fault, "rank": at_fault, "step": step, "place": place, **outcome}


def judged(ended: Ended, fault: str, at_fault: int, folder: Path) -> dict[str, Any]:
    struck = float((folder / "mark").read_text()) if (folder / "mark").exists() else None
    if struck is None:
        return {"passed": False, "said": ended.said[-2000:]}
    lines = [line for line in ended.said.splitlines() if line.startswith("triaxis: error: rank ")]
    named = [re.match(r"triaxis: error: rank \d+: rank ([\d, ]+) ", line) for line in lines]
    blamed = {int(rank) for match in named if match for rank in match.group(1).split(",")}
    allowed = {EXIT_HANG, EXIT_REQUEUE, -signal.SIGKILL}
    if fault in ("skip", "extra"):
        allowed.add(-signal.SIGABRT)  # gloo ends a process that receives more than it expects
    # Measured from the fault to the end of the last rank; the processes are joined as they end.
    took_s = time.time() - struck
    detected_s = took_s - (0 if fault == "kill" else LIMIT_S)
    good = {
        "in_time": detected_s <= PROMISED_S,
        "named": blamed == {at_fault},
        "ended": set(ended.codes) <= allowed and any(code in (EXIT_HANG, EXIT_REQUEUE) for code in ended.codes),
        "page": bool(list((folder / "run" / "logs").glob("autopsy-*.txt"))),
    }
    outcome = {"passed": all(good.values()), **good, "late_s": round(detected_s, 2), "codes": ended.codes}
    return outcome if outcome["passed"] else outcome | {"blamed": sorted(blamed), "said": ended.said[-6000:]}


def hangs(cases: int, seed: int, names: Sequence[str], faults: Sequence[str]) -> bool:
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="triaxis-hangs-") as scratch:
        for case in range(cases):
            outcomes.append(one_case(case, seed, names, faults, Path(scratch)))
            report(campaign="hangs", seed=seed, **outcomes[-1])
    for fault in faults:
        of_it = [outcome for outcome in outcomes if outcome["fault"] == fault]
        if of_it:
            report(campaign="hangs", fault=fault, **_figures(of_it))
    report(campaign="hangs", seed=seed, **_figures(outcomes))
    return all(outcome["passed"] for outcome in outcomes)


def _figures(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    late = sorted(outcome["late_s"] for outcome in outcomes if "late_s" in outcome)
    counts = {key: sum(bool(o.get(key)) for o in outcomes) for key in ("passed", "in_time", "named", "ended", "page")}
    p99 = late[min(len(late) - 1, int(0.99 * len(late)))] if late else None
    return {"n": len(outcomes), **counts, "late_p50_s": statistics.median(late) if late else None, "late_p99_s": p99}


# --------------------------------------------------------------------------------------- slow ranks

SLOW_RUN_STEPS, SLOW_WINDOW_S = 200, 2.0
DELAY_S = 0.04  # about the time of a step


def train_with_a_slow_rank(words: Sequence[str], at_fault: int, cause: str) -> int:
    """Run `train` with rank `at_fault` slower in each step, or, with the cause "wandering", another
    one in each step."""
    import trainer.watchdog.slow as slow

    slow.WINDOW_S = SLOW_WINDOW_S
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    real_step, real_data = Engine.step, StepData.take

    def is_slow(step: int) -> bool:
        return rank == (step % ranks if cause == "wandering" else at_fault)

    def step_with(self: Engine, micro_batches: Any, *, step: int, **named: Any) -> Any:
        if cause != "data" and is_slow(step):
            with self.watch("forward"):
                time.sleep(DELAY_S)
        return real_step(self, micro_batches, step=step, **named)

    def data_with(self: StepData, number: int, **more: bool) -> Any:
        if cause == "data" and is_slow(number):
            time.sleep(DELAY_S)
        return real_data(self, number, **more)

    Engine.step, StepData.take = step_with, data_with  # type: ignore[method-assign]
    return train(words)


def slow_case(case: int, layout: str, cause: str, scratch: Path) -> dict[str, Any]:
    """Return whether the slow rank is named, with the cause, and no other; no rank at all if the
    slowness wanders."""
    way = next(way for way in WAYS if way.name == layout)
    at_fault = case % way.processes
    folder = scratch / f"slow-{case}"
    recipe = write_recipe(folder, steps=SLOW_RUN_STEPS, every=0, keep=1)
    words = arguments(recipe, folder / "run", way)
    ended = run_ranks(
        train_with_a_slow_rank, words, at_fault, cause, world_size=way.processes, log=folder / "log", timeout_s=180.0
    )
    named = sorted(set(re.findall(r"^rank (\d+) is slow in (its data|computation|communication)", ended.said, re.MULTILINE)))
    expected = [] if cause == "wandering" else [(str(at_fault), "its data" if cause == "data" else "computation")]
    shutil.rmtree(folder)
    done = set(ended.codes) == {EXIT_OK}
    return {
        "case": case,
        "layout": layout,
        "cause": cause,
        "rank": at_fault,
        "passed": done and named == expected,
        "named": named,
    }


def slow_ranks(cases: int, names: Sequence[str]) -> bool:
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="triaxis-slow-") as scratch:
        for case in range(cases):
            cause = ("data", "computation", "wandering")[case // len(names) % 3]
            outcomes.append(slow_case(case, names[case % len(names)], cause, Path(scratch)))
            report(campaign="slow", **outcomes[-1])
    report(campaign="slow", n=cases, passed=sum(outcome["passed"] for outcome in outcomes))
    return all(outcome["passed"] for outcome in outcomes)


# ------------------------------------------------------------------------------------- false alarms

# An evaluation and a save that take twice the limit of a step, on one rank after another.
SLOW_EVERY, SLOW_S = 500, 2.5
CALM_LIMIT_S = 1


def train_slowly_at_times(words: Sequence[str]) -> int:
    import trainer.loop as loop

    def slow(real: Callable[..., Any]) -> Callable[..., Any]:
        def slower(run: Any, *args: Any, steps_done: int) -> Any:
            turn = steps_done // SLOW_EVERY
            if steps_done % SLOW_EVERY == 0 and turn % int(os.environ["WORLD_SIZE"]) == int(os.environ["RANK"]):
                with run.engine.watch("evaluation" if real.__name__ == "evaluate" else "saving"):
                    time.sleep(SLOW_S)
            return real(run, *args, steps_done=steps_done)

        return slower

    loop.evaluate, loop.save = slow(loop.evaluate), slow(loop.save)
    return train(words)


def calm(steps: int, names: Sequence[str]) -> bool:
    """Run `steps` steps in each layout in which nobody hangs, with a limit of 1 s."""
    quiet = True
    with tempfile.TemporaryDirectory(prefix="triaxis-calm-") as scratch:
        for way in (way for way in WAYS if way.name in names):
            recipe = write_recipe(
                Path(scratch) / way.name,
                steps=steps,
                every=SLOW_EVERY,
                keep=1,
                hidden=16,
                guard={"timeout_s": CALM_LIMIT_S},
                train={"eval_every": SLOW_EVERY, "log_every": 1000},
                data={"eval_fraction": 0.05},
                batch={"global_sequences": 2, "micro_sequences": 1},
            )
            ended = run_ranks(
                train_slowly_at_times,
                arguments(recipe, Path(scratch) / way.name / "run", way),
                world_size=way.processes,
                log=Path(scratch) / "log",
                timeout_s=7200.0,
            )
            alarms = ended.said.count("Autopsy of run")
            done = set(ended.codes) == {EXIT_OK}
            quiet &= done and not alarms
            said = {} if done else {"said": ended.said[-3000:]}
            report(campaign="calm", layout=way.name, steps=steps, alarms=alarms, done=done, wall_s=round(ended.wall_s), **said)
    return quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--calm", type=int, metavar="STEPS", help="so many steps in which nobody hangs, instead")
    parser.add_argument("--slow", type=int, metavar="CASES", help="so many runs with a rank that is slow, instead")
    options = parser.parse_args()
    if options.slow:
        return int(not slow_ranks(options.slow, [name for name in options.layouts if name != "pp2"]))
    if options.calm:
        return int(not calm(options.calm, options.layouts))
    return int(not hangs(options.cases, options.seed, options.layouts, options.faults))


if __name__ == "__main__":
    raise SystemExit(main())
