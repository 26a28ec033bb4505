"""The SLURM lab (`tools/slurm_lab.sh`) from Python: jobs by `triaxis submit`, their states, and
disturbances."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.cluster.submit import seconds

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "slurm_lab.sh"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


class LabError(Exception):
    """The error that the lab does not do what was asked."""


@dataclass(frozen=True)
class Job:
    """A job as `scontrol show job` reports it."""

    state: str
    exit_code: int
    restarts: int


class Lab:
    """A real SLURM in a folder: `start` it, and `stop` it whatever happens."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, nodes
        search = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))},
            "PATH": search,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def missing(self) -> list[str]:
        """Return what has to be installed first."""
        return [name for name in NEEDED if not shutil.which(name, path=self.environment["PATH"])]

    def start(self) -> None:
        self._lab("start", str(self.nodes))

    def stop(self) -> None:
        self._lab("stop")

    def lose(self, node: str) -> None:
        """Cut the power of one node."""
        self._lab("lose", node)

    def silence(self, node: str) -> None:
        """End a node's daemon, but not the processes of its jobs."""
        self._lab("silence", node)

    def bring_back(self, node: str) -> None:
        self._lab("return", node)

    def _lab(self, action: str, *words: str) -> None:
        command = ["bash", str(SCRIPT), action, str(self.folder), *words]
        # The daemons keep the files they inherit, so a pipe would never end.
        said = self.folder.with_name(f"{self.folder.name}.txt")
        with said.open("w") as file:
            done = subprocess.run(command, env=self.environment, stdout=file, stderr=file, check=False, timeout=120)
        if done.returncode != 0:
            raise LabError(said.read_text().strip())

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands, and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
        if done.returncode != 0:
            raise LabError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, recipe: Path, run_dir: Path, *words: str, nodes: int = 2, ranks: int = 2, **site: object) -> str:
        """Submit a job by `triaxis submit`, and return its id."""
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        file = run_dir.with_name(f"{run_dir.name}-site.json")
        file.write_text(json.dumps({"partition": "main", **site}))
        said = self.run(
            *(sys.executable, "-m", "trainer", "submit", str(recipe), "--run-dir", str(run_dir), "--site", str(file)),
            *("--nodes", str(nodes), "--ranks-per-node", str(ranks), *words),
        )
        return said.removeprefix("job ").partition(":")[0]

    def give_grace(self, partition: str, seconds: int) -> None:
        """Set how long the partition's jobs live on after the notice that they are preempted."""
        self.run("scontrol", "update", f"PartitionName={partition}", f"GraceTime={seconds}")

    def preempt(self) -> None:
        """Submit a job of higher priority that takes all nodes for a second."""
        self.run("sbatch", "--partition=high", f"--nodes={self.nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")

    def limit(self, job: str, *, minutes: int) -> None:
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def seconds_run(self, job: str) -> int:
        """Return the seconds since the job's latest start."""
        return seconds(re.findall(r"RunTime=(\S+)", self.run("scontrol", "--oneliner", "show", "job", job))[0])

    def bring_the_end_near(self, job: str, grace_s: int) -> None:
        """Set a limit of which SLURM will warn within a minute and a half: it does so grace_s
        before, or half a minute earlier."""
        self.limit(job, minutes=1 + (self.seconds_run(job) + grace_s + 15) // 60)

    def clear(self) -> None:
        """Remove all jobs, and bring all nodes back."""
        for job in self.run("squeue", "--noheader", "--format=%A").split():
            self.run("scancel", job)
        for node in range(1, self.nodes + 1):
            self.bring_back(f"lab{node}")
        self.until(lambda: not self.run("squeue", "--noheader"), 120, "all jobs leave")

    def nodes_of(self, job: str) -> list[str]:
        """Return the nodes of a job; the first one runs its script."""
        return self.run("scontrol", "show", "hostnames", self.run("squeue", "-h", "-j", job, "-o", "%N")).split()

    def job(self, job: str) -> Job:
        told = dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "--oneliner", "show", "job", job)))
        return Job(told["JobState"], int(told["ExitCode"].partition(":")[0]), int(told["Restarts"]))

    def until_ended(self, job: str, timeout_s: float = 280.0) -> Job:
        self.until(lambda: self.job(job).state in ENDED, timeout_s, f"job {job} ends")
        return self.job(job)

    def until(self, happens: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not happens():
            if time.monotonic() > deadline:
                raise LabError(f"not within {timeout_s:.0f} s: {what}")
            time.sleep(0.1)


def steps_logged(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def said(run_dir: Path) -> str:
    """Return the output of the job's script and of its ranks."""
    paths = [*sorted(run_dir.glob("slurm-*.out")), *sorted(run_dir.glob("logs/slurm-*.log"))]
    return "".join(path.read_text(errors="replace") for path in paths)
