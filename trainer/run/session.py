"""A run that is ready to train: the objects that `opening.py` made, and the operations between
steps."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from shlex import quote
from typing import Any, NoReturn

from parallel.messages import Messages
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.disk_space import bytes_of_one, disk_space
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.model_card import CARD, Trained, write_card
from trainer.checkpoint.resume_check import Resume
from trainer.cluster.lease import Lease
from trainer.data import PreparedData, prepare_summary
from trainer.data.loader import EvalData
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.group import Joined, joined
from trainer.engine.matmul_peak import device_peak, slower_than_fp32
from trainer.engine.parameter_counts import ParameterCounts
from trainer.engine.swap_folder import private_swap_folders
from trainer.errors import EXIT_REQUEUE, UserError
from trainer.files.spare import Spare
from trainer.guard.guard import Guard
from trainer.guard.inspector import Inspector
from trainer.launch.ranks import PeerFailed, Place, together
from trainer.launch.stop_request import LOST, WANTED
from trainer.model.model_files import ModelFiles
from trainer.model.network import Network
from trainer.recipe import ResolvedRecipe
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.account import Account, open_ledger, times_of_steps
from trainer.run.closing import baseline, export, exported, sampled, translated, translated_meanwhile
from trainer.run.compilation import compilation_failed, settle_compilation
from trainer.run.devices import devices_of, footprint, machine_of, sheet_of
from trainer.run.memory_check import require_memory
from trainer.run.meter import Meter
from trainer.run.micro_batch import settle_micro_batch
from trainer.run.opening import LoadedRun, OpenFolder, clear_the_way, evaluations_so_far, opened_folder, read_data
from trainer.run.plan_outcome import introduced, outcome
from trainer.run.reference import with_reference
from trainer.run.run_plan import RunPlan, explained, plan_of
from trainer.run.step_data import StepData, evaluation_data, targets_for, training_data
from trainer.run.worst_case import require_staging, tries, try_worst_case
from trainer.run_folder import RunFolder
from trainer.schema import Recipe
from trainer.track import RunInfo, Tracker, make_tracker, read_metrics
from trainer.track.evaluations import Evaluations, out_of_patience
from trainer.track.goodput import Ledger, lost_s
from trainer.track.history import History
from trainer.track.plan_record import PlanRecord, line_of
from trainer.track.progress import work_progress
from trainer.track.report import write_report
from trainer.versions import versions
from trainer.watchdog.beats import Limits
from trainer.watchdog.lost import among_ranks
from trainer.watchdog.watchdog import Watchdog

BACKSTOP_S = 60  # after the watchdog, torch ends the wait, in case the threads of a rank do not run


@dataclass
class Session:
    """A run that is ready to train."""

    recipe: Recipe
    place: Place
    plan: BatchPlan
    folder: RunFolder
    files: ModelFiles
    prepared: PreparedData
    data: StepData
    eval_data: EvalData | None
    engine: Engine
    counts: ParameterCounts
    tracker: Tracker
    checkpoints: Checkpoints
    evaluations: Evaluations
    messages: Messages  # for messages at the end of a step
    watchdog: Watchdog
    lease: Lease | None  # on the first rank
    account: Account
    devices: str
    peak_flops: float  # of this rank's device, FLOP/s
    peak_source: str  # the source of that figure
    planned: RunPlan | None

    def say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.tracker.note(line)

    @property
    def reason_to_end(self) -> int:
        """The reason for which this rank would end the run, 0 for none; see
        `StopRequest.agreed`."""
        if self.lease is None:
            return 0
        return LOST if self.lease.is_lost else WANTED if self.lease.is_wanted else 0

    def remarks(self) -> list[str]:
        """Return what there is to say after a step. All ranks must call it together."""
        return [*self.watchdog.remarks(), *compilation_failed(self.engine, self.messages)]

    def leave_to_the_next(self, reason: str) -> NoReturn:
        """End at once, and write nothing more, because another start now owns the run folder."""
        if not self.place.is_first:
            raise PeerFailed(EXIT_REQUEUE)
        sys.stderr.write(f"triaxis: error: run folder {self.folder.path}: {reason}: this one ends, and writes nothing more\n")
        sys.stderr.flush()
        os._exit(EXIT_REQUEUE)

    def beside_plan(self) -> PlanRecord | None:
        """Return what was predicted and measured of this run, on the first rank. All ranks must
        call it together."""
        planned = self.planned.own.num_bytes if self.planned else None
        memories = self.messages.gather([planned, footprint(self.place.device)])
        if memories is None:
            return None
        return outcome(self.planned, memories, History.of(read_metrics(self.folder.metrics)).median("step_time_s"))

    def meter(self) -> Meter:
        """Return a meter that continues from the checkpoint."""
        return Meter(
            self.engine,
            self.counts,
            peak_flops=self.peak_flops,
            tracker=self.tracker,
            account=self.account.write,
            metrics=self.folder.metrics,
            skipped=self.checkpoints.memory.get("meter", {}).get("skipped", 0),
        )

    def guard(self) -> Guard:
        """Return a guard that continues from the checkpoint."""
        return Guard(
            self.recipe,
            self.plan,
            self.engine.mesh.layout,
            Inspector(self.engine, self.messages, self.data.micro_batches),
            scaler=self.engine.scaler,
            checkpoints=self.checkpoints,
            first_sequence=self.data.first_sequence,
            folder=self.folder.path / "guard",
            is_first=self.place.is_first,
            note=self.tracker.note,
        )

    @property
    def out_of_patience(self) -> str:
        """The reason for which train.patience ends the run now, the same on all ranks; "" while it
        goes on."""
        return out_of_patience(self.recipe, self.evaluations)

    def translations(self, steps_done: int) -> dict[str, float]:
        """Return the figures of translations at an evaluation, on the first rank; {} unless
        checkpoint.best is one of them."""
        is_first, note = self.place.is_first, self.tracker.note
        return translated_meanwhile(self.engine, self.files, self.folder, step=steps_done, is_first=is_first, note=note)

    def export(self, steps_done: int) -> Mapping[str, object]:
        """Write the weights of the best checkpoint, or else of the last step, as a Hugging Face
        folder, and return what was measured of them for the summary."""
        with together(lambda: self.engine.watch.doing):
            best, remarks = self.checkpoints.restore_best(self.engine, steps_done)
        told = exported(self.recipe, best, self.evaluations.of(steps_done), steps_done)
        step = best.manifest.step if best else steps_done
        export(self.engine, self.files, self.folder, step=step, is_first=self.place.is_first, note=self.tracker.note)
        self.say([*remarks, *told.lines])
        return told.figures

    def finish(self, summary: dict[str, Any]) -> None:
        """Add the closing results to the summary (the baseline, a sample, translations), and write
        the report."""
        recipe, engine, steps = self.recipe, self.engine, summary["steps"]
        if self.eval_data is not None and self.place.is_first and engine.measures.predicts_tokens:
            targets = targets_for(recipe, self.prepared, "evaluation", causal=engine.network.causal)
            summary |= baseline(recipe, self.prepared, targets)
        summary |= sampled(recipe, self.prepared, engine.evaluator)
        if self.place.is_first:
            summary |= translated(recipe, self.folder.export, tick=engine.watch.tick, note=self.tracker.note)
        summary |= self.account.goodput(steps)
        summary |= {"num_params": engine.num_params, "world_size": self.place.world_size, "devices": self.devices}
        self.end_tracking(summary)
        self.account.end(steps)
        if self.place.is_first:
            self._leave(summary.get("best_step", steps))

    def end_tracking(self, summary: Mapping[str, Any]) -> None:
        """Close the history with a summary, to which the run's plan is added. All ranks must call
        it together."""
        record = self.beside_plan()
        if record is not None:
            self.say(filter(None, [line_of(record)]))
        self.tracker.finish({**summary, **({"plan": record} if record else {})})

    def _leave(self, exported_step: int) -> None:
        """Write the export's card and the report, and say what a user does next."""
        recipe, layout = self.recipe, {**asdict(self.engine.mesh.layout), "zero": self.recipe.zero.stage}
        trained = Trained(recipe=recipe, step=exported_step, layout=layout, versions=versions())
        with Spare(self.folder.export / CARD, "triaxis export writes a folder with one").written():
            write_card(self.folder.export, trained.with_history(self.folder), name=str(self.folder.export))
        with Spare(self.folder.report, "triaxis report writes it again").written():
            write_report(self.folder.path)
        self.say([f"report: {self.folder.report}", f"next: {trained.task.used_by.format(quote(str(self.folder.export)))}"])

    def rewind(self, steps_done: int) -> int:
        """Restore the newest checkpoint after a spike in the last of `steps_done` steps, but
        continue with the data after the spike. Return the number of steps done now."""
        times = times_of_steps(self.folder)
        lines = self.checkpoints.rewind(self.engine)
        step = self.checkpoints.start_step
        self.data.skipped += steps_done - step
        self.tracker.rewind(step)
        self.evaluations.rewind(step)
        if self.account.ledger is not None:
            self.account.ledger.lose(lost_s(times, step))
        sequences = (steps_done - step) * self.plan.global_sequences
        self.say([*lines, f"rewound to step {step}; the data of {steps_done - step} steps ({sequences} sequences) is left out"])
        return step


@contextmanager
def open_session(
    resolved: ResolvedRecipe, run_dir: str | None, resume: Resume, *, plan_check: bool = True
) -> Iterator[Session]:
    """Open everything on every rank, and close it when the run ends, however it ends. `plan_check`:
    what is planned beyond the memory that is there is refused."""
    guard = resolved.recipe.guard
    limits = Limits(step_s=guard.timeout_s, long_s=guard.long_timeout_s)
    timeout = timedelta(seconds=limits.longest_s + BACKSTOP_S)
    with ExitStack() as stack:
        group = stack.enter_context(joined(Place.from_environment(os.environ), timeout))
        with together():
            BatchPlan.from_recipe(resolved.recipe, group.place.world_size, group.place.how)
        opened = stack.enter_context(opened_folder(group, resolved, run_dir, resume, limits))
        loaded = read_data(group, opened, resume)
        with together(lambda: group.watch.doing):
            machine = machine_of(group.place, opened.mesh.layout)
            settle_micro_batch(group, opened, loaded.network, machine)
            plan = BatchPlan.from_recipe(opened.resolved.recipe, group.place.world_size, group.place.how)
            planned = _planned(group, opened.resolved.recipe, loaded.network)
            require_memory(opened.resolved.recipe, plan, loaded.network, machine, planned if plan_check else None)
            ledger = open_ledger(opened.folder, loaded.found) if group.is_first else None
            if group.is_first:
                opened.remarks += clear_the_way(opened, loaded)
        stack.enter_context(explained(planned, group.watch))
        yield stack.enter_context(_ready(group, opened, loaded, plan, ledger, planned))


def _planned(group: Joined, recipe: Recipe, network: Network) -> RunPlan | None:
    place = group.place
    on_gpu = place.device.type == "cuda"
    return plan_of(network, recipe, place.world_size, place.how, on_gpu=on_gpu, device=sheet_of(place), rank=place.rank)


@contextmanager
def _ready(
    group: Joined, opened: OpenFolder, loaded: LoadedRun, plan: BatchPlan, ledger: Ledger | None, planned: RunPlan | None
) -> Iterator[Session]:
    """Build the engine and the objects around it, on every rank."""
    recipe, folder, watch, is_first = opened.resolved.recipe, opened.folder, group.watch, group.is_first
    devices = devices_of(group.place)
    with ExitStack() as stack:
        if ledger is not None:
            stack.callback(lambda: ledger.end(watch.step, watch.totals(), opened.watchdog.waiting()))
        checkpoints = Checkpoints(
            recipe,
            plan,
            opened.mesh.layout,
            loaded.facts,
            loaded.evaluated_on,
            CheckpointFolder(folder.checkpoints),
            opened.messages,
            loaded.found,
            loaded.files.save,
        )
        dict_for_deepspeed = deepspeed_config(recipe, plan, largest_weight=loaded.network.largest_weight)
        if is_first:
            folder.write_data([row.as_json() for row in prepare_summary(loaded.prepared)])
            folder.write_resolved(opened.resolved.as_resolved_json(dict_for_deepspeed))
        with together(lambda: watch.doing):
            tracker = make_tracker(
                recipe.tracking,
                RunInfo(
                    name=recipe.run.name,
                    folder=folder.path,
                    recipe=recipe.model_dump(mode="json"),
                    total_steps=recipe.train.total_steps,
                    world_size=group.place.world_size,
                    devices=devices,
                    start_step=checkpoints.start_step,
                ),
                writing_rank=is_first,
            )
        stack.push(_closing(tracker))
        engine = stack.enter_context(_built_engine(group, opened, loaded, plan, dict_for_deepspeed, checkpoints))
        prepared = _with_reference(group, opened, loaded, engine)
        watch.begin("start")
        opened.log.capture()  # DeepSpeed has made loggers of its own by now
        # entered after the tracker, so that the tracker still records which rank was lost
        stack.enter_context(among_ranks(opened.watchdog, lambda: watch.doing))
        session = _session(group, opened, loaded, prepared, engine, tracker, checkpoints, ledger, devices, planned)
        stack.callback(session.data.end)
        _introduce(session, [*opened.remarks, *loaded.remarks])
        _try_first(session)
        yield session


def _try_first(run: Session) -> None:
    """Take the memory of the worst case, where the recipe wants it."""
    require_staging(run.engine, run.place.local_world_size)
    step = run.checkpoints.start_step
    if tries(run.recipe, run.place.device) and step < run.recipe.train.total_steps:
        try_worst_case(run.engine, run.data.micro_batches(step), run.planned, evaluates=run.eval_data is not None)
    batches = partial(run.data.micro_batches, step)
    run.say(settle_compilation(run.engine, run.messages, run.folder.compilation, start_step=step, batches=batches))


@contextmanager
def _built_engine(
    group: Joined,
    opened: OpenFolder,
    loaded: LoadedRun,
    plan: BatchPlan,
    dict_for_deepspeed: dict[str, object],
    checkpoints: Checkpoints,
) -> Iterator[Engine]:
    """Build the engine with its first weights, or those of the checkpoint."""
    watch = group.watch
    with ExitStack() as stack:
        watch.begin("building the model")
        with together(lambda: watch.doing):
            private = stack.enter_context(private_swap_folders(dict_for_deepspeed, opened.folder.path, group.place.rank))
            engine = Engine(
                opened.resolved.recipe,
                plan,
                loaded.network,
                opened.mesh,
                group.device,
                deepspeed_config=private,
                fill=loaded.fill,
                watch=watch,
            )
        stack.callback(engine.close)
        watch.begin("restoring the checkpoint")
        with together(lambda: watch.doing):
            checkpoints.restore(engine)
        yield engine


def _with_reference(group: Joined, opened: OpenFolder, loaded: LoadedRun, engine: Engine) -> PreparedData:
    """Return the data, with the log-probabilities before training where the loss compares with
    them."""
    if not opened.resolved.recipe.needs_reference:
        return loaded.prepared
    folder = opened.folder.reference
    group.watch.begin("computing the reference")
    origin = loaded.found.path.parents[1] / folder.name if loaded.found else None
    with together(lambda: group.watch.doing), work_progress(shown=group.is_first) as progress:
        return with_reference(loaded.prepared, engine, folder=folder, origin=origin, writes=group.is_first, progress=progress)


def _session(
    group: Joined,
    opened: OpenFolder,
    loaded: LoadedRun,
    prepared: PreparedData,
    engine: Engine,
    tracker: Tracker,
    checkpoints: Checkpoints,
    ledger: Ledger | None,
    devices: str,
    planned: RunPlan | None,
) -> Session:
    recipe, mesh = opened.resolved.recipe, opened.mesh
    skipped: int = checkpoints.memory.get("data", {}).get("skipped_steps", 0)
    train_data = training_data(recipe, prepared, causal=loaded.network.causal)
    peak_flops, peak_source = device_peak(group.device, recipe.precision.products)
    return Session(
        recipe=recipe,
        place=group.place,
        plan=engine.plan,
        folder=opened.folder,
        files=loaded.files,
        prepared=prepared,
        data=StepData(
            train_data,
            mesh.data,
            engine.plan,
            engine.execution.reads_tokens,
            skipped,
            group.device if group.device.type == "cuda" else None,
        ),
        eval_data=evaluation_data(recipe, prepared, causal=loaded.network.causal),
        engine=engine,
        counts=ParameterCounts.of(engine.specs, mesh.replica, group.device, engine.quantized),
        tracker=tracker,
        checkpoints=checkpoints,
        evaluations=evaluations_so_far(opened),
        messages=group.messages(),
        watchdog=opened.watchdog,
        lease=opened.lease,
        account=Account(ledger, engine, opened.watchdog),
        devices=devices,
        peak_flops=peak_flops,
        peak_source=peak_source,
        planned=planned,
    )


def _closing(tracker: Tracker) -> Callable[..., None]:
    """Return an exit function that finishes the tracker when the run fails: the terminal is
    restored, and W&B records the reason."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            # with a full disk too, the error that ended the run must be reported
            with suppress(UserError):
                tracker.finish({"ended_by": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__})

    return close


def _introduce(run: Session, remarks: Iterable[str]) -> None:
    """Write to the console what will be trained, on which devices, and the remarks so far."""
    recipe, engine, counts, note = run.recipe, run.engine, run.counts, run.tracker.note
    if remark := slower_than_fp32(run.place.device, recipe.precision.settled, run.peak_flops):
        note(remark)
    one = bytes_of_one(recipe, trained=counts.trained, frozen_bytes=counts.frozen_bytes)
    run.say([*remarks, disk_space(recipe, run.checkpoints.folder, one).line])
    run.say(f"data: {row}" for row in prepare_summary(run.prepared))
    run.say(f"data: {line}" for line in run.data.data.described(run.prepared.sources, recipe.train.total_steps))
    run.say(run.prepared.passes.lines(recipe))
    run.say([*run.prepared.notes, *engine.notes])
    note(run.plan.line)
    run.say(introduced(run.planned))
    weights = "6 · matmul weights"
    if counts.frozen:
        whole = counts.trained + counts.frozen
        note(f"tuning: {counts.trained:,} of {whole:,} parameters are trained ({counts.trained / whole:.3%})")
        weights = "(4 · frozen + 6 · trained matmul weights)"
    peak = f"{run.peak_flops / 1e12:.3g} TFLOP/s per rank ({run.peak_source})"
    note(f"MFU = model FLOPs ({weights} · tokens + causal attention inside documents) / {peak}")
