"""DeepSpeed's ZeRO between CPUs: single functions of it that are replaced, each with the reason.

DeepSpeed moves gradients and weights as suits NCCL and a caching allocator. Between CPUs gloo moves
them, and the operating system zeroes the pages of each large buffer that is allocated anew. So a
step at stages 1 to 3 took up to a third more than at stage 0. The times are of a Llama with
35 million fp32 parameters (139 MB) on two processes of one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import direct

ALONE = 1 << 16  # elements from which on a gradient is worth a message of its own


def move_directly(backend: Any) -> None:
    """Make DeepSpeed's all-gathers and reduce-scatters those of `parallel/direct.py`.

    All-gather of the weights 27 ms in place of 104, reduce-scatter of the gradients 31 in place
    of 138.
    """

    def all_gather(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        return _ended(direct.start_gather(output_tensor, input_tensor, _handle(group)), async_op)

    def reduce_scatter(output_tensor: Tensor, input_tensor: Tensor, op: Any, group: Any = None, async_op: bool = False) -> Any:
        if op != dist.ReduceOp.SUM:
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return _ended(direct.start_reduce_scatter(output_tensor, input_tensor, _handle(group)), async_op)

    backend.all_gather_function, backend.reduce_scatter_function = all_gather, reduce_scatter


def _handle(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group, by default that of all ranks."""
    handle = group or dist.group.WORLD
    assert handle is not None
    return handle


def _ended(work: direct.Work, async_op: bool) -> direct.Work | None:
    if async_op:
        return work
    work.wait()
    return None


def scatter_directly(stage_3: Any) -> None:
    """Make stage 3 send the parts of each gradient from where they are, and add them up there.

    DeepSpeed joins all gradients of a bucket in a new buffer first. `stage_3`: its module,
    which calls the function by name.
    """

    def reduce_scatter(tensors: Sequence[Tensor], group: Any = None) -> list[Tensor]:
        handle = _handle(group)
        rank, peers = handle.rank(), direct.others(handle.rank(), handle.size())
        parts = [_parts(tensor.div_(handle.size()).view(-1), handle.size()) for tensor in tensors]
        own = [part[rank] for part in parts]
        here = [part for part in own if part.numel()]
        terms = [[torch.empty_like(part) for part in here] for _ in peers]
        receiving = [[direct.receive(t, peer, handle) for t in told] for peer, told in zip(peers, terms, strict=True)]
        sending = [direct.send(part[peer], peer, handle) for peer in peers for part in parts if part[peer].numel()]
        for told, works in zip(terms, receiving, strict=True):
            for part, term, work in zip(here, told, works, strict=True):
                work.wait()
                part.add_(term)
        direct.Messages(sending).wait()
        return own

    stage_3.reduce_scatter_coalesced = reduce_scatter


def _parts(flat: Tensor, size: int) -> list[Tensor]:
    """Return the parts of a gradient in the order of the ranks, as ZeRO-3 divides it; the last ones
    may be shorter, or empty."""
    share = -(-flat.numel() // size)
    return [flat[rank * share : (rank + 1) * share] for rank in range(size)]


def one_by_one(config: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's dict with each weight of stage 3 gathered into a buffer of its own.

    Those of a block come as one message else, from which each is then copied together.
    """
    return {**config, "zero_optimization": {**config["zero_optimization"], "stage3_allgather_sequential": True}}


def reduce_in_place(engine: Any) -> None:
    """Make the all-reduce of stage 0, and of stage 1 in bf16, sum each large gradient where it is.

    DeepSpeed copies all of them into a new buffer and back.
    """
    through_a_buffer = engine.allreduce_and_copy

    def allreduce_and_copy(bucket: Sequence[Tensor], dp_group: Any, dp_world_size: float | None = None) -> None:
        size = dp_world_size or dist.get_world_size(dp_group)
        large = [t for t in bucket if t.numel() >= ALONE and t.is_contiguous() and t.dtype == engine.communication_data_type]
        works = [dist.all_reduce(tensor.mul_(1.0 / size), group=dp_group, async_op=True) for tensor in large]
        kept = {tensor.data_ptr() for tensor in large}
        if small := [tensor for tensor in bucket if tensor.data_ptr() not in kept]:
            through_a_buffer(small, dp_group, dp_world_size)
        for work in works:
            work.wait()

    engine.allreduce_and_copy = allreduce_and_copy


def reduce_to_owners(optimizer: Any) -> None:
    """Make stages 1 and 2 send each gradient only to the rank that owns it, and keep their bucket.

    DeepSpeed copies the bucket into a new buffer, all-reduces it (60 ms in place of 31) and copies
    this rank's part back.
    """
    optimizer.allreduce_and_scatter = MethodType(_to_owners, optimizer)
    optimizer.setup_buckets = _keeping(optimizer, optimizer.setup_buckets)


def _to_owners(
    optimizer: Any,
    bucket: Sequence[tuple[frozenset[int], Tensor, Tensor | None]],
    communication_data_type: torch.dtype,
    numel_per_bucket: int = 0,
    log: Any = None,
    divide: bool = True,
    process_group: Any = None,
) -> None:
    """Add up the slices of a bucket, averaged already, each on its owner, and add them to what is
    there of its partition. `bucket`: the owner of each slice, the slice, and its partition's."""
    handle = process_group or optimizer.dp_process_group
    peers = direct.others(handle.rank(), handle.size())
    runs = [_Run.of(list(run)) for _, run in groupby(bucket, key=itemgetter(0))]
    moved = [run.whole.to(communication_data_type) for run in runs]
    mine = [(run, values) for run, values in zip(runs, moved, strict=True) if run.owner == handle.rank()]
    terms = [[torch.empty_like(values) for _, values in mine] for _ in peers]
    receiving = [[direct.receive(term, peer, handle) for term in own] for own, peer in zip(terms, peers, strict=True)]
    sending = [direct.send(v, run.owner, handle) for run, v in zip(runs, moved, strict=True) if run.owner != handle.rank()]
    for own, works in zip(terms, receiving, strict=True):
        for term, work, (_, values) in zip(own, works, mine, strict=True):
            work.wait()
            values.add_(term)
    for run, values in mine:
        run.take(values)
    for work in sending:
        work.wait()


@dataclass(frozen=True)
class _Run:
    """Slices of a bucket that lie side by side and have one owner: one message."""

    owner: int
    slices: Sequence[Tensor]
    outputs: Sequence[Tensor | None]

    @classmethod
    def of(cls, run: Sequence[tuple[frozenset[int], Tensor, Tensor | None]]) -> _Run:
        (owner,) = run[0][0]
        return cls(owner, [part for _, part, _ in run], [output for _, _, output in run])

    @property
    def whole(self) -> Tensor:
        return self.slices[0].as_strided((sum(part.numel() for part in self.slices),), (1,))

    def take(self, values: Tensor) -> None:
        """Add the sums to the partition, or leave them in the bucket if there is none."""
        for part, output, own in zip(self.slices, self.outputs, values.split([p.numel() for p in self.slices]), strict=True):
            if output is not None:
                output.add_(own)
            elif own.dtype != part.dtype:
                part.copy_(own)


def _keeping(optimizer: Any, setup_buckets: Callable[[], None]) -> Callable[[], None]:
    """Return a `setup_buckets` that gives each bucket the buffer it had before: the pages of a new
    one took 40 ms."""
    kept: dict[Any, list[Tensor]] = {}

    def setup() -> None:
        if optimizer.ready_for_gradients:
            return
        if not kept:
            setup_buckets()
            kept.update({key: list(bucket.buffer) for key, bucket in optimizer.ipg_buckets.items()})
            return
        optimizer.micro_step_id += 1
        for key, bucket in optimizer.ipg_buckets.items():
            bucket.buffer[:] = kept[key]
            bucket.index = 0
        optimizer.ready_for_gradients = True

    return setup
