"""A step that is not logged reads no number from the device, but for those on which it decides."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.mesh import Mesh
from parallel.topology import Layout
from tests.parallel.training import ADAMW, Case, make_engine, micro_batches
from tests.spawn import spawn
from trainer.engine.step_result import StepResult

OURS = tuple(str(Path(__file__).parents[2] / package) for package in ("trainer", "parallel"))
# On a GPU each of them makes the host wait for all that was computed before.
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
ON_HOST = {"num_targets", "_found_places"}  # read labels that have not left the host
STEPS = 3


class Reads(TorchDispatchMode):
    """Counts the operations that read from the device, by our file that asks for one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            asking = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            if asking.filename.startswith(OURS) and asking.name not in ON_HOST:
                self.asked[f"{asking.filename}:{asking.lineno}"] += 1
        return func(*args, **(kwargs or {}))


def unlogged(mesh: Mesh, case: Case) -> tuple[Counter[str], list[int], list[int]]:
    """Take steps that nobody asks for their numbers, then ask for the last one's loss. Return the reads of our own code, and
    the sizes of the transfers of results before and after that question."""
    engine, sizes = make_engine(mesh, case), []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        if traceback.extract_stack()[-2].name == "_read":
            sizes.append(tensor.numel())
        return tolist(tensor)

    StepResult.is_read = property(lambda result: result._values is not None)  # as on a GPU
    batches = [micro_batches(mesh, engine.plan, step) for step in range(STEPS)]
    assert engine.step(batches[0], step=0, lr=1e-3).loss > 0  # torch's pipeline compares shapes in the first step
    torch.Tensor.tolist = counted
    try:
        with Reads() as reads:
            results = [engine.step(batch, step=step, lr=1e-3) for step, batch in enumerate(batches)]
        before = list(sizes)
        assert all(result.loss > 0 for result in results)
    finally:
        torch.Tensor.tolist = tolist
    engine.close()
    return reads.asked, before, sizes[len(before) :]


@pytest.mark.parametrize(("stage", "pp"), [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2)])
def test_an_unlogged_step_reads_only_what_it_decides_on(stage: int, pp: int) -> None:
    """At stage 0 the norm decides, and comes with the loss and the count in one transfer; at the others DeepSpeed decides."""
    case = Case(dp=2 // pp, pp=pp, stage=stage, steps=STEPS, optimizer=ADAMW, clip_norm=0.3, accumulation=2)
    for asked, before, after in spawn(unlogged, Layout(dp=2 // pp, pp=pp), case):
        assert not asked
        numbers = 3  # loss, targets, norm
        assert (before, after) == (([numbers] * STEPS, []) if stage == 0 else ([], [numbers * STEPS]))
