"""The bytes that a rank sends in a step, by the link that they take. No torch.

A ring of n ranks sends (n − 1)/n of a tensor for a reduce-scatter or an all-gather, and twice that
for an all-reduce (Thakur et al. 2005, doi:10.1177/1094342005051521). What ZeRO communicates is
DeepSpeed's, as zero_step.py times it: below stage 3 gradients are all-reduced, though each rank
keeps only its part of them at stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from parallel.topology import Layout
from trainer.model.config import TransformerConfig
from trainer.planner.job import job_of
from trainer.planner.memory import stages_of_ranks
from trainer.planner.states import ITEMSIZE, MASTERS, STATES
from trainer.planner.weights import FP32_BYTES
from trainer.planner.zero_step import ZeroJob
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import rank_of_stage
from trainer.schema import Recipe


class Medium(Enum):
    """The link that bytes take."""

    NODE = "inside a node"
    NETWORK = "between nodes"
    HOST = "to and from the host"
    NVME = "to and from NVMe"


@dataclass(frozen=True)
class Transfer:
    """The bytes that a rank sends in a step for one purpose, over one link."""

    what: str
    medium: Medium
    num_bytes: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The traffic of the rank that sends most. `per_node`: devices in a node."""

    recipe: Recipe
    batch: BatchPlan
    network: TransformerConfig
    layout: Layout
    per_node: int

    def transfers(self) -> list[Transfer]:
        zero = job_of(self.recipe, self.batch, self.network, self.layout).zero
        assert zero is not None, "our own engine's job has it"
        found = [self._tensor_sums(), self._messages(), *self._data_parallel(zero), *_offloaded(zero)]
        return [one for one in found if one.num_bytes]

    @property
    def _hidden_bytes(self) -> int:
        """The bytes of a micro-batch's hidden states."""
        itemsize = ITEMSIZE[self.recipe.precision.settled]
        return self.batch.micro_sequences * self.batch.row_tokens * self.network.hidden_size * itemsize

    def _tensor_sums(self) -> Transfer:
        """Return the sums over tensor ranks: two of each layer forward and two backward, and again
        two where the forward is recomputed. With sequence parallelism their halves stand apart."""
        ranks, sums = self.layout.tp, 4 + 2 * (self.recipe.train.recompute == "full")
        layers = max(
            sum(block.kind == "layer" for blocks in stages.values() for block in blocks)
            for stages in stages_of_ranks(self.recipe, self.network)
        )
        sent = 2 * _of_ring(ranks) * self._hidden_bytes * sums * layers * self.batch.num_micro_batches
        return Transfer("tensor sums", self._link(ranks, 1), sent)

    def _messages(self) -> Transfer:
        """Return the hidden states to the next stage and their gradients to the one before, where
        these are on other ranks."""
        if self.layout.pp == 1:
            return Transfer("pipeline", Medium.NODE, 0.0)
        holders = rank_of_stage(self.recipe.parallel)
        neighbours = [0] * self.layout.pp
        for one, other in pairwise(holders):
            neighbours[one] += one != other
            neighbours[other] += one != other
        divided = self.layout.tp if self.recipe.parallel.divides_tokens else 1
        sent = max(neighbours) * self._hidden_bytes / divided * self.batch.num_micro_batches
        return Transfer("pipeline", self._link(2, self.layout.world_size // self.layout.pp), sent)

    def _data_parallel(self, zero: ZeroJob) -> Iterator[Transfer]:
        link, share, times = self._link(zero.ranks, zero.stride), _of_ring(zero.ranks), zero.micro_batches
        reduced = {
            0: 2 * FP32_BYTES * zero.trained,
            1: 2 * FP32_BYTES * zero.trained,
            2: 2 * zero.reduced * zero.trained * times,
            3: zero.reduced * zero.trained * times,
        }
        yield Transfer("gradients", link, share * reduced[zero.stage])
        gathered = _gathered(zero) * times if zero.stage == 3 else zero.trained * (zero.stage > 0)
        yield Transfer("gathered weights", link, share * zero.itemsize * gathered)

    def _link(self, ranks: int, stride: int) -> Medium:
        return Medium.NODE if ranks * stride <= self.per_node else Medium.NETWORK


def _offloaded(zero: ZeroJob) -> Iterator[Transfer]:
    """Yield what passes between the device, the host and NVMe: gradients down and new weights up
    once, offloaded weights up for each gather; from NVMe gradients and states are read and
    written."""
    own = zero.trained / (zero.ranks if zero.stage else 1)
    if zero.optimizer_on != "none":
        yield Transfer("gradients and weights", Medium.HOST, own * (FP32_BYTES + zero.itemsize))
    if zero.optimizer_on == "nvme":
        yield Transfer(f"gradients, {MASTERS}, {STATES}", Medium.NVME, 2 * own * FP32_BYTES * (2 + zero.states))
    fetched = _gathered(zero) / zero.ranks * zero.itemsize * zero.micro_batches
    if zero.weights_on != "none":
        yield Transfer("weights", Medium.HOST, fetched)
    if zero.weights_on == "nvme":
        yield Transfer("weights", Medium.NVME, fetched)


def _gathered(zero: ZeroJob) -> float:
    """Return the weights that stage 3 gathers for a micro-batch: those that are not kept once
    gathered are gathered again for its backward."""
    return zero.divided + max(0.0, zero.divided - zero.live)


def _of_ring(ranks: int) -> float:
    return (ranks - 1) / ranks
