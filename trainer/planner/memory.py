"""The memory of every rank of a run, from its recipe alone: what is held, where, and when. No
torch.

Ranks that differ only in their places among tensor or data-parallel ranks hold as much, so there is
one plan for each rank of the pipeline.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from parallel.schedules import SCHEDULES
from parallel.topology import Layout
from trainer.checkpoint.disk_space import bytes_of_one
from trainer.engine.tiling import Tiling
from trainer.model.blocks import Block, blocks_of
from trainer.model.config import TransformerConfig
from trainer.planner.activations import Beside, Rows, Saving
from trainer.planner.in_flight import InFlight, Kept, by_name, most_in_flight
from trainer.planner.items import Item, Phase, Place, peak
from trainer.planner.states import ITEMSIZE, ModelStates
from trainer.planner.weights import FP32_BYTES, RankWeights
from trainer.recipe.batch_plan import BatchPlan
from trainer.recipe.pipeline import rank_of_stage, schedule_table
from trainer.recipe.stages import stages_of
from trainer.schema import Recipe, Tuning
from trainer.tasks import TASKS
from trainer.tuning.methods import method_of
from trainer.tuning.targets import roles_of

Stages = Mapping[int, Sequence[Block]]  # the blocks of a rank's stages, by the numbers of these

# What a process takes of a GPU before it holds a tensor: 1343 MB after the first one on a V100
# (Hugging Face transformers, Model training anatomy).
CONTEXT_BYTES = 1343 << 20
# A communicator's buffers after its first all-reduce on A100s with NVLink: 544 MB for two ranks,
# 688 MB for more (NVIDIA/nccl issue 964).
PAIR_BYTES, GROUP_BYTES = 544 << 20, 688 << 20
# cuBLAS keeps a workspace for each handle: 32 MiB on Hopper, 8.1 MiB elsewhere; the larger one
# (PyTorch, CUBLAS_WORKSPACE_CONFIG).
WORKSPACE_BYTES = 32 << 20
# What torch's allocator reserves beyond what is allocated, on average: the peaks that nanotron's
# runs logged (1.009 to 1.090 over 18 layouts, mean 1.027).
RESERVE = 0.027
# The resident memory of a rank beside tensors: Python, torch (for CPUs) and DeepSpeed; libraries of
# CUDA take more. Ranks that talk to each other by gloo take the second as well. Measured, as is the
# next, on 19 runs of tools/validate_here.py.
PROCESS_BYTES, GLOO_BYTES = 420 << 20, 40 << 20
# What glibc's heap keeps beyond what is allocated. With MALLOC_MMAP_THRESHOLD_=65536, under which
# all that is freed goes back to the system, runs hold what is allocated, to 1 %.
HEAP = 0.25
INDEX_BYTES = 8  # a token, and its label
ROW_PARALLEL = frozenset(("o", "down"))

RESERVED, CONTEXT, COMMUNICATORS, WORKSPACE = "allocator's reserve", "CUDA context", "NCCL buffers", "cuBLAS workspace"
ACTIVATIONS, RECOMPUTED, TEMPORARIES, PASSED_ON = "activations", "recomputed layer", "logits and gradients", "pipeline messages"
PROCESS, BATCH, STAGING = "process", "data of a step", "copy of a checkpoint"


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank of the pipeline, as the items it is made of. `on_gpu`: it computes on
    a GPU, and not on the host."""

    rank: int
    stages: Stages
    items: tuple[Item, ...]
    on_gpu: bool = True

    @property
    def num_bytes(self) -> int:
        """The bytes that it needs of what it computes on."""
        return self.peak(Place.DEVICE) + (0 if self.on_gpu else self.peak(Place.HOST))

    def peak(self, place: Place) -> int:
        """Return the bytes in one memory at the worst moment of a step."""
        return peak(self.items, place)


def memory(
    recipe: Recipe, plan: BatchPlan, network: TransformerConfig, layout: Layout, *, on_gpu: bool = True
) -> list[RankMemory]:
    """Return the memory of each rank of the pipeline. `on_gpu`: devices are GPUs, with what CUDA
    and NCCL take beside tensors."""
    found = []
    divided = stages_of_ranks(recipe, network)
    states = states_of_ranks(recipe, plan, network, layout, divided, on_gpu=on_gpu)
    for rank, (stages, state) in enumerate(zip(divided, states, strict=True)):
        items = [*state.items(), *_activations(recipe, plan, network, layout, rank, stages)]
        items += _host(recipe, plan, state)
        beside = of_gpu if on_gpu else of_cpu
        items += beside(layout, peak(items, Place.DEVICE))
        found.append(RankMemory(rank, stages, tuple(item for item in items if item.num_bytes), on_gpu))
    return found


# ---------------------------------------------------------------------------- weights


def stages_of_ranks(recipe: Recipe, network: TransformerConfig) -> list[Stages]:
    """Return the stages of each rank of the pipeline."""
    if recipe.parallel.pipeline == 1:
        return [{0: blocks_of(network)}]
    ranks: defaultdict[int, dict[int, Sequence[Block]]] = defaultdict(dict)
    for stage, (blocks, rank) in enumerate(zip(stages_of(recipe, network), rank_of_stage(recipe.parallel), strict=True)):
        ranks[rank][stage] = blocks
    return [ranks[rank] for rank in range(recipe.parallel.pipeline)]


def states_of_ranks(
    recipe: Recipe,
    plan: BatchPlan,
    network: TransformerConfig,
    layout: Layout,
    ranks: Sequence[Stages],
    *,
    data_rank: int = 0,
    on_gpu: bool = True,
) -> list[ModelStates]:
    """Return the model states of each rank of the pipeline, from its stages."""
    weights = RankWeights(network=network, tensor=layout.tp, tuning=recipe.tuning)
    alone = Tiling.of(recipe)
    states = [
        ModelStates(
            recipe=recipe,
            weights=weights.of_stages(stages),
            data=layout.dp * layout.cp,
            data_rank=data_rank,
            tiling=alone,
            accumulates=plan.num_micro_batches > 1,
            on_gpu=on_gpu,
        )
        for stages in ranks
    ]
    together = alone.together([state.num_groups for state in states], [len(state.trained) for state in states])
    return [state.cut(together) for state in states]


def checkpoint_bytes(recipe: Recipe, network: TransformerConfig) -> int:
    """Return the bytes of one checkpoint of the whole model."""
    weights = RankWeights(network=network, tensor=1, tuning=recipe.tuning).of_stages({0: blocks_of(network)})
    itemsize = ITEMSIZE[recipe.precision.settled]
    frozen = [weight for weight in weights if not weight.trained]
    frozen_bytes = sum(w.quantized_bytes if w.quantized else w.elements * itemsize for w in frozen)
    trained = sum(weight.elements for weight in weights if weight.trained)
    return bytes_of_one(recipe, trained=trained, frozen_bytes=frozen_bytes)


def disk_bytes(recipe: Recipe, network: TransformerConfig) -> int:
    """Return the bytes of all checkpoints that a run keeps, with the one that is being written."""
    return checkpoint_bytes(recipe, network) * (recipe.checkpoint.keep + 1) if recipe.checkpoint.every else 0


# ---------------------------------------------------------------------------- activations


def rows_of(recipe: Recipe) -> Rows:
    """Return the rows of a micro-batch as the worst of them are: where documents are packed, one
    that fills nearly all of a row, and another."""
    length, parts = recipe.data.seq_len, recipe.data.row_tokens // recipe.data.seq_len
    lengths = (length - 1, 1) if recipe.data.isolate_documents and length > 1 else (length,)
    return Rows(recipe.batch.micro_sequences, lengths * parts)


def saving(recipe: Recipe, network: TransformerConfig, layout: Layout, rows: Rows) -> Saving:
    """Return the way a rank computes micro-batches of such rows."""
    itemsize, tuned = ITEMSIZE[recipe.precision.settled], recipe.tuning.method is not None
    schedule = SCHEDULES.get(recipe.parallel.schedule)
    # Layers that leave the gradients of their weights for later convert them anew.
    defers = recipe.parallel.pipeline > 1 and (schedule is None or schedule.splits_backward)
    return Saving(
        network=network,
        rows=rows,
        tensor=layout.tp,
        divides_tokens=recipe.parallel.divides_tokens,
        itemsize=itemsize,
        recompute=recipe.train.recompute,
        casts=recipe.zero.stage == 0 and itemsize < FP32_BYTES and not tuned and not defers,
        by_token=TASKS[recipe.data.task].compares,
        beside=_beside(recipe.tuning) if tuned else None,
    )


def _beside(tuning: Tuning) -> Beside:
    method, adapted = method_of(tuning), roles_of(tuning)
    kinds = (adapted - ROW_PARALLEL, adapted & ROW_PARALLEL)
    inputs, outputs = (
        frozenset().union(*(roles for roles, keeps in zip(kinds, kept, strict=True) if keeps))
        for kept in (method.keeps_inputs, method.keeps_outputs)
    )
    features = tuning.rank if method.is_low_rank else tuning.bottleneck if method.has_bottleneck else 0
    return Beside(inputs, outputs, features, tuning.dropout if method.is_low_rank else 0.0)


def _activations(
    recipe: Recipe, plan: BatchPlan, network: TransformerConfig, layout: Layout, rank: int, stages: Stages
) -> Iterator[Item]:
    counted = saving(recipe, network, layout, rows_of(recipe))
    last = recipe.parallel.pipeline * recipe.parallel.virtual_stages - 1
    kinds, of_stage, passed_on = {}, {}, {}
    for stage, blocks in stages.items():
        kinds[stage] = counted.of_blocks(blocks)
        passed_on[stage] = counted.passed_on(first=stage == 0, last=stage == last) * (last > 0)
        of_stage[stage] = Kept(kinds[stage].total() + passed_on[stage], counted.deferred(blocks))
    flying = _in_flight(recipe, plan, rank, of_stage)
    of_kind: Counter[str] = Counter()
    for stage, number in flying.whole.items():
        for kind, num_bytes in kinds[stage].items():
            of_kind[kind] += number * num_bytes
    number = sum(flying.whole.values())
    note = f"{number} micro-batches in flight" if last else ""
    for kind, num_bytes in of_kind.items():
        yield Item(f"{ACTIVATIONS}: {kind}", num_bytes, phase=Phase.BACKWARD, note=note)
    waiting = sum(of_stage[stage].until_weights * number for stage, number in flying.weights.items())
    yield Item(f"{ACTIVATIONS}: waiting for weights' gradients", waiting, phase=Phase.BACKWARD)
    messages = sum(passed_on[stage] * number for stage, number in flying.whole.items())
    yield Item(PASSED_ON, messages, phase=Phase.BACKWARD)
    yield Item(RECOMPUTED, max(map(counted.while_recomputed, stages.values())), phase=Phase.BACKWARD)
    yield Item(TEMPORARIES, max(map(counted.temporaries, stages.values())), phase=Phase.BACKWARD)


def _in_flight(recipe: Recipe, plan: BatchPlan, rank: int, of_stage: Mapping[int, Kept]) -> InFlight:
    parallel = recipe.parallel
    if parallel.pipeline == 1:
        return InFlight(Counter(of_stage.keys()), Counter())
    if parallel.schedule not in SCHEDULES:  # a file
        return most_in_flight(schedule_table(recipe, plan).steps[rank], of_stage)
    return by_name(
        parallel.schedule,
        ranks=parallel.pipeline,
        virtual_stages=parallel.virtual_stages,
        num_micro_batches=plan.num_micro_batches,
        rank=rank,
        of_stage=of_stage,
    )


# ---------------------------------------------------------------------------- beside tensors


def _host(recipe: Recipe, plan: BatchPlan, states: ModelStates) -> Iterator[Item]:
    yield Item(PROCESS, PROCESS_BYTES, Place.HOST)
    yield Item(BATCH, plan.sequences_per_rank * plan.row_tokens * 2 * INDEX_BYTES, Place.HOST)
    if recipe.checkpoint.asynchronous and recipe.checkpoint.every:
        yield Item(STAGING, states.saved_bytes, Place.HOST)


def of_cpu(layout: Layout, allocated: int) -> Iterator[Item]:
    """Yield what a rank that computes on the host holds there beside tensors and its process."""
    yield Item(RESERVED, int(HEAP * allocated), Place.HOST)
    yield Item(PROCESS, GLOO_BYTES * (layout.world_size > 1), Place.HOST, note="gloo")


def of_gpu(layout: Layout, allocated: int) -> Iterator[Item]:
    """Yield what a GPU holds beside tensors."""
    yield Item(WORKSPACE, WORKSPACE_BYTES)
    yield Item(RESERVED, int(RESERVE * allocated))
    yield Item(CONTEXT, CONTEXT_BYTES)
    sizes = [layout.tp, layout.pp, layout.dp * layout.cp, layout.tp * layout.pp]
    sizes += [layout.dp] * (layout.cp > 1) + [2] * (layout.pp > 1)
    yield Item(COMMUNICATORS, sum(GROUP_BYTES if size > 2 else PAIR_BYTES for size in sizes if size > 1))
