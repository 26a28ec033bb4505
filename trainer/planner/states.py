"""The model states of a rank, to the byte: weights, master weights, optimizer states, gradients,
and the buffers in which ZeRO moves them. No torch.

What each stage allocates was read from DeepSpeed 0.19.8 and is compared with real engines byte by
byte. Ψ: this rank's trained elements; d: data-parallel ranks; w: bytes of the compute format.

| stage | weights | masters | states of Adam | gradients while micro-batches run |
|---|---|---|---|---|
| 0 | 4 Ψ | 0 | 8 Ψ | 4 Ψ |
| 1, bf16 on the device | w Ψ | 4 Ψ/d | 8 Ψ/d | 4 Ψ, and w Ψ of the last micro-batch |
| 1 else | w Ψ | 4 Ψ/d | 8 Ψ/d | 4 Ψ |
| 2 | w Ψ | 4 Ψ/d | 8 Ψ/d | 4 Ψ/d |
| 3 | w Ψ/d, whole ones below the threshold, gathered ones | 4 Ψ/d | 8 Ψ/d | 4 Ψ/d |

Stages 1 and 2 pad each of the two groups (matrices, others) to 2 d elements, stage 3 each weight to
d. With offload the masters, the states and another copy of the gradients are in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod

from trainer.engine.bucket import bucket_size
from trainer.engine.tiling import Tiling, cut
from trainer.planner.items import Item, Phase, Place
from trainer.planner.weights import FP32_BYTES, Weight
from trainer.schema import Dtype, Recipe
from trainer.update_rules import Shape, State, StepCount, rule_of, states_of

ITEMSIZE: dict[Dtype, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# The multiple of elements that each data-parallel rank's part of a group has (DeepSpeed's
# nccl_start_alignment_factor).
ALIGNMENT = 2
COUNTER_BYTES = 4  # an fp32 scalar: the updates of a tensor
# DeepSpeed reduces the gradients of stage 0 in runs of this many (MEMORY_OPT_ALLREDUCE_SIZE).
REDUCED_AT_ONCE = 500_000_000
# DeepSpeed's NVMe swapping leaves smaller tensors in memory, and pads buffers for each thread
# [bytes].
LEAST_SWAPPED, SWAP_ALIGNMENT = 2**20, 1024

WEIGHTS, PERSISTENT, GATHERED = "weights", "weights kept whole", "weights gathered"
MASTERS, STATES, GRADIENTS = "master weights", "optimizer states", "gradients"
BUCKETS, REDUCED, COPIES = "reduction buckets", "gradients being reduced", "copies for offload"
SWAP_BUFFERS = "swap buffers"


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """The states of one rank's weights.

    `tiling`: how the ranks of its replica cut trained weights into groups. `accumulates`: a step
    has several micro-batches. `data_rank`: its number among the data-parallel ranks. `on_gpu`: it
    computes on one.
    """

    recipe: Recipe
    weights: Sequence[Weight]
    data: int
    data_rank: int = 0
    tiling: Tiling
    accumulates: bool = True
    on_gpu: bool = True

    def items(self) -> list[Item]:
        return [item for item in self._items() if item.num_bytes]

    def _items(self) -> Iterator[Item]:
        yield Item(WEIGHTS, sum(weight.quantized_bytes for weight in self.weights if weight.quantized))
        yield from self._divided() if self._stage == 3 else self._whole()

    @property
    def saved_bytes(self) -> int:
        """The bytes that this rank writes of a checkpoint: its share of trained weights with their
        states, and of frozen ones."""
        held = [item for item in self.items() if item.name in (MASTERS, STATES)]
        whole = [item for item in self.items() if item.name == WEIGHTS] if self._stage == 0 else []
        share = sum(item.num_bytes for item in (*held, *whole))
        return share // self.data if self._stage == 0 else share + self._itemsize * sum(self._frozen) // self.data

    # ------------------------------------------------------------------------ what is held

    @property
    def _stage(self) -> int:
        return self.recipe.zero.stage

    @property
    def _itemsize(self) -> int:
        return ITEMSIZE[self.recipe.precision.settled]

    @cached_property
    def _frozen(self) -> list[int]:
        return [weight.elements for weight in self.weights if not weight.trained and weight.quantized is None]

    @cached_property
    def trained(self) -> list[Weight]:
        return [weight for weight in self.weights if weight.trained]

    @cached_property
    def _kinds(self) -> list[list[Weight]]:
        return [[weight for weight in self.trained if weight.is_matrix is kind] for kind in (True, False)]

    @property
    def num_groups(self) -> int:
        """The number of groups before stage 3 cuts them into tiles."""
        return len(self.tiling.groups(self._kinds, self._here))

    def cut(self, tiling: Tiling) -> ModelStates:
        return replace(self, tiling=tiling)

    @cached_property
    def groups(self) -> list[list[Weight]]:
        """The trained weights in DeepSpeed's groups, at stage 3 in its tiles."""
        groups = self.tiling.groups(self._kinds, self._here)
        if self._stage < 3 or self.tiling.tile is not None:
            return groups
        return cut(groups, self.recipe.zero.sub_group_size, self._here)

    def _here(self, weight: Weight) -> int:
        return self._share(weight.elements) if self._stage == 3 else weight.elements

    def _share(self, elements: int) -> int:
        return -(-elements // self.data)

    @property
    def _offloads(self) -> bool:
        return self.recipe.zero.offload_optimizer.device != "none"

    @property
    def _place(self) -> Place:
        """The memory of masters, states and the gradients beside them."""
        return Place.HOST if self._offloads else Place.DEVICE

    def _states(self, shapes: Sequence[tuple[int, ...]]) -> int:
        """Return the bytes of the states of tensors with these shapes."""
        keys = self.recipe.optimizer
        elements = sum(prod(state.shape.beside(shape)) for state in states_of(keys) for shape in shapes if _has(state, shape))
        return FP32_BYTES * elements + COUNTER_BYTES * len(shapes) * (rule_of(keys).count is StepCount.TENSOR)

    @property
    def _summing(self) -> Phase:
        """The part of a step in which gradients that are not kept between steps are there. With one
        micro-batch they come as its activations go, and are all there when none is left."""
        return Phase.ALWAYS if self.accumulates else Phase.UPDATE

    @property
    def _reducing(self) -> Phase:
        """The part of a step in which a full bucket is reduced: within the backward, unless all
        gradients fit into one."""
        trained = sum(weight.elements for weight in self.trained)
        return Phase.BACKWARD if self._bucket() < trained else Phase.UPDATE

    def _bucket(self) -> int:
        """Return the elements of a bucket of gradients."""
        trained = sum(weight.elements for weight in self.trained)
        return bucket_size(self.recipe.zero.reduce_bucket_size, trained, on_cpu=not self.on_gpu)

    # ------------------------------------------------------------------------ stages 0, 1, 2

    def _whole(self) -> Iterator[Item]:
        yield Item(WEIGHTS, self._itemsize * sum(self._frozen))
        trained = sum(weight.elements for weight in self.trained)
        if self._stage == 0:
            yield Item(WEIGHTS, FP32_BYTES * trained)
            yield Item(STATES, self._states([weight.shape for weight in self.trained]))
            yield Item(GRADIENTS, FP32_BYTES * trained, phase=self._summing)
            flat = FP32_BYTES * min(trained, REDUCED_AT_ONCE) * (self.data > 1)
            yield Item(REDUCED, flat, phase=Phase.UPDATE)
            return
        padded = [self._padded(group) for group in self.groups]
        part = sum(padded) // self.data
        yield Item(WEIGHTS, self._itemsize * sum(padded))
        yield Item(MASTERS, FP32_BYTES * part, self._place)
        yield Item(STATES, self._states([(elements // self.data,) for elements in padded]), self._place)
        yield from self._whole_gradients(trained, sum(padded))
        if self._offloads:
            largest = max((weight.elements for weight in self.trained), default=0)
            yield Item(COPIES, self._itemsize * (part + largest), Place.HOST)
            yield Item(COPIES, self._itemsize * largest)

    def _padded(self, group: Sequence[Weight]) -> int:
        multiple = ALIGNMENT * self.data
        return -(-sum(weight.elements for weight in group) // multiple) * multiple

    @property
    def _in_flat_fp32(self) -> bool:
        """Return whether DeepSpeed's bf16 optimizer runs, which sums gradients in a flat buffer."""
        return self._stage == 1 and self.recipe.precision.settled == "bf16" and not self._offloads

    def _whole_gradients(self, trained: int, padded: int) -> Iterator[Item]:
        part, itemsize = padded // self.data, self._itemsize
        contiguous = self.recipe.zero.contiguous_gradients or self._offloads
        buckets = self._bucket() * (1 + self.recipe.zero.overlap_comm) * contiguous
        if self._in_flat_fp32:
            yield Item(GRADIENTS, FP32_BYTES * padded)
            yield Item(GRADIENTS, itemsize * trained, phase=self._summing)
            yield Item(REDUCED, FP32_BYTES * padded * (padded <= REDUCED_AT_ONCE), phase=Phase.UPDATE)
            return
        if self._stage == 1:
            yield Item(GRADIENTS, FP32_BYTES * trained, phase=self._summing)
            yield Item(REDUCED, FP32_BYTES * part, phase=Phase.UPDATE)
            yield Item(GRADIENTS, FP32_BYTES * part * self._offloads, Place.HOST)
            yield Item(BUCKETS, FP32_BYTES * buckets)
            return
        yield Item(BUCKETS, itemsize * buckets)
        if itemsize < FP32_BYTES or not self._offloads:
            yield Item(GRADIENTS, FP32_BYTES * part, phase=self._summing)
        elif self.accumulates:
            yield Item(GRADIENTS, FP32_BYTES * self._touched(), Place.HOST)
        if itemsize < FP32_BYTES:
            yield Item(REDUCED, (itemsize + FP32_BYTES) * self._bucket(), phase=self._reducing)
        if self._offloads:
            yield Item(GRADIENTS, FP32_BYTES * part, Place.HOST)

    def _touched(self) -> int:
        """Return the elements of all weights of which this rank's partition has a part."""
        touched = 0
        for group in self.groups:
            part = self._padded(group) // self.data
            first, last = self.data_rank * part, (self.data_rank + 1) * part
            ends = list(accumulate(weight.elements for weight in group))
            touched += sum(
                weight.elements for weight, end in zip(group, ends, strict=True) if end - weight.elements < last and end > first
            )
        return touched

    # ------------------------------------------------------------------------ stage 3

    def _divided(self) -> Iterator[Item]:
        zero, itemsize = self.recipe.zero, self._itemsize
        tiles = [sum(map(self._here, group)) for group in self.groups]
        every = [*(weight.elements for weight in self.trained), *self._frozen]
        persistent = [n for n in every if n <= zero.stage3_param_persistence_threshold]
        yield from self._divided_weights(tiles)
        yield Item(PERSISTENT, itemsize * sum(persistent))
        yield Item(GATHERED, itemsize * self._live(sum(every) - sum(persistent)), phase=Phase.BACKWARD)
        in_memory = [elements for elements in tiles if not self._swaps(elements, FP32_BYTES, zero.offload_optimizer.device)]
        yield Item(MASTERS, FP32_BYTES * sum(in_memory), self._place)
        yield Item(STATES, self._states([(elements,) for elements in in_memory]), self._place)
        yield Item(GRADIENTS, FP32_BYTES * sum(in_memory) * self._offloads, self._place)
        if len(in_memory) < len(tiles):
            yield from self._swapped_states()
        yield Item(GRADIENTS, FP32_BYTES * sum(tiles), self._place)
        reduced_in = ITEMSIZE[self.recipe.deepspeed.communication_data_type or self.recipe.precision.settled]
        yield Item(BUCKETS, reduced_in * self._bucket() * zero.contiguous_gradients)
        yield Item(REDUCED, reduced_in * (self._bucket() + self._share(self._bucket())), phase=self._reducing)
        if not self._offloads:
            yield Item(REDUCED, FP32_BYTES * max(tiles, default=0), phase=Phase.UPDATE)

    def _swapped_states(self) -> Iterator[Item]:
        """Yield the tiles that are on NVMe, and the buffers that they are swapped through."""
        keys = self.recipe.zero.offload_optimizer
        tiles = [[self._here(weight) for weight in group] for group in self.groups]
        swapped = [tile for tile in tiles if self._swaps(sum(tile), FP32_BYTES, keys.device)]
        elements = sum(map(sum, swapped))
        counters = COUNTER_BYTES * len(swapped) * (rule_of(self.recipe.optimizer).count is StepCount.TENSOR)
        yield Item(MASTERS, FP32_BYTES * elements, Place.NVME)
        yield Item(STATES, self._states([(sum(tile),) for tile in swapped]) - counters, Place.NVME)
        yield Item(STATES, counters, Place.HOST)
        gradients = [share for tile in swapped for share in tile if self._swaps(share, FP32_BYTES, keys.device)]
        yield Item(GRADIENTS, FP32_BYTES * sum(gradients), Place.NVME)
        buffers = keys.buffer_count * FP32_BYTES * self._aligned(max(map(sum, tiles)), FP32_BYTES)
        yield Item(SWAP_BUFFERS, buffers, Place.HOST)

    def _divided_weights(self, tiles: Sequence[int]) -> Iterator[Item]:
        """Yield this rank's shares of the weights, in the memory that the recipe names."""
        keys, itemsize = self.recipe.zero.offload_param, self._itemsize
        frozen = [self._share(elements) for elements in self._frozen]
        if keys.device != "nvme":
            yield Item(WEIGHTS, itemsize * (sum(tiles) + sum(frozen)), Place.DEVICE if keys.device == "none" else Place.HOST)
            return
        in_host, left = 0, keys.max_in_cpu
        for elements in tiles:  # whole tiles stay in host memory as long as there is room
            in_host += elements * (elements <= left)
            left -= elements * (elements <= left)
        shares = [*(self._share(weight.elements) for weight in self.trained), *frozen]
        on_disk = [share for share in shares if self._swaps(share, itemsize, keys.device)]
        small = [share for share in frozen if not self._swaps(share, itemsize, keys.device)]
        yield Item(WEIGHTS, itemsize * (in_host + sum(small)), Place.HOST)
        # Files of weights that have moved to host memory stay.
        yield Item(WEIGHTS, itemsize * sum(on_disk), Place.NVME)
        each = keys.buffer_size or self._share(max(weight.elements for weight in self.weights))
        yield Item(SWAP_BUFFERS, keys.buffer_count * itemsize * self._aligned(each, itemsize), Place.HOST)

    def _swaps(self, elements: int, itemsize: int, device: str) -> bool:
        """Return whether a tensor is large enough to be on NVMe, where the recipe wants it."""
        return device == "nvme" and elements * itemsize >= max(LEAST_SWAPPED, self.recipe.deepspeed.aio.block_size)

    def _aligned(self, elements: int, itemsize: int) -> int:
        multiple = SWAP_ALIGNMENT * self.recipe.deepspeed.aio.intra_op_parallelism // itemsize
        return -(-elements // multiple) * multiple

    def _live(self, divided: int) -> int:
        """Return the gathered elements that are there at most: those that are kept or fetched ahead
        for their next use, and the weight in use."""
        zero = self.recipe.zero
        kept = max(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
        largest = max((weight.elements for weight in self.weights), default=0)
        return min(divided, kept + largest)


def _has(state: State, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of this shape has the state: averages over rows are of matrices."""
    is_vector = len(shape) < 2
    if state.of_vectors:
        return is_vector
    return state.shape is Shape.WEIGHT or not is_vector
