"""A disk that fills while a checkpoint is saved: training goes on, and earlier saves stay good.

    python -m tools.campaign.disk_full
    python -m tools.campaign.disk_full --scenes one:sync --kinds errors --ranks 0 --only fsync:1/EIO

The second command runs one case again.

A case is a layout and how the third of four saves fails:

| kind | the third save meets |
|---|---|
| `short` | a disk with a share of the bytes that the save needs, which it sees before it writes |
| `filling` | a disk that fills after it has looked: that share of the save fits, or all of it but some pages |
| `files` | a disk on which only a few more files can be made |
| `stays` | as `filling`, and the disk stays full to the end of the run |
| `run-folder` | as `filling`, and all of the run's folder is on that disk |
| `errors` | ENOSPC, EDQUOT or EIO from one of its system calls on the checkpoints, from each in turn |

For all but `errors` the run's folder of checkpoints is a small tmpfs in a private mount namespace,
which needs no privilege; if none can be made, only `errors`, which strace injects, are run. A case
passes if the run ends with exit code 0 after one line that names the path and the reason, the
checkpoint before is whole and has the undisturbed run's tensors, no draft is left after the next
good save, and a run that goes on from that older checkpoint ends to the bit like the undisturbed
one. An error that costs no checkpoint may pass without a message; if there is a message, there must
be no checkpoint.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tools.campaign.cases import WAYS, digests, report
from tools.campaign.kill_in_save import Point, Scene, Undisturbed, whole_steps
from tools.campaign.ranks import Ended, train
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.save import Saver
from trainer.errors import DataError

# The third save fails, after two good ones; the fourth must be good again.
STEPS, HIT, KEPT = 4, 3, 2
DISK_BYTES, INODES = 4 << 20, 300  # room for ten checkpoints
PAGE_BYTES = 4096  # a tmpfs allocates whole pages
SHARES = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)  # of the save, in percent
LAST_PAGES = (1, 2, 3, 4, 5, 6, 7)  # the small files, written last, have one to three pages each
KINDS = ("short", "filling", "files", "stays", "run-folder", "errors")
SCENES = ("one:sync", "one:async", "dp2-zero1:sync")
# The system calls in which an error can occur, and its message. Calls that only ask for a file's
# kind or place cannot fail in this way.
ERRORS = {
    "ENOSPC": ("No space left on device", ("mkdir", "openat", "write", "fsync", "rename")),
    "EDQUOT": ("Disk quota exceeded", ("mkdir", "write")),
    "EIO": (
        "Input/output error",
        ("openat", "write", "fsync", "close", "chmod", "rename", "unlinkat", "rmdir", "newfstatat", "getdents64", "read"),
    ),
}
NOT_SAVED, NOT_REMOVED = "warning: no checkpoint of step", "warning: checkpoints older than"
NO_SPACE = ERRORS["ENOSPC"][0]
SEEN_BEFORE = r"the disk is full: [\d,]+ bytes are needed, [\d,]+ are free"


# ------------------------------------------------------------------------------ the disk that fills


@dataclass(frozen=True)
class Filling:
    """The space left on the disk around the third save: bytes, or files that can still be made.

    `after_look`: it fills once the save has seen that there is room. `stays`: nothing is given
    back. `run_folder`: it is the disk of the whole run, not of the checkpoints alone.
    """

    num_bytes: int = 0
    num_files: int | None = None
    after_look: bool = True
    stays: bool = False
    run_folder: bool = False

    def disk(self, checkpoints: Path) -> Path:
        return checkpoints.parent if self.run_folder else checkpoints


def train_on_filling_disk(command: Sequence[str], filling: Filling) -> int:
    """Train on this rank, in a run whose first rank fills the disk around the third save."""
    if os.environ["RANK"] != "0":
        return train(command)
    look, write = Saver._begin, Saver._write

    def looking(saver: Saver, step: int, need: int) -> dict[str, Any]:
        if step == HIT and not filling.after_look:
            fill(filling.disk(saver.folder.path), filling)
        told = look(saver, step, need)
        if step == HIT and filling.after_look:
            fill(filling.disk(saver.folder.path), filling)
        return told

    def writing(saver: Saver, manifest: Any, *rest: Any) -> Any:
        try:
            return write(saver, manifest, *rest)
        finally:
            if manifest.step == HIT and not filling.stays:
                give_back(filling.disk(saver.folder.path))

    with patch.object(Saver, "_begin", looking), patch.object(Saver, "_write", writing):
        return train(command)


def fill(disk: Path, filling: Filling) -> None:
    ballast = disk / "ballast"
    ballast.mkdir()
    (ballast / "bytes").touch()
    free = os.statvfs(disk)
    if filling.num_files is not None:
        for n in range(free.f_ffree - filling.num_files):
            (ballast / str(n)).touch()
    else:
        with (ballast / "bytes").open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - filling.num_bytes)


def give_back(disk: Path) -> None:
    shutil.rmtree(disk / "ballast")


@contextmanager
def small_disk(at: Path) -> Iterator[None]:
    at.mkdir(parents=True)
    size = f"size={DISK_BYTES},nr_inodes={INODES},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "campaign", str(at)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


def can_mount() -> bool:
    """Return whether a tmpfs can be mounted in a private namespace here."""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "campaign", folder]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


# ------------------------------------------------------------------------------------- the campaign


@dataclass(frozen=True)
class Expected:
    """The facts of the undisturbed run: its end, the tensors of its checkpoints by step, and the
    space that one takes on a tmpfs."""

    end: Undisturbed
    tensors: dict[int, dict[str, str]]
    need: int  # bytes that the save asks for
    num_bytes: int  # bytes that it takes
    num_files: int

    @classmethod
    def of(cls, scene: Scene) -> Expected:
        """Run the scene undisturbed, keeping all its checkpoints."""
        end = scene.prepare(f"checkpoint.keep={STEPS}")
        found = dict(CheckpointFolder(scene.whole / "checkpoints").steps())
        entries = list(found[STEPS].rglob("*"))
        pages = sum(-(-path.stat().st_size // PAGE_BYTES) for path in entries if path.is_file())
        need = sum(path.stat().st_size for path in entries if path.suffix == ".safetensors")
        tensors = {step: digests(path) for step, path in found.items()}
        return cls(end, tensors, need, pages * PAGE_BYTES, len(entries))

    def fillings(self, kind: str) -> dict[str, Filling]:
        """Return the cases of a kind, by name."""
        if kind == "files":
            return {f"{n}-files": Filling(num_files=n) for n in range(self.num_files)}
        after_look = kind != "short"
        left = {f"{share}%": (self.num_bytes if after_look else self.need) * share // 100 for share in SHARES}
        if after_look:
            left |= {f"all-but-{n}-pages": self.num_bytes - n * PAGE_BYTES for n in LAST_PAGES}
        how = {"after_look": after_look, "stays": kind == "stays", "run_folder": kind == "run-folder"}
        return {name: Filling(num_bytes, **how) for name, num_bytes in left.items()}


@dataclass
class Tally:
    """The counts over `n` cases.

    In `struck` the fault occurred; `ended` with exit code 0; `told` in one line which path and why;
    `kept` the checkpoint before; were `clean` of drafts; went on from that checkpoint to
    `identical` bits; `passed` all of it.
    """

    n: int = 0
    struck: int = 0
    ended: int = 0
    told: int = 0
    kept: int = 0
    clean: int = 0
    identical: int = 0
    passed: int = 0

    def add(self, outcome: dict[str, Any]) -> bool:
        good = {name: bool(outcome.get(name)) for name in ("struck", "ended", "told", "kept", "clean", "identical")}
        for name, value in {**good, "n": True, "passed": all(good.values())}.items():
            setattr(self, name, getattr(self, name) + value)
        return all(good.values())

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def judged(scene: Scene, ended: Ended, expected: Expected, reason: str, *, must_fail: bool) -> dict[str, Any]:
    """Return what came of a run in whose third save something failed for that reason; see `Tally`.

    `must_fail`: the failure leaves no checkpoint of that save.
    """
    steps, damage = whole_ones(scene, expected)
    before = max((step for step in steps if step < STEPS), default=0)
    lines = warnings(ended)
    outcome: dict[str, Any] = {
        "struck": bool(lines),
        "ended": not any(ended.codes),
        "told": told_of(HIT in steps, lines) and well_told(scene, lines, reason),
        "kept": not damage and before == HIT - 1 if must_fail else not damage and before >= HIT - 1,
        "there": damage or steps,
        "said": [line.replace(str(scene.checkpoints), "CKPTS") for line in lines],
        "left": sorted(path.name for path in scene.checkpoints.glob(".*")),
    }
    outcome["clean"] = not outcome["left"]
    if not outcome["ended"] or not outcome["kept"]:
        return outcome | {"codes": ended.codes, "end": ended.said[-500:]}
    shutil.rmtree(scene.folder / "again", ignore_errors=True)
    resumed = scene.train("again", resume=str(scene.checkpoints / f"step-{before:08d}"))
    differences = [
        expected.end.difference(scene.run_dir, STEPS),
        resumed.said[-500:] if any(resumed.codes) else expected.end.difference(scene.folder / "again", STEPS, after=before),
    ]
    return outcome | {"identical": differences == [None, None], "differences": differences}


def judged_when_full_to_the_end(scene: Scene, ended: Ended, expected: Expected) -> dict[str, Any]:
    """Return the same if the fourth save failed too; the run goes on in its own folder once there
    is room."""
    give_back(scene.checkpoints)
    steps, damage = whole_ones(scene, expected)
    lines = warnings(ended)
    resumed = scene.train("run")
    difference = resumed.said[-500:] if any(resumed.codes) else expected.end.difference(scene.run_dir, STEPS)
    return {
        "struck": bool(lines),
        "ended": not any(ended.codes),
        "told": len(lines) == 2 and well_told(scene, lines, f"{SEEN_BEFORE}|{NO_SPACE}"),
        "kept": not damage and max(steps, default=0) == HIT - 1,
        "clean": not list(scene.checkpoints.glob(".*")),
        "identical": difference is None,
        "there": damage or steps,
        "said": [line.replace(str(scene.checkpoints), "CKPTS") for line in lines],
        "differences": [difference],
    }


def warnings(ended: Ended) -> list[str]:
    return [line for line in ended.said.splitlines() if line.startswith((NOT_SAVED, NOT_REMOVED))]


def told_of(saved: bool, lines: Sequence[str]) -> bool:
    """Return whether the messages fit what is there.

    A missing checkpoint is reported once. About one that is there, the only message may be that an
    older one stayed.
    """
    return (
        len(lines) <= 1 and all(line.startswith(NOT_REMOVED) for line in lines)
        if saved
        else (len(lines) == 1 and lines[0].startswith(NOT_SAVED))
    )


def well_told(scene: Scene, lines: Sequence[str], reason: str) -> bool:
    """Return whether each line names a path and the reason."""
    return all(str(scene.checkpoints) in line and re.search(reason, line) for line in lines)


def whole_ones(scene: Scene, expected: Expected) -> tuple[list[int], str]:
    """Return the steps of the checkpoints that are there, and which is damaged or has other tensors
    than the undisturbed run, or ""."""
    try:
        steps = whole_steps(scene.checkpoints)
    except DataError as error:
        return [], str(error)
    wrong = [step for step in steps if digests(scene.checkpoints / f"step-{step:08d}") != expected.tensors[step]]
    return steps, f"other tensors in {wrong}" if wrong else ""


Case = Callable[[], dict[str, Any]]


def full_disks(scene: Scene, expected: Expected, kind: str) -> dict[str, Case]:
    def case(filling: Filling) -> dict[str, Any]:
        shutil.rmtree(scene.run_dir, ignore_errors=True)
        with small_disk(filling.disk(scene.checkpoints)):
            ended = scene.on_ranks(train_on_filling_disk, scene.command("run"), filling)
            if filling.stays:
                return judged_when_full_to_the_end(scene, ended, expected)
            return judged(scene, ended, expected, SEEN_BEFORE if kind == "short" else NO_SPACE, must_fail=True)

    return {name: partial(case, filling) for name, filling in expected.fillings(kind).items()}


def failing_calls(scene: Scene, expected: Expected, victim: int, errors: Sequence[str]) -> dict[str, Case]:
    """Return a case for each system call of a rank's save on the checkpoints, with each error that
    it can give."""
    watched = scene.held(HIT, victim).watched()

    def case(point: Point, error: str) -> dict[str, Any]:
        ended, struck = watched.failing_at(point, error)
        return {**judged(scene, ended, expected, ERRORS[error][0], must_fail=False), "struck": struck}

    return {
        f"{point}/{error}": partial(case, point, error)
        for error in errors
        for point in watched.points
        if point.call in ERRORS[error][1]
    }


def run(
    name: str,
    folder: Path,
    *,
    kinds: Sequence[str] = KINDS,
    ranks: Sequence[int] = (),
    errors: Sequence[str] = tuple(ERRORS),
    stride: int = 1,
    only: Sequence[str] = (),
) -> Tally:
    """Run all cases of a scene. `ranks`: whose system calls fail in turn, all by default. `only`:
    the cases of these names."""
    scene, total = Scene.named(name, folder, steps=STEPS, keep=KEPT), Tally()
    expected = Expected.of(scene)
    for kind in kinds:
        for victim in (ranks or range(scene.way.processes)) if kind == "errors" else (0,):
            if kind == "errors":
                cases = failing_calls(scene, expected, victim, errors)
            else:
                cases = full_disks(scene, expected, kind)
            wanted = {name: case for name, case in cases.items() if not only or name in only}
            total += _tried(dict(list(wanted.items())[::stride]), scene=name, kind=kind, rank=victim)
    return total


def _tried(cases: Mapping[str, Case], **which: Any) -> Tally:
    started, tally = time.monotonic(), Tally()
    for name, case in cases.items():
        outcome = case()
        if not tally.add(outcome):
            report(campaign="disk_full", **which, case=name, passed=False, **outcome)
    report(campaign="disk_full", **which, **vars(tally), wall_s=round(time.monotonic() - started, 1))
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    legal = [f"{way.name}:{mode}" for way in WAYS for mode in ("sync", "async")]
    parser.add_argument("--scenes", nargs="+", default=list(SCENES), choices=legal, metavar="LAYOUT:MODE")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[], help="in which system calls fail in turn; default: all")
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=list(ERRORS))
    parser.add_argument("--stride", type=int, default=1, help="every STRIDE-th case")
    parser.add_argument("--only", nargs="+", default=[], metavar="CASE", help="only these, as in 50%% or fsync:3/EIO")
    # Set in the private namespace.
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.inside:
        if can_mount():
            command = [sys.executable, "-m", "tools.campaign.disk_full", "--inside", *(arguments or sys.argv[1:])]
            return subprocess.run(["unshare", "-Urm", *command], check=False).returncode
        report(campaign="disk_full", remark="no private tmpfs can be mounted here: only errors that strace injects")
        options.kinds = [kind for kind in options.kinds if kind == "errors"]
    report(campaign="disk_full", arguments=vars(options))
    started, total = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory(prefix="triaxis-disk-") as top:
        for name in options.scenes:
            total += run(
                name,
                Path(top).resolve(),
                kinds=options.kinds,
                ranks=options.ranks,
                errors=options.errors,
                stride=options.stride,
                only=options.only,
            )
    report(campaign="disk_full", **vars(total), wall_s=round(time.monotonic() - started, 1))
    return int(total.passed < total.n)


if __name__ == "__main__":
    raise SystemExit(main())
