"""A run beside its plan: what was predicted of memory and time, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.planner.devices import HERE
from trainer.planner.prediction import MEMORY_BAND
from trainer.run.run_plan import RunPlan, gib
from trainer.track.plan_record import Figures, PlanRecord
from trainer.track.text import duration

Memory = tuple[int | None, int]  # of a rank: by the plan, and measured [bytes]


def introduced(plan: RunPlan | None) -> Iterator[str]:
    """Yield the line that says what is planned."""
    if plan is None:
        return
    fullest = plan.fullest
    who = f"rank {fullest.rank} of the pipeline, the fullest" if len(plan.ranks) > 1 else "a rank"
    yield f"plan: {gib(fullest.num_bytes)} ± {MEMORY_BAND:.0%} on {who}{_step_of(plan)}"


def _step_of(plan: RunPlan) -> str:
    time, device = plan.prediction.time, plan.prediction.device
    if time is None or device is None:
        return ""
    return f"; a step takes {duration(time.total)} on {'this machine' if device.name == HERE else device.name}"


def outcome(plan: RunPlan | None, memories: Sequence[Memory], step_time_s: float | None) -> PlanRecord:
    """Return the record of a run. `memories`: of all ranks; the one that took most counts."""
    predicted, measured = max(memories, key=lambda memory: memory[1])
    time = plan.prediction.time if plan else None
    device = plan.prediction.device if plan else None
    return PlanRecord(
        device=device.name if device else None,
        calibration=device.calibration if device else 1.0,
        predicted=Figures(memory_bytes=predicted, step_time_s=time.total if time else None),
        measured=Figures(memory_bytes=measured, step_time_s=step_time_s),
    )
