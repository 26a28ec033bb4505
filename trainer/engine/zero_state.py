"""This rank's fp32 weights and optimizer state, wherever DeepSpeed keeps them, as ranges of logical tensors.

DeepSpeed's optimizers keep flat fp32 tensors, whose state lies in the optimizer of torch that they wrap:

| ZeRO | a flat tensor is | this rank's part of a parameter |
|---|---|---|
| 0 | the parameter itself | all of it; the data-parallel ranks have it alike, and each saves its equal share |
| 1, 2 | this rank's partition of a parameter group, concatenated | what of it lies in the partition (`_hp_mapping`) |
| 3 | this rank's share of every parameter of a sub-group | the rank-th of equal shares, padded; on NVMe while unused |

The weights in the compute format are the fp32 ones, rounded, so they are not saved but made again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.mesh import Group
from parallel.params import Companion, Piece, ShardSpec
from trainer.engine.zero_parameter import divided
from trainer.update_rules import WEIGHT, StepCount, UpdateRule

STEP = "step"  # torch's name for the number of updates, the same for all parameters


@dataclass(frozen=True)
class Extent:
    """Elements [start, start + count) of a flattened local parameter, at `offset` of a flat tensor."""

    spec: ShardSpec
    start: int
    count: int
    offset: int

    def within(self, first: int, end: int) -> Extent:
        """The part of it that lies in [first, end) of the parameter."""
        start, stop = max(self.start, first), min(self.start + self.count, end)
        return Extent(self.spec, start, max(0, stop - start), self.offset + start - self.start)


@dataclass(frozen=True)
class Stretch:
    """Elements [offset, offset + count) of a flattened piece in one of its states: what a fragment holds.

    A state that does not go element by element (Adafactor's row and column means) is a piece of its own.
    """

    piece: Piece
    state: str
    dtype: torch.dtype
    offset: int
    count: int


class Source(Protocol):
    """What a restored state is read from."""

    def states(self, name: str) -> Sequence[str]:
        """The optimizer's states that there are of this weight, in their order."""

    def read(self, stretch: Stretch) -> Tensor:
        """Its values, flat, in any format."""


@dataclass(frozen=True)
class _Flat:
    """`tensor`: as the optimizer knows it. `replicated`: all data-parallel ranks have it alike. `sub_group`: of ZeRO-3.
    `trained`: it has optimizer state. `state`: what it is."""

    tensor: Tensor
    extents: Sequence[Extent]
    replicated: bool = False
    sub_group: int | None = None
    trained: bool = True
    state: str = WEIGHT


class ZeroState:
    """Reads and sets it. Every rank of the data-parallel group must `restore` together."""

    def __init__(
        self,
        optimizer: Any,
        specs: Sequence[tuple[nn.Parameter, ShardSpec]],
        constants: Sequence[tuple[ShardSpec, Tensor]],
        companions: Sequence[Companion] = (),
        *,
        rule: UpdateRule,
        group: Group,
        zero_stage: int,
    ) -> None:
        """`optimizer`: what `deepspeed.initialize` returned. `constants`: saved like weights, never trained."""
        self._optimizer = optimizer
        self._inner = optimizer.optimizer if zero_stage else optimizer
        self._rule = rule
        self._specs = dict(specs)
        self._constants = constants
        self._companions = companions
        self._group = group
        self._zero = zero_stage

    @property
    def updates(self) -> int:
        """Optimizer updates made, skipped steps left out."""
        return max((int(state[STEP]) for state in self._inner.state.values() if STEP in state), default=0)

    def stretches(self) -> list[Stretch]:
        """What this rank saves, in the order in which `tensors` brings it; all ranks' together are the whole model."""
        return [stretch for flat in self._flats() for stretch, _ in self._saved(flat)]

    def tensors(self) -> Iterator[Tensor]:
        """The values of each stretch, flat; each is valid until the next is asked for."""
        for flat in self._flats():
            with self._resident(flat):
                for stretch, (state, at) in self._saved(flat):
                    values = self._values(flat, state).detach().reshape(-1)
                    yield values.narrow(0, at, stretch.count)

    @torch.no_grad()
    def restore(self, source: Source, *, updates: int) -> None:
        """Set everything as `source` has it, after `updates` optimizer updates. Padding becomes 0."""
        self._divide()
        for flat in self._flats():
            states = source.states(flat.extents[0].spec.pieces[0].name) if flat.extents and flat.trained else ()
            with self._resident(flat, changed=True):
                self._restore_one(flat, flat.state, source)
                for state in states:
                    self._restore_one(flat, state, source)
                if states and updates:
                    self._set_updates(flat.tensor, updates)
        self._round()

    @torch.no_grad()
    def clear(self, kept: Mapping[str, Tensor]) -> None:
        """Set those elements of fp32 weights to 0 that `kept` (bool, of whole logical tensors by name) leaves out. Every
        rank of the data-parallel group must call it with the same."""
        if not kept:
            return
        self._divide()
        for flat in self._flats():
            parts = [part for extent in flat.extents for part in _pieces(extent) if part[0].name in kept]
            if parts:
                with self._resident(flat, changed=True):
                    for piece, offset, count, at in parts:
                        stays = kept[piece.name].flatten()[offset : offset + count].to(flat.tensor.device)
                        self._values(flat, WEIGHT).view(-1).narrow(0, at, count).masked_fill_(~stays, 0.0)
        self._round()

    def _restore_one(self, flat: _Flat, state: str, source: Source) -> None:
        if state != flat.state and state not in self._inner.state[flat.tensor]:
            self._inner.state[flat.tensor][state] = self._empty_state(flat, state)
        values = self._values(flat, state)
        if values.shape != flat.tensor.shape:
            values.copy_(source.read(_whole(flat, state, values)).view(values.shape))
            return
        values = values.view(-1)
        if self._zero:  # else the parameter's padding rows are 0 already
            values.zero_()
        for extent in flat.extents:
            for piece, offset, count, at in _pieces(extent):
                target = values.narrow(0, at, count)
                target.copy_(source.read(Stretch(piece, state, values.dtype, offset, count)))

    def _empty_state(self, flat: _Flat, state: str) -> Tensor:
        (shape,) = (kept.shape for kept in self._rule.states if kept.name == state)
        return torch.zeros(shape.beside(flat.tensor.shape), dtype=flat.tensor.dtype, device=flat.tensor.device)

    def _set_updates(self, tensor: Tensor, updates: int) -> None:
        """Set the optimizer's own count of its updates of a weight."""
        if self._rule.count is StepCount.TENSOR:
            fused = any(group.get("fused") for group in self._inner.param_groups)
            count = torch.tensor(float(updates), dtype=torch.float32, device=tensor.device if fused else "cpu")
            self._inner.state[tensor][STEP] = count
        elif self._rule.count is StepCount.NUMBER:
            self._inner.state[tensor][STEP] = updates

    def _divide(self) -> None:
        """Let go of the weights in the compute format that ZeRO-3 holds whole: `_round` gathers only what is not there."""
        if self._zero == 3:
            self._optimizer._partition_all_parameters()

    def _round(self) -> None:
        """Make the weights in the compute format again."""
        if self._zero in (1, 2):
            self._optimizer.update_lp_params()
        elif self._zero == 3 and self._optimizer.persistent_parameters:
            persistent = self._optimizer.persistent_parameters
            persistent[0].all_gather(persistent)

    @contextmanager
    def _resident(self, flat: _Flat, *, changed: bool = False) -> Iterator[None]:
        """Bring a sub-group from NVMe for the block; `changed`: write it back, and round its weights."""
        zero, index = self._optimizer, flat.sub_group
        swapped = index is not None and zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        try:
            yield
            if changed and index is not None:
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if changed and swapped:
                zero._optimizer_states_and_gradient_swap_out(index)
        finally:
            if swapped and not changed:
                zero._release_swap_buffers(index)

    def _values(self, flat: _Flat, state: str) -> Tensor:
        values: Tensor = flat.tensor if state == flat.state else self._inner.state[flat.tensor][state]
        return values

    def _saved(self, flat: _Flat) -> Iterator[tuple[Stretch, tuple[str, int]]]:
        """Each stretch that this rank saves of it, with its state and its place in the flat tensor."""
        state = self._inner.state.get(flat.tensor, {}) if flat.trained else {}
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != STEP}
        for name, values in {flat.state: flat.tensor, **tensors}.items():
            if values.shape != flat.tensor.shape:
                if flat.extents[0].spec.owned and self._group.rank == 0:
                    yield _whole(flat, name, values), (name, 0)
                continue
            for extent in flat.extents:
                if extent.spec.owned:
                    for piece, offset, count, at in _pieces(self._share(extent) if flat.replicated else extent):
                        yield Stretch(piece, name, values.dtype, offset, count), (name, at)

    def _share(self, extent: Extent) -> Extent:
        """This rank's part of what all data-parallel ranks have alike."""
        share = -(-extent.count // self._group.size)
        return extent.within(self._group.rank * share, (self._group.rank + 1) * share)

    def _flats(self) -> Iterator[_Flat]:
        if self._zero == 0:
            yield from (_replicated(p, spec) for p, spec in self._specs.items() if p.requires_grad)
        elif self._zero < 3:
            yield from self._partitions()
        else:
            yield from self._sub_groups()
        yield from (self._frozen(p, spec) for p, spec in self._specs.items() if not p.requires_grad)
        yield from (_replicated(tensor, spec, trained=False) for spec, tensor in self._constants)
        yield from (replace(_replicated(c.tensor, c.spec, trained=False), state=c.state) for c in self._companions)

    def _frozen(self, parameter: nn.Parameter, spec: ShardSpec) -> _Flat:
        """A weight that is not trained, in the format in which it is held."""
        if self._zero < 3:
            return _replicated(parameter.detach(), spec, trained=False)
        return _Flat(divided(parameter).ds_tensor, [self._extent(parameter, 0)], trained=False)

    def _extent(self, parameter: nn.Parameter, offset: int) -> Extent:
        """Of a parameter that ZeRO-3 divides: the rank-th of equal shares."""
        share = divided(parameter).partition_numel()
        start = self._group.rank * share
        return Extent(self._specs[parameter], start, max(0, min(share, divided(parameter).ds_numel - start)), offset)

    def _partitions(self) -> Iterator[_Flat]:
        zero = self._optimizer
        if hasattr(zero, "bf16_groups"):  # stage 1 in bf16 has an optimizer of its own
            partitions, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        else:
            partitions, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
        for flat, parameters in zip(partitions, groups, strict=True):
            mapped = [(self._specs[p], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
            yield _Flat(
                flat,
                [
                    Extent(spec, at.lp_fragment_address.start, at.lp_fragment_address.numel, at.hp_fragment_address.start)
                    for spec, at in mapped
                ],
            )

    def _sub_groups(self) -> Iterator[_Flat]:
        zero = self._optimizer
        for index, (flat, parameters) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
            offsets = itertools.accumulate((parameter.partition_numel() for parameter in parameters), initial=0)
            extents = [self._extent(parameter, offset) for parameter, offset in zip(parameters, offsets, strict=False)]
            yield _Flat(flat, extents, sub_group=index)


def _replicated(tensor: Tensor, spec: ShardSpec, *, trained: bool = True) -> _Flat:
    return _Flat(tensor, [Extent(spec, 0, tensor.numel(), 0)], replicated=True, trained=trained)


def _pieces(extent: Extent) -> Iterator[tuple[Piece, int, int, int]]:
    """(piece, offset in its flattening, count, place in the flat tensor) of all pieces of which the extent has a part."""
    for piece in extent.spec.pieces:
        numel = math.prod(piece.size)
        if not numel:  # a rank that holds only padding of it
            continue
        first = piece.row * (numel // piece.rows)
        part = extent.within(first, first + numel)
        if part.count:
            yield piece, part.start - first, part.count, part.offset


def _whole(flat: _Flat, state: str, values: Tensor) -> Stretch:
    """A state with a shape of its own, under the name of its parameter's first piece."""
    (extent,) = flat.extents
    shape = tuple(values.shape)
    piece = Piece(f"{extent.spec.pieces[0].name}:{state}", shape, (0,) * len(shape), shape)
    return Stretch(piece, state, values.dtype, 0, values.numel())
