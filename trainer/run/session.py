"""Everything that a run needs, made in order: place, layout, data, network, engine, trackers."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from parallel.mesh import Mesh
from parallel.messages import Messages
from parallel.topology import Layout
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.disk_space import bytes_of_one, room
from trainer.checkpoint.facts import data_facts, model_facts, recipe_facts
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.resume import Found
from trainer.checkpoint.resume_check import Resume, as_json
from trainer.cluster.lease import Hold, JobStart, held
from trainer.data import PreparedData, prepare, prepare_summary
from trainer.data.handed_on_tokenizer import beside_model
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.targets import Part, Targets, targets_of
from trainer.data.tokenizer import Tokenizer
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.execution import DTYPES
from trainer.engine.first_weights import first_weights
from trainer.engine.matmul_peak import device_peak, slower_than_fp32
from trainer.engine.parameter_counts import Census
from trainer.engine.swap_folder import private_swap_folders
from trainer.errors import EXIT_REQUEUE, UserError
from trainer.launch import ranks
from trainer.launch.binding import placed
from trainer.launch.ranks import PeerFailed, Place, together
from trainer.launch.stop_request import LOST, WANTED
from trainer.model.hugging_face import local_folder, read_config, unread_weights
from trainer.model.model_files import ModelFiles
from trainer.model.network import Network
from trainer.model.origin import Origin
from trainer.recipe import ResolvedRecipe
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.least_memory import Machine, host_bytes, require_memory
from trainer.run.reference import with_reference
from trainer.run.start import agree, begin_again, claim, find, keep_rules, leave_behind, make_room
from trainer.run_folder import RunFolder
from trainer.schema import Recipe
from trainer.stopwatch import Stopwatch
from trainer.track import RunInfo, Tracker, make_tracker, open_rank_log, read_metrics, truncate_after
from trainer.track.goodput import Ledger, lost_s
from trainer.track.progress import work_progress
from trainer.watchdog.beats import Limits
from trainer.watchdog.lost import among_ranks, among_strangers
from trainer.watchdog.watchdog import Watchdog

logger = logging.getLogger(__name__)

BACKSTOP_S = 60  # after the watchdog torch ends the wait: should the threads of a rank not run


@dataclass
class Session:
    """A run that is ready to train."""

    recipe: Recipe
    place: Place
    mesh: Mesh
    plan: BatchPlan
    folder: RunFolder
    network: Network
    files: ModelFiles
    prepared: PreparedData
    data: TrainData
    eval_data: EvalData | None
    engine: Engine
    census: Census
    tracker: Tracker
    checkpoints: Checkpoints
    ranks: Messages  # for a word at the end of a step
    watchdog: Watchdog
    hold: Hold | None  # on the first rank
    ledger: Ledger | None  # on the first rank
    devices: str
    peak_flops: float  # of this rank's device, FLOP/s
    newly_skipped: int = 0  # steps of data left out since the run went on from a checkpoint

    def say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.tracker.note(line)

    @property
    def word(self) -> int:
        """What this rank has to say for the end of the run; see `StopRequest.agreed`."""
        if self.hold is None:
            return 0
        return LOST if self.hold.is_lost else WANTED if self.hold.is_wanted else 0

    def leave_to_the_next(self, reason: str) -> NoReturn:
        """The run folder is another start's: nothing more may be written there, nor what else would be at the end."""
        if not self.place.is_first:
            raise PeerFailed(EXIT_REQUEUE)
        sys.stderr.write(f"triaxis: error: run folder {self.folder.path}: {reason}: this one ends, and writes nothing more\n")
        sys.stderr.flush()
        os._exit(EXIT_REQUEUE)

    def account(self, step: int, *, always: bool = False) -> None:
        if self.ledger is not None:
            self.ledger.write(step, self.engine.watch.totals(), self.watchdog.waiting(), always=always)

    def end_account(self, step: int) -> None:
        if self.ledger is not None:
            self.ledger.end(step, self.engine.watch.totals(), self.watchdog.waiting())

    def goodput(self, step: int) -> dict[str, float]:
        """{"goodput": the share of the time that the run was given in which it trained}; {} off the first rank."""
        if self.ledger is None:
            return {}
        shares = self.ledger.shares(step, self.engine.watch.totals(), self.watchdog.waiting())
        return {name: share for name, share in shares.items() if name == "goodput"}

    @property
    def skipped_data(self) -> int:
        """Steps whose data is left out from here on, because of spikes."""
        return self._skipped_before + self.newly_skipped

    @property
    def _skipped_before(self) -> int:
        """Of them, those that the checkpoint knows of."""
        skipped: int = self.checkpoints.memory.get("data", {}).get("skipped_steps", 0)
        return skipped

    def rewind(self, steps_done: int) -> int:
        """After a spike in the last of `steps_done` steps: everything as the newest checkpoint has it, but for the data, which
        goes on after the spike; the number of steps done now."""
        skipped = self.skipped_data
        times = _times_of_steps(self.folder)
        lines = self.checkpoints.rewind(self.engine)
        step = self.checkpoints.start_step
        self.newly_skipped = skipped + steps_done - step - self._skipped_before
        self.tracker.rewind(step)
        if self.ledger is not None:
            self.ledger.lose(lost_s(times, step))
        sequences = (steps_done - step) * self.plan.global_sequences
        self.say([*lines, f"rewound to step {step}; the data of {steps_done - step} steps ({sequences} sequences) is left out"])
        return step

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's part of a step."""
        step += self.skipped_data
        dp, read = self.mesh.dp, self.engine.execution.reads_tokens
        micro_sequences = self.plan.micro_sequences
        return list(self.data.micro_batches(step, dp_rank=dp.rank, dp=dp.size, micro_sequences=micro_sequences, read=read))


@contextmanager
def open_session(resolved: ResolvedRecipe, run_dir: str | None, resume: Resume) -> Iterator[Session]:
    """Make everything on every rank, and give it back when the run ends, however it ends."""
    recipe = resolved.recipe
    place = Place.from_environment(os.environ)
    folder = RunFolder.of(recipe, run_dir)
    with ExitStack() as stack:
        limits = Limits(step_s=recipe.guard.timeout_s, long_s=recipe.guard.long_timeout_s)
        timeout = timedelta(seconds=limits.longest_s + BACKSTOP_S)
        stack.enter_context(among_strangers(place.rank))
        neighbour = stack.enter_context(ranks.joined(place, timeout))
        watch = Stopwatch(place.device)
        with together():
            plan = BatchPlan.from_recipe(recipe, place.world_size, place.how)
        degrees = recipe.parallel
        layout = Layout.from_world_size(place.world_size, pp=degrees.pipeline, cp=degrees.context, tp=degrees.tensor)
        remarks: list[str] = []
        hold = None
        with together():
            if place.is_first:
                remarks = claim(folder, resume, resolved.sources)
                start = JobStart.from_environment(os.environ)
                hold = stack.enter_context(held(folder.path, start, patience_s=limits.step_s))
                remarks += begin_again(folder, resume)
        log = stack.enter_context(open_rank_log(folder.path, place.rank))
        logger.info(placed(place.rank, str(place.device)))
        alike = layout.groups("dp", "cp", "tp")
        watchdog = stack.enter_context(Watchdog(watch, limits, log.path.parent, recipe.run.name, alike, neighbour=neighbour))
        stack.enter_context(among_ranks(watchdog, lambda: watch.doing))
        mesh, messages = Mesh.build(layout, timeout), Messages.among_all(timeout)
        watch.begin("reading the data")
        with together(lambda: watch.doing):
            resolved, told = keep_rules(resolved, folder, resume, messages)
        recipe = resolved.recipe
        remarks += told
        with together(lambda: watch.doing), work_progress(shown=place.is_first) as progress:
            cache_dir = Path(str(recipe.data.cache_dir))
            prepared = prepare(recipe.data, seed=recipe.run.seed, cache_dir=cache_dir, build=place.is_first, progress=progress)
        watch.begin("looking for a checkpoint")
        with together(lambda: watch.doing):
            found, told = find(folder, resume, messages)
            remarks += told
            network, fill = first_weights(resolved, prepared.tokenizer, prepared.classes, resumed=found is not None)
            require_memory(recipe, plan, network, _machine(place))
            if recipe.model.from_pretrained is not None and found is None:
                remarks += unread_weights(local_folder(recipe.model.from_pretrained, recipe.model.revision))
            if prepared.chat and recipe.train.sample_prompt is not None:
                prepared.chat.prompt(recipe.train.sample_prompt)  # refused now rather than after the last step
            dtype, chat = str(DTYPES[recipe.precision.dtype]).removeprefix("torch."), prepared.chat
            files = ModelFiles(
                network,
                prepared.tokenizer,
                dtype,
                task=recipe.data.task,
                end_of_turn=chat.end_of_turn if chat else None,
                origin=_origin(recipe, prepared.tokenizer),
            )
            if place.is_first:  # which writes them; what cannot be handed on is refused now rather than after the last step
                files = replace(files, tokenizer=beside_model(prepared.tokenizer, files.config))
            facts = _facts(recipe, files, prepared)
            if found is not None:
                agree(found, facts, resume)
            ledger = None
            if place.is_first:
                ledger = _open_ledger(folder, found)
                remarks += _clear_the_way(folder, found, resolved)
        if ledger is not None:
            stack.callback(lambda: ledger.end(watch.step, watch.totals(), watchdog.waiting()))
        checkpoints = Checkpoints(
            recipe, plan, mesh.layout, facts, CheckpointFolder(folder.checkpoints), messages, found, files.save
        )
        dict_for_deepspeed = deepspeed_config(recipe, plan, largest_weight=network.largest_weight)
        if place.is_first:
            folder.write_resolved(resolved.as_resolved_json(dict_for_deepspeed))
        devices = _devices(place)
        with together(lambda: watch.doing):
            tracker = make_tracker(
                recipe.tracking,
                RunInfo(
                    name=recipe.run.name,
                    folder=folder.path,
                    recipe=recipe.model_dump(mode="json"),
                    total_steps=recipe.train.steps,
                    world_size=place.world_size,
                    devices=devices,
                    start_step=checkpoints.start_step,
                ),
                writing_rank=place.is_first,
            )
        stack.push(_closing(tracker))
        watch.begin("building the model")
        with together(lambda: watch.doing):
            private = stack.enter_context(private_swap_folders(dict_for_deepspeed, folder.path, place.rank))
            engine = Engine(recipe, plan, network, mesh, place.device, deepspeed_config=private, fill=fill, watch=watch)
        stack.callback(engine.close)
        watch.begin("restoring the checkpoint")
        with together(lambda: watch.doing):
            checkpoints.restore(engine)
        if recipe.needs_reference:
            watch.begin("computing the reference")
            origin = found.path.parents[1] / folder.reference.name if found else None
            with together(lambda: watch.doing), work_progress(shown=place.is_first) as progress:
                prepared = with_reference(
                    prepared, engine, folder=folder.reference, origin=origin, writes=place.is_first, progress=progress
                )
        watch.begin("start")
        log.capture()  # DeepSpeed makes loggers of its own on the way
        peak_flops, peak_source = device_peak(place.device, recipe.precision.dtype)
        if remark := slower_than_fp32(place.device, recipe.precision.dtype, peak_flops):
            tracker.note(remark)
        census = Census.take(engine.specs, mesh.replica, place.device, engine.quantized)
        one = bytes_of_one(recipe, trained=census.trained, frozen_bytes=census.frozen_bytes)
        for remark in (*remarks, room(recipe, checkpoints.folder, one).line):
            tracker.note(remark)
        stack.enter_context(among_ranks(watchdog, lambda: watch.doing))  # so that the tracker hears who was lost
        peak = f"{peak_flops / 1e12:.3g} TFLOP/s per rank ({peak_source})"
        data = _train_data(recipe, prepared, network)
        _introduce(tracker, recipe, prepared, data, engine, plan, census, peak)
        yield Session(
            recipe=recipe,
            place=place,
            mesh=mesh,
            plan=plan,
            folder=folder,
            network=network,
            files=files,
            prepared=prepared,
            data=data,
            eval_data=_eval_data(recipe, prepared, network),
            engine=engine,
            census=census,
            tracker=tracker,
            checkpoints=checkpoints,
            ranks=Messages.among_all(timeout),
            hold=hold,
            watchdog=watchdog,
            ledger=ledger,
            devices=devices,
            peak_flops=peak_flops,
        )


def _closing(tracker: Tracker) -> Callable[..., None]:
    """What ends the tracker when the run does not reach its end: the terminal is given back, W&B hears of it."""

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with suppress(UserError):  # a full disk: what ended the run is to be heard
                tracker.finish({"ended_by": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__})

    return close


def _origin(recipe: Recipe, tokenizer: Tokenizer) -> Origin | None:
    """What the folder that the run starts from says of special tokens and of writing."""
    name = recipe.model.from_pretrained
    if name is None:
        return None
    folder = local_folder(name, recipe.model.revision, code=recipe.model.trust_remote_code)
    named = Path(recipe.data.tokenizer)
    same = name == recipe.data.tokenizer or (named.is_dir() and named.samefile(folder))
    return Origin.of(folder, read_config(folder), tokenizer, same_tokenizer=same)


def _facts(recipe: Recipe, files: ModelFiles, prepared: PreparedData) -> dict[str, Any]:
    """What must be the same to go on from this run's checkpoints."""
    data = data_facts(tokenizer=prepared.tokenizer.fingerprint, samples=prepared.fingerprint)
    return as_json({**recipe_facts(recipe), **model_facts(files.config), **data})


def _open_ledger(folder: RunFolder, found: Found | None) -> Ledger:
    from_step = found.manifest.step if found else 0
    return Ledger(folder.path, from_step=from_step, times=_times_of_steps(folder))


def _times_of_steps(folder: RunFolder) -> dict[int, float]:
    """When each step was logged."""
    return {int(record["step"] or 0): float(record["time"] or 0.0) for record in read_metrics(folder.metrics)}


def _clear_the_way(folder: RunFolder, found: Found | None, resolved: ResolvedRecipe) -> list[str]:
    """Only now is anything of an earlier start changed: its history ends where this start begins; remarks."""
    remarks = [*leave_behind(found, folder), *make_room(folder, resolved.recipe.checkpoint.keep)] if found else []
    for history in (folder.metrics, folder.evaluations):
        truncate_after(history, found.manifest.step if found else 0)
    folder.write_given(resolved.given)
    return remarks


def targets_for(recipe: Recipe, prepared: PreparedData, network: Network, part: Part) -> Targets:
    """What the positions of this run's rows are to predict."""
    return targets_of(recipe.data, prepared.tokenizer, causal=network.causal, seed=recipe.run.seed, part=part)


def _train_data(recipe: Recipe, prepared: PreparedData, network: Network) -> TrainData:
    return TrainData(
        prepared.train,
        prepared.weights,
        seq_len=recipe.data.row_tokens,
        seed=recipe.run.seed,
        isolate_documents=recipe.data.isolate_documents,
        tails=recipe.data.tails == "train",
        global_sequences=recipe.batch.global_sequences,
        targets=targets_for(recipe, prepared, network, "training"),
    )


def _eval_data(recipe: Recipe, prepared: PreparedData, network: Network) -> EvalData | None:
    if not prepared.evaluation:
        return None
    return EvalData(
        prepared.evaluation,
        seq_len=recipe.data.row_tokens,
        isolate_documents=recipe.data.isolate_documents,
        sequences=recipe.train.eval_sequences,
        targets=targets_for(recipe, prepared, network, "evaluation"),
    )


def _machine(place: Place) -> Machine:
    on_gpu = place.device.type == "cuda"
    gpu_bytes = torch.cuda.get_device_properties(place.device).total_memory if on_gpu else None
    return Machine(host_bytes(), place.local_world_size, gpu_bytes)


def _devices(place: Place) -> str:
    if place.device.type == "cuda":
        return f"{place.world_size} × {torch.cuda.get_device_name(place.device)}"
    threads = torch.get_num_threads()
    return (
        f"{place.world_size} CPU process{'es' if place.world_size > 1 else ''}, "
        f"{threads} thread{'s' if threads > 1 else ''} each"
    )


def _introduce(
    tracker: Tracker,
    recipe: Recipe,
    prepared: PreparedData,
    data: TrainData,
    engine: Engine,
    plan: BatchPlan,
    census: Census,
    peak: str,
) -> None:
    for row in prepare_summary(prepared):
        tracker.note(f"data: {row}")
    for line in data.described(prepared.sources, recipe.train.steps):
        tracker.note(f"data: {line}")
    for note in (*prepared.notes, *engine.notes):
        tracker.note(note)
    tracker.note(
        f"step: {plan.global_sequences} sequences = micro {plan.micro_sequences} × data-parallel {plan.dp} × "
        f"{plan.num_micro_batches} micro-batches; {plan.tokens_per_step:,} tokens"
    )
    weights = "6 · matmul weights"
    if census.frozen:
        whole = census.trained + census.frozen
        tracker.note(f"tuning: {census.trained:,} of {whole:,} parameters are trained ({census.trained / whole:.3%})")
        weights = "(4 · frozen + 6 · trained matmul weights)"
    tracker.note(f"MFU = model FLOPs ({weights} · tokens + causal attention inside documents) / {peak}")
