"""The time of a training step from first principles: each block's operations on the device's
roofline, the pipeline by simulation of its schedule, the reduction of gradients and the optimizer.
No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.schedules import build
from parallel.simulator import Costs, Flow
from parallel.topology import Layout
from trainer.costs.blocks import count_parameters
from trainer.model.blocks import Block
from trainer.model.config import TransformerConfig
from trainer.planner.collectives import all_reduce, link_of, reduce_scatter, send
from trainer.planner.devices import Device
from trainer.planner.operations import Kernels, Move, Pass, Share, embedding_pass, head_pass, layer_pass
from trainer.planner.roofline import moves_s, work_s

# A schedule in its steady state takes equally long for each further round of micro-batches, so long
# ones are simulated for two short counts and continued in a straight line.
SIMULATED_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training to be timed. `balance`: layers of each stage, in the order of the model.
    `gradient_bytes`: of a gradient that is summed over micro-batches, and sent over ranks."""

    network: TransformerConfig
    layout: Layout
    kernels: Kernels
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

    @property
    def share(self) -> Share:
        return Share(
            sequences=self.micro_sequences,
            length=self.seq_len,
            tensor=self.layout.tp,
            divides_tokens=self.divides_tokens,
            itemsize=self.itemsize,
            gradient_bytes=self.gradient_bytes,
            kernels=self.kernels,
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
    `bubble` is idle; `sums`: the tensor-parallel communication of a stage's micro-batches in it."""

    pipeline: float
    bubble: float
    sums: float
    reduction: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.pipeline + self.reduction + self.optimizer

    @property
    def parts(self) -> dict[str, float]:
        """The parts that sum to the whole step, by what the time is spent on."""
        return {
            "compute": self.pipeline - self.bubble - self.sums,
            "bubble": self.bubble,
            "tensor sums": self.sums,
            "gradient reduction": self.reduction,
            "update": self.optimizer,
        }


def step_time(job: Job, device: Device) -> StepTime:
    """Return the time of a step, every rank of `layout` on such a device."""
    costs = stage_costs(job, device)
    busy = [job.num_micro_batches * (cost.forward + cost.input_grad + cost.weight_grad) for cost in costs]
    of_rank = [sum(busy[rank :: job.layout.pp]) for rank in range(job.layout.pp)]
    makespan = _makespan(job, tuple(costs), _sending(job, device))
    params = _largest_share(job)
    scale = device.calibration
    sums = 4 * _sum_s(job, device) * max(job.stages) * job.virtual_stages * job.num_micro_batches
    return StepTime(
        pipeline=scale * makespan,
        bubble=scale * (makespan - max(of_rank)),
        sums=scale * sums,
        reduction=scale * _reduction(job, device, params),
        optimizer=scale * _optimizer(job, device, params),
    )


def stage_costs(job: Job, device: Device) -> list[Costs]:
    """Return the time of each stage's actions on a micro-batch [s]."""
    share, network = job.share, job.network
    windows = Counter(_windows(network))
    layer = [[n * time for time in _timed(job, device, layer_pass(network, share, window))] for window, n in windows.items()]
    average = [sum(times) / windows.total() for times in zip(*layer, strict=True)]
    embedding = _timed(job, device, embedding_pass(network, share), recomputes=False)
    head = _timed(job, device, head_pass(network, share), recomputes=False)
    costs = []
    for stage, layers in enumerate(job.stages):
        parts = [[layers * time for time in average]]
        parts += [embedding] * (stage == 0) + [head] * (stage == len(job.stages) - 1)
        forward, input_grad, weight_grad = (sum(times) for times in zip(*parts, strict=True))
        costs.append(Costs(forward=forward, input_grad=input_grad, weight_grad=weight_grad))
    return costs


def _windows(network: TransformerConfig) -> Sequence[int | None]:
    return network.windows or (None,)


def _timed(job: Job, device: Device, work: Pass, *, recomputes: bool = True) -> list[float]:
    """Return the seconds of forward, of the gradients of inputs, and of those of weights."""
    peak, summed = device.peaks[job.dtype], _sum_s(job, device)
    forward = work_s(work.forward, device, peak, job.itemsize, len(work.forward.sums) * summed)
    backward = work_s(work.backward, device, peak, job.itemsize, len(work.backward.sums) * summed)
    if recomputes and job.recompute == "full":
        backward += forward
    elif recomputes and job.recompute == "selective":
        backward += work_s(work.core, device, peak, job.itemsize)
    return [forward, 2 * backward / 3, backward / 3]


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
    layers = job.stages
    largest = 0.0
    for rank in range(job.layout.pp):
        blocks: list[Block] = []
        for stage in range(rank, len(layers), job.layout.pp):
            blocks += [Block("layer", index) for index in range(layers[stage])]
            blocks += [Block("embedding")] * (stage == 0) + [Block("head")] * (stage == len(layers) - 1)
        largest = max(largest, count_parameters(job.network, blocks) / job.layout.tp)
    return largest


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
