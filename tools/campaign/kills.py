"""kill -9 in every phase of a run: do the other ranks end by themselves, and does the same command
come to the same bits?

    python -m tools.campaign.kills --cases 1000 --record kills.jsonl
    python -m tools.campaign.kills --cases 1000 --record kills.jsonl   (again: only what is missing)
    python -m tools.campaign.kills --cases 1 --first 417               (one case again)
    python -m tools.campaign.kills --seconds 600 --seed 7

A case is a layout and a way to save, a story (a run that starts anew, one that goes on from a
checkpoint, one that is asked by a signal to end, one that rewinds after a spike), a rank, and a
moment of it: a phase by name, the number of the rank's visit to it, and the number of the call it
makes there. The rank counts, and kills itself, so that no case depends on time. An undisturbed run
of each story is counted first; phases, moments and ranks are drawn from what it did.

A case passes if the rank died; the others ended within 15 s with the code that starts the run again
(75), or 0 if it was trained to its end, or, before the group is joined, when their launcher would
end them; no folder with a checkpoint's name is damaged; and the same command, given again, ends
with the numbers of every step, the tensors, the memory and the files of the undisturbed run, with
no draft, process or shared memory left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from multiprocessing import connection as waiting
from pathlib import Path
from typing import Any

from tools.campaign.cases import report
from tools.campaign.kill_in_save import KILLED, Scene, Undisturbed, whole_steps, write_small_recipe
from tools.campaign.phases import Moment, Phases
from tools.campaign.ranks import Ended, train
from tools.campaign.spikes import plant_spikes
from trainer.data.digests import RACY_S
from trainer.errors import EXIT_OK, EXIT_REQUEUE, DataError
from trainer.stopwatch import Stopwatch

LAYOUTS = ("one", "dp2-zero1", "dp2-zero3", "tp2", "pp2", "tp2xpp2")
SCENES = tuple(f"{layout}:{mode}" for layout in LAYOUTS for mode in ("async", "sync"))
KEYS = (
    *("guard.timeout_s=6", "guard.long_timeout_s=12", "guard.check_every=2"),
    *("checkpoint.every=2", "checkpoint.best=eval_loss"),
    *("train.eval_every=3", "train.eval_sequences=4"),
)
WARNED_AT = 4  # the step before which the signal comes
SPIKE_AT = 9  # steps are judged only after the guard's smallest window
# Until all other ranks have ended. The watchdog promises 5 s, on a machine that is not shared.
BOUND_S = 15.0
LAUNCHER_S = 1.0  # a launcher ends its other ranks; before they are joined nobody else can
PATIENCE_S = 90.0
MEMORY = Path("/dev/shm")
BEFORE_THE_GROUP = ("joining the group",)


# ------------------------------------------------------------------------------------------ stories


def nothing() -> None:
    """Leave a run as it is."""


def ask_to_end() -> None:
    """Send the last rank a signal between two steps."""
    begin_step = Stopwatch.begin_step

    def with_a_signal(watch: Stopwatch, step: int) -> None:
        if step == WARNED_AT and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        begin_step(watch, step)

    Stopwatch.begin_step = with_a_signal  # type: ignore[method-assign]


def spike() -> None:
    plant_spikes([SPIKE_AT])


@dataclass(frozen=True)
class Story:
    """The events in the first start of a run.

    `plant`: runs on each of its ranks, before it trains; `again`: the same for the starts after it.
    `goes_on`: it begins with what the story of that name leaves.
    """

    steps: int = 6
    keys: tuple[str, ...] = ()
    plant: Callable[[], None] = nothing
    again: Callable[[], None] = nothing
    goes_on: str = ""


STORIES = {
    "anew": Story(),
    "asked to end": Story(plant=ask_to_end),
    "goes on": Story(goes_on="asked to end"),
    "spikes": Story(steps=12, keys=("guard.on_spike=rewind", "guard.spike_window=8"), plant=spike, again=spike),
}


def train_in_a_story(words: Sequence[str], story: str) -> int:
    STORIES[story].again()
    return train(words)


def train_and_count(words: Sequence[str], story: str, counted: str) -> int:
    """Train, and write the calls of each visit to each phase into the folder `counted`."""
    STORIES[story].plant()
    phases = Phases()
    phases.plant()
    code = train(words)
    sys.setprofile(None)
    Path(counted, f"{os.environ['RANK']}.json").write_text(json.dumps(phases.calls))
    return code


def train_and_die(words: Sequence[str], story: str, victim: int, phase: str, entry: int, call: int) -> int:
    STORIES[story].plant()
    if int(os.environ["RANK"]) == victim:
        Phases(Moment(phase, entry, call)).plant()
    return train(words)


# ------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Told:
    """An undisturbed story: `calls` by rank, phase and visit; what the run came to, and the names
    of its files."""

    story: str
    calls: list[dict[str, list[int]]]
    expected: Undisturbed
    files: frozenset[str]


class Stage:
    """A scene, in which every story is run undisturbed once, when it is first needed."""

    def __init__(self, name: str, folder: Path) -> None:
        scene = Scene.named(name, folder, steps=STORIES["anew"].steps, keep=1)
        evaluated = json.dumps([{"path": str(scene.folder / "text.txt")}])
        self.scene = replace(scene, keys=(*KEYS, f"data.eval_sources={evaluated}"))
        write_small_recipe(self.scene.folder, steps=self.scene.steps, keep=1)
        # The hash of a file that has just been written is not remembered, and then its file is
        # missing.
        time.sleep(RACY_S)
        self._told: dict[str, Told] = {}

    @property
    def run_dir(self) -> Path:
        return self.scene.run_dir

    @cached_property
    def phases(self) -> list[str]:
        return sorted({phase for story in STORIES for calls in self.told(story).calls for phase in calls})

    def told(self, story: str) -> Told:
        if story not in self._told:
            self._told[story] = self._tell(story)
        return self._told[story]

    def set_up(self, story: str) -> list[str]:
        """Prepare the run folder as the story finds it, and return its command."""
        before = STORIES[story].goes_on
        if before:
            self.told(before)
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if before:
            shutil.copytree(self._left_by(before), self.run_dir, symlinks=True)
        return self.command(story)

    def command(self, story: str) -> list[str]:
        told = STORIES[story]
        return self.scene.command("run", *told.keys, f"train.steps={told.steps}", f"data.cache_dir={self.run_dir / 'cache'}")

    def again(self, story: str) -> Ended:
        return self.scene.on_ranks(train_in_a_story, self.command(story), story)

    def _tell(self, story: str) -> Told:
        steps = STORIES[story].steps
        with tempfile.TemporaryDirectory(dir=self.scene.folder) as counted:
            ended = self.scene.on_ranks(train_and_count, self.set_up(story), story, counted)
            if set(ended.codes) not in ({EXIT_OK}, {EXIT_REQUEUE}):
                raise RuntimeError(f"{self.scene.folder.name}, {story}: {ended.said}")
            calls = [json.loads(Path(counted, f"{rank}.json").read_text()) for rank in range(self.scene.way.processes)]
        if set(ended.codes) == {EXIT_REQUEUE}:
            shutil.copytree(self.run_dir, self._left_by(story), symlinks=True)
            ended = self.again(story)
        told = Told(story, calls, Undisturbed.of(self.run_dir, steps), files_of(self.run_dir))
        same = [other for other in self._told.values() if STORIES[other.story].steps == steps]
        if difference := next((found for other in same if (found := other.expected.difference(self.run_dir, steps))), None):
            raise RuntimeError(f"{self.scene.folder.name}, {story}, which nobody disturbed: {difference}")
        return told

    def _left_by(self, story: str) -> Path:
        return self.scene.folder / f"left by {story}"


def files_of(run_dir: Path) -> frozenset[str]:
    """Return the names of all that a run leaves, except what reports lost ranks: pages, and the
    stacks of killed ranks."""
    names = (path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*"))
    return frozenset(name for name in names if not re.fullmatch(r"logs/(autopsy-.*|.*\.stack)", name))


# -------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    story: str
    victim: int
    moment: Moment

    @classmethod
    def drawn(cls, stage: Stage, phase: str, stream: random.Random) -> Case:
        """Draw a case: each story and rank that comes to the phase is equally likely, and so is
        each visit to it and each call there."""
        places = [(told, rank) for told in map(stage.told, STORIES) for rank, calls in enumerate(told.calls) if phase in calls]
        told, victim = stream.choice(places)
        visits = told.calls[victim][phase]
        entry = stream.randrange(len(visits))
        return cls(told.story, victim, Moment(phase, entry + 1, stream.randrange(visits[entry] + 1)))


@dataclass
class Death:
    """The observations of the campaign from outside the ranks while one of them dies."""

    case: Case
    pids: list[int] = field(default_factory=list)
    reaped: list[int] = field(default_factory=list)
    ended_s: float = 0.0

    def watch(self, pids: list[int]) -> None:
        """Wait until the victim has died, and then until the others have ended, for a bounded
        time."""
        self.pids = pids
        running_after([pids[self.case.victim]], PATIENCE_S)
        died = time.monotonic()
        others = [pid for rank, pid in enumerate(pids) if rank != self.case.victim]
        left = running_after(others, LAUNCHER_S if self.case.moment.phase in BEFORE_THE_GROUP else BOUND_S)
        self.ended_s = round(time.monotonic() - died, 2)
        self.reaped = [pids.index(pid) for pid in left]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def running_after(pids: Sequence[int], patience_s: float) -> list[int]:
    """Return those of the processes that have not ended by then."""
    deaths: dict[int, int] = {}  # by descriptor
    for pid in pids:
        with suppress(ProcessLookupError):
            deaths[os.pidfd_open(pid)] = pid
    try:
        deadline, running = time.monotonic() + patience_s, dict(deaths)
        while running and time.monotonic() < deadline:
            for ended in waiting.wait(list(running), deadline - time.monotonic()):
                running.pop(ended)  # type: ignore[call-overload]
        return list(running.values())
    finally:
        for descriptor in deaths:
            os.close(descriptor)


def judged(stage: Stage, case: Case) -> dict[str, Any]:
    """Play a case, and return what came of it."""
    told, death = stage.told(case.story), Death(case)
    moment = (case.moment.phase, case.moment.entry, case.moment.call)
    ended = stage.scene.on_ranks(train_and_die, stage.set_up(case.story), case.story, case.victim, *moment, around=death.watch)
    steps = STORIES[case.story].steps
    try:
        there: Any = whole_steps(stage.scene.checkpoints)
    except DataError as error:
        there = str(error)
    right = {EXIT_REQUEUE, EXIT_OK} if there == [steps] else {EXIT_REQUEUE}
    others = {code for rank, code in enumerate(ended.codes) if rank not in (case.victim, *death.reaped)}
    again = stage.again(case.story)
    difference = None if any(again.codes) else told.expected.difference(stage.run_dir, steps)
    good = {
        "killed": ended.codes[case.victim] == KILLED,
        "others": others <= right and (not death.reaped or case.moment.phase in BEFORE_THE_GROUP),
        "whole": isinstance(there, list),
        "resumed": not any(again.codes),
        "identical": not any(again.codes) and difference is None,
        "clean": not any(again.codes) and not (left := sorted(left_over(stage.run_dir, told.files, death.pids))),
    }
    outcome = {"passed": all(good.values()), **good, "codes": ended.codes, "there": there, "ended_s": death.ended_s}
    if outcome["passed"]:
        return outcome
    said = {"said": ended.said[-3000:], "said_again": again.said[-3000:] if any(again.codes) else ""}
    left = [] if any(again.codes) else left
    return {**outcome, "reaped": death.reaped, "again": again.codes, "difference": difference, "left": left, **said}


def left_over(run_dir: Path, files: frozenset[str], pids: Sequence[int]) -> Iterator[str]:
    """Yield files that are too many or missing, processes that have one of them open, and shared
    memory of the ranks.

    Whatever listens on a port is a process.
    """
    yield from files ^ files_of(run_dir)
    for process in (path for path in Path("/proc").iterdir() if path.name.isdecimal()):
        with suppress(OSError):
            if any(str(file.readlink()).startswith(str(run_dir)) for file in (process / "fd").iterdir()):
                yield f"process {process.name}"
    if MEMORY.is_dir():
        yield from (path.name for path in MEMORY.iterdir() if any(str(pid) in re.split(r"\D+", path.name) for pid in pids))


# ----------------------------------------------------------------------------------------- campaign


def one_case(
    number: int, seed: int, names: Sequence[str], stage_of: Callable[[str], Stage], phases: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one case. Scenes take turns, and in each scene the phases."""
    started, name = time.monotonic(), names[number % len(names)]
    stage = stage_of(name)
    named = [phase for phase in stage.phases if not phases or phase in phases]
    case = Case.drawn(stage, named[number // len(names) % len(named)], random.Random(f"{seed} {number}"))
    told = {"story": case.story, "rank": case.victim, **asdict(case.moment)}
    outcome = judged(stage, case)
    return {"case": number, "scene": name, **told, **outcome, "wall_s": round(time.monotonic() - started, 1)}


def kills(chosen: argparse.Namespace) -> bool:
    """Run the chosen cases that the record lacks, and print a table of all that are there then."""
    outcomes = recorded(chosen.record, chosen.seed, chosen.scenes) if chosen.record else {}
    deadline = time.monotonic() + chosen.seconds
    # Files in memory survive the kill of the process that wrote them, too.
    fast = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="triaxis-kills-", dir=fast) as folder:
        stage_of = cache(lambda name: Stage(name, Path(folder)))
        for number in range(chosen.first, chosen.first + chosen.cases):
            if time.monotonic() > deadline:
                break
            if number in outcomes:
                continue
            outcome = one_case(number, chosen.seed, chosen.scenes, stage_of, chosen.phases)
            outcomes[number] = outcome
            report(campaign="kills", seed=chosen.seed, **outcome)
            if chosen.record:
                line = json.dumps({"seed": chosen.seed, "scenes": chosen.scenes, **outcome})
                with chosen.record.open("a") as file:
                    file.write(f"{line}\n")
    cases = list(outcomes.values())
    print("\n".join(table(cases)), file=sys.stderr)
    passed = sum(case["passed"] for case in cases)
    report(campaign="kills", seed=chosen.seed, n=len(cases), **{key: sum(case[key] for case in cases) for key in VERDICTS})
    return bool(cases) and passed == len(cases)


VERDICTS = ("passed", "killed", "others", "whole", "resumed", "identical", "clean")


def recorded(record: Path, seed: int, scenes: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Return the recorded outcomes, by number, of cases that these arguments would draw alike."""
    lines = record.read_text().splitlines() if record.exists() else []
    # A kill may have cut the last line.
    cases = [json.loads(line) for line in lines if line.endswith("}")]
    return {case["case"]: case for case in cases if (case["seed"], case["scenes"]) == (seed, list(scenes))}


def table(cases: Sequence[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [("phase", "n", *VERDICTS, "median s to end", "longest")]
    for phase in (*sorted({case["phase"] for case in cases}), "all"):
        of_it = [case for case in cases if phase in (case["phase"], "all")]
        ended_s = [case["ended_s"] for case in of_it if len(case["codes"]) > 1] or [0.0]
        counts = (str(sum(case[key] for case in of_it)) for key in VERDICTS)
        rows.append((phase, str(len(of_it)), *counts, f"{statistics.median(ended_s):.2f}", f"{max(ended_s):.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no further case after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=SCENES, metavar="LAYOUT:MODE")
    parser.add_argument("--phases", nargs="+", default=[], metavar="PHASE", help="only these")
    parser.add_argument("--record", type=Path, metavar="FILE", help="a line for each case; what is there is not done again")
    return int(not kills(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
