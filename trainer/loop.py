"""The training loop, as prose."""

from __future__ import annotations

import time

from trainer.checkpoint.resume_check import Resume
from trainer.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE
from trainer.guard.guard import Guard
from trainer.launch.stop_request import LOST, REASONS, StopRequest
from trainer.learning_rate import lr_at
from trainer.recipe import ResolvedRecipe
from trainer.run.meter import Meter
from trainer.run.session import Session, open_session


def train(resolved: ResolvedRecipe, run_dir: str | None, resume: Resume, stop: StopRequest, *, plan_check: bool = True) -> int:
    """Run a recipe to its last step, or to the end of the step in which `stop` is requested; return
    the exit code. `plan_check`: see `open_session`."""
    with open_session(resolved, run_dir, resume, plan_check=plan_check) as run:
        stop.trains()
        started = time.monotonic()
        keys, steps = run.recipe.train, run.recipe.train.total_steps
        meter, guard = run.meter(), run.guard()
        step, ended = run.checkpoints.start_step, run.out_of_patience
        while step < steps and not ended:
            run.engine.watch.begin_step(step + 1)
            if reason := stop.agreed(run.messages, run.reason_to_end):
                return interrupt(run, reason, meter, guard, steps_done=step)
            with run.engine.watch("data"):
                micro_batches = run.data.take(step, more=step + 1 < steps)
            lr = lr_at(step, schedule=run.recipe.schedule, peak=run.recipe.optimizer.lr, total_steps=steps)
            result = run.engine.step(micro_batches, step=step, lr=lr, norm_limit=guard.norm_limit)
            meter.record(step + 1, lr, result, micro_batches)
            guard.judge(step, lr, result, micro_batches)
            run.say(run.remarks())
            if guard.must_rewind:
                with run.engine.watch("rewinding"):
                    step = run.rewind(step + 1)
                meter, guard = run.meter(), run.guard()
                continue
            if step + 1 == steps or (keys.eval_every and (step + 1) % keys.eval_every == 0):
                with run.engine.watch("evaluation"):
                    evaluate(run, steps_done=step + 1)
                meter.restart()
                ended = run.out_of_patience
            last = step + 1 == steps or ended != ""
            if run.checkpoints.due(step + 1, run.evaluations.of(step + 1), last=last):
                save(run, meter, guard, steps_done=step + 1)
            step += 1
        with run.engine.watch("saving"):
            run.say(run.checkpoints.wait())
        guard.require_finite(step)
        early = {"ended_early": ended} if step < steps else {}
        run.say(f"ended by patience at step {step} of {steps}: {why}" for why in early.values())
        with run.engine.watch("export"):
            figures = run.export(steps_done=step)
            summary = {"steps": step, **early, "wall_s": time.monotonic() - started}
            run.finish({**summary, **meter.summary(), **figures})
    return EXIT_OK


def save(run: Session, meter: Meter, guard: Guard, *, steps_done: int) -> None:
    with run.engine.watch("saving"):
        memory = {"meter": meter.state(), "guard": guard.state(), "data": {"skipped_steps": run.data.skipped}}
        run.say(run.checkpoints.save(steps_done, run.engine, memory, run.evaluations.of(steps_done)))
        run.account.write(steps_done, always=True)
    meter.restart()


def interrupt(run: Session, reason: str, meter: Meter, guard: Guard, *, steps_done: int) -> int:
    """Save what is not saved yet, and end. The exit code tells whether the run can go on when it is
    started again."""
    if reason == REASONS[LOST]:
        run.leave_to_the_next(reason)
    if run.recipe.checkpoint.every and run.checkpoints.saved_step != steps_done:
        save(run, meter, guard, steps_done=steps_done)
    run.say(run.checkpoints.wait())
    saved = run.checkpoints.saved_step
    goes_on = saved is not None or steps_done == 0
    advice = f"the same command goes on after step {saved or 0}" if goes_on else "nothing is saved (checkpoint.every = 0)"
    run.tracker.note(f"{reason}: ended after step {steps_done}; {advice}")
    run.end_tracking({"ended_by": reason, "steps": steps_done, **meter.summary(), **run.account.goodput(steps_done)})
    return EXIT_REQUEUE if goes_on else EXIT_INTERRUPTED


def evaluate(run: Session, *, steps_done: int) -> None:
    """Record what the task measures on held-out data, if any is held out, alike on every rank."""
    if run.eval_data is None:
        return
    group = run.data.group
    batches = run.eval_data.micro_batches(dp_rank=group.rank, dp=group.size, micro_sequences=run.plan.micro_sequences)
    record = run.engine.measures.record(run.engine.evaluator.evaluate(batches, run.prepared.tokens_per_byte))
    record |= run.translations(steps_done)
    run.evaluations.add(run.messages.broadcast({"step": steps_done, **record}))
    run.tracker.evaluate(run.evaluations.records[-1])
