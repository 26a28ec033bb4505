"""The bytes that a rank sends in a step, by the link that they take. No torch.

A ring of n ranks sends (n − 1)/n of a tensor for a reduce-scatter or an all-gather, and twice that
for an all-reduce (Thakur et al. 2005, doi:10.1177/1094342005051521). ZeRO sends as much as an
all-reduce in stages 1 and 2; in stage 3 it gathers the weights for each forward and each backward
(Rajbhandari et al. 2020, arXiv:1910.02054, section 7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from parallel.topology import Layout
from trainer.model.config import TransformerConfig
from trainer.planner.memory import stages_of_ranks
from trainer.planner.states import ITEMSIZE, MASTERS, STATES
from trainer.planner.weights import FP32_BYTES, RankWeights
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import rank_of_stage
from trainer.schema import Recipe
from trainer.update_rules import states_per_element


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
    """The traffic of the busiest rank. `per_node`: devices in a node."""

    recipe: Recipe
    batch: BatchPlan
    network: TransformerConfig
    layout: Layout
    per_node: int

    def transfers(self) -> list[Transfer]:
        found = max(map(self._of_rank, range(self.layout.pp)), key=lambda rank: sum(one.num_bytes for one in rank))
        return [one for one in found if one.num_bytes]

    def _of_rank(self, rank: int) -> list[Transfer]:
        stages = stages_of_ranks(self.recipe, self.network)[rank]
        weights = RankWeights(network=self.network, tensor=self.layout.tp, tuning=self.recipe.tuning).of_stages(stages)
        whole = sum(weight.elements for weight in weights)
        trained = sum(weight.elements for weight in weights if weight.trained)
        layers = sum(block.kind == "layer" for blocks in stages.values() for block in blocks)
        return [
            self._tensor_sums(layers),
            self._messages(rank, stages),
            *self._data_parallel(whole, trained),
            *self._offloaded(whole, trained),
        ]

    @property
    def _hidden_bytes(self) -> int:
        """The bytes of a micro-batch's hidden states."""
        return self.batch.micro_sequences * self.batch.row_tokens * self.network.hidden_size * self._itemsize

    @property
    def _itemsize(self) -> int:
        return ITEMSIZE[self.recipe.precision.settled]

    def _tensor_sums(self, layers: int) -> Transfer:
        """Return the sums over tensor ranks: two of each layer forward and two backward, and again
        two where the forward is recomputed. With sequence parallelism their halves stand apart."""
        ranks, sums = self.layout.tp, 4 + 2 * (self.recipe.train.recompute == "full")
        sent = 2 * _of_ring(ranks) * self._hidden_bytes * sums * layers * self.batch.num_micro_batches
        return Transfer("tensor sums", self._link(ranks, 1), sent)

    def _messages(self, rank: int, stages: Iterable[int]) -> Transfer:
        """Return the hidden states to the next stage and their gradients to the one before, where
        these are on other ranks."""
        if self.layout.pp == 1:
            return Transfer("pipeline", Medium.NODE, 0.0)
        holders = dict(enumerate(rank_of_stage(self.recipe.parallel)))
        neighbours = sum(holders.get(stage + step, rank) != rank for stage in stages for step in (1, -1))
        divided = self.layout.tp if self.recipe.parallel.divides_tokens else 1
        sent = neighbours * self._hidden_bytes / divided * self.batch.num_micro_batches
        return Transfer("pipeline", self._link(2, self.layout.world_size // self.layout.pp), sent)

    def _data_parallel(self, whole: int, trained: int) -> Iterator[Transfer]:
        ranks, stage, times = self.layout.dp * self.layout.cp, self.recipe.zero.stage, self.batch.num_micro_batches
        link, share = self._link(ranks, self.layout.tp), _of_ring(ranks)
        gradients = share * trained * FP32_BYTES
        if stage == 3:
            yield Transfer("gradients", link, share * trained * self._itemsize * times)
            yield Transfer("gathered weights", link, 2 * share * whole * self._itemsize * times)
        elif stage:
            yield Transfer("gradients", link, gradients * (times if stage == 2 else 1))
            yield Transfer("gathered weights", link, share * trained * self._itemsize)
        else:
            yield Transfer("gradients", link, 2 * gradients)

    def _offloaded(self, whole: int, trained: int) -> Iterator[Transfer]:
        """Yield what passes between the device, the host and NVMe: gradients down and new weights
        up once, offloaded weights up for each forward and backward; from NVMe the states are read
        and written."""
        zero, ranks = self.recipe.zero, self.layout.dp * self.layout.cp
        own, passes = trained / ranks, 2 * self.batch.num_micro_batches
        if zero.offload_optimizer.device != "none":
            yield Transfer("gradients and weights", Medium.HOST, own * (FP32_BYTES + self._itemsize))
        if zero.offload_optimizer.device == "nvme":
            states = 1 + states_per_element(self.recipe.optimizer)
            yield Transfer(f"{MASTERS}, {STATES}", Medium.NVME, 2 * own * FP32_BYTES * states)
        if zero.offload_param.device != "none":
            yield Transfer("weights", Medium.HOST, passes * whole / ranks * self._itemsize)
        if zero.offload_param.device == "nvme":
            yield Transfer("weights", Medium.NVME, (passes + 1) * whole / ranks * self._itemsize)

    def _link(self, ranks: int, stride: int) -> Medium:
        return Medium.NODE if ranks * stride <= self.per_node else Medium.NETWORK


def _of_ring(ranks: int) -> float:
    return (ranks - 1) / ranks
