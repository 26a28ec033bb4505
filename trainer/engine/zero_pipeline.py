"""The calls that DeepSpeed's ZeRO needs while a pipeline schedule runs, for each stage of ZeRO.

A schedule runs the backward of one pipeline stage at a time, so DeepSpeed's own `backward`, which
goes from a loss to the gradients of the whole module, is never called. This file makes the calls to
the optimizer that `backward` would make.

| ZeRO | during the schedule | after it |
|---|---|---|
| 0 | gradients accumulate on the weights | one reduction |
| 1 | gradients accumulate in fp32 beside the weights (DeepSpeed's own hooks) | one reduction |
| 2 | after each backward the gradients are reduced and divided, and added to this rank's part | nothing |
| 3 | the same | nothing |

At stages 2 and 3 `micro_step_id` says whether a gradient starts a sum (0) or is added. DeepSpeed
counts its own backwards; here each half of the backward of each pipeline stage has its own count.
"Boundary" tells the optimizer that sums are complete. With offload it is set for each gradient,
which is copied to the host then; else once, because the optimizer takes all sums when it is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from parallel.pipeline import StageBackward
from parallel.ties import TiedGradients
from trainer.stopwatch import Stopwatch


class ZeroInPipeline:
    """The calls to DeepSpeed's engine for one pipelined step after another: `start`, then `around`
    each backward, then `finish`."""

    def __init__(self, module: nn.Module, watch: Stopwatch) -> None:
        self._ties = TiedGradients(module)
        self._watch = watch
        self._engine: Any = None

    def attach(self, engine: Any) -> None:
        """Take the DeepSpeed engine, which is built after this."""
        self._engine = engine
        self._zero = engine.zero_optimization_stage()
        self._offloaded = bool(engine.zero_offload_optimizer() is not None) and self._zero > 0

    def start(self) -> None:
        if self._zero == 1 and hasattr(self._engine.optimizer, "set_gradient_accumulation_boundary"):
            self._engine.optimizer.set_gradient_accumulation_boundary(False)

    @contextmanager
    def around(self, backward: StageBackward) -> Iterator[None]:
        complete = backward.last_of_half if self._offloaded else backward.last and not self._ties.weights
        with self._watch("backward"), self._accumulating(backward.number, complete):
            yield

    def finish(self, num_micro_batches: int) -> None:
        """Complete, after all backwards, the gradients that are shared with other pipeline stages,
        and reduce the others."""
        with self._watch("backward"):
            for weight, total in self._ties.totals():
                with self._whole(weight), self._accumulating(num_micro_batches, True):
                    torch.autograd.backward([weight], [total.view(weight.shape)])
            self._engine.set_gradient_accumulation_boundary(True)
            if self._zero < 2:
                self._reduce_once()

    @contextmanager
    def _accumulating(self, number: int, complete: bool) -> Iterator[None]:
        optimizer = self._engine.optimizer
        if self._zero < 2:
            yield
            if self._zero == 1:
                # Without the argument, which only the bf16 optimizer reads, the same gradients
                # would be added again next time.
                optimizer.backward_epilogue(clear_lp_grads=True)
            return
        optimizer.set_gradient_accumulation_boundary(complete)
        # Stage 2 adds 1 at the first gradient of a backward, stage 3 not.
        optimizer.micro_step_id = number - 1 if self._zero == 2 else number
        optimizer.backward_prologue()
        yield
        optimizer.overlapping_partition_gradients_reduce_epilogue()
        optimizer.backward_epilogue()
        optimizer.clear_backward_seen_flag()

    def _reduce_once(self) -> None:
        optimizer = self._engine.optimizer
        # no ZeRO, or its stage 1 in bf16, which has an optimizer of its own
        if not hasattr(optimizer, "setup_buckets"):
            self._engine.allreduce_gradients()
            return
        optimizer.set_gradient_accumulation_boundary(True)
        optimizer.setup_buckets()
        for index, group in enumerate(optimizer.bit16_groups):
            for weight in group:
                if optimizer.get_gradient_for_reduction(weight) is not None:
                    optimizer.reduce_ready_partitions_and_remove_grads(weight, index)
        optimizer.overlapping_partition_gradients_reduce_epilogue()

    def _whole(self, weight: nn.Parameter) -> Any:
        """Return a context in which the weight is whole: at stage 3 a gradient can only be
        accumulated then."""
        if self._zero != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([weight])
