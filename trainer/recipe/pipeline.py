"""The pipeline that a recipe describes: what is wrong with it, and its schedule as a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.schedule_table import ScheduleTable, read_csv
from parallel.schedules import SCHEDULES, Schedule, build
from parallel.simulator import simulate
from trainer.errors import RecipeError
from trainer.files.reading import read_text, told
from trainer.model.config import TransformerConfig
from trainer.recipe.batch_plan import divisors
from trainer.redaction import shown
from trainer.schema import Finding, Parallel, Recipe
from trainer.spelling import nearest

if TYPE_CHECKING:
    from trainer.recipe.batch_plan import BatchPlan

KEY, BALANCE = "parallel.schedule", "parallel.balance"


def pipeline_findings(recipe: Recipe) -> Iterator[Finding]:
    """Yield what cannot work whatever the world size and the network."""
    if recipe.parallel.pipeline == 1:
        return
    yield from _balance_findings(recipe)
    if _is_file(recipe.parallel.schedule):
        yield from _file_findings(recipe)
    elif (schedule := SCHEDULES.get(recipe.parallel.schedule)) is None:
        yield _unknown_name(recipe.parallel.schedule)
    else:
        yield from _virtual_stage_findings(recipe, schedule)
        yield from _most_micro_batches_findings(recipe, schedule)
        yield from _zero_findings(recipe, splits_backward=schedule.splits_backward)


def layer_findings(recipe: Recipe, network: TransformerConfig) -> Iterator[Finding]:
    """Yield a finding unless each stage has a layer, without which it would pass on nothing, and
    each layer a stage."""
    parallel = recipe.parallel
    if parallel.pipeline == 1:
        return
    stages, division = parallel.pipeline * parallel.virtual_stages, parallel.balance
    if network.num_layers < stages:
        legal = network.num_layers // parallel.virtual_stages
        fewer = f"; nearest legal parallel.pipeline: {legal}" if legal else ""
        yield Finding(
            ("parallel.pipeline", "parallel.virtual_stages", "model.config", "model.from_pretrained"),
            f"parallel.pipeline {parallel.pipeline} × virtual_stages {parallel.virtual_stages} = {stages} stages, but the "
            f"model has {network.num_layers} layers, and each stage needs one{fewer}",
        )
    elif division is not None and len(division) == stages and sum(division) != network.num_layers:
        yield Finding(
            (BALANCE, "model.config", "model.from_pretrained"),
            f"{BALANCE} = {shown(division)} is {sum(division)} layers, but the model has {network.num_layers}; nearest legal: "
            f"{_nearest_division(division, network.num_layers)}, or leave it out to divide by cost",
        )


def rank_of_stage(parallel: Parallel) -> list[int]:
    """Return the rank of each stage, by the schedule of a valid recipe."""
    if _is_file(parallel.schedule):
        ranks = _read(parallel.schedule).rank_of_stage
        return [ranks[stage] for stage in sorted(ranks)]
    return SCHEDULES[parallel.schedule].rank_of_stage(parallel.pipeline, parallel.virtual_stages)


def schedule_table(recipe: Recipe, plan: BatchPlan) -> ScheduleTable:
    """Return what each rank of the pipeline runs, for a valid recipe.

    RecipeError if the schedule does not support the number of micro-batches that this world size
    gives.
    """
    check_micro_batches(recipe, plan)
    parallel = recipe.parallel
    if _is_file(parallel.schedule):
        return _read(parallel.schedule)
    return build(
        parallel.schedule,
        ranks=parallel.pipeline,
        virtual_stages=parallel.virtual_stages,
        num_micro_batches=plan.num_micro_batches,
    )


def check_micro_batches(recipe: Recipe, plan: BatchPlan) -> None:
    """Raise RecipeError with the nearest legal numbers if the schedule does not support this number
    of micro-batches."""
    name, ranks = recipe.parallel.schedule, recipe.parallel.pipeline
    if ranks == 1:
        return
    if _is_file(name):
        legal = [_read(name).num_micro_batches]
        accepted = plan.num_micro_batches in legal
        needs = f"is written for {legal[0]} micro-batches"
    else:
        accepted = SCHEDULES[name].accepts(plan.num_micro_batches, ranks)
        legal = SCHEDULES[name].nearest_micro_batches(plan.num_micro_batches, ranks)
        needs = f"needs {SCHEDULES[name].needs.format(ranks=ranks)}"
    if accepted:
        return
    sequences = [str(n * plan.micro_sequences * plan.dp) for n in legal]
    raise RecipeError(
        f"{KEY} = {json.dumps(name)} {needs}, but batch.global_sequences {plan.global_sequences} / (micro_sequences "
        f"{plan.micro_sequences} × data-parallel {plan.dp}) = {plan.num_micro_batches}; nearest legal: "
        f"{' or '.join(map(str, legal))} micro-batches (batch.global_sequences {' or '.join(sequences)})"
    )


def _is_file(name: str) -> bool:
    return name.lower().endswith(".csv") or "/" in name


def _read(name: str) -> ScheduleTable:
    return read_csv(read_text(name))


def _unknown_name(name: str) -> Finding:
    meant = nearest(name, SCHEDULES)
    return Finding(
        (KEY,),
        f"{KEY} = {json.dumps(name)}: unknown schedule{f'; did you mean {meant}?' if meant else ''}; legal: "
        f"{', '.join(SCHEDULES)}, or a .csv file",
    )


def _virtual_stage_findings(recipe: Recipe, schedule: Schedule) -> Iterator[Finding]:
    name, stages = recipe.parallel.schedule, recipe.parallel.virtual_stages
    if schedule.virtual_stages in (None, stages):
        return
    others = [other for other, of in SCHEDULES.items() if of.virtual_stages in (None, stages)]
    yield Finding(
        ("parallel.virtual_stages", KEY, "parallel.pipeline"),
        f'parallel.virtual_stages = {stages}, but {KEY} "{name}" has {schedule.virtual_stages} on each rank; legal: '
        f"parallel.virtual_stages {schedule.virtual_stages}, or {KEY} {', '.join(others)}",
    )


def _most_micro_batches_findings(recipe: Recipe, schedule: Schedule) -> Iterator[Finding]:
    """Yield a finding if no world size gives a legal number. The smallest world has the most
    micro-batches in a step."""
    batch, ranks = recipe.batch, recipe.parallel.pipeline
    most, rest = divmod(batch.global_sequences, batch.micro_sequences)
    if rest or any(schedule.accepts(n, ranks) for n in divisors(most)):
        return
    above = schedule.nearest_micro_batches(most, ranks)[-1]
    yield Finding(
        ("batch.global_sequences", "batch.micro_sequences", KEY, "parallel.pipeline"),
        f'{KEY} "{recipe.parallel.schedule}" needs {schedule.needs.format(ranks=ranks)}, but batch.global_sequences '
        f"{batch.global_sequences} / micro_sequences {batch.micro_sequences} = {most}, and "
        f"data parallelism divides it; nearest legal: batch.global_sequences {above * batch.micro_sequences}",
    )


def _balance_findings(recipe: Recipe) -> Iterator[Finding]:
    parallel = recipe.parallel
    stages = parallel.pipeline * parallel.virtual_stages
    if parallel.balance is not None and len(parallel.balance) != stages:
        yield Finding(
            (BALANCE, "parallel.pipeline", "parallel.virtual_stages"),
            f"{BALANCE} has {len(parallel.balance)} numbers, but parallel.pipeline {parallel.pipeline} × virtual_stages "
            f"{parallel.virtual_stages} = {stages} stages; legal: {stages} numbers, the layers on each, or leave it out to "
            "divide by cost",
        )


def _nearest_division(division: Sequence[int], layers: int) -> list[int]:
    """Return the nearest division of `layers`.

    Missing layers go to the smallest stages, one by one, and surplus layers are taken from the
    largest. In the end all changed stages are at one level, or the first of them one layer further.
    """
    nearest = [min(number, layers) for number in division]
    if sum(nearest) <= layers:
        level = _level(nearest, layers, max)
        changed, step = [max(number, level) for number in nearest], 1
    else:
        level = _level(nearest, layers, min)
        changed, step = [min(number, level) for number in nearest], -1
    left = abs(layers - sum(changed))
    for place in [place for place, number in enumerate(changed) if number == level][:left]:
        changed[place] += step
    return changed


def _level(numbers: Sequence[int], total: int, limited: Callable[[int, int], int]) -> int:
    """Return the level of `_nearest_division`.

    Lifted to it (max), the numbers sum to at most `total`, and to more one further. Lowered to it
    (min), they sum to at least `total`.
    """
    low, high = 0, total + 1
    while high - low > 1:
        middle = (low + high) // 2
        reached = sum(limited(number, middle) for number in numbers)
        if reached <= total if limited is max else reached < total:
            low = middle
        else:
            high = middle
    return low if limited is max else high


def _zero_findings(recipe: Recipe, *, splits_backward: bool) -> Iterator[Finding]:
    """Yield what ZeRO and a schedule cannot do together."""
    zero, parallel = recipe.zero, recipe.parallel
    if zero.stage == 3 and splits_backward:
        lower = "" if zero.offload_param.device != "none" else "zero.stage 2, or "
        if _is_file(parallel.schedule):
            whole = "a table with B in place of I and W"
        else:
            whole = f"{KEY} {'1f1b' if parallel.virtual_stages == 1 else 'interleaved_1f1b'}"
        yield Finding(
            ("zero.stage", KEY),
            f"zero.stage = 3 divides a stage's weights again after its backward, but {KEY} {json.dumps(parallel.schedule)} "
            f"computes weight gradients later (W), when there is nothing to add them to; nearest legal: {lower}{whole}",
        )


def _file_findings(recipe: Recipe) -> Iterator[Finding]:
    said = f"{KEY} = {json.dumps(recipe.parallel.schedule)}"
    try:
        table = _read(recipe.parallel.schedule)
    except OSError as error:
        yield Finding((KEY,), f"{said}: {told(error)} (looked from {Path.cwd()})")
    except ValueError as error:
        yield Finding((KEY,), f"{said}: {error}")
    else:
        yield from (Finding(keys, f"{said}: {message}") for keys, message in _table_problems(recipe, table))
        yield from _zero_findings(recipe, splits_backward=table.splits_backward)


def _table_problems(recipe: Recipe, table: ScheduleTable) -> Iterator[tuple[tuple[str, ...], str]]:
    parallel, batch = recipe.parallel, recipe.batch
    if table.num_ranks != parallel.pipeline:
        yield (KEY, "parallel.pipeline"), f"{table.num_ranks} rows (ranks), but parallel.pipeline = {parallel.pipeline}"
        return
    for rank in range(table.num_ranks):
        if len(stages := table.stages(rank)) != parallel.virtual_stages:
            message = f"rank {rank} has {len(stages)} stages, but parallel.virtual_stages = {parallel.virtual_stages}"
            yield (KEY, "parallel.virtual_stages"), message
            return
    if batch.global_sequences % (needed := table.num_micro_batches * batch.micro_sequences):
        message = (
            f"{table.num_micro_batches} micro-batches of batch.micro_sequences {batch.micro_sequences}, but "
            f"batch.global_sequences = {batch.global_sequences} is not a multiple of {needed}"
        )
        yield (KEY, "batch.global_sequences", "batch.micro_sequences"), message
    try:
        simulate(table)
    except ValueError as deadlock:
        yield (KEY,), str(deadlock)
