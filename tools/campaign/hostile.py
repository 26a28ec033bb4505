"""Thousands of recipes, files, folders, environments, limits and signals that are wrong: each ends
in one clear line.

    python -m tools.campaign.hostile --cases 5000
    python -m tools.campaign.hostile --only "run folder" --cases 200 --seed 3
    python -m tools.campaign.hostile --number 1234             (one case again, with all its output)

A case passes if its ranks end by themselves within a minute, without a Python traceback, with an
exit code of the README's table other than 70, a line that says what is wrong if it is not 0, and at
most 4 GB of memory. What is drawn depends only on the seed and the number of the case. The table at
the end counts cases, real starts and exit codes by kind.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.campaign import hostile_files, hostile_recipes, hostile_surroundings
from tools.campaign.cases import report
from tools.campaign.disk_full import can_mount
from tools.campaign.hostile_cases import Case, Draw, Originals
from tools.campaign.ranks import Ended, run_ranks, train

LIMIT_S = 60.0
MOST_KIB = 4 << 20  # memory of a rank and what it started
CODES = (0, 1, 65, 75, 78, 93, 124, 130)
TRACEBACKS = (
    "Traceback (most recent call last)",
    "--- Logging error",
    "Exception ignored in",
    "please report it",
    "panicked at",
)
MEMORY = "memory.txt"
ROOT = Path(__file__).parents[2]
# Kind → the function that draws it, and its share of the cases.
KINDS: dict[str, tuple[Draw, int]] = {
    "recipe": (hostile_recipes.recipe, 30),
    "chain": (hostile_recipes.chain, 2),
    "set": (hostile_recipes.setting, 20),
    "number": (hostile_recipes.number, 6),
    "path": (hostile_recipes.path, 10),
    "data": (hostile_files.data, 8),
    "tokenizer": (hostile_files.tokenizer, 3),
    "run folder": (hostile_files.run_folder, 14),
    "environment": (hostile_surroundings.environment, 4),
    "limits": (hostile_surroundings.limits, 4),
    "disk": (hostile_surroundings.disk, 1),
    "signals": (hostile_surroundings.signals, 2),
}


@dataclass(frozen=True)
class Verdict:
    """The end of a case. `fault`: "" if it passed."""

    number: int
    kind: str
    case: Case
    ended: Ended
    fault: str


def judged(number: int, seed: int, kinds: Sequence[str], originals: Originals) -> Verdict:
    """Draw one case and run it."""
    stream = random.Random(f"hostile {seed} {number}")
    kind = stream.choices(kinds, [KINDS[kind][1] for kind in kinds])[0]
    with tempfile.TemporaryDirectory(prefix="hostile-", ignore_cleanup_errors=True) as name:
        folder = Path(name, "case")
        folder.mkdir()
        case = KINDS[kind][0](stream, originals, folder)
        case.environment.setdefault("HOME", str(folder))  # a case only reaches its own files
        log = Path(name, "log")
        ended = _in_a_process_of_its_own(case) if case.is_alone else _forked(case, log)
        fault = _fault(case, ended, log / MEMORY)
    return Verdict(number, kind, case, ended, fault)


def _forked(case: Case, log: Path) -> Ended:
    return run_ranks(_triaxis, case, str(log), world_size=case.ranks, log=log, timeout_s=LIMIT_S, around=_sending(case))


def _triaxis(case: Case, log: str) -> int:
    """Run the command on this rank."""
    for name, value in case.environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.chdir(case.folder)
    code = train(case.command[1:]) if case.command[0] == "train" else _command(case.command)
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    Path(log, MEMORY).write_text(str(kib))
    return code


def _command(words: Sequence[str]) -> int:
    from trainer.cli import main

    return main(words)


def _sending(case: Case) -> Callable[[list[int]], None]:
    def send(pids: list[int]) -> None:
        for after_s, number in case.signals:
            time.sleep(after_s)
            try:
                os.kill(pids[0], number)
            except ProcessLookupError:
                return

    return send


def _in_a_process_of_its_own(case: Case) -> Ended:
    """Run `python -m trainer` with limits, outputs and surroundings that a fork would share with
    us."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **case.environment}
    started = time.monotonic()
    process = subprocess.Popen(
        [*_on_a_small_disk(case), sys.executable, "-m", "trainer", *case.command],
        cwd=case.folder,
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: _surround(case),
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    return Ended((process.returncode,), said.decode(errors="replace"), time.monotonic() - started)


def _on_a_small_disk(case: Case) -> list[str]:
    """Return the words before a command that has a folder on a disk of its own, in a private mount
    namespace."""
    if case.disk is None:
        return []
    mount = 'mount -t tmpfs -o size="$0"k,nr_inodes=200 campaign "$1" && shift && exec "$@"'
    return ["unshare", "-Urm", "sh", "-c", mount, str(case.disk[1]), str(case.disk[0])]


def _surround(case: Case) -> None:
    """Set the surroundings between fork and exec."""
    if case.in_a_folder_that_is_gone:
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir(os.getcwd())
    for descriptor, target in case.outputs.items():
        if target:
            os.dup2(os.open(target, os.O_WRONLY), descriptor)
        else:
            os.close(descriptor)
    for name, limit in case.limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _fault(case: Case, ended: Ended, memory: Path) -> str:
    """Return why the case does not pass."""
    codes = set(ended.codes)
    if -signal.SIGKILL in codes and ended.wall_s >= LIMIT_S:
        return "hang"
    if bad := sorted(codes - set(CODES) - ({-number for _, number in case.signals} if _before_python_listens(case) else set())):
        return f"exit code {bad[0]}"
    if found := next((words for words in TRACEBACKS if words in ended.said), None):
        return found
    if (
        codes != {0}
        and not any(word in ended.said for word in ("triaxis: ", "DAMAGED: "))
        and 2 not in case.outputs
        and not case.signals
    ):
        return "no line"
    if memory.exists() and (kib := int(memory.read_text())) > MOST_KIB:
        return f"{kib / 2**20:.1f} GiB of memory"
    return ""


def _before_python_listens(case: Case) -> bool:
    """Return whether the first signal may have come while the interpreter was starting and could
    not handle it."""
    return bool(case.signals) and case.signals[0][0] < 0.3


def verdicts(cases: int, seed: int, kinds: Sequence[str], *, first: int = 0) -> Iterator[Verdict]:
    """Run `cases` cases, one after another."""
    with tempfile.TemporaryDirectory(prefix="hostile-originals-") as name:
        originals = Originals.make(Path(name))
        for number in range(first, first + cases):
            yield judged(number, seed, kinds, originals)


def table(found: Sequence[Verdict]) -> str:
    """Return a table of the number of cases, real starts, and ends of each kind."""
    rows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for verdict in found:
        row = rows[verdict.kind]
        row["cases"] += 1
        row["starts"] += verdict.case.starts
        row["failed"] += bool(verdict.fault)
        row[str(max(verdict.ended.codes, key=abs))] += 1
    columns = [
        "cases",
        "starts",
        "failed",
        *sorted({key for row in rows.values() for key in row} - {"cases", "starts", "failed"}),
    ]
    rows["all"] = sum(rows.values(), Counter())
    lines = [f"{'kind':<12}" + "".join(f"{column:>8}" for column in columns)]
    lines += [f"{kind:<12}" + "".join(f"{row[column]:>8}" for column in columns) for kind, row in rows.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=90.0, help="after which no further case is begun")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", choices=sorted(KINDS), action="append", help="kinds; default: all")
    parser.add_argument("--number", type=int, help="one case, and all that it said")
    arguments = parser.parse_args()
    kinds = arguments.only or [kind for kind in KINDS if kind != "disk" or can_mount()]
    first, cases = (arguments.first, arguments.cases) if arguments.number is None else (arguments.number, 1)
    started, found = time.monotonic(), list[Verdict]()
    for verdict in verdicts(cases, arguments.seed, kinds, first=first):
        found.append(verdict)
        if verdict.fault or arguments.number is not None:
            tail = verdict.ended.said if arguments.number is not None else verdict.ended.said[-400:]
            report(number=verdict.number, kind=verdict.kind, what=verdict.case.what, fault=verdict.fault, said=tail)
        if time.monotonic() - started > 60 * arguments.minutes:
            break
    print(table(found))
    print(f"seed {arguments.seed}: {len(found)} cases in {(time.monotonic() - started) / 60:.1f} min")
    return int(any(verdict.fault for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
