"""kill -9 at every system call of a save: does the run go on, to the bit as if undisturbed?

    python -m tools.campaign.kill_in_save
    python -m tools.campaign.kill_in_save --scenes one:sync --saves 2 --ranks 0 --points fsync:3
    python -m tools.campaign.kill_in_save --control

The second command runs one case again.

A case is a layout, a save (the run's first, or its second, which also removes an older checkpoint),
the rank that dies and the system call before which it dies. strace counts the calls and kills. The
rank waits for it at the beginning of the save, so no case depends on time. A case passes if no
folder with a checkpoint's name is damaged, and the same command, given again, ends with the numbers
of every step, the tensors and the memory of the undisturbed run, and with no draft left.

`--control`: the same deaths for two savers that write under the final name and rewrite a pointer
file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing import connection as waiting
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tools.campaign.cases import WAYS, Way, arguments, digests, first_difference, numbers, remembered, report, write_recipe
from tools.campaign.ranks import Ended, run_ranks, train
from trainer.checkpoint.check import check_files, read_sound
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.save import Saver
from trainer.checkpoint.tensor_file import Slot, header_bytes
from trainer.errors import DataError

STEPS = 3  # a checkpoint after each; one is kept
PATIENCE_S = 60.0  # for a rank to come to the save, and through it; each takes under a second
SCENES = ("one:sync", "one:async", "dp2-zero1:sync", "dp2-zero1:async", "tp2xpp2:sync")
KILLED = -signal.SIGKILL


# -------------------------------------------------------------------- a rank in the hands of strace


@dataclass(frozen=True)
class Point:
    """The `nth` system call of that name, counted from 1, that concerns the checkpoints."""

    call: str
    nth: int

    def __str__(self) -> str:
        return f"{self.call}:{self.nth}"


@dataclass(frozen=True)
class Held:
    """A run of which one rank waits at the beginning of a save, so that strace can attach to it.

    `body`: called on each rank with `arguments`, the victim's rank and its end of the gate.
    `folder`: what the run makes; it always begins without it. `inside`: the folder whose system
    calls count.
    """

    body: Callable[..., int]
    arguments: tuple[Any, ...]
    processes: int
    victim: int
    folder: Path
    inside: Path
    log: Path

    def watched(self) -> Watched:
        """Return the system calls of the save. strace injects by exact paths, so one run finds the
        paths, and another counts the calls."""
        seen = [line for line in self.run("-y", "-s", "0")[1].splitlines() if str(self.inside) in line]
        paths = sorted(set(re.findall(rf'(?<=["<]){re.escape(str(self.inside))}[^">]*', "\n".join(seen))))
        watched = Watched(self, tuple(word for path in paths for word in ("-P", path)), _points("\n".join(seen)))
        if watched.points != _points(self.run(*watched.paths)[1]):
            raise RuntimeError(f"two runs of one save differ in their system calls: see {self.log / 'trace.txt'}")
        return watched

    def run(self, *how: str, to_the_end: bool = False) -> tuple[Ended, str]:
        """Run with strace on the victim during the save, and return the end of the run and strace's
        output.

        All ranks are ended after the save, or with the victim, unless the run is to come
        `to_the_end`.
        """
        trace, ended = self.log / "trace.txt", self._once(how, to_the_end)
        if not trace.exists():
            raise RuntimeError(f"rank {self.victim} did not come to the save: {ended.codes}\n{ended.said}")
        return ended, trace.read_text()

    def _once(self, how: Sequence[str], to_the_end: bool) -> Ended:
        shutil.rmtree(self.folder, ignore_errors=True)
        trace = self.log / "trace.txt"
        trace.unlink(missing_ok=True)
        ours, theirs = Pipe()

        def around(pids: list[int]) -> None:
            victim = pids[self.victim]
            if alive := _heard_from(ours, victim):
                with _attached(victim, trace, how) as tracer:
                    ours.send_bytes(b"go")
                    alive = _heard_from(ours, victim)
                    if not alive:
                        tracer.wait(PATIENCE_S)
            if alive and to_the_end:
                ours.send_bytes(b"go")
            else:
                _end(pids)

        with ours, theirs:
            return run_ranks(
                self.body, *self.arguments, self.victim, theirs, world_size=self.processes, log=self.log, around=around
            )


@dataclass(frozen=True)
class Watched:
    """A held run, strace's arguments for the paths that its save touches, and the system calls on
    them in order."""

    held: Held
    paths: tuple[str, ...]
    points: list[Point]

    def killed_at(self, point: Point) -> bool:
        """Kill the victim just before it enters that system call, then the other ranks; return
        whether it came to that."""
        ended, trace = self.held.run(*self.paths, *_inject(point, "signal=KILL"))
        return ended.codes[self.held.victim] == KILLED and "+++ killed by SIGKILL +++" in trace

    def failing_at(self, point: Point, error: str) -> tuple[Ended, bool]:
        """Let that system call fail, and the run go on to its end; return the end, and whether it
        came to that."""
        ended, trace = self.held.run(*self.paths, *_inject(point, f"error={error}"), to_the_end=True)
        return ended, "(INJECTED)" in trace


def wait_at(gate: Connection) -> None:
    """Report, on a rank, that it is here, and wait until it may go on."""
    gate.send_bytes(b"here")
    gate.recv_bytes()


def _end(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _heard_from(gate: Connection, pid: int) -> bool:
    """Return whether the rank has come to the gate; False if it has died."""
    try:
        death = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        heard = waiting.wait([gate, death], PATIENCE_S)
    finally:
        os.close(death)
    if not heard:
        raise TimeoutError(f"process {pid} neither came to the gate nor died in {PATIENCE_S:.0f} s")
    if gate not in heard:
        return False
    gate.recv_bytes()
    return True


@contextmanager
def _attached(pid: int, trace: Path, how: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Attach strace to a process and all its threads; it counts from here on."""
    command = ["strace", "-f", "-p", str(pid), "-o", str(trace), *how]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = []
        for line in tracer.stderr:
            said.append(line)
            if "attached" in line:
                break
        else:
            raise RuntimeError(f"strace could not attach: {''.join(said)}")
        try:
            yield tracer
        finally:
            tracer.terminate()  # it detaches from the process


def _inject(point: Point, what: str) -> tuple[str, str]:
    return "-e", f"inject={point.call}:{what}:when={point.nth}"


def _points(trace: str) -> list[Point]:
    calls = re.findall(r"^(\d+) +([a-z0-9_]+)\(", trace, re.MULTILINE)
    if len({thread for thread, _ in calls}) != 1:
        raise RuntimeError("strace counts for each thread, and more than one had to do with the checkpoints")
    seen: Counter[str] = Counter()
    points = []
    for _, call in calls:
        seen[call] += 1
        points.append(Point(call, seen[call]))
    return points


# -------------------------------------------------------------------------------------- what is run


def train_held(command: Sequence[str], step: int, victim: int, gate: Connection) -> int:
    """Run `train`; the victim stops at the gate before and after it has written the checkpoint of
    that step."""
    if int(os.environ["RANK"]) != victim:
        return train(command)
    write = Saver._write  # in the background the thread runs this

    def held(saver: Saver, manifest: Any, *rest: Any) -> Any:
        if manifest.step != step:
            return write(saver, manifest, *rest)
        wait_at(gate)
        try:
            # strace needs the names of temporary files too.
            with patch("uuid.uuid4", return_value=uuid.UUID(int=0)):
                return write(saver, manifest, *rest)
        finally:
            wait_at(gate)

    with patch.object(Saver, "_write", held):
        return train(command)


def write_small_recipe(folder: Path, *, steps: int, keep: int) -> Path:
    """Write a recipe with a checkpoint of 100 kB after each step. A save takes some 200 system
    calls, two thirds of the larger one's."""
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    return write_recipe(
        folder,
        steps=steps,
        every=1,
        keep=keep,
        model={"family": "gpt2", "config": {**config, **dropout}},
        schedule={"name": "cosine", "warmup_steps": 1},
    )


@dataclass(frozen=True)
class Undisturbed:
    """The result that a run must come to."""

    numbers: list[tuple[Any, ...]]
    digests: dict[str, str]
    memory: dict[str, Any]

    @classmethod
    def of(cls, run_dir: Path, step: int) -> Undisturbed:
        """Read the numbers of a run's steps, and its checkpoint of that step."""
        last = run_dir / "checkpoints" / f"step-{step:08d}"
        return cls(numbers(run_dir), digests(last), remembered(last))

    def difference(self, run_dir: Path, step: int, *, after: int = 0) -> Any:
        """Return the first thing in which another run differs from this one, or None. `after`: it
        began after that step."""
        try:
            other = Undisturbed.of(run_dir, step)
        except DataError as error:
            return str(error)
        return (
            first_difference(other.numbers, self.numbers[after:])
            or first_difference(sorted(other.digests.items()), sorted(self.digests.items()))
            or first_difference(sorted(other.memory.items(), key=str), sorted(self.memory.items(), key=str))
        )


def whole_steps(checkpoints: Path) -> list[int]:
    """Return the steps of the checkpoints that have their final name, the newest first. DataError
    if one is damaged."""
    found = CheckpointFolder(checkpoints).steps()
    for _, path in found:
        check_files(path, read_sound(path).files)
    return [step for step, _ in found]


# ------------------------------------------------------------------------------------- the campaign


@dataclass(frozen=True)
class Scene:
    """A layout and a way to save, of which `keep` are kept.

    All its runs are in one folder; the disturbed one is always `folder/run`, whose paths strace is
    given. `keys`: of the recipe, as `--set` takes them.
    """

    way: Way
    asynchronous: bool
    folder: Path
    steps: int
    keep: int
    keys: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str, folder: Path, *, steps: int, keep: int, keys: Sequence[str] = ()) -> Scene:
        """Return the scene of a name, LAYOUT:sync or LAYOUT:async."""
        layout, _, mode = name.partition(":")
        way = next(way for way in WAYS if way.name == layout)
        return cls(way, mode == "async", folder / name.replace(":", "-"), steps, keep, tuple(keys))

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def prepare(self, *keys: str) -> Undisturbed:
        """Write the recipe, and run it undisturbed."""
        write_small_recipe(self.folder, steps=self.steps, keep=self.keep)
        ended = self.train("whole", *keys)
        if any(ended.codes):
            raise RuntimeError(f"{self.way.name}: {ended.said}")
        return Undisturbed.of(self.whole, self.steps)

    def train(self, name: str, *keys: str, resume: str = "auto") -> Ended:
        return self.on_ranks(train, self.command(name, *keys, resume=resume))

    def on_ranks(self, body: Callable[..., int], *parts: Any, around: Callable[[list[int]], None] | None = None) -> Ended:
        log = self.folder / "log"
        return run_ranks(body, *parts, world_size=self.way.processes, log=log, around=around)

    def held(self, step: int, victim: int) -> Held:
        """Return the disturbed run, in which a rank waits before it saves that step."""
        return Held(
            train_held,
            (self.command("run"), step),
            self.way.processes,
            victim,
            folder=self.run_dir,
            inside=self.checkpoints,
            log=self.folder / "log",
        )

    def go_on(self, expected: Undisturbed) -> dict[str, Any]:
        """Return what is there after the death, and what comes of running the same command."""
        try:
            there: Any = whole_steps(self.checkpoints)
        except DataError as error:
            there = str(error)
        ended = self.train("run")
        if any(ended.codes):
            return {"there": there, "codes": ended.codes, "said": ended.said[-500:]}
        return {
            "there": there,
            "codes": ended.codes,
            "difference": expected.difference(self.run_dir, self.steps),
            "left": sorted(path.name for path in self.checkpoints.iterdir() if path != self._last(self.run_dir)),
        }

    def command(self, name: str, *keys: str, resume: str = "auto") -> list[str]:
        mode = f"checkpoint.async={str(self.asynchronous).lower()}"
        return arguments(self.folder / "recipe.json", self.folder / name, self.way, mode, *self.keys, *keys, resume=resume)

    def _last(self, run_dir: Path) -> Path:
        return run_dir / "checkpoints" / f"step-{self.steps:08d}"


@dataclass
class Tally:
    """The counts over all cases.

    There are so many crash `points`; the rank was `killed` at so many; the run came to its end
    (`resumed`) and to the same bits (`identical`) after so many; `passed`: all that a case must be.
    """

    points: int = 0
    killed: int = 0
    resumed: int = 0
    identical: int = 0
    passed: int = 0

    def add(self, killed: bool, outcome: dict[str, Any]) -> bool:
        resumed = not any(outcome.get("codes", (1,)))
        identical = resumed and outcome["difference"] is None
        passed = killed and identical and not outcome["left"] and isinstance(outcome["there"], list)
        self.points += 1
        self.killed += killed
        self.resumed += killed and resumed
        self.identical += killed and identical
        self.passed += passed
        return passed

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def run(
    name: str, folder: Path, *, saves: Sequence[int], ranks: Sequence[int] = (), stride: int = 1, only: Sequence[str] = ()
) -> Tally:
    """Run all cases of a scene. `ranks`: those that die in turn, all by default. `only`: these
    points."""
    scene, total = Scene.named(name, folder, steps=STEPS, keep=1), Tally()
    expected = scene.prepare()
    for save in saves:
        for victim in ranks or range(scene.way.processes):
            total += _deaths(name, scene, expected, save=save, victim=victim, stride=stride, only=only)
    return total


def _deaths(
    name: str, scene: Scene, expected: Undisturbed, *, save: int, victim: int, stride: int, only: Sequence[str]
) -> Tally:
    started, tally, there = time.monotonic(), Tally(), Counter[str]()
    watched = scene.held(save, victim).watched()
    tried = [point for point in watched.points if str(point) in only] if only else watched.points[::stride]
    case = {"campaign": "kill_in_save", "scene": name, "save": save, "rank": victim}
    for point in tried:
        killed = watched.killed_at(point)
        outcome = scene.go_on(expected)
        if not tally.add(killed, outcome):
            report(**case, point=str(point), passed=False, killed=killed, **outcome)
        there[str(outcome["there"])] += 1
    calls = dict(Counter(point.call for point in watched.points))
    report(
        **case, n=len(tried), **vars(tally), enumerated=len(watched.points), calls=calls, there=there, wall_s=_since(started)
    )
    return tally


# -------------------------------------------------------------------------------------- the control


def save_in_place(folder: Path, step: int, *, file_name: str) -> None:
    """Save as trainers do that know nothing of crashes: the weights under their final name, then a
    pointer to them."""
    tensors = {f"layer-{n}.weight": torch.full((64, 64), float(step)) for n in range(12)}
    slots = {name: Slot("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    with (folder / file_name).open("wb") as file:
        file.write(header_bytes(slots))
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
    (folder / "latest").write_text(json.dumps({"file": file_name, "step": step}))


def step_in_place(folder: Path) -> int | None:
    """Return the step that such a folder can be read back as, None if it cannot."""
    try:
        latest = json.loads((folder / "latest").read_text())
        values = {value for tensor in load_file(folder / latest["file"]).values() for value in tensor.unique().tolist()}
    except (OSError, ValueError, SafetensorError):
        return None
    return int(values.pop()) if len(values) == 1 else None


CONTROLS = {"one file": "model.safetensors", "a file for each step": "model-{step}.safetensors"}


def save_twice(folder: str, pattern: str, victim: int, gate: Connection) -> int:
    """Save twice, the second time between the gates."""
    Path(folder).mkdir()
    for step in (1, 2):
        if step == 2:
            wait_at(gate)
        save_in_place(Path(folder), step, file_name=pattern.format(step=step))
    wait_at(gate)
    return 0


def control(folder: Path) -> None:
    """Report how many of the same deaths leave nothing to go on from, in a saver that writes in
    place."""
    for name, pattern in CONTROLS.items():
        inside = folder / name.replace(" ", "-")
        watched = Held(save_twice, (str(inside), pattern), 1, 0, inside, inside, log=folder / "log").watched()
        killed, there = 0, Counter[str]()
        for point in watched.points:
            killed += watched.killed_at(point)
            there[str(step_in_place(inside))] += 1
        n = len(watched.points)
        report(campaign="kill_in_save", control=name, n=n, killed=killed, unreadable=there["None"], there=there)


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    legal = [f"{way.name}:{mode}" for way in WAYS for mode in ("sync", "async")]
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=legal, metavar="LAYOUT:MODE")
    parser.add_argument(
        "--saves", nargs="+", type=int, default=[2, 1], choices=[1, 2], help="killed in the run's 1st, 2nd save"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[], help="those that die in turn; default: all")
    parser.add_argument("--stride", type=int, default=1, help="every STRIDE-th system call")
    parser.add_argument("--points", nargs="+", default=[], metavar="CALL:N", help="only these, as in fsync:3")
    parser.add_argument("--control", action="store_true", help="savers that write in place, instead")
    options = parser.parse_args()
    report(campaign="kill_in_save", arguments=vars(options))
    started, total = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory(prefix="triaxis-kill-") as top:
        folder = Path(top).resolve()
        if options.control:
            control(folder)
            return 0
        for name in options.scenes:
            total += run(
                name,
                folder,
                saves=options.saves,
                ranks=options.ranks,
                stride=options.stride,
                only=options.points,
            )
    report(campaign="kill_in_save", n=total.points, **vars(total), wall_s=_since(started))
    return int(total.passed < total.points)


if __name__ == "__main__":
    raise SystemExit(main())
