"""The time of a training step from first principles: each block's operations on the device's
roofline, the pipeline by simulation of its schedule, the reduction of gradients and the optimizer.
No torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from parallel.schedule_table import ScheduleTable
from parallel.schedules import SCHEDULES, build
from parallel.simulator import Costs, Flow
from parallel.topology import Layout
from trainer.costs.blocks import count_parameters
from trainer.model.blocks import Block
from trainer.model.config import TransformerConfig
from trainer.planner import our_layers
from trainer.planner.collectives import all_reduce, link_of, reduce_scatter, send
from trainer.planner.devices import Device
from trainer.planner.operations import Kernels, Move, Pass, Share, counted_embedding, counted_head, counted_layer
from trainer.planner.roofline import longer, moves_s, work_s
from trainer.planner.zero_step import ZeroJob, ZeroStep

# A schedule in its steady state takes equally long for each further round of micro-batches, so long
# ones are simulated for two short counts and continued in a straight line.
SIMULATED_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training to be timed. `balance`: layers of each stage, in the order of the model.
    `gradient_bytes`: of a gradient that is summed over micro-batches, and sent over ranks.

    Our own engine has no `kernels` but `zero`, and then `gradient_bytes` and `state_bytes` are not
    read. `stored_bytes`, `trains`: see `Share`. `overlaps_sums`: sums over tensor ranks in backward
    run beside its products.
    """

    network: TransformerConfig
    layout: Layout
    kernels: Kernels | None
    dtype: str
    seq_len: int
    micro_sequences: int
    num_micro_batches: int
    schedule: str = "1f1b"
    virtual_stages: int = 1
    balance: tuple[int, ...] = ()
    divides_tokens: bool = False
    recompute: str = "none"
    zero_stage: int = 0
    itemsize: int = 2
    gradient_bytes: int = 4
    state_bytes: int = 12  # of a parameter in the optimizer: master weight and two moments
    stored_bytes: int = 2
    trains: bool = True
    overlaps_sums: bool = False
    zero: ZeroJob | None = None
    table: ScheduleTable | None = None  # of a schedule that has no name

    @property
    def share(self) -> Share:
        """The part of a rank. Of a translation's row, half are the source's tokens and half the
        target's, and an encoder's layer sees as many as a decoder's."""
        sides = 2 if self.network.encoder_layers else 1
        return Share(
            sequences=self.micro_sequences,
            length=self.seq_len // (sides * self.layout.cp),
            tensor=self.layout.tp,
            divides_tokens=self.divides_tokens,
            itemsize=self.itemsize,
            gradient_bytes=self.gradient_bytes,
            kernels=self.kernels,
            stored_bytes=self.stored_bytes,
            trains=self.trains,
        )

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers of each stage."""
        count = self.layout.pp * self.virtual_stages
        if self.balance:
            return self.balance
        layers = self.network.num_layers
        return tuple(layers // count + (stage < layers % count) for stage in range(count))


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The parts of a step [s]. `pipeline`: from the first forward to the last backward, of which
    `bubble` is idle; `sums`: the tensor-parallel communication of a stage's micro-batches in it;
    `zero`: what ZeRO adds to them, with sums, reductions and hooks; `gathers`: the communication of
    ZeRO-3's weights, in part beside the computation. `jitter`: the wait for the slowest
    data-parallel rank."""

    pipeline: float
    bubble: float
    sums: float
    reduction: float
    optimizer: float
    zero: float = 0.0
    gathers: float = 0.0
    jitter: float = 0.0

    @property
    def total(self) -> float:
        return self.pipeline + self.reduction + self.optimizer + self.jitter

    @property
    def parts(self) -> dict[str, float]:
        """The parts that sum to the whole step, by what the time is spent on."""
        return {
            "compute": self.pipeline - self.bubble - self.sums - self.zero,
            "bubble": self.bubble,
            "tensor sums": self.sums,
            "ZeRO": self.zero,
            "gradient reduction": self.reduction,
            "update": self.optimizer,
            "slowest rank": self.jitter,
        }


def step_time(job: Job, device: Device) -> StepTime:
    """Return the time of a step, every rank of `layout` on such a device."""
    device = device.shared_by(job.layout.world_size)
    blocks, zero = block_times(job, device), ZeroStep(job.zero, device) if job.zero else None
    costs = _costs(job, blocks, zero)
    of_rank, without_zero = _busy(job, costs), _busy(job, _costs(job, blocks, None))
    busiest = max(range(job.layout.pp), key=of_rank.__getitem__)
    makespan = _makespan(job, tuple(costs), _sending(job, device))
    scale = device.calibration
    sums = 4 * _sum_s(job, device) * max(job.stages) * job.virtual_stages * job.num_micro_batches
    params = 0.0 if zero else _largest_share(job)
    return StepTime(
        pipeline=scale * makespan,
        bubble=scale * (makespan - of_rank[busiest]),
        sums=scale * sums,
        reduction=scale * (zero.reduction if zero else _reduction(job, device, params)),
        optimizer=scale * (zero.update if zero else _optimizer(job, device, params)),
        zero=scale * (of_rank[busiest] - without_zero[busiest]),
        gathers=scale * job.num_micro_batches * sum(zero.gathers) if zero else 0.0,
        jitter=scale * makespan * jitter(device, job.layout.dp * job.layout.cp) if zero else 0.0,
    )


def jitter(device: Device, ranks: int) -> float:
    """Return by which part of a step the slowest of the ranks that wait for each other is slower
    than the others: the largest of n draws from a normal distribution."""
    return device.jitter * math.sqrt(2 * math.log(ranks)) if ranks > 1 else 0.0


def stage_costs(job: Job, device: Device) -> list[Costs]:
    """Return the time of each stage's actions on a micro-batch [s]."""
    return _costs(job, block_times(job, device), ZeroStep(job.zero, device) if job.zero else None)


def _costs(job: Job, blocks: list[list[float]], zero: ZeroStep | None) -> list[Costs]:
    embedding, layer, head = blocks
    costs = []
    for stage, layers in enumerate(job.stages):
        parts = [[layers * time for time in layer]]
        parts += [embedding] * (stage == 0) + [head] * (stage == len(job.stages) - 1)
        forward, input_grad, weight_grad = (sum(times) for times in zip(*parts, strict=True))
        if zero:
            own = zero.with_share(_weights_of(job, stage) / job.layout.tp)
            forward += own.forward(forward)
            weight_grad += own.backward(input_grad + weight_grad)
        costs.append(Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad))
    return costs


def _busy(job: Job, costs: list[Costs]) -> list[float]:
    """Return the seconds in which each rank of the pipeline works."""
    found = [0.0] * job.layout.pp
    for rank, cost in zip(_rank_of_stage(job), costs, strict=True):
        found[rank] += job.num_micro_batches * (cost.forward + cost.input_grad + cost.weight_grad)
    return found


def _rank_of_stage(job: Job) -> list[int]:
    if job.table is not None:
        return [rank for _, rank in sorted(job.table.rank_of_stage.items())]
    if job.layout.pp == 1:
        return [0]
    return SCHEDULES[job.schedule].rank_of_stage(job.layout.pp, job.virtual_stages)


def block_times(job: Job, device: Device) -> list[list[float]]:
    """Return the seconds of the embedding, of a layer on average, and of the head, for a
    micro-batch: of forward, of the gradients of inputs, and of those of weights."""
    embedding, layers, head = _passes(job)
    average = [0.0] * 3
    for one, count in layers:
        times = _timed(job, device, one)
        average = [sofar + count / job.network.num_layers * time for sofar, time in zip(average, times, strict=True)]
    return [_timed(job, device, embedding, recomputes=False), average, _timed(job, device, head, recomputes=False)]


def _passes(job: Job) -> tuple[Pass, list[tuple[Pass, int]], Pass]:
    """Return the work of the embedding, of each kind of layer with the number of these, and of the
    head."""
    share, network = job.share, job.network
    if job.kernels is not None:
        windows = Counter(network.windows or (None,) * network.num_layers)
        layers = [(counted_layer(network, share, window), count) for window, count in windows.items()]
        return counted_embedding(network, share), layers, counted_head(network, share)
    kinds = Counter((window, index >= network.encoder_layers > 0) for index, window in enumerate(network.windows))
    layers = [
        (our_layers.layer_pass(network, share, window, crosses=crosses), count) for (window, crosses), count in kinds.items()
    ]
    return our_layers.embedding_pass(network, share), layers, our_layers.head_pass(network, share)


def _timed(job: Job, device: Device, work: Pass, *, recomputes: bool = True) -> list[float]:
    """Return the seconds of forward, of the gradients of inputs, and of those of weights."""
    peak, summed = device.peaks[job.dtype], _sum_s(job, device)
    computed = partial(work_s, device=device, peak=peak, itemsize=job.itemsize, dtype=job.dtype)
    forward = computed(work.forward, communication=len(work.forward.sums) * summed)
    backward = _backward_s(job, device, work, computed, len(work.backward.sums) * summed)
    if recomputes and job.recompute == "full":
        backward += forward
    elif recomputes and job.recompute == "selective":
        backward += computed(work.core)
    return [forward, 2 * backward / 3, backward / 3]


def _backward_s(job: Job, device: Device, work: Pass, computed: Callable[..., float], summed: float) -> float:
    """Return the seconds of a backward.

    With sequence parallelism our row-parallel layers gather their gradient, and our column-parallel
    ones their inputs again: half of a sum each. What column-parallel layers communicate can run
    beside their products.
    """
    if job.kernels is not None or not summed:
        return computed(work.backward, communication=summed)
    alone = 0.5 * summed * job.divides_tokens
    if job.overlaps_sums and device.asynchronous:
        return longer(computed(work.backward), summed) + alone
    return computed(work.backward, communication=summed + alone)


def _sum_s(job: Job, device: Device) -> float:
    """Return the seconds of one sum over the tensor-parallel ranks; with sequence parallelism a
    reduce-scatter and an all-gather, which take as long together."""
    tensor = job.layout.tp
    num_bytes = job.share.tokens * job.network.hidden_size * job.itemsize
    return all_reduce(num_bytes, tensor, link_of(device, tensor, 1))


def _sending(job: Job, device: Device) -> float:
    """Return the seconds of sending hidden states to the next stage. Neighbours are dp · tp ranks
    apart, and a rank sends its part where the tokens are divided."""
    layout = job.layout
    if layout.pp == 1:
        return 0.0
    num_bytes = job.share.own_tokens * job.network.hidden_size * job.itemsize
    return send(num_bytes, link_of(device, 2, layout.dp * layout.cp * layout.tp))


def _makespan(job: Job, costs: tuple[Costs, ...], latency: float) -> float:
    ranks, count = job.layout.pp, job.num_micro_batches
    if ranks == 1:
        return count * sum(cost.forward + cost.input_grad + cost.weight_grad for cost in costs)
    if job.table is not None:
        return Flow.of(job.table).makespan(costs, latency)
    short, long = SIMULATED_ROUNDS * ranks, (SIMULATED_ROUNDS + 1) * ranks
    if count <= long:
        return _simulated(job.schedule, ranks, job.virtual_stages, count, costs, latency)
    first = _simulated(job.schedule, ranks, job.virtual_stages, short, costs, latency)
    second = _simulated(job.schedule, ranks, job.virtual_stages, long, costs, latency)
    return second + (second - first) / ranks * (count - long)


@lru_cache(maxsize=4096)
def _simulated(schedule: str, ranks: int, virtual_stages: int, count: int, costs: tuple[Costs, ...], latency: float) -> float:
    return _flow(schedule, ranks, virtual_stages, count).makespan(costs, latency)


@lru_cache(maxsize=128)
def _flow(schedule: str, ranks: int, virtual_stages: int, count: int) -> Flow:
    return Flow.of(build(schedule, ranks=ranks, virtual_stages=virtual_stages, num_micro_batches=count))


def _largest_share(job: Job) -> float:
    """Return the parameters of the rank that has the most."""
    ranks = (range(rank, len(job.stages), job.layout.pp) for rank in range(job.layout.pp))
    return max(sum(_weights_of(job, stage) for stage in stages) for stages in ranks) / job.layout.tp


def _weights_of(job: Job, stage: int) -> float:
    """Return the parameters of a stage, over all tensor ranks."""
    blocks = [Block("layer", index) for index in range(job.stages[stage])]
    blocks += [Block("embedding")] * (stage == 0) + [Block("head")] * (stage == len(job.stages) - 1)
    return count_parameters(job.network, blocks)


def _reduction(job: Job, device: Device, params: float) -> float:
    """Return the seconds of summing the gradients over the data-parallel ranks."""
    layout = job.layout
    link = link_of(device, layout.dp * layout.cp, layout.tp)
    once = reduce_scatter(params * job.gradient_bytes, layout.dp, link)
    gathered = reduce_scatter(params * job.itemsize, layout.dp, link)
    return once + (gathered if job.zero_stage else once)


def _optimizer(job: Job, device: Device, params: float) -> float:
    """Return the seconds of the update: states are read and written, gradients read, weights
    written."""
    own = params / (job.layout.dp if job.zero_stage else 1)
    return moves_s([Move(own * (2 * job.state_bytes + job.gradient_bytes + job.itemsize), 10)], device)
