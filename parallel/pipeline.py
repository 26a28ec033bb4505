"""A pipeline: this rank's stages, run in the order of a schedule by torch's runtime.

The schedule is a `ScheduleTable`, so that the schedule that was drawn and simulated is the one that
runs. torch adds the messages between the ranks. Shapes are fixed when the pipeline is made, so that
ranks never negotiate them.

Shape letters: B rows of a micro-batch, S sequence, N tokens that a rank has between the layers, D
model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import PipelineStage, _RecvInfo

from parallel.deferred import WeightGradients
from parallel.mesh import Group
from parallel.schedule_table import Kind, ScheduleTable


@dataclass(frozen=True)
class StageBackward:
    """A backward of a stage, or one half of it: input gradients or weight gradients.

    `number` counts the backwards of the same stage and half from 0. `last_of_half`: no more of
    these follow. `last`: no more of any follow on this rank.
    """

    number: int
    last_of_half: bool
    last: bool


Around = Callable[[StageBackward], AbstractContextManager[None]]


class Pipeline:
    """The stages of one rank.

    `modules` are its stages by index. The first stage takes tokens [B, S], the others take hidden
    states [N, D], and all take the same keywords beside them. The last stage returns
    `num_sums` sums, of which the first is the summed loss, or logits; the others return hidden
    states. `hidden` (on the meta device) has the shape and dtype of what passes between stages.
    Every backward runs inside the context manager that `around` returns. `deferred`: the queues in
    which the stages' linear layers leave their weight gradients, if the schedule splits backwards.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        table: ScheduleTable,
        *,
        group: Group,
        device: torch.device,
        tokens: Tensor,
        hidden: Tensor,
        num_sums: int = 1,
        around: Around,
        deferred: Mapping[int, WeightGradients],
        leaves_weights: bool = True,
    ) -> None:
        """Build the stages and load the schedule into torch's runtime.

        `leaves_weights`: whether any layer trains a weight whose gradient can be deferred. In a
        frozen model the halves that compute weight gradients are empty, and `around` is not called
        for them.
        """
        self.table = table
        self.group = group
        self.device = device
        self.hidden = hidden
        self.modules = dict(sorted(modules.items()))
        self._around = around
        self._count: Counter[tuple[int, bool]] = Counter()
        self._leaves_weights = leaves_weights
        silent = {Kind.FORWARD} if leaves_weights else {Kind.FORWARD, Kind.WEIGHT_GRAD}
        self._backwards = sum(action.kind not in silent for action in table.actions(group.rank))
        self.sums = torch.zeros(num_sums, dtype=torch.float64, device=device)
        last = table.num_stages - 1
        self._stages = [
            _Stage(
                module,
                index,
                table.num_stages,
                device,
                input_args=tokens if index == 0 else hidden.requires_grad_(),
                output_args=torch.empty(num_sums, device="meta", requires_grad=True)
                if index == last
                else hidden.requires_grad_(),
                group=group.handle,
                dw_builder=deferred[index].take if index in deferred else None,
                around=self._enter,
            )
            for index, module in self.modules.items()
        ]
        self._runtime = _PipelineScheduleRuntime(self._stages, table.num_micro_batches, self._loss, scale_grads=False)
        self._runtime._prepare_schedule_with_comms(
            {rank: [_Action.from_str(str(step)) for step in steps] for rank, steps in enumerate(table.steps)}
        )

    @property
    def has_first(self) -> bool:
        return 0 in self.modules

    @property
    def has_last(self) -> bool:
        return self.table.num_stages - 1 in self.modules

    def step(self, tokens_BS: Sequence[Tensor], keywords: Sequence[dict[str, Any]], *, scale: Tensor | float) -> Tensor:
        """Run forward and backward of all micro-batches, with the loss multiplied by `scale`.

        Returns the unscaled sums over the micro-batches, float64 [num_sums], on the rank with the
        last stage; 0 on the others.
        """
        self.sums.zero_()
        self._count.clear()
        for stage in self._stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        inputs = [(tokens,) if self.has_first else () for tokens in tokens_BS]
        self._runtime._step_microbatches(inputs, list(keywords), [scale] * len(inputs), [], return_outputs=False)
        return self.sums

    def forward(self, tokens_BS: Tensor, keywords: Mapping[str, Any], hidden: Tensor | None = None) -> Tensor | None:
        """Run one micro-batch through all stages without gradients.

        Returns the last stage's output on the rank that has it, None elsewhere. `hidden` has the
        shape and dtype between the stages, if they are not those of the schedule.
        """
        hidden = self.hidden if hidden is None else hidden
        output: Tensor | None = None
        for index, module in self.modules.items():
            if index == 0:
                x = tokens_BS
            elif output is not None and index - 1 in self.modules:
                x = output
            else:
                x = torch.empty(hidden.shape, dtype=hidden.dtype, device=self.device)
                dist.recv(x, self._global_rank(index - 1), group=self.group.handle)
            output = module(x, **keywords)
            if index + 1 < self.table.num_stages and index + 1 not in self.modules:
                dist.send(output, self._global_rank(index + 1), group=self.group.handle)
        return output if self.has_last else None

    def broadcast_from_last(self, tensor: Tensor) -> Tensor:
        """Return the last stage's tensor on all ranks of the pipeline. Elsewhere `tensor` only
        gives its shape and dtype."""
        result = tensor.clone()
        dist.broadcast(result, self._global_rank(self.table.num_stages - 1), group=self.group.handle)
        return result

    def _global_rank(self, stage: int) -> int:
        return self.group.ranks[self.table.rank_of_stage[stage]]

    def _loss(self, output: Tensor, scale: Tensor | float) -> Tensor:
        sums = output.reshape(-1)
        self.sums += sums.detach().double()
        return sums[0] * scale

    def _enter(self, stage: int, weights_only: bool) -> AbstractContextManager[None]:
        if weights_only and not self._leaves_weights:
            return nullcontext()
        number = self._count[stage, weights_only]
        self._count[stage, weights_only] += 1
        last_of_half = number == self.table.num_micro_batches - 1
        return self._around(StageBackward(number, last_of_half, sum(self._count.values()) == self._backwards))


class _Stage(PipelineStage):
    """torch's stage, with a context around each of its backwards, and with buffers only for
    messages under way.

    torch makes a buffer for the activation and one for the gradient of every micro-batch of the
    step, and keeps them. With 256 micro-batches of 4096 × 8192 in bf16 that is 34 GB for a stage,
    while 1F1B has only as many in flight as there are ranks.
    """

    def __init__(self, *args: Any, around: Callable[[int, bool], AbstractContextManager[None]], **more: Any) -> None:
        super().__init__(*args, **more)
        self._around = around

    def _setup_forward_recv_info(self, *args: Any, **more: Any) -> None:
        with self._without_storage():
            super()._setup_forward_recv_info(*args, **more)

    def _setup_backward_recv_info(self, *args: Any, **more: Any) -> None:
        with self._without_storage():
            super()._setup_backward_recv_info(*args, **more)

    @contextmanager
    def _without_storage(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        yield
        self.device = device

    def _get_recv_ops(self, recv_infos: tuple[_RecvInfo, ...]) -> list[dist.P2POp]:
        for info in recv_infos:
            if info.tensor_meta is not None and not info.is_root_arg:
                info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, micro_batch: int) -> tuple[Tensor, ...]:
        activations: tuple[Tensor, ...] = super()._retrieve_recv_activations(micro_batch)
        _forget(self.args_recv_info[micro_batch])
        return activations

    def _retrieve_recv_grads(self, micro_batch: int) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = super()._retrieve_recv_grads(micro_batch)
        _forget(self.grad_recv_info[micro_batch])
        return grads

    def backward_one_chunk(self, *args: Any, **more: Any) -> None:
        with self._around(self.stage_index, False):
            super().backward_one_chunk(*args, **more)

    def backward_weight_one_chunk(self, *args: Any, **more: Any) -> None:
        with self._around(self.stage_index, True):
            super().backward_weight_one_chunk(*args, **more)


def _forget(infos: Sequence[_RecvInfo]) -> None:
    for info in infos:
        info.buffer = None
