"""The worst case of a run, tried before its first step, so that memory which would be exhausted
after hours is exhausted at once.

* A forward and backward of the fullest micro-batches. A row is always full, so steps differ only
  in its documents; as the plan has it, the worst is one that fills nearly all of a row, and
  another. Two micro-batches show the sum of gradients beside the activations of the next; a
  pipeline runs all of a step, because its schedule is fixed.
* The moments, which at ZeRO-0 are allocated by the first update: as much memory is held meanwhile.
* One micro-batch of an evaluation.
* The copy that a save makes in host memory: Linux would promise it, and kill the process when it is
  filled, so what is available is asked instead.

Nothing of it stays. The loss is multiplied with NaN, and a step whose gradient is not finite is
skipped at every ZeRO stage; dropout is drawn by the number of the step, and the data of a step are
a function of its number. So the steps that follow are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from parallel.documents import Documents
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.errors import RecipeError
from trainer.exhausted import exhausted
from trainer.model.config import TransformerConfig
from trainer.planner.items import Place, total
from trainer.planner.memory import rows_of
from trainer.planner.states import STATES
from trainer.run.memory_check import available_bytes
from trainer.run.run_plan import RunPlan, gib
from trainer.schema import Recipe
from trainer.tasks import TASKS

ACCUMULATED = 2  # micro-batches that show the sum of gradients beside the activations of the next


def tries(recipe: Recipe, device: torch.device) -> bool:
    """Return whether the worst case is tried. On a CPU it would say little: what does not fit is
    seen when the process is killed."""
    asked = recipe.train.worst_case_first
    return device.type == "cuda" if asked is None else asked


def try_worst_case(engine: Engine, batches: Sequence[MicroBatch], plan: RunPlan | None, *, evaluates: bool) -> None:
    """Take the memory of the worst step, and give it back. `batches`: those of the first step. All
    ranks must call it together. OutOfMemory where there is too little."""
    with _named(engine):
        worst = worst_of(engine, batches)
        held = _moments(engine, plan)
        engine.rehearse(worst)
        del held
        if evaluates:
            engine.evaluator.evaluate(iter(worst[:1]))


def worst_of(engine: Engine, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return as many micro-batches as show the most memory. Where a task's labels depend on the
    documents of a row, these stay as they are."""
    recipe, task = engine.recipe, TASKS[engine.recipe.data.task]
    chosen = batches if recipe.parallel.pipeline > 1 else batches[:ACCUMULATED]
    if task.compares or task.translates or task.target == "label" or not isinstance(engine.network, TransformerConfig):
        return list(chosen)
    lengths = rows_of(recipe).lengths
    return [
        replace(batch, documents=Documents((lengths,) * len(batch.documents.lengths)), labels_BS=batch.tokens_BS)
        for batch in chosen
    ]


def require_staging(engine: Engine, local_ranks: int) -> None:
    """Raise RecipeError where the ranks of this machine cannot copy what they save."""
    keys = engine.recipe.checkpoint
    if not (keys.every and keys.asynchronous):
        return
    copy = sum(saved.fragment.count * saved.dtype.itemsize for saved in engine.state.fragments())
    there = available_bytes()
    if copy * local_ranks > there:
        raise RecipeError(
            f"a save copies {gib(copy)} of each of the {local_ranks} ranks here into host memory, and {gib(there)} of it are "
            "available: set checkpoint.async to false, which writes without a copy while training waits"
        )


def _moments(engine: Engine, plan: RunPlan | None) -> torch.Tensor | None:
    if plan is None or engine.zero_stage or engine.optimizer.state:
        return None
    num_bytes = total(plan.own.items, STATES, place=Place.DEVICE)
    return torch.empty(num_bytes, dtype=torch.uint8, device=engine.device)


@contextmanager
def _named(engine: Engine) -> Iterator[None]:
    """Say of exhausted memory that the worst case has taken it."""
    try:
        yield
    except Exception as error:
        if said := exhausted(error, f"rank {engine.mesh.rank}: {engine.watch.phase} of the worst case, before step 1"):
            raise said from error
        raise
