"""Ten thousand damaged checkpoints: is one of them taken for whole?

    python -m tools.campaign.damage --cases 10000 --runs 30
    python -m tools.campaign.damage --control

A run of four ranks is made once. A case does one thing to the newest of its two checkpoints, and
asks what a restarted run asks: `newest_whole`. It passes if the damaged one is set aside with a
reason that names what was damaged, and the older one is returned. The first `--runs` cases are also
continued by `train --resume auto`, which must end with the numbers and the tensors of the
undisturbed run. `--control` does the same to the plain safetensors file of the run's export, read
with safetensors' own `load_file`.

A damage that has changed nothing is drawn again. All files are equally likely, small ones as often
as large ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from parallel.messages import Messages
from tools.campaign.cases import WAYS, Way, arguments, digests, first_difference, numbers, remembered, report, write_recipe
from trainer.checkpoint.check import check_files, read_sound
from trainer.checkpoint.folder import REASON, CheckpointFolder, files_in
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.resume import newest_whole

# Checkpoints of steps 3, 6 and 9; the damaged one is that of 6, so that a run has three steps to
# go.
STEPS, EVERY = 9, 3
BLOCK_BYTES = 4096
LIMIT_S = 5.0  # for checking some 150 kB, which takes 2 ms if the disk is not busy
Random = random.Random


@dataclass(frozen=True)
class Victim:
    """The checkpoint of a case. Its files are hard links until they are written, so the originals
    stay as they are."""

    path: Path
    older: Path  # of the same run
    later: Path  # of the same run
    foreign: Path  # of the same step of another run

    def names(self) -> list[str]:
        return sorted(files_in(self.path))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def put(self, name: str, data: bytes) -> None:
        self.remove(name)
        (self.path / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def change(self, stream: Random, change: Callable[[Random, bytes], bytes]) -> set[str]:
        """Change the content of some file, and return its name."""
        name = stream.choice([name for name in self.names() if self.read(name)])
        self.put(name, change(stream, self.read(name)))
        return {name}


# ---------------------------------------------------------------- what can happen to a file's bytes


def flipped(stream: Random, data: bytes) -> bytes:
    position = stream.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << stream.randrange(8)]) + data[position + 1 :]


def zeroed(stream: Random, data: bytes) -> bytes:
    size = min(len(data), stream.choice([BLOCK_BYTES, 512, 64, 8, 1]))
    start = stream.randrange(len(data) - size + 1)
    return data[:start] + bytes(size) + data[start + size :]


def truncated(stream: Random, data: bytes) -> bytes:
    return data[: stream.choice([0, stream.randrange(len(data)), len(data) - 1])]


def lengthened(stream: Random, data: bytes) -> bytes:
    size = stream.choice([1, 8, BLOCK_BYTES])
    return data + stream.choice([bytes(size), stream.randbytes(size)])


# ------------------------------------------------------------------ what can happen to a checkpoint

# Damages the victim, and returns names of files, one of which the reason must give, or THE_STEP.
Damage = Callable[[Random, Victim], set[str]]
THE_STEP = ""  # the manifest is sound, and of another step than the folder


def swap_two_files(stream: Random, victim: Victim) -> set[str]:
    a, b = stream.sample(victim.names(), 2)
    of_a, of_b = victim.read(a), victim.read(b)
    victim.put(a, of_b)
    victim.put(b, of_a)
    return {a, b}


def lose_a_file(stream: Random, victim: Victim) -> set[str]:
    name = stream.choice(victim.names())
    victim.remove(name)
    return {name}


def add_a_file(stream: Random, victim: Victim) -> set[str]:
    """Add a file, a link or a pipe; some have the name under which the reason is about to be
    written."""
    folder = stream.choice(["", "", "hugging_face/", "new/"])
    names = ("rank-00099.safetensors", ".metadata", "optimizer.pt", "manifest.json.bak", REASON, REASON, "extra", "é", "a\nb")
    name = folder + stream.choice(names)
    (victim.path / folder).mkdir(exist_ok=True)
    makers: tuple[Callable[[Path], Any], ...] = (
        *(lambda path, data=data: path.write_bytes(data) for data in (b"", b"{}", stream.randbytes(100))),
        lambda path: path.symlink_to(victim.older / MANIFEST),
        os.mkfifo,
    )
    stream.choice(makers)(victim.path / name)
    return {" ".join(name.split())}  # a reason is written on one line


def put_in(source: Callable[[Victim], Path]) -> Damage:
    """Return a damage that replaces one file by that of the same name in another checkpoint."""

    def damage(stream: Random, victim: Victim) -> set[str]:
        name = stream.choice(victim.names())
        victim.put(name, (source(victim) / name).read_bytes())
        # A sound manifest from elsewhere contradicts its folder, or the files that are not its own.
        return {name} if name != MANIFEST else {name, THE_STEP, *victim.names()}

    return damage


def become_another_step(stream: Random, victim: Victim) -> set[str]:
    shutil.rmtree(victim.path)
    _link_tree(stream.choice([victim.older, victim.later]), victim.path)
    return {THE_STEP}


def become_a_link(stream: Random, victim: Victim) -> set[str]:
    name = stream.choice(victim.names())
    aside = victim.path.parent.parent / "aside"
    aside.write_bytes(victim.read(name))
    target = stream.choice([aside, victim.older / name, victim.older, Path("nowhere"), Path(Path(name).name)])
    victim.remove(name)
    (victim.path / name).symlink_to(target)
    return {name}


def become_a_pipe(stream: Random, victim: Victim) -> set[str]:
    """Replace a file by a pipe: whoever opens it to read waits for a writer that never comes."""
    name = stream.choice(victim.names())
    victim.remove(name)
    os.mkfifo(victim.path / name)
    return {name}


def become_a_folder(stream: Random, victim: Victim) -> set[str]:
    name = stream.choice(victim.names())
    victim.remove(name)
    (victim.path / name).mkdir()
    return {name}


def lose_the_manifest_s_content(stream: Random, victim: Victim) -> set[str]:
    victim.put(MANIFEST, stream.choice([b"", b"\n", b"{}", b"null", b"[]", b"{}\n", b"\0" * BLOCK_BYTES, b"[" * 100_000]))
    return {MANIFEST}


# --------------------------------------------------------------------------------- edited manifests

Body = dict[str, Any]


def canonical(body: Body) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def sealed(body: Body) -> bytes:
    """Return a manifest as its author writes it: the checksum is right, whatever it says."""
    content = {key: value for key, value in body.items() if key != "sha256"}
    return canonical({**content, "sha256": hashlib.sha256(canonical(content)).hexdigest()})


def _edit_a_number(stream: Random, body: Body) -> None:
    container, key = stream.choice(list(_number_places(body)))
    container[key] += stream.choice([-1, 1, 1000])


def _number_places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield value, key
        yield from _number_places(item)


def _move_a_fragment(stream: Random, body: Body) -> None:
    fragments = stream.choice(list(body["tensors"].values()))[2]
    fragment = stream.choice(fragments)
    part = stream.randrange(4)
    if part == 0:
        fragment[0] = (fragment[0] + 1) % len(body["files"])
    elif part == 1:
        fragment[1][0] += stream.choice([-1, 1])
    elif part == 2:
        fragment[3] += stream.choice([-1, 1, 64])
    else:
        fragments.append(fragment)


def _rename_a_tensor(stream: Random, body: Body) -> None:
    old, other = stream.sample(list(body["tensors"]), 2)
    new = {old: stream.choice([old + "x", old.upper()]), other: other}
    if stream.random() < 0.5:
        new = {old: other, other: old}
    body["tensors"] = {new.get(name, name): tensor for name, tensor in body["tensors"].items()}


EDITS = (_edit_a_number, _move_a_fragment, _rename_a_tensor)
SPELLINGS: tuple[Callable[[Body], bytes], ...] = (
    lambda body: json.dumps(body).encode() + b"\n",
    lambda body: json.dumps(body, indent=1).encode() + b"\n",
    lambda body: canonical(body)[:-1],
    lambda body: canonical(body) + b"\n",
    lambda body: b" " + canonical(body),
    lambda body: b"\xef\xbb\xbf" + canonical(body),
    lambda body: canonical(dict(reversed(body.items()))),
    lambda body: canonical(body).replace(b'"step"', b'"\\u0073tep"', 1),
    lambda body: canonical(body).replace(b'{"format"', b'{"step":1,"format"', 1),
)
OUTSIDE = (
    *("../x", "..", "/etc/passwd", "hugging_face/../../x", "./x", "a//b", "-rf", ".x", "", "x\0", "x\ny", "x" * 300),
    *("..%2fx", "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/x", "r\N{CYRILLIC SMALL LETTER A}nk", "C:\\x", "~/x"),
)


def edit_the_manifest(stream: Random, victim: Victim) -> set[str]:
    """Edit the manifest as by hand, or by a program that does not know of the checksum."""
    body = json.loads(victim.read(MANIFEST))
    stream.choice(EDITS)(stream, body)
    victim.put(MANIFEST, canonical(body))
    return {MANIFEST}


def respell_the_manifest(stream: Random, victim: Victim) -> set[str]:
    """Write the manifest's content in other bytes."""
    victim.put(MANIFEST, stream.choice(SPELLINGS)(json.loads(victim.read(MANIFEST))))
    return {MANIFEST}


def forge_the_manifest(stream: Random, victim: Victim) -> set[str]:
    """Write a manifest with a right checksum but wrong files or steps."""
    body = json.loads(victim.read(MANIFEST))
    file = stream.choice(body["files"])
    part, named = stream.randrange(6), {file[0]}
    if part == 0:
        file[1] += stream.choice([-1, 1])
    elif part == 1:
        file[2] = hashlib.sha256(file[2].encode()).hexdigest()
    elif part == 2:
        body["step"], named = body["step"] + stream.choice([-EVERY, 1, EVERY]), {THE_STEP}
    elif part == 3:
        file[0], named = stream.choice(OUTSIDE), {MANIFEST}
    elif part == 4:
        body["files"].append(["rank-00077.safetensors", *file[1:]])
        named = {"rank-00077.safetensors"}
    else:
        fragment = stream.choice(stream.choice(list(body["tensors"].values()))[2])
        fragment[stream.choice([0, 4])], named = stream.choice([-1, 10_000]), {MANIFEST}
    victim.put(MANIFEST, sealed(body))
    return named


DAMAGES: dict[str, Damage] = {
    "bit flipped": lambda stream, victim: victim.change(stream, flipped),
    "block zeroed": lambda stream, victim: victim.change(stream, zeroed),
    "truncated": lambda stream, victim: victim.change(stream, truncated),
    "bytes appended": lambda stream, victim: victim.change(stream, lengthened),
    "two files swapped": swap_two_files,
    "file missing": lose_a_file,
    "file too many": add_a_file,
    "file of an older step": put_in(lambda victim: victim.older),
    "file of another run": put_in(lambda victim: victim.foreign),
    "content of another step": become_another_step,
    "manifest edited": edit_the_manifest,
    "manifest spelt otherwise": respell_the_manifest,
    "manifest forged": forge_the_manifest,
    "manifest empty": lose_the_manifest_s_content,
    "link for a file": become_a_link,
    "pipe for a file": become_a_pipe,
    "folder for a file": become_a_folder,
}


def do_damage(kind: str, stream: Random, victim: Victim, original: Path) -> set[str]:
    """Damage the victim, a copy of `original`, until something has changed, and return names of
    which the reason must give one."""
    before = _picture(original)
    while True:
        names = DAMAGES[kind](stream, victim)
        if _picture(victim.path) != before:
            return names


def _picture(folder: Path) -> dict[str, bytes | str]:
    """Return all that is in a folder: the content of files, the kind of everything else."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: _content(path) for name, path in paths.items()}


def _content(path: Path) -> bytes | str:
    mode = path.lstat().st_mode
    return path.read_bytes() if stat.S_ISREG(mode) else f"{stat.S_IFMT(mode):o}"


# ---------------------------------------------------------------------------------------- the judge


class Hung(Exception):
    """The error that there was no answer. It is not an OSError, which the judged code may take for
    a file's."""


@dataclass(frozen=True)
class Verdict:
    """The result of a case. `said`: what went wrong, "" if nothing did."""

    detected: bool
    silent: bool
    fell_back: bool
    said: str = ""

    @property
    def passed(self) -> bool:
        return self.detected and self.fell_back


def judge(victim: Victim, names: set[str]) -> Verdict:
    """Judge what `newest_whole` does with a folder of the damaged checkpoint and an older one."""
    try:
        with at_most(LIMIT_S):
            found, _ = newest_whole(CheckpointFolder(victim.path.parent), Messages.alone())
    except (Exception, Hung) as error:  # any of these would have stopped a run
        return Verdict(detected=False, silent=False, fell_back=False, said=f"{type(error).__name__}: {error}"[:300])
    fell_back = found is not None and found.path.name == victim.older.name
    silent = found is not None and found.path == victim.path
    reason = reason_of(victim.path)
    detected = not silent and names_one_of(reason, victim.path, names)
    said = "" if detected and fell_back else f"went on from {found and found.path.name}; {sorted(names)} not in {reason!r}"
    return Verdict(detected, silent, fell_back, said)


def names_one_of(reason: str, checkpoint: Path, names: set[str]) -> bool:
    return any(reason.startswith(f"{checkpoint / name}: ") for name in names)


def reason_of(checkpoint: Path) -> str:
    """Return why a checkpoint was set aside, "" if it was not."""
    path = checkpoint.with_name(f"{checkpoint.name}.damaged") / REASON
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Hung inside the context after so many seconds."""

    def ring(number: int, frame: object) -> None:
        raise Hung(f"no answer after {seconds} s")

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest has one for the test
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@dataclass(frozen=True)
class Originals:
    """The checkpoints from which cases are made."""

    newest: Path
    older: Path
    later: Path
    foreign: Path

    @classmethod
    def of_runs(cls, run: Path, other: Path) -> Originals:
        older, newest, later = (run / "checkpoints" / f"step-{step:08d}" for step in range(EVERY, STEPS + 1, EVERY))
        return cls(newest, older, later, other / "checkpoints" / newest.name)

    def copied(self, checkpoints: Path) -> Victim:
        """Make a folder of checkpoints with the older and the newest one."""
        checkpoints.mkdir(parents=True, exist_ok=True)
        for original in (self.older, self.newest):
            _link_tree(original, checkpoints / original.name)
        return Victim(checkpoints / self.newest.name, self.older, self.later, self.foreign)


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def stream_of(seed: int, case: int) -> Random:
    return Random(f"{seed} {case}")


def kind_of(case: int) -> str:
    return list(DAMAGES)[case % len(DAMAGES)]


def judge_case(seed: int, case: int, originals: Originals, folder: Path) -> Verdict:
    """Make a case in a new folder, judge it, and remove it."""
    victim = originals.copied(folder / "checkpoints")
    try:
        return judge(victim, do_damage(kind_of(case), stream_of(seed, case), victim, originals.newest))
    finally:
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------- real runs


def make_run(recipe: Path, run: Path, way: Way, *keys: str) -> Path:
    # Imported here, because it sets up a fork server, and tests have another.
    from tools.campaign.ranks import run_ranks, train

    ended = run_ranks(train, arguments(recipe, run, way, *keys), world_size=way.processes, log=run.parent / "log")
    if any(ended.codes):
        raise RuntimeError(f"{way.name}: {ended.codes}: {ended.said[-500:]}")
    return run


def write_small_recipe(folder: Path) -> Path:
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    model = {"family": "gpt2", "config": {**config, **dropout}}
    return write_recipe(folder, steps=STEPS, every=EVERY, keep=STEPS, model=model)


def go_on(seed: int, case: int, originals: Originals, recipe: Path, way: Way, whole: Path) -> str:
    """Continue a run that was ended before its last checkpoint, and whose newest one is damaged.

    Returns why it did not go on as it should; "" if it did, to the bit.
    """
    run = whole.with_name(f"case-{case}")
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints", "export", "summary.json"))
    victim = originals.copied(run / "checkpoints")
    names = do_damage(kind_of(case), stream_of(seed, case), victim, originals.newest)
    try:
        make_run(recipe, run, way)
        reason, last = reason_of(victim.path), run / "checkpoints" / originals.later.name
        if not names_one_of(reason, victim.path, names):
            return f"{sorted(names)} not in {reason!r}"
        return _difference(run, last, whole, originals.later)
    except RuntimeError as error:
        return str(error)
    finally:
        shutil.rmtree(run)


def _difference(run: Path, last: Path, whole: Path, whole_last: Path) -> str:
    difference = (
        first_difference(numbers(run), numbers(whole))
        or first_difference(sorted(digests(last).items()), sorted(digests(whole_last).items()))
        or first_difference(sorted(remembered(last).items(), key=str), sorted(remembered(whole_last).items(), key=str))
    )
    return "" if difference is None else f"not as undisturbed: {difference}"


# ------------------------------------------------------------------------------------- the campaign


def campaign(cases: int, runs: int, seed: int, way: Way, folder: Path) -> int:
    """Return how many cases did not pass."""
    recipe = write_small_recipe(folder)
    whole = make_run(recipe, folder / "whole", way)
    other = make_run(recipe, folder / "other", way, "run.seed=1")
    originals = Originals.of_runs(whole, other)
    counts = {kind: Counter[str]() for kind in DAMAGES}
    started = time.monotonic()
    for case in range(cases):
        verdict = judge_case(seed, case, originals, folder / "case")
        count = counts[kind_of(case)]
        count.update({"n": 1, "passed": verdict.passed, "detected": verdict.detected})
        count.update({"silent": verdict.silent, "fell_back": verdict.fell_back})
        if not verdict.passed:
            report(campaign="damage", seed=seed, case=case, kind=kind_of(case), passed=False, said=verdict.said)
    wall_s = round(time.monotonic() - started, 1)
    for kind, count in counts.items():
        report(campaign="damage", seed=seed, kind=kind, **count)
    total = sum(counts.values(), Counter[str]())
    report(campaign="damage", seed=seed, layout=way.name, **{key: total[key] for key in counts["bit flipped"]}, wall_s=wall_s)
    for original in (originals.newest, originals.older):  # no case must have written through a link
        check_files(original, read_sound(original).files)
    return total["n"] - total["passed"] + _runs(runs, seed, originals, recipe, way, whole)


def _runs(runs: int, seed: int, originals: Originals, recipe: Path, way: Way, whole: Path) -> int:
    failed = 0
    for case in range(runs):
        if said := go_on(seed, case, originals, recipe, way, whole):
            failed += 1
            report(campaign="damage", seed=seed, run=case, kind=kind_of(case), passed=False, said=said)
    report(campaign="damage", seed=seed, layout=way.name, runs=runs, gone_on_to_the_bit=runs - failed)
    return failed


CONTROL = {"bit flipped": flipped, "block zeroed": zeroed, "truncated": truncated}


def control(cases: int, seed: int, folder: Path) -> None:
    """Report what safetensors does with such files: `silent` ones load, `wrong` ones with other
    values or names."""
    run = make_run(write_small_recipe(folder), folder / "whole", WAYS[0])
    whole, path = (run / "export" / "model.safetensors").read_bytes(), folder / "damaged.safetensors"
    expected = load_file(run / "export" / "model.safetensors")
    counts = {kind: Counter[str]() for kind in CONTROL}
    for case in range(cases):
        kind = list(CONTROL)[case % len(CONTROL)]
        path.write_bytes(_changed(stream_of(seed, case), whole, CONTROL[kind]))
        counts[kind].update({"n": 1, **_taken_by_safetensors(path, expected)})
    for kind, count in counts.items():
        report(campaign="damage, plain safetensors", seed=seed, kind=kind, num_bytes=len(whole), **count)


def _changed(stream: Random, data: bytes, change: Callable[[Random, bytes], bytes]) -> bytes:
    return next(changed for changed in iter(lambda: change(stream, data), None) if changed != data)


def _taken_by_safetensors(path: Path, expected: dict[str, torch.Tensor]) -> dict[str, int]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError):
        return {"detected": 1}
    same = tensors.keys() == expected.keys() and all(_same_bits(tensors[name], expected[name]) for name in expected)
    return {"silent": 1, "wrong": int(not same)}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=20, help="so many of the cases are also gone on with by real runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", default="tp2xpp2", choices=[way.name for way in WAYS if way.processes > 1])
    parser.add_argument("--control", action="store_true", help="damage a plain safetensors file instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="triaxis-damage-") as folder:
        if options.control:
            control(options.cases, options.seed, Path(folder))
            return 0
        way = next(way for way in WAYS if way.name == options.layout)
        return int(campaign(options.cases, options.runs, options.seed, way, Path(folder)) > 0)


if __name__ == "__main__":
    raise SystemExit(main())
