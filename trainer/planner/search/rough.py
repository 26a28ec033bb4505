"""Rough figures of every layout, by which a search chooses those that are planned exactly. No
torch.

The blocks of a pass are timed and their tensors counted once for each way to compute it. What
differs between layouts is put together from these by arithmetic: layers on a stage, micro-batches
in flight, and the idle time of a schedule whose stages are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from parallel.schedules import SCHEDULES
from parallel.topology import Layout
from trainer.engine.tiling import Tiling
from trainer.model.blocks import Block, blocks_of
from trainer.planner.devices import Device
from trainer.planner.items import Item, Phase, Place
from trainer.planner.job import job_of
from trainer.planner.memory import of_cpu, of_gpu, rows_of, saving
from trainer.planner.search.choice import Choice
from trainer.planner.search.space import Mesh, Passes, Space, States
from trainer.planner.states import ModelStates
from trainer.planner.step_time import Job, block_times, jitter
from trainer.planner.weights import RankWeights
from trainer.planner.zero_step import ZeroJob, ZeroStep
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.stages import layers_by_cost
from trainer.schema import Recipe


class Rough(NamedTuple):
    """A layout with the seconds of its step and the bytes that its fullest rank needs of its
    device, roughly."""

    seconds: float
    num_bytes: float
    passes: Passes
    schedule: str
    virtual_stages: int
    states: States

    @property
    def choice(self) -> Choice:
        return self.passes.choice(self.schedule, self.virtual_stages, self.states)


class Blocks(NamedTuple):
    """Figures of the embedding, of a layer and of the head."""

    embedding: float
    layer: float
    head: float

    def of_all(self, layers: int) -> float:
        return self.embedding + layers * self.layer + self.head

    def of_first(self, division: Division) -> float:
        return self.embedding + division.first * self.layer + self.head * division.is_v

    def of_last(self, division: Division) -> float:
        return division.last * self.layer + self.head * (not division.is_v)


class Division(NamedTuple):
    """The layers of the first rank of a pipeline, of the ones between that have the most, and of
    the last. `is_v`: the first rank has the head too."""

    first: int
    between: int
    last: int
    is_v: bool


class Times(NamedTuple):
    """The seconds of blocks, forward and backward, and the share of the weights' gradients in a
    backward."""

    forward: Blocks
    backward: Blocks
    of_weights: float


class Beside(NamedTuple):
    """The seconds of ZeRO's work: in a micro-batch's forward and backward, where it does not run
    beside them, and after all of them."""

    step: ZeroStep
    runs_beside: bool
    in_forward: float
    in_backward: float
    after: float

    @classmethod
    def of(cls, step: ZeroStep) -> Beside:
        runs_beside = step.job.overlaps and step.device.asynchronous
        return cls(step, runs_beside, step.forward(0.0), step.backward(0.0), step.reduction + step.update)

    def forward(self, computed: float) -> float:
        """Return the seconds that a forward of so many seconds takes longer."""
        return self.step.forward(computed) if self.runs_beside else self.in_forward

    def backward(self, computed: float) -> float:
        """Return the seconds that a backward of so many seconds takes longer."""
        return self.step.backward(computed) if self.runs_beside else self.in_backward


class Held(NamedTuple):
    """The bytes of model states on a rank, in each part of a step."""

    always: int
    backward: int
    update: int


@dataclass(frozen=True)
class Roughly:
    """The rough figures of a space on a device."""

    space: Space
    device: Device
    most_bytes: float  # layouts that surely need more are left out
    _zero: dict[object, Beside] = field(default_factory=dict)
    _times: dict[object, Times] = field(default_factory=dict)
    _jobs: dict[Mesh, ZeroJob] = field(default_factory=dict)
    _bytes: dict[object, tuple[Blocks, int, int, int]] = field(default_factory=dict)
    _divisions: dict[object, Division] = field(default_factory=dict)
    _states: dict[object, list[Held]] = field(default_factory=dict)

    def of(self, ways: Iterable[Passes]) -> Iterator[Rough]:
        """Yield the figures of the layouts that compute micro-batches in these ways."""
        for passes in ways:
            pipelines = self.space.pipelines(passes)
            for schedule, virtual in pipelines:
                activations = {casts: self._activations(passes, schedule, virtual, casts=casts) for casts in (True, False)}
                for states in self.space.states(passes, schedule):
                    held = self._states_of(passes, states)
                    needs = max(
                        one.always + max(one.backward + kept, one.update)
                        for one, kept in zip(held, activations[states.stage == 0], strict=True)
                    )
                    if needs <= self.most_bytes:
                        seconds = self._step(passes, schedule, virtual, states)
                        yield Rough(seconds, needs + self._around(passes.mesh, needs), passes, schedule, virtual, states)

    # ------------------------------------------------------------------------ the time

    def _step(self, passes: Passes, schedule: str, virtual: int, states: States) -> float:
        """Return the seconds of a step."""
        zero = self._beside(passes, states)
        pipeline = self._pipeline(passes, schedule, virtual, zero, weights_wide=states.stage == 0)
        waiting = jitter(self._device, passes.mesh.data * passes.mesh.context)
        return self._device.calibration * (pipeline * (1 + waiting) + zero.after)

    def _pipeline(self, passes: Passes, schedule: str, virtual: int, zero: Beside, *, weights_wide: bool) -> float:
        """Return the seconds from the first forward to the last backward."""
        count, ranks = passes.num_micro_batches, passes.mesh.pipeline
        forward, backward, of_weights = self._times_of(passes, weights_wide=weights_wide)
        if ranks == 1:
            layers = self.space.network.num_layers
            ahead, back = forward.of_all(layers), backward.of_all(layers)
            return count * (ahead + back + zero.forward(ahead) + zero.backward(back))
        division = self._division(ranks, schedule, virtual)
        ahead, back = max(
            (
                (forward.of_first(division), backward.of_first(division)),
                (forward.of_last(division), backward.of_last(division)),
                (division.between * forward.layer, division.between * backward.layer),
            ),
            key=lambda both: both[0] + both[1],
        )
        added = zero.forward(ahead), zero.backward(back)
        slowest = ahead + back + sum(added)
        together = sum(blocks.of_all(self.space.network.num_layers) for blocks in (forward, backward)) + ranks * sum(added)
        weight_grads = of_weights * back + added[1]
        schedule_of = SCHEDULES[schedule]
        if count < ranks:  # each micro-batch passes all stages before a rank has more to do
            waited = (slowest - weight_grads) / slowest if schedule_of.splits_backward else 1.0
            return (together + (count - 1) * slowest / virtual) * waited
        waited = 1.0
        if schedule_of.splits_backward:
            waited = max(0.0, (slowest - weight_grads * (3 if schedule_of.v_shaped else 2)) / slowest)
        return count * slowest + (together - slowest) / virtual * waited

    def _times_of(self, passes: Passes, *, weights_wide: bool) -> Times:
        """Return the seconds of blocks; `weights_wide`: weights are held wider than the compute
        format."""
        key = passes.mesh.tensor, passes.micro, passes.divides, passes.recompute, weights_wide
        if key not in self._times:
            job = self._job(
                passes._replace(mesh=passes.mesh._replace(pipeline=1)), States(0 if weights_wide else 1, "none", "none")
            )
            embedding, layer, head = block_times(job, self._device)
            forward, input_grad, weight_grad = zip(embedding, layer, head, strict=True)
            backward = Blocks(*(sum(both) for both in zip(input_grad, weight_grad, strict=True)))
            self._times[key] = Times(Blocks(*forward), backward, layer[2] / (layer[1] + layer[2]))
        return self._times[key]

    def _beside(self, passes: Passes, states: States) -> Beside:
        """Return the work of ZeRO on the rank that trains the most."""
        mesh = passes.mesh
        if (key := (mesh, states, passes.num_micro_batches)) not in self._zero:
            if mesh not in self._jobs:
                job = self._job(passes, States(0, "none", "none")).zero
                assert job is not None, "our own engine has it"
                self._jobs[mesh] = job
            job = replace(
                self._jobs[mesh],
                stage=states.stage,
                optimizer_on=states.optimizer,
                weights_on=states.param,
                micro_batches=passes.num_micro_batches,
            )
            self._zero[key] = Beside.of(ZeroStep(job, self._device))
        return self._zero[key]

    @cached_property
    def _device(self) -> Device:
        """The device as each of the ranks finds it."""
        return self.device.shared_by(self.space.world_size)

    def _job(self, passes: Passes, states: States) -> Job:
        recipe = passes.choice("1f1b", 1, states).recipe(self.space.base)
        return job_of(recipe, _batch(recipe, passes), self.space.network, _layout(passes.mesh))

    def _division(self, ranks: int, schedule: str, virtual: int) -> Division:
        is_v = SCHEDULES[schedule].v_shaped
        key = ranks, virtual, is_v
        if key not in self._divisions:
            choice = replace(self.space.plain, pipeline=ranks, schedule=schedule, virtual_stages=virtual)
            layers = [0] * ranks
            stages = layers_by_cost(choice.recipe(self.space.base), self.space.network)
            for rank, number in zip(SCHEDULES[schedule].rank_of_stage(ranks, virtual), stages, strict=True):
                layers[rank] += number
            self._divisions[key] = Division(layers[0], max(layers[1:-1], default=0), layers[-1], is_v)
        return self._divisions[key]

    # ------------------------------------------------------------------------ the memory

    def _states_of(self, passes: Passes, states: States) -> list[Held]:
        """Return the model states of the first and of the last rank of the pipeline."""
        mesh = passes.mesh
        key = mesh, states, passes.num_micro_batches > 1
        if key not in self._states:
            recipe = passes.choice("1f1b", 1, states).recipe(self.space.base)
            weights = RankWeights(network=self.space.network, tensor=mesh.tensor, tuning=recipe.tuning)
            self._states[key] = [
                _held(
                    ModelStates(
                        recipe=recipe,
                        weights=weights.of_stages({0: blocks}),
                        data=mesh.data * mesh.context,
                        tiling=Tiling.of(recipe),
                        accumulates=passes.num_micro_batches > 1,
                    )
                )
                for blocks in self._ends(mesh.pipeline)
            ]
        return self._states[key]

    def _ends(self, ranks: int) -> list[list[Block]]:
        """Return the blocks of the first and of the last rank."""
        embedding, *layers, head = blocks_of(self.space.network)
        if ranks == 1:
            return [[embedding, *layers, head]]
        division = self._division(ranks, "1f1b", 1)
        return [[embedding, *layers[: division.first]], [*layers[-division.last :], head]]

    def _activations(self, passes: Passes, schedule: str, virtual: int, *, casts: bool) -> list[float]:
        """Return the bytes of activations of the first and of the last rank at the fullest moment
        of a step."""
        mesh, network = passes.mesh, self.space.network
        kept, deferred, passed, moment = self._bytes_of(passes, casts=casts)
        if mesh.pipeline == 1:
            return [kept.of_all(network.num_layers) + moment]
        division, count, end = self._division(mesh.pipeline, schedule, virtual), passes.num_micro_batches, mesh.pipeline - 1
        first, last = (one + virtual * passed for one in (kept.of_first(division), kept.of_last(division)))
        flying = [in_flight(schedule, mesh.pipeline, virtual, count, rank) / virtual for rank in (0, end)]
        puts_off = SCHEDULES[schedule].splits_backward and not division.is_v
        waiting = deferred * division.last * end / virtual * puts_off
        return [flying[0] * first + moment, flying[1] * last + waiting + moment]

    def _bytes_of(self, passes: Passes, *, casts: bool) -> tuple[Blocks, int, int, int]:
        """Return the bytes that blocks keep of a micro-batch, those of a layer that wait for the
        gradients of weights, those of a stage's messages, and those that are there for a
        moment."""
        key = passes.mesh.tensor, passes.micro, passes.divides, passes.recompute, casts
        if key not in self._bytes:
            recipe = passes.choice("1f1b", 1, States(0, "none", "none")).recipe(self.space.base)
            way = saving(recipe, self.space.network, _layout(passes.mesh), rows_of(recipe))
            way = replace(way, casts=way.casts and casts)
            embedding, *layers, head = blocks_of(self.space.network)
            embeds, none, ends = (way.of_blocks(blocks).total() for blocks in ([embedding], [], [head]))
            each = (way.of_blocks(layers).total() - none) / len(layers)
            kept = Blocks(embeds, each, ends - none)
            moment = max(way.temporaries([layers[0], head]), 0) + way.while_recomputed(layers[:1])
            self._bytes[key] = kept, way.deferred(layers[:1]), way.passed_on(first=False, last=False), moment
        return self._bytes[key]

    def _around(self, mesh: Mesh, allocated: float) -> float:
        """Return what a device holds beside tensors."""
        if mesh not in self._fixed:
            self._fixed[mesh] = sum(item.num_bytes for item in self._beside_tensors(_layout(mesh), 0))
        return self._fixed[mesh] + self._reserve * allocated

    @cached_property
    def _fixed(self) -> dict[Mesh, int]:
        return {}

    @cached_property
    def _reserve(self) -> float:
        """The share of what is allocated that the allocator reserves."""
        none, much = (sum(item.num_bytes for item in self._beside_tensors(Layout(), size)) for size in (0, 1 << 40))
        return (much - none) / (1 << 40)

    @property
    def _beside_tensors(self) -> Callable[[Layout, int], Iterable[Item]]:
        return of_gpu if self.device.is_gpu else of_cpu


# Schedules that run all forwards of a stage before its first backward.
BREADTH_FIRST = frozenset(("gpipe", "looped_bfs"))


def in_flight(schedule: str, ranks: int, virtual: int, count: int, rank: int) -> int:
    """Return the forwards of stages on a rank whose backward is not complete, at most."""
    of_schedule, hops = SCHEDULES[schedule], ranks - 1 - rank
    whole = count * virtual
    if of_schedule.v_shaped:
        return min(whole, 2 * ranks)
    if schedule in BREADTH_FIRST:
        return whole
    if virtual == 1 and not of_schedule.splits_backward:
        return min(whole, hops + 1)
    per_round = count // max(1, count // ranks)
    ahead = hops if of_schedule.splits_backward else 2 * hops
    return min(whole, (virtual - 1) * per_round + ahead + 1)


def _held(states: ModelStates) -> Held:
    held = dict.fromkeys(Phase, 0)
    for item in states.items():
        if item.place is Place.DEVICE:
            held[item.phase] += item.num_bytes
    return Held(held[Phase.ALWAYS], held[Phase.BACKWARD], held[Phase.UPDATE])


def _layout(mesh: Mesh) -> Layout:
    return Layout(pp=mesh.pipeline, dp=mesh.data, cp=mesh.context, tp=mesh.tensor)


def _batch(recipe: Recipe, passes: Passes) -> BatchPlan:
    return BatchPlan(
        global_sequences=recipe.batch.global_sequences,
        micro_sequences=passes.micro,
        dp=passes.mesh.data,
        num_micro_batches=passes.num_micro_batches,
        row_tokens=recipe.data.row_tokens,
    )
