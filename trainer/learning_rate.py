"""The learning rate as a pure function of the step: nothing to save, nothing to advance, nothing to
resume."""

from __future__ import annotations

import math
from collections.abc import Iterator

from trainer.schema import Finding, Recipe, Schedule, Train


def lr_at(step: int, *, schedule: Schedule, peak: float, total_steps: int) -> float:
    """Return the learning rate of update number `step`, counted from 0, in a run of `total_steps`
    updates (T below).

    With w = max(warm-up, 1), m = min_lr_ratio, and progress p from 0 at step w - 1 (the first
    at the peak) to 1 at step T - 1 (the last):

        warm-up       peak · (step + 1) / w, while step < w: never 0, the peak at step w - 1
        constant      peak
        linear        peak · (m + (1 - m) (1 - p))
        cosine        peak · (m + (1 - m) (1 + cos πp) / 2)
        wsd           peak until the last d = decay_steps updates, then linear to m · peak
                      (d: a fifth of T when absent)
        inverse_sqrt  peak · sqrt(w / (step + 1))

    Past the last step the value stays. ValueError for a step below 0.
    """
    if step < 0:
        raise ValueError(f"step {step} is before the first, which is 0")
    step = min(step, total_steps - 1)
    warmup = max(warmup_steps(schedule, total_steps), 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    match schedule.name:
        case "constant":
            return peak
        case "inverse_sqrt":
            return peak * math.sqrt(warmup / (step + 1))
        case "wsd":
            decay = min(decay_steps(schedule, total_steps), total_steps - warmup)
            progress = max(0.0, 1 - (total_steps - 1 - step) / decay) if decay else 0.0
            remaining = 1 - progress
        case "linear" | "cosine":
            progress = (step - (warmup - 1)) / (total_steps - warmup)
            remaining = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * remaining)


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """Return the length of the warm-up [steps]; a share of the run is rounded up, as transformers
    does."""
    if schedule.warmup_ratio is None:
        return schedule.warmup_steps
    # 0.07 × 100 is 7.000000000000001
    return math.ceil(round(schedule.warmup_ratio * total_steps, 6))


def decay_steps(schedule: Schedule, total_steps: int) -> int:
    """Return the length of wsd's final decay [steps], which never reaches into the warm-up.

    Without the key it is a fifth of the run (Hu et al. 2024, arXiv:2404.06395, used 10 %; Hägele et
    al. 2024, arXiv:2405.18392, find little gain past 20 %).
    """
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    return min(-(-total_steps // 5), max(total_steps - warmup_steps(schedule, total_steps), 0))


def schedule_findings(schedule: Schedule, train: Train) -> Iterator[Finding]:
    """Yield what cannot work in a recipe's schedule, as far as the steps are known."""
    if schedule.warmup_steps and schedule.warmup_ratio:
        yield Finding(
            ("schedule.warmup_ratio", "schedule.warmup_steps"),
            f"schedule.warmup_ratio = {schedule.warmup_ratio:g} and schedule.warmup_steps = {schedule.warmup_steps} both say "
            "how long the warm-up is: remove one of them",
        )
    if train.steps is None:
        return
    if schedule.warmup_steps > train.steps:
        yield Finding(
            ("schedule.warmup_steps", "train.steps"),
            f"schedule.warmup_steps = {schedule.warmup_steps} is longer than train.steps = {train.steps}: the peak would never "
            f"be reached; legal: 0 to {train.steps}",
        )
    elif schedule.name == "wsd" and (warmup := warmup_steps(schedule, train.steps)) + (schedule.decay_steps or 0) > train.steps:
        room = train.steps - warmup
        yield Finding(
            ("schedule.decay_steps", "schedule.warmup_steps", "schedule.warmup_ratio", "train.steps"),
            f"a warm-up of {warmup} steps + schedule.decay_steps {schedule.decay_steps} is more than "
            f"train.steps = {train.steps}; legal decay_steps: 0 to {room}",
        )


def changed_length(earlier: Recipe, now: Recipe, steps_done: int) -> str | None:
    """Return a line that says what another number of steps does to the learning rate of a run that
    goes on after `steps_done`. None if the number is the same."""
    before, after = earlier.train.total_steps, now.train.total_steps
    if before == after:
        return None
    epochs = [train.epochs for train in (earlier.train, now.train)]
    written = "" if epochs[0] == epochs[1] else f"train.epochs {' → '.join(map(_epochs, epochs))}: "
    changed = f"{written}train.steps {before:,} → {after:,}: {_shape(now.schedule, after)}"
    if steps_done >= after:
        return f"{changed}; no step is left of it"
    then, will_be = (
        lr_at(steps_done, schedule=recipe.schedule, peak=recipe.optimizer.lr, total_steps=steps)
        for recipe, steps in ((earlier, before), (now, after))
    )
    place = f"the learning rate at step {steps_done + 1:,}"
    if f"{then:.3g}" == f"{will_be:.3g}":
        return f"{changed}; {place} is {will_be:.3g}, as by the earlier plan"
    return f"{changed}; {place} is {will_be:.3g}, and was {then:.3g} by the earlier plan"


def _epochs(epochs: float | None) -> str:
    return "none" if epochs is None else f"{epochs:g}"


def _shape(schedule: Schedule, total_steps: int) -> str:
    """Return what the end of a run is to its schedule, as a part of a sentence."""
    match schedule.name:
        case "constant" | "inverse_sqrt" if schedule.warmup_ratio:
            return f"the warm-up of {schedule.name} now ends at step {warmup_steps(schedule, total_steps):,}"
        case "constant" | "inverse_sqrt":
            return f"{schedule.name} does not depend on it"
        case "wsd":
            return f"wsd now falls from step {total_steps - decay_steps(schedule, total_steps) + 1:,} to {total_steps:,}"
        case "linear" | "cosine":
            return f"the {schedule.name} now ends at step {total_steps:,}"
