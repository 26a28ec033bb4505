"""The fp32 weights and optimizer state of this rank, wherever DeepSpeed keeps them, as fragments.

DeepSpeed's optimizers keep flat fp32 tensors, whose state lies in the optimizer of torch that they
wrap. Each way of dividing them has a class:

| ZeRO | class | a flat tensor is | this rank's part of a parameter |
|---|---|---|---|
| 0 | `ReplicatedState` | the parameter itself | all of it; each data-parallel rank saves an equal share |
| 1, 2 | `PartitionedState` | this rank's partition of a parameter group | what lies in the partition |
| 3 | `DividedState` | this rank's share of every parameter of a sub-group | one of equal shares, padded |

The weights in the compute format are the fp32 ones, rounded, so they are not saved but made again.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from parallel.mesh import Group
from parallel.params import AuxiliaryState, ShardSpec
from parallel.pieces import Fragment, Piece
from trainer.engine.zero_parameter import divided
from trainer.update_rules import WEIGHT, StepCount, UpdateRule

STEP = "step"  # torch's name for the number of updates, the same for all parameters


class StateFragment(NamedTuple):
    """A fragment of one state of a weight, in this format: what a checkpoint has under one name."""

    fragment: Fragment
    state: str
    dtype: torch.dtype


class Source(Protocol):
    """A checkpoint from which a state is restored."""

    def states(self, name: str) -> Sequence[str]:
        """Return the optimizer's states that there are of this weight, in their order."""

    def read(self, fragment: Fragment, state: str) -> Tensor:
        """Return its values, flat, in any format."""


@dataclass(frozen=True)
class _Part:
    """Elements [start, start + count) of a flattened parameter, at `offset` of a flat tensor."""

    spec: ShardSpec
    start: int
    count: int
    offset: int

    def within(self, first: int, end: int) -> _Part:
        """Return the part of this one that is in [first, end) of the parameter."""
        start, stop = max(self.start, first), min(self.start + self.count, end)
        return _Part(self.spec, start, max(0, stop - start), self.offset + start - self.start)

    def fragments(self) -> Iterator[tuple[Fragment, int]]:
        """Yield its fragment of each piece, with the offset in the flat tensor."""
        for piece in self.spec.pieces:
            if not piece.numel:  # a rank that has only padding of it
                continue
            first = piece.row * (piece.numel // piece.rows)
            part = self.within(first, first + piece.numel)
            if part.count:
                yield Fragment(piece, part.start - first, part.count), part.offset


@dataclass(frozen=True)
class _Flat:
    """A tensor as the optimizer knows it, and the parts of parameters in it.

    `replicated`: all data-parallel ranks have copies of it. `sub_group`: its number at ZeRO-3.
    `trained`: it has optimizer state. `state`: the name of the state that its values are.
    """

    tensor: Tensor
    parts: Sequence[_Part]
    replicated: bool = False
    sub_group: int | None = None
    trained: bool = True
    state: str = WEIGHT

    def fragments(self) -> Iterator[tuple[Fragment, int]]:
        """Yield all fragments in it, each with its offset."""
        for part in self.parts:
            yield from part.fragments()


class ZeroState(ABC):
    """Reads and sets the state. Every rank of the data-parallel group must `restore` together.

    `optimizer`: what `deepspeed.initialize` returned. `constants`: saved like weights, never
    trained. `group`: the data-parallel ranks.
    """

    def __init__(
        self,
        optimizer: Any,
        specs: Sequence[tuple[nn.Parameter, ShardSpec]],
        constants: Sequence[tuple[ShardSpec, Tensor]],
        auxiliary: Sequence[AuxiliaryState] = (),
        *,
        rule: UpdateRule,
        group: Group,
    ) -> None:
        self._optimizer = optimizer
        self._rule = rule
        self._specs = dict(specs)
        self._constants = constants
        self._auxiliary = auxiliary
        self._group = group

    @property
    def updates(self) -> int:
        """The number of optimizer updates, skipped steps left out."""
        return max((int(state[STEP]) for state in self._inner.state.values() if STEP in state), default=0)

    def fragments(self) -> list[StateFragment]:
        """Return the fragments that this rank saves, in the order of `tensors`. Those of all ranks
        together are the whole model."""
        return [saved for flat in self._flats() for saved, _ in self._saved(flat)]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the values of each of the `fragments`, flat; valid until the next is asked for."""
        for flat in self._flats():
            with self._resident(flat):
                for (fragment, state, _), at in self._saved(flat):
                    values = self._values(flat, state).detach().reshape(-1)
                    yield values.narrow(0, at, fragment.count)

    @torch.no_grad()
    def restore(self, source: Source, *, updates: int) -> None:
        """Set everything as `source` has it, after `updates` optimizer updates. Padding is 0."""
        self._free_weights()
        for flat in self._flats():
            states = source.states(flat.parts[0].spec.pieces[0].name) if flat.parts and flat.trained else ()
            with self._resident(flat, changed=True):
                self._restore_one(flat, flat.state, source)
                for state in states:
                    self._restore_one(flat, state, source)
                if states and updates:
                    self._set_updates(flat.tensor, updates)
        self._round()

    @torch.no_grad()
    def clear(self, kept: Mapping[str, Tensor]) -> None:
        """Set those elements of fp32 weights to 0 that `kept` (bool, of whole logical tensors by
        name) leaves out. Every rank of the data-parallel group must call it with the same."""
        if not kept:
            return
        self._free_weights()
        for flat in self._flats():
            changed = [(fragment, at) for fragment, at in flat.fragments() if fragment.piece.name in kept]
            if changed:
                with self._resident(flat, changed=True):
                    for fragment, at in changed:
                        end = fragment.offset + fragment.count
                        stays = kept[fragment.piece.name].flatten()[fragment.offset : end].to(flat.tensor.device)
                        self._values(flat, WEIGHT).view(-1).narrow(0, at, fragment.count).masked_fill_(~stays, 0.0)
        self._round()

    @property
    def _inner(self) -> Any:
        """The optimizer of torch that DeepSpeed's wraps."""
        return self._optimizer.optimizer

    @abstractmethod
    def _trained(self) -> Iterator[_Flat]:
        """Yield the tensors that the optimizer updates."""

    def _frozen(self, parameter: nn.Parameter, spec: ShardSpec) -> _Flat:
        """Return a weight that is not trained, in the format in which it is stored."""
        return _replicated(parameter.detach(), spec, trained=False)

    @abstractmethod
    def _free_weights(self) -> None:
        """Free the weights in the compute format that exist beside the fp32 ones."""

    @abstractmethod
    def _round(self) -> None:
        """Make the weights in the compute format again."""

    def _resident(self, flat: _Flat, *, changed: bool = False) -> AbstractContextManager[None]:
        """Return a context in which a flat tensor is in memory, and after which it may have been
        `changed`."""
        return nullcontext()

    def _restore_one(self, flat: _Flat, state: str, source: Source) -> None:
        if state != flat.state and state not in self._inner.state[flat.tensor]:
            self._inner.state[flat.tensor][state] = self._empty_state(flat, state)
        values = self._values(flat, state)
        if values.shape != flat.tensor.shape:
            values.copy_(source.read(_of_own_shape(flat, state, values), state).view(values.shape))
            return
        values = values.view(-1)
        values.zero_()
        for fragment, at in flat.fragments():
            values.narrow(0, at, fragment.count).copy_(source.read(fragment, state))

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

    def _values(self, flat: _Flat, state: str) -> Tensor:
        values: Tensor = flat.tensor if state == flat.state else self._inner.state[flat.tensor][state]
        return values

    def _saved(self, flat: _Flat) -> Iterator[tuple[StateFragment, int]]:
        """Yield the fragments of a flat tensor that this rank saves, each with its offset in it."""
        state = self._inner.state.get(flat.tensor, {}) if flat.trained else {}
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != STEP}
        for name, values in {flat.state: flat.tensor, **tensors}.items():
            if values.shape != flat.tensor.shape:
                if flat.parts[0].spec.owned and self._group.rank == 0:
                    yield StateFragment(_of_own_shape(flat, name, values), name, values.dtype), 0
                continue
            for part in flat.parts:
                if part.spec.owned:
                    for fragment, at in (self._share(part) if flat.replicated else part).fragments():
                        yield StateFragment(fragment, name, values.dtype), at

    def _share(self, part: _Part) -> _Part:
        """Return this rank's share of a part of which all data-parallel ranks have copies."""
        share = -(-part.count // self._group.size)
        return part.within(self._group.rank * share, (self._group.rank + 1) * share)

    def _flats(self) -> Iterator[_Flat]:
        yield from self._trained()
        yield from (self._frozen(p, spec) for p, spec in self._specs.items() if not p.requires_grad)
        yield from (_replicated(tensor, spec, trained=False) for spec, tensor in self._constants)
        yield from (replace(_replicated(a.tensor, a.spec, trained=False), state=a.state) for a in self._auxiliary)


class ReplicatedState(ZeroState):
    """The state at ZeRO-0: whole on every data-parallel rank, in torch's own optimizer."""

    @property
    def _inner(self) -> Any:
        return self._optimizer

    def _trained(self) -> Iterator[_Flat]:
        yield from (_replicated(p, spec) for p, spec in self._specs.items() if p.requires_grad)

    def _free_weights(self) -> None:
        """Do nothing: there are no others."""

    def _round(self) -> None:
        """Do nothing: layers round weights where they use them."""


class PartitionedState(ZeroState):
    """The state at ZeRO-1 and 2: a partition of the concatenated parameters of each group."""

    def _trained(self) -> Iterator[_Flat]:
        zero = self._optimizer
        if hasattr(zero, "bf16_groups"):  # stage 1 in bf16 has an optimizer of its own
            partitions, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
        else:
            partitions, groups = zero.single_partition_of_fp32_groups, zero.bit16_groups
        for flat, parameters in zip(partitions, groups, strict=True):
            yield _Flat(flat, [self._mapped(p) for p in parameters if p._hp_mapping is not None])

    def _mapped(self, parameter: Any) -> _Part:
        """Return the part of a parameter in this rank's partition, as DeepSpeed maps it."""
        lies, held = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
        return _Part(self._specs[parameter], lies.start, lies.numel, held.start)

    def _free_weights(self) -> None:
        """Do nothing: they are whole, and rounding overwrites them."""

    def _round(self) -> None:
        self._optimizer.update_lp_params()


class DividedState(ZeroState):
    """The state at ZeRO-3: a share of every parameter, many in one flat tensor, which is on NVMe
    while it is not used where it is offloaded."""

    def _trained(self) -> Iterator[_Flat]:
        zero = self._optimizer
        for index, (flat, parameters) in enumerate(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)):
            offsets = itertools.accumulate((parameter.partition_numel() for parameter in parameters), initial=0)
            parts = [self._own(parameter, offset) for parameter, offset in zip(parameters, offsets, strict=False)]
            yield _Flat(flat, parts, sub_group=index)

    def _frozen(self, parameter: nn.Parameter, spec: ShardSpec) -> _Flat:
        return _Flat(divided(parameter).ds_tensor, [self._own(parameter, 0)], trained=False)

    def _own(self, parameter: nn.Parameter, offset: int) -> _Part:
        """Return this rank's share of a parameter: the rank-th of equal ones, the last padded."""
        share = divided(parameter).partition_numel()
        start = self._group.rank * share
        return _Part(self._specs[parameter], start, max(0, min(share, divided(parameter).ds_numel - start)), offset)

    def _free_weights(self) -> None:
        # `_round` gathers only what is not there.
        self._optimizer._partition_all_parameters()

    def _round(self) -> None:
        if persistent := self._optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)

    @contextmanager
    def _resident(self, flat: _Flat, *, changed: bool = False) -> Iterator[None]:
        """Bring a sub-group from NVMe for the block; `changed`: write it back and round its
        weights."""
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


BY_STAGE: tuple[type[ZeroState], ...] = (ReplicatedState, PartitionedState, PartitionedState, DividedState)


def _replicated(tensor: Tensor, spec: ShardSpec, *, trained: bool = True) -> _Flat:
    return _Flat(tensor, [_Part(spec, 0, tensor.numel(), 0)], replicated=True, trained=trained)


def _of_own_shape(flat: _Flat, state: str, values: Tensor) -> Fragment:
    """Return a state that does not go element by element (Adafactor's row and column means): a
    piece of its own, named after its parameter's first."""
    (part,) = flat.parts
    return Fragment.whole(Piece.whole(f"{part.spec.pieces[0].name}:{state}", tuple(values.shape)))
