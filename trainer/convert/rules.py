"""The rules of keys that say something together, for tools that have the same things under other
names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from trainer.convert.draft import Draft
from trainer.convert.rows import Row, if_true, joint, listed, none, number, text, whole, yes
from trainer.convert.schema_keys import default_of
from trainer.schema import STDLIB
from trainer.tasks import TASKS

Rule = Callable[[Draft], None]

BY_DATA = "the number of steps in a pass depends on the data"


def batch(micro: str, accumulation: str) -> Rule:
    """Return the rule of the batch, which other tools count on each device."""

    def rule(draft: Draft) -> None:
        per_device, rounds = draft.read(micro, whole), draft.read(accumulation, whole)
        if per_device is not None:
            draft.put("batch.micro_sequences", per_device, micro)
        if per_device is not None and rounds is not None:
            ranks = f"{draft.world_size} {'rank' if draft.world_size == 1 else 'ranks'} (--world-size)"
            draft.put(
                "batch.global_sequences", per_device * rounds * draft.world_size, micro, accumulation, by=" × ", note=ranks
            )

    return rule


def length(steps: str, epochs: str) -> Rule:
    """Return the rule of the run's length, in which a number of steps goes before one of passes."""

    def rule(draft: Draft) -> None:
        limit, passes = draft.read(steps, whole), draft.read(epochs, number)
        if limit is not None and limit > 0:
            draft.put("train.steps", limit, steps)
            if draft.is_asked(epochs):
                draft.miss(epochs, f"{steps} goes before it")
        elif passes is not None and not draft.put_if_there("train.epochs", float(passes), epochs):
            draft.lacks("train.steps", f"{epochs} = {passes:g} counts passes over the data: set the steps that they take")

    return rule


def warmup(steps: str, ratio: str) -> Rule:
    """Return the rule of the warm-up, a number of steps, or below 1 a share of all."""

    def rule(draft: Draft) -> None:
        share, count, name = draft.read(ratio, number), draft.read(steps, number), ratio
        if count is not None and 0 < count < 1:
            share, name, count = count, steps, 0
        if count or not share:
            draft.put("schedule.warmup_steps", int(count or 0), steps)
        elif not draft.put_if_there("schedule.warmup_ratio", share, name):
            _share_of_steps(draft, "schedule.warmup_steps", share, name)

    return rule


def _share_of_steps(draft: Draft, to: str, share: float, name: str) -> None:
    total = draft.values.get("train.steps")
    if total is None:
        draft.miss(name, f"it is a share of the steps, whose number is not in the file: set {to}")
    else:
        draft.put(to, max(1, math.ceil(share * total)), name)


def interval(to: str, strategy: str, steps: str, *, otherwise: str = "", no: int = 0) -> Rule:
    """Return the rule of something that is done every so many steps: a number, or below 1 a share
    of all.

    `otherwise`: the key whose number is taken where `steps` has none. `no`: our value for never.
    """

    def rule(draft: Draft) -> None:
        how = draft.get(strategy)
        name = steps if not otherwise or draft.get(steps) is not None else otherwise
        if how in ("no", False):
            draft.put(to, no, strategy)
        elif how == "epoch":
            draft.miss(strategy, f"{BY_DATA}: set {to}")
        elif how not in (None, "steps"):
            draft.miss(strategy, f"it is none of no, steps and epoch: set {to}")
        elif (every := draft.read(name, number)) is not None:
            if 0 < every < 1:
                _share_of_steps(draft, to, every, name)
            else:
                draft.put(to, int(every), name)

    return rule


def pair(to: str, one: str, other: str) -> Rule:
    """Return the rule of a list of two numbers that the tool has under two keys."""

    def rule(draft: Draft) -> None:
        values = [draft.read(name, number) for name in (one, other)]
        if None not in values:
            draft.put(to, values, one, other)

    return rule


def precision(*switches: str) -> Rule:
    """Return the rule that without any of these switches everything is fp32, and then tf32 counts:
    half formats leave no fp32 product."""

    def rule(draft: Draft) -> None:
        if "precision.dtype" not in draft.values:
            draft.put("precision.dtype", "fp32", *switches)
        if draft.read("tf32", _wants_tf32) and draft.values["precision.dtype"] == "fp32":
            draft.put("precision.matmul", "tf32", "tf32")

    return rule


def _wants_tf32(value: object) -> bool:
    """Return true also for "auto", where the GPU decides."""
    return value == "auto" or yes(value)


def measure(name: object) -> str:
    """Return our name of a measure: eval_loss for loss."""
    found = text(name)
    return found if found.startswith("eval_") else f"eval_{found}"


# The rows of the checkpoint that is kept because it is the best.
BEST: Mapping[str, Row] = {
    "load_best_model_at_end": joint("checkpoint.best", False, if_true({"checkpoint.best": "eval_loss"})),
    "metric_for_best_model": joint("checkpoint.best", read=measure),
    "greater_is_better": none("which direction is better belongs to the measure", idle=(True,)),
}


def best(draft: Draft) -> None:
    """Bring the checkpoint that is kept because it is the best."""
    if draft.read("load_best_model_at_end", yes):
        name = draft.read("metric_for_best_model", measure) or "eval_loss"
        instead = "the newest checkpoints are kept, whatever they measure: evaluations are in evaluations.jsonl"
        draft.put_if_there("checkpoint.best", name, "load_best_model_at_end", "metric_for_best_model", instead=instead)


def patience(name: str) -> Rule:
    """Return the rule of evaluations without improvement that end a run."""

    def rule(draft: Draft) -> None:
        instead = "a run is not ended by what its evaluations measure: stop it by hand, it can be resumed"
        draft.put_if_there("train.patience", draft.read(name, whole), name, instead=instead)

    return rule


def max_rows(name: str) -> Rule:
    """Return the rule of the largest number of rows that are read of a source."""

    def rule(draft: Draft) -> None:
        instead = "all rows of a source are read: shorten the file"
        draft.put_if_there("data.max_rows", draft.read(name, whole), name, instead=instead)

    return rule


def chat_template(name: str, names: Mapping[str, str]) -> Rule:
    """Return the rule of a template by its name. `names`: theirs → ours, "" for the tokenizer's
    own."""

    def rule(draft: Draft) -> None:
        theirs = draft.read(name, text)
        if theirs is None or names.get(theirs) == "":
            return
        own = "conversations are written by the tokenizer's own chat template"
        if theirs in names:
            draft.put_if_there("data.chat_template", names[theirs], name, instead=own)
        else:
            draft.miss(name, f"{own}: none is here under that name")

    return rule


RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def output(folder: str, name: str) -> Rule:
    """Return the rule of the run's folder, whose last part is the run's name here.

    `name`: the key of a name for trackers, which they get from the run here.
    """

    def rule(draft: Draft) -> None:
        path, called = draft.read(folder, text), draft.read(name, text)
        above, last = os.path.split(os.path.normpath(path)) if path else ("", "")
        if last and RUN_NAME.fullmatch(last):
            draft.put("run.name", last, folder)
            if above:
                draft.put("run.dir", above, folder)
            if called and called != last:
                draft.miss(name, f"trackers show run.name, which {folder} gives")
            return
        if path:
            draft.put("run.dir", path, folder)
        if called and RUN_NAME.fullmatch(called):
            draft.put("run.name", called, name)
        elif called:
            draft.miss(name, "run.name has letters, digits, '.', '_' and '-' only: set it")

    return rule


TRACKERS: Mapping[str, Mapping[str, Any]] = {
    "wandb": {"tracking.wandb.mode": "online"},
    "tensorboard": {"tracking.tensorboard": True},
    "all": {"tracking.wandb.mode": "online", "tracking.tensorboard": True},
    "none": {},
}


def trackers(name: str) -> Rule:
    """Return the rule of the list of trackers."""

    def rule(draft: Draft) -> None:
        for tracker in draft.read(name, listed) or []:
            if tracker not in TRACKERS:
                draft.miss(name, f"there is no mirror of metrics.jsonl in {tracker}: wandb and tensorboard are there")
            for to, value in TRACKERS.get(tracker, {}).items():
                draft.put(to, value, name)

    return rule


def held_out(size: str) -> Rule:
    """Return the rule of what is held out of the sources: a share, or a number of rows."""

    def rule(draft: Draft) -> None:
        share = draft.read(size, number)
        if share is None or draft.values.get("data.eval_sources"):
            return
        if share >= 1:
            draft.miss(size, "it is a number of rows: set data.eval_fraction, a share of them")
        else:
            draft.put("data.eval_fraction", share, size)

    return rule


# Keys that look at the evaluations during a run.
OF_EVALUATIONS = ("train.patience", "checkpoint.best")


def evaluate_something(draft: Draft) -> None:
    """Remove what needs evaluations where nothing is held out, or where none is during the run."""
    nothing = not draft.values.get("data.eval_sources") and draft.values.get("data.eval_fraction") == 0
    if nothing and draft.values.get("train.eval_every"):
        draft.drop("train.eval_every", "nothing is held out to evaluate: set data.eval_fraction or data.eval_sources too")
    if not draft.values.get("train.eval_every"):
        for to in OF_EVALUATIONS:
            draft.drop(to, "the only evaluation is after the last step: set train.eval_every too")


def name_what_is_missing(draft: Draft) -> None:
    """Say which keys of the recipe no file of this tool could fill, and give the recipe a model to
    be checked with."""
    if "model.from_pretrained" not in draft.values and "model.family" not in draft.values:
        draft.values["model.family"], draft.origins["model.family"] = "gpt2", "a stand-in"
        draft.lacks("model.from_pretrained", "the file names no model, and the recipe has a new gpt2 as a stand-in: set it")
    if "data.sources" not in draft.values:
        task = TASKS[draft.values.get("data.task", "pretrain")]
        draft.lacks("data.sources", f"the file names no data{'' if task.rows else f', and the recipe has {STDLIB!r}'}: set it")


def say_that_rows_are_packed(*switches: str) -> Rule:
    """Return the rule that a sequence of a batch may hold several rows, unless one of the switches
    says that it does in the tool too."""

    def rule(draft: Draft) -> None:
        task = TASKS[draft.values.get("data.task", "pretrain")]
        if task.answers and not any(draft.get(name) for name in switches):
            seq_len = draft.values.get("data.seq_len", default_of("data.seq_len"))
            why = f"a sequence of the batch is filled with rows up to {seq_len} tokens, which do not see each other: "
            draft.lacks("batch.global_sequences", f"{why}a step sees more rows than with one row a sequence")

    return rule


def own_tokenizer(draft: Draft) -> None:
    """Take the tokenizer that came with the model, unless the file names another one."""
    model = draft.values.get("model.from_pretrained")
    if model and "data.tokenizer" not in draft.values:
        draft.values["data.tokenizer"] = model
        draft.origins["data.tokenizer"] = "the model's own"
