"""The decision, after the ranks of a SLURM job have ended, whether the job's script queues it
again. No torch.

    python -m trainer.cluster.requeue --run-dir DIR --code CODE --since SECONDS

It ends with 75 if so, and else with the code with which the script must end.

Only a job that was interrupted goes on: its ranks ended with 75, or with 124 for a hang, or a
signal ended them. A job that SLURM itself is ending (cancelled, preempted, out of time, a lost
node) is left to SLURM, because a requeue would bring a cancelled job back. And it does not go on
for ever: three restarts in a row that left no later checkpoint end the job with 93.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.folder import CheckpointFolder
from trainer.cluster.lease import JobStart
from trainer.errors import EXIT_HANG, EXIT_INTERRUPTED, EXIT_NO_PROGRESS, EXIT_REQUEUE
from trainer.files.durable import write_json
from trainer.files.reading import read_json
from trainer.launch.environment import job_name
from trainer.run_folder import RunFolder

IDLE_RESTARTS = 3
RECORD = "requeue.json"
TORCHRUN_FAILED = 1  # whatever its ranks ended with
LEFT_TO_SLURM = 128 + 15  # the code of a shell that SIGTERM ended
SLURM_ANSWERS_S = 30
ASK_SLURM = 5  # times, and seconds between them: a controller may be restarting


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.cluster.requeue", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--code", type=int, required=True, help="what srun ended with")
    parser.add_argument("--since", type=int, required=True, help="when srun was started, in seconds since 1970")
    arguments = parser.parse_args(argv)
    code, why = verdict(RunFolder(arguments.run_dir), arguments.code, arguments.since, os.environ)
    sys.stderr.write(f"triaxis: {why}\n")
    return code


def verdict(folder: RunFolder, code: int, since: int, environment: Mapping[str, str]) -> tuple[int, str]:
    """Return the script's exit code, 75 for a requeue, and the line that says why."""
    if not was_interrupted(folder, code, since):
        return code, f"the ranks ended with {code}: not queued again"
    state, restarts = job_state(environment)
    if state != "RUNNING":
        return LEFT_TO_SLURM, f"the ranks ended with {code}, the job is {state}: left to SLURM"
    if restarts > JobStart.from_environment(environment).restarts:
        return LEFT_TO_SLURM, f"the ranks ended with {code}, SLURM has started the job again meanwhile: left to that start"
    idle, step = count_restart(folder, environment.get("SLURM_JOB_ID", ""))
    if idle >= IDLE_RESTARTS:
        return EXIT_NO_PROGRESS, (
            f"{idle} restarts in a row left no checkpoint after step {step}: not queued again; see the ranks' logs, then "
            "submit anew"
        )
    return EXIT_REQUEUE, f"the ranks ended with {code}: queued again, to go on after step {step}"


def was_interrupted(folder: RunFolder, code: int, since: int) -> bool:
    """Return whether the job was interrupted, by the code of srun: the largest of the ranks' codes,
    128 + n where signal n ended one.

    torchrun ends with 1 instead, so then the run folder tells: a rank that saved and ended for a
    signal records it there, and one that missed another rank left an autopsy.
    """
    if code == TORCHRUN_FAILED:
        return ended_by_signal(folder, since) or ended_for_another_rank(folder, since)
    return code in (EXIT_REQUEUE, EXIT_HANG) or (128 < code <= 128 + 64 and code != EXIT_INTERRUPTED)


def ended_by_signal(folder: RunFolder, since: int) -> bool:
    """Return whether the run's summary, written since then, says that a signal ended it and that it
    is saved."""
    path = folder.path / "summary.json"
    try:
        summary, written = read_json(path), path.stat().st_mtime
    except (OSError, ValueError):
        return False
    if "ended_by" not in summary or written < since:
        return False
    return summary.get("steps") in (0, newest_step(folder))


def ended_for_another_rank(folder: RunFolder, since: int) -> bool:
    """Return whether an autopsy was written since then: a rank was gone, or made no progress."""
    try:
        return any(page.stat().st_mtime >= since for page in (folder.path / "logs").glob("autopsy-*.txt"))
    except OSError:
        return False


def newest_step(folder: RunFolder) -> int:
    steps = CheckpointFolder(folder.checkpoints).steps()
    return steps[0][0] if steps else 0


def count_restart(folder: RunFolder, job: str) -> tuple[int, int]:
    """Return how many restarts of this job in a row have left no later checkpoint, and the newest
    checkpoint's step."""
    step, last = newest_step(folder), _record(folder)
    idle = last["idle"] + 1 if last["job"] == job and step <= last["step"] else 0
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.path / RECORD, {"job": job, "step": step, "idle": idle})
    return idle, step


def _record(folder: RunFolder) -> dict[str, Any]:
    """Return what the last end of a job recorded, or an empty record."""
    try:
        record = read_json(folder.path / RECORD)
        return {"job": record["job"], "step": int(record["step"]), "idle": int(record["idle"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"job": None, "step": 0, "idle": 0}


def job_state(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the job's state from `squeue`, RUNNING while only the ranks have ended, and how often
    it has been queued again."""
    command = ["squeue", "--noheader", "--Format=State:|,RestartCnt:|", f"--jobs={job_name(environment)}"]
    for _ in range(ASK_SLURM):
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_ANSWERS_S, check=True).stdout
            state, restarts, *_ = said.strip().split("|")
            return state.strip(), int(restarts)
        except (OSError, subprocess.SubprocessError, ValueError):
            time.sleep(ASK_SLURM)
    return "UNKNOWN", 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
