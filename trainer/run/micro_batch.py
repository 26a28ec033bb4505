"""The largest micro-batch that fits the devices of a run (train.auto_micro_batch): found by the
first start, and kept for all later ones.

The sequences of a step stay the same, so the training is the same up to rounding. Which sizes may
fit the plan says; the largest of them is then tried for real, and the next smaller one where it
does not fit any one rank. A model without a plan is tried from the largest size there is.

| file of the run folder | content |
|---|---|
| `micro-batch.json` | `Kept`: the size, where it was found, and what was tried |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.engine.group import Joined
from trainer.errors import RecipeError
from trainer.exhausted import MORE_MEMORY
from trainer.files.decoding import read_as
from trainer.files.durable import write_json
from trainer.model.network import Network
from trainer.recipe.batch_plan import BatchPlan, divisors, layout_of
from trainer.recipe.pipeline import check_micro_batches
from trainer.recipe.resolve import MICRO_BATCH
from trainer.run.memory_check import Machine, require_memory
from trainer.run.opening import OpenFolder
from trainer.run.run_plan import plan_of
from trainer.run.trial import try_on_all_ranks
from trainer.schema import Recipe


@dataclass(frozen=True)
class Kept:
    """The size that was found. `where`: what it depends on. `tried`: each size, and whether it
    fits."""

    micro_sequences: int
    where: dict[str, Any]
    tried: list[tuple[int, bool]]


def settle_micro_batch(group: Joined, opened: OpenFolder, network: Network, machine: Machine) -> None:
    """Give the run its micro-batch, where the recipe leaves that to the devices. All ranks must
    call it together."""
    resolved, path = opened.resolved, opened.folder.micro_batch
    if not resolved.recipe.train.auto_micro_batch:
        return
    said = opened.messages.broadcast(_read(path) if group.is_first else None)
    kept, where = Kept(**said) if said else None, circumstances(resolved.recipe, group, machine)
    sizes = legal_sizes(resolved.recipe, group.place.world_size, group.place.how)
    known = kept is not None and kept.where == where and kept.micro_sequences in sizes
    if kept is None or not known:
        kept = _found(group, opened, sizes_by_plan(sizes, resolved.recipe, group, network, machine), where)
    opened.resolved = resolved.with_micro_batch(kept.micro_sequences)
    opened.remarks.append(told(kept, found_now=not known))
    if group.is_first and not known:
        write_json(path, asdict(kept))


def _found(group: Joined, opened: OpenFolder, sizes: Sequence[int], where: dict[str, Any]) -> Kept:
    tried: list[tuple[int, bool]] = []
    group.watch.begin("trying micro-batches")
    folder = opened.log.path.parent / f"trial-{group.place.rank:05d}"
    folder.mkdir(exist_ok=True)

    def fits(size: int) -> bool:
        recipe = opened.resolved.with_micro_batch(size)
        fitted = try_on_all_ranks(
            recipe, group.place, opened.messages, folder, group.watch, timeout_s=group.timeout.total_seconds()
        )
        tried.append((size, fitted))
        return fitted

    found = largest_that_fits(sizes, fits)
    if found is None:
        raise RecipeError(f"train.auto_micro_batch: not even {MICRO_BATCH} {min(sizes)} fits these devices: {MORE_MEMORY}")
    return Kept(found, where, tried)


def sizes_by_plan(sizes: Sequence[int], recipe: Recipe, group: Joined, network: Network, machine: Machine) -> Sequence[int]:
    """Return the sizes that are not refused before they are tried; the smallest is always among
    them."""
    place = group.place

    def may_fit(size: int) -> bool:
        sized = _of_size(recipe, size)
        on_gpu = machine.gpu_bytes is not None
        planned = plan_of(network, sized, place.world_size, place.how, on_gpu=on_gpu, device=None, rank=place.rank)
        try:
            require_memory(sized, BatchPlan.from_recipe(sized, place.world_size, place.how), network, machine, planned)
        except RecipeError:
            return False
        return True

    largest = largest_that_fits(sizes, may_fit) or sizes[0]
    return sizes[: sizes.index(largest) + 1]


def told(kept: Kept, *, found_now: bool) -> str:
    """Return the line that says which micro-batch is taken, and why."""
    if not found_now:
        return f"{MICRO_BATCH} {kept.micro_sequences}: found by an earlier start of this run (train.auto_micro_batch)"
    tried = ", ".join(f"{size} {'fits' if fits else 'does not'}" for size, fits in kept.tried)
    return f"{MICRO_BATCH} {kept.micro_sequences}: the largest that fits (train.auto_micro_batch; tried: {tried})"


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending sizes that fits, None if none does. Trials go down from the
    largest in growing strides, then halve the gap that is left."""
    at, failing, stride = len(sizes) - 1, len(sizes), 1
    while at >= 0 and not fits(sizes[at]):
        failing, at, stride = at, max(0, at - stride) if at else -1, 2 * stride
    if at < 0:
        return None
    while failing - at > 1:
        middle = (at + failing) // 2
        at, failing = (middle, failing) if fits(sizes[middle]) else (at, middle)
    return sizes[at]


def legal_sizes(recipe: Recipe, world_size: int, how: str) -> list[int]:
    """Return the micro-batches that divide the step and that the schedule accepts, ascending."""
    dp = layout_of(recipe.parallel, world_size, how).dp
    of_rank, rest = divmod(recipe.batch.global_sequences, dp)
    if rest:
        BatchPlan.from_recipe(recipe, world_size, how)  # which says what divides
    return [size for size in sorted(divisors(of_rank)) if _is_legal(_of_size(recipe, size), world_size, how)]


def _is_legal(recipe: Recipe, world_size: int, how: str) -> bool:
    try:
        check_micro_batches(recipe, BatchPlan.from_recipe(recipe, world_size, how))
    except RecipeError:
        return False
    return True


def _of_size(recipe: Recipe, size: int) -> Recipe:
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro_sequences": size})})


def circumstances(recipe: Recipe, group: Joined, machine: Machine) -> dict[str, Any]:
    """Return what the largest micro-batch depends on, as JSON."""
    return {
        "device": group.device.type,
        "memory_bytes": machine.gpu_bytes or machine.host_bytes // machine.local_ranks,
        "world_size": group.place.world_size,
        "parallel": recipe.parallel.model_dump(mode="json"),
        "zero": recipe.zero.model_dump(mode="json"),
        "precision": recipe.precision.settled,
        "seq_len": recipe.data.seq_len,
        "recompute": recipe.train.recompute,
        "optimizer": recipe.optimizer.name,
        "tuning": recipe.tuning.model_dump(mode="json"),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """Return what an earlier start has kept; None where there is nothing, or nothing sound."""
    try:
        return asdict(read_as(Kept, path))
    except (OSError, ValueError):
        return None
