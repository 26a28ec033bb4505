"""The search for what made a step's gradient not finite: its micro-batches run once more, and every
tensor is checked.

Good steps pay nothing, because nothing is watched until one was skipped. By then DeepSpeed has
dropped the gradients (ZeRO-1 to 3), so the step is replayed (`Engine.replay`), with hooks that
check the output of every module and the gradient of every parameter, before anything sums or
divides it. That works in each layout, because both exist in each: a hook on a tensor knows nothing
of ZeRO, and micro-batches reach the modules of a pipeline stage one after another.

A NaN spreads, so most of what is not finite is only infected. The culprit is what comes first in
the flow of the data: a weight; then, in the earliest micro-batch, the first output in the order of
stages and modules; then the first gradient, in the reverse of that order. Ranks compare what they
found, so that the rank is also the one where it began.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.messages import Messages
from parallel.params import ShardSpec, owned_specs
from trainer.data.loader import MicroBatch
from trainer.engine.engine import Engine
from trainer.guard.replicas import held_values

WEIGHT, OUTPUT, GRADIENT = range(3)


@dataclass(frozen=True, order=True)
class Finding:
    """A tensor that is not finite; the least is the first. `micro_batch`: -1 if not known; the
    number of micro-batches: after all of them."""

    phase: int  # WEIGHT, OUTPUT or GRADIENT
    micro_batch: int
    place: tuple[int, int]  # stage and module, negative where the data flows backwards
    what: str
    has_nan: bool
    rank: int

    @property
    def where(self) -> tuple[object, ...]:
        return self.phase, self.micro_batch, self.place, self.what

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**{**value, "place": tuple(value["place"])})


@dataclass(frozen=True)
class Culprit:
    """The cause. `what`: such as "gradient of model.layers.3.mlp.up_proj.weight". `ranks`: where it
    began, on all of them at once."""

    what: str
    ranks: tuple[int, ...]
    micro_batch: int | None


def find_culprit(
    engine: Engine, ranks: Messages, micro_batches: Sequence[MicroBatch], *, step: int, scale: float, loss_is_finite: bool
) -> Culprit | None:
    """Replay the step that was skipped, and return the culprit; None if all is finite this time.
    Every rank must call it together."""
    search = _Search(engine, ranks.rank)
    with search.watching():
        engine.replay(micro_batches, step=step, scale=scale)
    findings = [Finding.from_json(found) for of_rank in ranks.all(search.first_of_each()) for found in of_rank]
    # With a finite loss, infinite outputs may be right: scores that a mask has set to −∞.
    suspects = [found for found in findings if found.phase != OUTPUT or found.has_nan or not loss_is_finite]
    if not suspects:
        return None
    first = min(suspects)
    together = sorted({found.rank for found in suspects if found.where == first.where})
    known = first.phase != WEIGHT and 0 <= first.micro_batch < len(micro_batches)
    return Culprit(first.what, tuple(together), first.micro_batch if known else None)


class _Search:
    """The findings of this rank."""

    def __init__(self, engine: Engine, rank: int) -> None:
        self._rank = rank
        self._found: list[Finding] = []
        self._specs = engine.specs
        module = engine.execution.module
        self._stages = (
            {int(index): stage for index, stage in module.items()} if isinstance(module, nn.ModuleDict) else {0: module}
        )

    def first_of_each(self) -> list[dict[str, Any]]:
        """Return the first finding of each phase, with and without NaN, as JSON."""
        firsts: dict[tuple[int, bool], Finding] = {}
        for found in sorted(self._found):
            firsts.setdefault((found.phase, found.has_nan), found)
        return [asdict(found) for found in firsts.values()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._look_at_weights()
        handles = [handle for index, stage in self._stages.items() for handle in self._watch(index, stage)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look_at_weights(self) -> None:
        """Check the weights that this rank holds."""
        for parameter, spec in self._specs:
            held = held_values(parameter)
            if not _is_finite(held):
                name = culprit_piece(spec, held) if held.shape == parameter.shape else spec.pieces[0].name
                self._add(WEIGHT, 0, (0, 0), f"weight {name}", held)

    def _watch(self, index: int, stage: nn.Module) -> Iterator[Any]:
        count: Counter[str] = Counter()
        yield stage.register_forward_pre_hook(lambda module, inputs: count.update(["forward"]))
        declared = list(owned_specs(stage))
        modules = list(_in_order(stage))
        for place, (path, module) in enumerate(modules):
            label = _logical_name(path, [(name, spec) for name, _, spec in declared])
            yield module.register_forward_hook(self._output_hook((index, place), label, count))
        position = {path: place for place, (path, _) in enumerate(modules)}
        for name, parameter, spec in declared:
            if parameter.requires_grad:
                backwards = (-index, -position[_home(name, position)])
                yield before_other_hooks(parameter, self._gradient_hook(backwards, name, spec, count))

    def _output_hook(self, place: tuple[int, int], label: str, count: Counter[str]) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.is_floating_point() and not _is_finite(output):
                    what = f"output of {label}" if output.dim() else "loss"
                    # A recomputation in backward may be of an earlier micro-batch, whose forward
                    # has reported already.
                    self._add(OUTPUT, count["forward"] - 1, place, what, output)

        return look

    def _gradient_hook(
        self, place: tuple[int, int], name: str, spec: ShardSpec, count: Counter[str]
    ) -> Callable[[Tensor], None]:
        # Two stages of one rank use it, and nothing tells which of their backwards this is.
        twice = spec.tied and spec.copies.size == 1

        def look(grad: Tensor) -> None:
            # A tied weight has one call more than there are micro-batches: the sum over the step
            # and all copies (`parallel.ties`), which comes last and is infected if one of them is.
            micro_batch = -1 if twice else count[name]
            count[name] += 1
            if not _is_finite(grad):
                self._add(GRADIENT, micro_batch, place, f"gradient of {culprit_piece(spec, grad)}", grad)

        return look

    def _add(self, phase: int, micro_batch: int, place: tuple[int, int], what: str, tensor: Tensor) -> None:
        self._found.append(Finding(phase, micro_batch, place, what, bool(tensor.isnan().any()), self._rank))


def before_other_hooks(parameter: nn.Parameter, hook: Callable[[Tensor], Any]) -> Any:
    """Register a gradient hook that sees what autograd computes, before other hooks sum it over
    ranks."""
    handle = parameter.register_hook(hook)
    hooks = parameter._backward_hooks
    assert hooks is not None, "there is one at least, ours"
    others = [(key, other) for key, other in hooks.items() if key != handle.id]
    # Autograd reads the plain dict below this ordered one, and `move_to_end` does not reorder that.
    hooks.clear()
    hooks.update([(handle.id, hook), *others])
    return handle


def culprit_piece(spec: ShardSpec, values: Tensor) -> str:
    """Return the name of the logical tensor whose rows are not finite; padding counts as the
    first."""
    bad = (piece.name for piece in spec.pieces if not _is_finite(piece.in_parameter(values)))
    return next(bad, spec.pieces[0].name)


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _in_order(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield modules in the order in which they finish: each after its children."""
    for name, child in module.named_children():
        yield from _in_order(child, f"{path}.{name}" if path else name)
    yield path, module


def _home(name: str, modules: dict[str, int]) -> str:
    """Return the path of the module that has this parameter; for a shared one the first path."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return name


def _logical_name(path: str, declared: Sequence[tuple[str, ShardSpec]]) -> str:
    """Return the common part of the logical names below a module, with the path if that is not the
    module itself."""
    inside, names = path, _names_inside(path, declared)
    while inside and not names:
        inside = inside.rpartition(".")[0]
        names = _names_inside(inside, declared)
    common = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False))]
    if len(names) == 1:
        common = common[:-1]  # without "weight"
    return f"{'.'.join(common)} ({path or 'stage'})" if common else path or "stage"


def _names_inside(path: str, declared: Sequence[tuple[str, ShardSpec]]) -> list[list[str]]:
    inside = [spec for name, spec in declared if not path or name.startswith(f"{path}.")]
    return [piece.name.split(".") for spec in inside for piece in spec.pieces]
