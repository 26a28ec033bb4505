"""A trial of a recipe on the devices of a run: its worst case, in a process of each rank's own.

A process of its own, because nothing else gives all memory back. Where one is exhausted, DeepSpeed
is in the middle of a step; other ranks wait for it in a collective; and a host's memory ends in the
kill of the process. The processes are forked from one that has imported what they need.

| file of a rank's folder | content |
|---|---|
| `job.json` | `TrialJob` |
| `outcome.json` | `Outcome`, where the process lived to write it |
| `output.log` | the output of the process and its libraries |
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parallel.messages import Messages
from trainer.data import PreparedData, prepare
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.first_weights import first_weights
from trainer.engine.group import joined
from trainer.engine.swap_folder import private_swap_folders
from trainer.errors import UserError
from trainer.exhausted import OutOfMemory, exhausted
from trainer.files.durable import write_json
from trainer.launch.ports import held_port
from trainer.launch.ranks import Place
from trainer.recipe import ResolvedRecipe
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.run_plan import plan_of
from trainer.run.step_data import StepData, evaluation_data, training_data
from trainer.run.worst_case import try_worst_case
from trainer.schema import Recipe
from trainer.stopwatch import Stopwatch

POLL_S = 0.2
PR_SET_PDEATHSIG = 1
# DeepSpeed and torch's optimizers import the last two when they are first used, 5 s together.
PRELOADED = ["trainer.run.trial", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"]
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
# Room that a trial leaves, of what is planned: a run has more beside its steps, and its allocator
# scatters what is free.
LEFT, LEAST_LEFT = 0.05, 128 << 20
RUNNING, FITS, FULL, FAILED = "running", "fits", "full", "failed"


@dataclass(frozen=True)
class TrialJob:
    """The recipe that is tried, and the place of the process that tries it. `limits`: those of the
    rank, by the system's number, which the fork server may not have."""

    recipe: dict[str, Any]
    hf_config: dict[str, Any] | None
    place: dict[str, Any]
    limits: list[tuple[int, list[int]]]
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """The end of a trial on one rank; `said`: why it failed."""

    state: str
    said: str = ""


def try_on_all_ranks(
    resolved: ResolvedRecipe, place: Place, messages: Messages, folder: Path, watch: Stopwatch, *, timeout_s: float
) -> bool:
    """Return whether the worst case of a recipe fits all ranks. All of them must call it together.
    UserError where a trial ended for another reason than memory."""
    with held_port() as port:
        port = messages.broadcast(port if messages.is_first else None)
        at = replace(place, master_port=port, how="a trial of the run")
        recipe = resolved.recipe.model_dump(mode="json", by_alias=True)
        limits = [(number, list(resource.getrlimit(number))) for number in LIMITS]
        write_json(folder / "job.json", asdict(TrialJob(recipe, resolved.hf_config, asdict(at), limits, timeout_s)))
        (folder / "outcome.json").unlink(missing_ok=True)
        with _process(folder, on_gpu=place.device.type == "cuda") as process:
            outcomes = _watched(process, folder, messages, watch)
    if any(outcome.state == FULL for outcome in outcomes):
        return False
    failed = [f"rank {rank}: {outcome.said}" for rank, outcome in enumerate(outcomes) if outcome.state == FAILED]
    if failed:
        raise UserError(f"a trial of batch.micro_sequences = {resolved.recipe.batch.micro_sequences} failed: {failed[0]}")
    return True


def _watched(process: BaseProcess, folder: Path, messages: Messages, watch: Stopwatch) -> list[Outcome]:
    """Return the outcomes of all ranks, as soon as one has failed or all are there. Memory that was
    exhausted comes first: the other ranks only miss the one."""
    seen_failure = False
    while True:
        outcomes = [Outcome(*said) for said in messages.all(list(_outcome(process, folder)))]
        states = {outcome.state for outcome in outcomes}
        # A rank may see that another is gone before that one's end is seen here.
        if FULL in states or (FAILED in states and seen_failure) or states == {FITS}:
            return outcomes
        seen_failure = FAILED in states
        watch.tick()
        process.join(1.0 if seen_failure else POLL_S)


def _outcome(process: BaseProcess, folder: Path) -> tuple[str, str]:
    path = folder / "outcome.json"
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        return told["state"], told["said"]
    if process.exitcode is None:
        return RUNNING, ""
    if process.exitcode == -signal.SIGKILL:  # by Linux, which had promised more memory than it has
        return FULL, ""
    return FAILED, f"the process died (exit code {process.exitcode}); {folder / 'output.log'} has its last words"


@contextmanager
def _process(folder: Path, *, on_gpu: bool) -> Iterator[BaseProcess]:
    context = multiprocessing.get_context("forkserver")
    # CUDA may not be touched before a fork.
    context.set_forkserver_preload([] if on_gpu else PRELOADED)
    process = context.Process(target=_main, args=(str(folder),))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _main(folder: str) -> None:
    path = Path(folder)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(path / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # these ranks have a store of their own
    job = TrialJob(**json.loads((path / "job.json").read_text(encoding="utf-8")))
    for number, (soft, hard) in job.limits:
        resource.setrlimit(number, (soft, hard))
    try:
        _run(job, path)
        outcome = Outcome(FITS)
    except BaseException as error:
        traceback.print_exc()
        outcome = _explained(error)
    write_json(path / "outcome.json", asdict(outcome))
    if outcome.state == FAILED:
        time.sleep(2 * POLL_S)  # another rank may be the cause, and be gone because its memory was
    os._exit(0)  # an orderly end would wait for the others


def _explained(error: BaseException) -> Outcome:
    if isinstance(error, OutOfMemory) or exhausted(error, "a trial") is not None:
        return Outcome(FULL)
    lines = error.lines if isinstance(error, UserError) else str(error).splitlines()
    return Outcome(FAILED, f"{type(error).__name__}: {lines[0] if lines else ''}")


def _run(job: TrialJob, folder: Path) -> None:
    resolved = ResolvedRecipe(Recipe.model_validate(job.recipe), {}, {}, (), job.hf_config)
    recipe = resolved.recipe
    with ExitStack() as stack:
        group = stack.enter_context(joined(Place(**job.place), timedelta(seconds=job.timeout_s)))
        place = group.place
        plan = BatchPlan.from_recipe(recipe, place.world_size, place.how)
        prepared = _prepared(recipe, first=group.is_first)
        # As for a run that goes on: the values of the weights do not matter.
        network, fill = first_weights(resolved, prepared.tokenizer, prepared.classes, resumed=True)
        given = deepspeed_config(recipe, plan, largest_weight=network.largest_weight)
        private = stack.enter_context(private_swap_folders(given, folder, place.rank))
        mesh = group.mesh(recipe.parallel)
        engine = Engine(recipe, plan, network, mesh, group.device, deepspeed_config=private, fill=fill, watch=group.watch)
        data = StepData(training_data(recipe, prepared, causal=network.causal), mesh.data, plan, engine.execution.reads_tokens)
        planned = plan_of(
            network, recipe, place.world_size, place.how, on_gpu=place.device.type == "cuda", device=None, rank=place.rank
        )
        evaluates = evaluation_data(recipe, prepared, causal=network.causal) is not None
        left = max(LEAST_LEFT, int(LEFT * planned.own.num_bytes) if planned else 0)
        held = torch.ones(left, dtype=torch.uint8, device=group.device)
        try_worst_case(engine, data.micro_batches(0), planned, evaluates=evaluates)
        del held


def _prepared(recipe: Recipe, *, first: bool) -> PreparedData:
    """Return the data, which the run has made already. What the loss may compare with is 0."""
    prepared = prepare(
        recipe.data,
        seed=recipe.run.seed,
        cache_dir=Path(str(recipe.data.cache_dir)),
        build=first,
        progress=lambda done, total, what: None,
    )
    if not recipe.needs_reference:
        return prepared
    train, evaluation = (
        tuple(store.with_reference(np.zeros(store.num_documents)) for store in part)
        for part in (prepared.train, prepared.evaluation)
    )
    return replace(prepared, train=train, evaluation=evaluation)
