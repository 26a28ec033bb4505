"""The first steps of a run on every rank, after it has joined the others (`engine/group.py`): the
folder, the data, the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from parallel.mesh import Mesh
from parallel.messages import Messages
from trainer.checkpoint.facts import data_facts, model_facts, recipe_facts
from trainer.checkpoint.resume import Found
from trainer.checkpoint.resume_check import Resume, as_json
from trainer.cluster.lease import JobStart, Lease, leased
from trainer.data import PreparedData, prepare
from trainer.data.digests import fingerprint_of
from trainer.data.foreign_tokenizer import not_of_model
from trainer.data.handed_on_tokenizer import beside_model
from trainer.data.rows import order_fingerprint
from trainer.data.tokenizer import Tokenizer
from trainer.engine.execution import DTYPES
from trainer.engine.first_weights import first_weights
from trainer.engine.group import Joined
from trainer.errors import DataError, RecipeError
from trainer.launch.binding import placed
from trainer.launch.ranks import together
from trainer.learning_rate import changed_length
from trainer.model.hugging_face import local_folder, read_config, unread_weights
from trainer.model.measures import measures_of
from trainer.model.model_files import ModelFiles
from trainer.model.network import Network
from trainer.model.origin import Origin
from trainer.recipe import ResolvedRecipe
from trainer.recipe.best import BEST, PATIENCE, unmeasured
from trainer.recipe.earlier import recipe_of
from trainer.recipe.epochs import settled
from trainer.run.start import agree, begin_again, claim, find, keep_rules, leave_behind, make_room, settle_format
from trainer.run_folder import RunFolder
from trainer.schema import Recipe
from trainer.track import open_rank_log, truncate_after
from trainer.track.evaluations import Evaluations
from trainer.track.log import RankLog
from trainer.track.progress import work_progress
from trainer.watchdog.beats import Limits
from trainer.watchdog.lost import among_ranks
from trainer.watchdog.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class OpenFolder:
    """A run folder that this start owns, with its log, and a watchdog over the ranks.

    `remarks` are shown when there is a tracker. `resolved` is the recipe with the rules by which
    the run in the folder began and with its compute format, and once the data is read with the
    steps of its epochs.
    """

    folder: RunFolder
    lease: Lease | None  # on the first rank
    log: RankLog
    watchdog: Watchdog
    mesh: Mesh
    messages: Messages
    resolved: ResolvedRecipe
    remarks: list[str]


@contextmanager
def opened_folder(
    group: Joined, resolved: ResolvedRecipe, run_dir: str | None, resume: Resume, limits: Limits
) -> Iterator[OpenFolder]:
    """Take the run folder on the first rank, and begin to watch over the ranks. RecipeError or
    DataError on all of them where this run must not write in the folder."""
    recipe, folder = resolved.recipe, RunFolder.of(resolved.recipe, run_dir)
    remarks: list[str] = []
    lease = None
    with ExitStack() as stack:
        with together():
            if group.is_first:
                remarks += claim(folder, resume, resolved.sources)
                lease = stack.enter_context(
                    leased(folder.path, JobStart.from_environment(os.environ), patience_s=limits.step_s)
                )
                remarks += begin_again(folder, resume)
        log = stack.enter_context(open_rank_log(folder.path, group.place.rank))
        logger.info(placed(group.place.rank, str(group.device)))
        alike = group.layout(recipe.parallel).groups("dp", "cp", "tp")
        watchdog = stack.enter_context(
            Watchdog(group.watch, limits, log.path.parent, recipe.run.name, alike, neighbour=group.neighbour)
        )
        stack.enter_context(among_ranks(watchdog, lambda: group.watch.doing))
        mesh, messages = group.mesh(recipe.parallel), group.messages()
        group.watch.begin("reading the data")
        with together(lambda: group.watch.doing):
            resolved, told = keep_rules(resolved, folder, resume, messages)
            resolved, more = settle_format(resolved, group.device, messages)
        yield OpenFolder(folder, lease, log, watchdog, mesh, messages, resolved, [*remarks, *told, *more])


@dataclass(frozen=True)
class LoadedRun:
    """The data of a run, the network with the function that fills it, and the checkpoint to
    continue from. `facts` must be equal to those of that checkpoint. `evaluated_on`: the
    fingerprint of the held-out data."""

    prepared: PreparedData
    found: Found | None
    network: Network
    fill: Callable[[nn.Module], None]
    files: ModelFiles
    facts: dict[str, Any]
    evaluated_on: str
    remarks: list[str]


def read_data(group: Joined, opened: OpenFolder, resume: Resume) -> LoadedRun:
    """Read the data and find the checkpoint to continue from. RecipeError or DataError, on all
    ranks, for problems that would otherwise appear after hours."""
    recipe = opened.resolved.recipe
    with together(lambda: group.watch.doing), work_progress(shown=group.is_first) as progress:
        cache_dir = Path(str(recipe.data.cache_dir))
        prepared = prepare(recipe.data, seed=recipe.run.seed, cache_dir=cache_dir, build=group.is_first, progress=progress)
    group.watch.begin("looking for a checkpoint")
    with together(lambda: group.watch.doing):
        opened.resolved = settled(opened.resolved, prepared.passes)
        recipe = opened.resolved.recipe
        found, remarks = find(opened.folder, resume, opened.messages)
        network, fill = first_weights(opened.resolved, prepared.tokenizer, prepared.classes, resumed=found is not None)
        if recipe.model.from_pretrained is not None and found is None:
            remarks += unread_weights(local_folder(recipe.model.from_pretrained, recipe.model.revision))
        if group.is_first:
            remarks += _foreign_tokenizer(recipe, prepared.tokenizer)
        if prepared.chat and recipe.train.sample_prompt is not None:
            prepared.chat.prompt(recipe.train.sample_prompt)
        _require_compared(recipe, network, prepared)
        files = _files(recipe, network, prepared)
        if group.is_first:  # only this rank writes them
            files = replace(files, tokenizer=beside_model(prepared.tokenizer, files.config))
        facts = _facts(recipe, files, prepared)
        if found is not None:
            agree(found, facts, resume)
            remarks += _changed_length(found, recipe)
    return LoadedRun(prepared, found, network, fill, files, facts, _evaluated_on(recipe, prepared), remarks)


def clear_the_way(opened: OpenFolder, loaded: LoadedRun) -> list[str]:
    """Remove what an earlier start left after the step from which this one continues; return
    remarks.

    Nothing of an earlier start is changed before this call.
    """
    folder, found, recipe = opened.folder, loaded.found, opened.resolved.recipe
    remarks = [*leave_behind(found, folder), *make_room(folder, recipe, loaded.evaluated_on)] if found else []
    for history in (folder.metrics, folder.evaluations):
        truncate_after(history, found.manifest.step if found else 0)
    folder.write_given(opened.resolved.given)
    return remarks


def _changed_length(found: Found, recipe: Recipe) -> list[str]:
    """Return a remark where the run that goes on is longer or shorter than it was planned."""
    try:
        earlier = recipe_of(found.path, found.manifest.recipe)
    except DataError:  # values that are no longer legal: nothing is known of its plan
        return []
    return list(filter(None, [changed_length(earlier, recipe, found.manifest.step)]))


def evaluations_so_far(opened: OpenFolder) -> Evaluations:
    """Return the evaluations up to the step from which the run continues, as the first rank has
    them. All ranks must call it together."""
    is_first, path = opened.messages.is_first, opened.folder.evaluations
    return Evaluations(opened.messages.broadcast(Evaluations.read(path).records if is_first else None))


def _require_compared(recipe: Recipe, network: Network, prepared: PreparedData) -> None:
    """Raise RecipeError if the data and the network, once they are known, leave nothing to compare
    evaluations by."""
    best = recipe.checkpoint.best
    asked = [key for key, value in ((BEST, best), (PATIENCE, recipe.train.patience)) if value is not None]
    if asked and not prepared.evaluation:
        raise RecipeError(
            f"{asked[0]} compares evaluations, and data.eval_fraction {recipe.data.eval_fraction:g} holds out none of these "
            f"documents: raise it, give data.eval_sources, or remove {asked[0]}"
        )
    legal = measures_of(recipe.data.task, network).figures
    if best is not None and best not in legal:
        raise RecipeError(unmeasured(best, legal, f"a model of {len(prepared.classes)} classes"))


def _files(recipe: Recipe, network: Network, prepared: PreparedData) -> ModelFiles:
    return ModelFiles(
        network,
        prepared.tokenizer,
        str(DTYPES[recipe.precision.settled]).removeprefix("torch."),
        task=recipe.data.task,
        end_of_turn=prepared.chat.end_of_turn if prepared.chat else None,
        origin=_origin(recipe, prepared.tokenizer),
    )


def _foreign_tokenizer(recipe: Recipe, tokenizer: Tokenizer) -> list[str]:
    """Return a warning where the tokenizer is not the one that came with the weights."""
    name = recipe.model.from_pretrained
    if name is None or name == recipe.data.tokenizer:
        return []
    folder = local_folder(name, recipe.model.revision, code=recipe.model.trust_remote_code)
    return not_of_model(recipe.data.tokenizer, tokenizer, folder, name)


def _origin(recipe: Recipe, tokenizer: Tokenizer) -> Origin | None:
    """Return what the folder that the run starts from says about special tokens and generation."""
    name = recipe.model.from_pretrained
    if name is None:
        return None
    folder = local_folder(name, recipe.model.revision, code=recipe.model.trust_remote_code)
    named = Path(recipe.data.tokenizer)
    same = name == recipe.data.tokenizer or (named.is_dir() and named.samefile(folder))
    return Origin.of(folder, read_config(folder), tokenizer, same_tokenizer=same)


def _facts(recipe: Recipe, files: ModelFiles, prepared: PreparedData) -> dict[str, Any]:
    data = data_facts(tokenizer=prepared.tokenizer.fingerprint, samples=prepared.fingerprint)
    return as_json({**recipe_facts(recipe), **model_facts(files.config), **data})


def _evaluated_on(recipe: Recipe, prepared: PreparedData) -> str:
    """Return a fingerprint that is equal if every evaluation is of the same samples and tokens."""
    samples = order_fingerprint(
        prepared.evaluation,
        None,
        row_tokens=recipe.data.row_tokens,
        seed=recipe.run.seed,
        isolate_documents=recipe.data.isolate_documents,
        tails=False,
    )
    return fingerprint_of([samples, recipe.train.eval_sequences, prepared.tokenizer.fingerprint])
