"""The process that imports torch and DeepSpeed for the doctor, and tells it what it saw.

A broken installation may end the process, hang it, or print whatever it likes; all of that is a
finding. So each part of what is seen is a line of JSON on the standard output, written as soon as
it is known, and what libraries print goes to the standard error.

    python -m trainer.doctor.probe look
    python -m trainer.doctor.probe build cpu_lion
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

Facts = dict[str, Any]


def main(words: Sequence[str]) -> int:
    """Run one task, and return the exit code."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        if words[0] == "build":
            from trainer.doctor.deepspeed_ops import build

            build(words[1])
            return 0
        for name, part in PARTS:
            _tell(answers, name, part)
    return 0


def _tell(answers: IO[str], name: str, part: Callable[[], Facts]) -> None:
    _write(answers, {"part": name, "begun": True})
    start = time.perf_counter()
    try:
        facts = part()
    except Exception as error:  # whatever is broken
        facts = {"error": f"{type(error).__name__}: {error}"}
    _write(answers, {"part": name, "seconds": time.perf_counter() - start, **facts})


def _write(answers: IO[str], facts: Facts) -> None:
    answers.write(json.dumps(facts) + "\n")
    answers.flush()


def _torch() -> Facts:
    import torch
    import torch.distributed as dist

    return {
        "version": str(torch.__version__),
        "folder": str(os.path.dirname(str(torch.__file__))),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "backends": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()},
    }


def _devices() -> Facts:
    """Return the accelerators that torch sees, each with what is free of its memory [bytes]."""
    import torch

    if not torch.cuda.is_available():
        return {"devices": []}
    return {
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "built_for": torch.cuda.get_arch_list(),
    }


def _device(number: int) -> Facts:
    import torch

    card = torch.cuda.get_device_properties(number)
    facts: Facts = {"name": card.name, "capability": f"{card.major}.{card.minor}", "memory": card.total_memory}
    try:
        facts["free"], _ = torch.cuda.mem_get_info(number)
        torch.zeros(1, device=f"cuda:{number}").add_(1).item()  # a kernel runs
    except RuntimeError as error:
        facts["error"] = str(error).splitlines()[0]
    return facts


def _gloo() -> Facts:
    """Join a group of one process, which binds the network interface that gloo would choose."""
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
    return {}


def _place() -> Facts:
    """Return what the launcher's variables say. An error is a line for the user, as of
    `train`."""
    from trainer.errors import RecipeError
    from trainer.launch.ranks import Place, check_host

    try:
        place = Place.from_environment(_of_a_run(os.environ))
        check_host(place)
    except RecipeError as error:
        return {"wrong": str(error)}
    return {"how": place.how, "rank": place.rank, "world_size": place.world_size, "port": place.master_port}


def _of_a_run(environment: os._Environ[str]) -> dict[str, str]:
    """Return the variables as srun would change them: the shell of a job is no rank, and the doctor
    is started there."""
    from trainer.launch.environment import in_a_step

    if environment.get("SLURM_JOB_ID") and not in_a_step(environment):
        return {name: value for name, value in environment.items() if name not in ("SLURM_NTASKS", "SLURM_NPROCS")}
    return dict(environment)


def _deepspeed() -> Facts:
    from trainer.doctor.deepspeed_ops import look

    return look()


PARTS: tuple[tuple[str, Callable[[], Facts]], ...] = (
    ("torch", _torch),
    ("devices", _devices),
    ("gloo", _gloo),
    ("place", _place),
    ("deepspeed", _deepspeed),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
