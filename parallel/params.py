"""Parameters know what they are.

A `ShardSpec` says which boxes of which logical tensors a local parameter holds. Logical tensors
bear Hugging Face's names and shapes. Initial weights, export, weight decay, norms and checkpoints
all read it; nothing guesses from names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from parallel.collectives import all_reduce
from parallel.mesh import Group
from parallel.pieces import Piece
from parallel.rng import stream


class Role(StrEnum):
    """The job of a parameter; decides its initial value and whether it decays."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    NORM = "norm"
    BIAS = "bias"


@dataclass(frozen=True)
class Init:
    """The start of a logical tensor: normal with this standard deviation around this mean (std
    0: constant), or, with a bound, uniform in [−bound, bound)."""

    mean: float = 0.0
    std: float = 0.0
    bound: float = 0.0


@dataclass(frozen=True)
class ShardSpec:
    """The identity of one local parameter.

    `copies` are the ranks that hold these same boxes, this one among them. The first of them owns
    the parameter: it is counted in norms and saved there only. `partial`: each copy's gradient is
    only the part that this rank's tokens or heads give, so that gradients must be summed over the
    copies (`complete_partial_gradients`); otherwise theirs are equal already. `tied`: used in two
    pipeline stages, whose backwards do not meet: its gradients are summed once per step
    (`parallel.ties`), over the copies where the stages are on different ranks. `added`: not one of
    the model's own weights but put beside them for tuning; it is drawn also where those are
    loaded.
    """

    role: Role
    init: Init
    pieces: tuple[Piece, ...]
    copies: Group
    partial: bool = False
    tied: bool = False
    added: bool = False

    @property
    def owned(self) -> bool:
        return self.copies.rank == 0


@dataclass(frozen=True)
class AuxiliaryState:
    """A tensor kept beside a weight, element by element, and alike on all data-parallel ranks.

    A checkpoint has it as a logical tensor of its own, since its fragments are not those of the
    weight.
    """

    spec: ShardSpec
    state: str
    tensor: Tensor

    @classmethod
    def of(cls, weight: ShardSpec, tensor: Tensor, *, state: str) -> Self:
        """Return the state of that name beside a weight."""
        pieces = tuple(replace(piece, name=f"{piece.name}:{state}") for piece in weight.pieces)
        return cls(replace(weight, pieces=pieces), state, tensor)


def whole(
    name: str,
    shape: tuple[int, ...],
    *,
    role: Role,
    init: Init,
    copies: Group,
    partial: bool = False,
    added: bool = False,
) -> ShardSpec:
    """The spec of a parameter that is one whole logical tensor on every rank of `copies`."""
    return ShardSpec(role, init, (Piece.whole(name, shape),), copies, partial, added=added)


class Sharded(nn.Module):
    """A module that says what each of its parameters is; `borrowed` ones are another module's
    (ties).

    The names are those of `named_parameters`, so it may also speak for parameters of modules below
    it that are not ours.
    """

    __call__: Callable[..., Tensor]  # torch says of no module what it gives

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, ShardSpec] = {}
        self.borrowed: set[str] = set()

    def declare(self, name: str, shape: tuple[int, ...], spec: ShardSpec) -> None:
        """Declare an uninitialised fp32 parameter on the current default device, with its spec."""
        setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.specs[name] = spec

    def derive(self) -> None:
        """Set what follows from other parameters; called when those were drawn or loaded."""

    def borrow(self, name: str, owner: Sharded) -> None:
        """Use another module's parameter of the same name: one logical tensor, one gradient,
        owned there."""
        setattr(self, name, getattr(owner, name))
        self.borrowed.add(name)


def owned_specs(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, ShardSpec]]:
    """Yield (dotted name, parameter, spec) of each parameter that the module owns, once.

    TypeError for a parameter that nobody declared.
    """
    declared: dict[str, ShardSpec | None] = {}
    for path, owner in module.named_modules():
        if isinstance(owner, Sharded):
            names = {**owner.specs, **dict.fromkeys(owner.borrowed)}
            declared |= {f"{path}.{name}" if path else name: spec for name, spec in names.items()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in declared:
            raise TypeError(f"parameter {name} has no ShardSpec: declare it in a Sharded module")
        if (spec := declared[name]) is not None:
            yield name, parameter, spec


def complete_partial_gradients(module: nn.Module) -> None:
    """Make every backward from now on sum the gradients of `partial` parameters over their copies,
    in fp32.

    This is the one place where it is done: norms and row-parallel biases under sequence
    parallelism, head norms, key/value heads that several ranks share. It acts on the gradient of
    each backward before anything accumulates, divides or offloads it, so it holds at every ZeRO
    stage.
    """
    for _, parameter, spec in owned_specs(module):
        if spec.partial and spec.copies.size > 1 and parameter.requires_grad:
            parameter.register_hook(partial(_summed, copies=spec.copies))


def _summed(grad: Tensor, copies: Group) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return all_reduce(grad.to(wide), copies).to(grad.dtype)


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give storage, not values, to the parameters that are on the meta device; one that two
    layers have stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(owner, name, made[parameter])


def initialise(module: nn.Module, seed: int, *, only: Callable[[ShardSpec], bool] = lambda spec: True) -> None:
    """Fill materialised parameters with their initial values, which depend on (seed, logical name)
    only; `only` those of these specs, where the others have been loaded.

    Each logical tensor is drawn whole in fp32 on the CPU and sliced, so that every layout starts
    from bit-identical weights. Peak extra memory: one logical tensor.
    """
    for _, parameter, spec in owned_specs(module):
        if not only(spec):
            continue
        drawn: dict[str, Tensor] = {}
        for piece in spec.pieces:
            if piece.name not in drawn:
                drawn[piece.name] = draw(piece.name, piece.shape, spec.init, seed) * piece.gain
        copy_pieces(parameter, spec, drawn)
    for owner in module.modules():
        if isinstance(owner, Sharded):
            owner.derive()


def draw(name: str, shape: tuple[int, ...], init: Init, seed: int) -> Tensor:
    """The whole initial logical tensor, fp32, on the CPU."""
    if init.std == init.bound == 0.0:
        return torch.full(shape, init.mean, device="cpu")
    generator = stream(torch.device("cpu"), seed, "weights", name)
    if init.bound:
        return torch.empty(shape, device="cpu").uniform_(-init.bound, init.bound, generator=generator)
    return torch.empty(shape, device="cpu").normal_(init.mean, init.std, generator=generator)


@torch.no_grad()
def zero_padding(parameter: Tensor, spec: ShardSpec) -> None:
    """Make the rows that no piece covers 0: they are the last, and 0 · NaN of uninitialised
    memory is NaN."""
    if parameter.dim():
        parameter[sum(piece.rows for piece in spec.pieces) :] = 0.0


@torch.no_grad()
def copy_pieces(parameter: Tensor, spec: ShardSpec, logical: Mapping[str, Tensor]) -> None:
    """Set a local parameter from whole logical tensors; padding becomes 0."""
    zero_padding(parameter, spec)
    for piece in spec.pieces:
        piece.in_parameter(parameter).copy_(piece.box_of(logical[piece.name]))
