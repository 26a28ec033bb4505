"""The memory that a rank needs, computed from the recipe, against the memory of its machine. No
torch.

Linux promises more memory than it has, and kills a process without a message when it uses it. So a
recipe that does not fit is refused before anything is allocated. Two figures are compared:

* The least, for every network. It counts only tensors that exist at the same time in every layout:
  a step's data, the input of each layer that is kept for backward, the weights themselves, and the
  buffers of a swap pool. What is below it is impossible.
* The plan, where one can be made. It counts everything, and errs by a known share, so only what is
  beyond that is refused. `train --no-plan-check` starts it all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import singledispatch
from pathlib import Path
from typing import NamedTuple

from trainer.costs.blocks import count_parameters
from trainer.errors import RecipeError
from trainer.model.auto_network import AutoNetwork
from trainer.model.config import TransformerConfig
from trainer.model.network import Network
from trainer.planner.items import Place
from trainer.planner.memory import RankMemory
from trainer.planner.prediction import MEMORY_BAND
from trainer.planner.reliefs import Held
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.run_plan import RunPlan, freeing, gib
from trainer.schema import Recipe

TOKEN_BYTES = 16  # a token and its label, both int64
ROW_BYTES = 56  # the lengths of the documents in a row of one document
BATCH_BYTES = 400  # the two tensor objects of a micro-batch, without their data
# a forward or backward in the table of a schedule; every rank of a pipeline has the whole table
ACTION_BYTES = 64
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FP32_BYTES = 4


class Demand(NamedTuple):
    """A need for memory. `what` names the keys that decide it; `in_host`: it is host memory also
    where the rank computes on a GPU."""

    what: str
    num_bytes: int
    in_host: bool


class Machine(NamedTuple):
    """The memory of the host, shared by `local_ranks` ranks, and of this rank's GPU; None: the rank
    computes on the host. `places`: those of its ranks in their pipelines, for the plan."""

    host_bytes: int
    local_ranks: int
    gpu_bytes: int | None
    places: Sequence[int] = ()


def require_memory(recipe: Recipe, plan: BatchPlan, network: Network, machine: Machine, planned: RunPlan | None = None) -> None:
    """Raise RecipeError where a rank needs more memory than it can have: at least, with the largest
    demand, or by its plan, with what frees most. `planned` None: the plan is not asked."""
    _require_least(list(least_demands(recipe, plan, network)), machine)
    if planned is not None:
        _require_planned(planned, machine)


def _require_planned(planned: RunPlan, machine: Machine) -> None:
    if machine.gpu_bytes is not None:
        _require_place(planned, planned.places, planned.fullest_bytes, ", and this GPU has", machine.gpu_bytes)
    here = [planned.ranks[place] for place in machine.places]
    places = frozenset((Place.HOST,)) if planned.on_gpu else planned.places
    ranks = f" for the {len(here)} ranks here" if len(here) > 1 else ""

    def of_node(ranks: Sequence[RankMemory]) -> int:
        return planned.host_bytes([ranks[place] for place in machine.places])

    _require_place(planned, places, of_node, f"{ranks}, and this machine has", machine.host_bytes)


def _require_place(planned: RunPlan, places: frozenset[Place], count: Held, whose: str, there: int) -> None:
    """Raise RecipeError where what is counted of the plan's ranks is more than is there."""
    needed = count(planned.ranks)
    if needed <= (1 + MEMORY_BAND) * there:
        return
    fullest = max(planned.ranks, key=lambda rank: sum(rank.peak(place) for place in places))
    who = f"rank {fullest.rank} of the pipeline, the fullest," if len(planned.ranks) > 1 else "each rank"
    settings = f"; {freeing(freed)}" if (freed := planned.reliefs(count)) else ""
    raise RecipeError(
        f"by the plan {needed / 2**30:,.2f} GiB are needed{whose} {there / 2**30:,.2f} GiB: most of {who} is "
        f"{planned.largest(fullest, places)}{settings}; the plan errs by {MEMORY_BAND:.0%}: --no-plan-check starts it all "
        "the same"
    )


def _require_least(demands: list[Demand], machine: Machine) -> None:
    in_host = [demand for demand in demands if demand.in_host or machine.gpu_bytes is None]
    in_gpu = [demand for demand in demands if demand not in in_host]
    share = machine.host_bytes // machine.local_ranks
    _require(in_host, share, f"this machine has {gib(share)} of memory for each of its {machine.local_ranks} ranks")
    if machine.gpu_bytes is not None:
        _require(in_gpu, machine.gpu_bytes, f"this GPU has {gib(machine.gpu_bytes)}")


def _require(demands: list[Demand], there: int, said: str) -> None:
    needed = sum(demand.num_bytes for demand in demands)
    if needed > there:
        largest = max(demands, key=lambda demand: demand.num_bytes)
        raise RecipeError(
            f"a rank needs at least {gib(needed)}, {gib(largest.num_bytes)} of them for {largest.what}, and {said}: lower "
            "what is named, or divide it over more ranks"
        )


def least_demands(recipe: Recipe, plan: BatchPlan, network: Network) -> Iterator[Demand]:
    """Yield the demands of one rank."""
    batch, seq_len, parallel, zero = recipe.batch, recipe.data.seq_len, recipe.parallel, recipe.zero
    step = plan.sequences_per_rank * (plan.row_tokens * TOKEN_BYTES + ROW_BYTES) + plan.num_micro_batches * BATCH_BYTES
    yield Demand(f"the data of a step (batch.global_sequences {batch.global_sequences} × data.seq_len {seq_len})", step, True)
    if parallel.pipeline > 1:
        actions = 2 * plan.num_micro_batches * parallel.pipeline * parallel.virtual_stages
        what = f"the schedule of {plan.num_micro_batches} micro-batches (batch.global_sequences {batch.global_sequences})"
        yield Demand(what, actions * ACTION_BYTES, True)
    itemsize, divided = DTYPE_BYTES[recipe.precision.settled], parallel.tensor * parallel.pipeline
    tokens = batch.micro_sequences * seq_len // (parallel.tensor if parallel.divides_tokens else 1)
    yield Demand(
        f"what the layers keep of a micro-batch (batch.micro_sequences {batch.micro_sequences} × data.seq_len {seq_len})",
        tokens * _kept_features(network, recipe) * itemsize,
        False,
    )
    elements, largest = _elements(network) // divided, network.largest_weight
    share = elements // (plan.dp if zero.stage == 3 else 1)
    if zero.offload_param.device != "nvme" and recipe.tuning.quantize is None:
        yield Demand("the weights (model.config)", share * itemsize, zero.offload_param.device == "cpu")
    if zero.offload_param.device == "nvme":
        keys = zero.offload_param
        each = keys.buffer_size or largest // plan.dp
        what = f"the swap buffers (zero.offload_param.buffer_count {keys.buffer_count} × buffer_size {each})"
        yield Demand(what, keys.buffer_count * each * itemsize, True)
    if zero.offload_optimizer.device == "nvme" and recipe.tuning.method is None:
        keys_of_states, tile = zero.offload_optimizer, min(zero.sub_group_size, share)
        what = f"the swap buffers (zero.offload_optimizer.buffer_count {keys_of_states.buffer_count} × a tile of {tile})"
        yield Demand(what, keys_of_states.buffer_count * tile * FP32_BYTES, True)


def host_bytes() -> int:
    """Return the memory [bytes] of this machine, or the limit of this process's control group if it
    is smaller, and the machine's swap."""
    found = _meminfo()
    return min([found["MemTotal"], *(limit for _, limit in _limits())]) + found["SwapTotal"]


def available_bytes() -> int:
    """Return the memory [bytes] that processes of this machine, or of this control group, can still
    take without swapping."""
    there = _meminfo()["MemAvailable"]
    for group, limit in _limits():
        taken = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        there = min(there, limit - taken + int(stat.get("inactive_file", 0)))
    return there


def _meminfo() -> dict[str, int]:
    """Return the lines of /proc/meminfo [bytes]."""
    lines = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, value in lines if value.endswith("kB")}


def _limits() -> Iterator[tuple[Path, int]]:
    """Yield the folder of this process's control group, and of each above it, that has a limit, and
    the limit [bytes]."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        hierarchy, _, name = line.split(":", 2)
        group = Path("/sys/fs/cgroup") / name.lstrip("/")
        for folder in (group, *group.parents) if hierarchy == "0" else ():
            limit = folder / "memory.max"
            if os.access(limit, os.R_OK) and (text := limit.read_text().strip()) != "max":
                yield folder, int(text)


@singledispatch
def _elements(network: Network) -> int:
    raise TypeError(type(network))


@_elements.register
def _(network: TransformerConfig) -> int:
    return count_parameters(network)


@_elements.register
def _(network: AutoNetwork) -> int:
    return network.matmul_weights


@singledispatch
def _kept_features(network: Network, recipe: Recipe) -> int:
    """Return how many features of a token a rank's layers keep for backward; 0 where that is not
    known."""
    return 0


@_kept_features.register
def _(network: TransformerConfig, recipe: Recipe) -> int:
    parallel = recipe.parallel
    return network.hidden_size * (network.num_layers if parallel.pipeline == 1 else parallel.virtual_stages)
