"""The answer to whether a run can resume, before anything is loaded: in under a second, the same on
every rank. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.facts import DATA, model_facts, recipe_facts, refusals
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.errors import DataError, RecipeError
from trainer.model.auto_rules import AUTO
from trainer.recipe import ResolvedRecipe, tokenizer_vocab_size
from trainer.recipe.earlier import Rules, as_begun, recipe_of, rules_of_checkpoint, rules_of_run
from trainer.recipe.task_defaults import FORMAT
from trainer.run_folder import RunFolder
from trainer.schema import Recipe
from trainer.track.evaluations import Evaluations, out_of_patience


@dataclass(frozen=True)
class Resume:
    """The choice of what to go on from.

    `how` is `--resume`: "auto" (the newest whole checkpoint of the run, if it has any), "never" (a
    new run; an old one of the same name moves aside) or a path. `allowed`: what `--allow-change`
    lets differ.
    """

    how: str = "auto"
    allowed: tuple[str, ...] = ()

    @property
    def path(self) -> str | None:
        return None if self.how in ("auto", "never") else self.how


def checkpoint_named(name: str, *, option: str = "--resume", also: str = "") -> Path:
    """Return the checkpoint that a command line names: a folder with a manifest, or the newest of a
    run. RecipeError where there is none; `also`: what else is legal there."""
    path = Path(name)
    try:
        if (path / MANIFEST).exists():
            return path
        found = [checkpoint for folder in (path, path / "checkpoints") for _, checkpoint in CheckpointFolder(folder).steps()]
    except (OSError, ValueError):  # not a possible name of a file
        found = []
    if not found:
        words = "auto, never, " if option == "--resume" else also
        raise RecipeError(f"{option} {name}: no checkpoint there; legal: {words}a checkpoint's folder, or a run's")
    return found[0]


def rules_begun_with(folder: RunFolder, resume: Resume) -> tuple[Rules, str] | None:
    """Return the rules of the named checkpoint, else those of the run in the folder, and the name
    of that; None for a new run."""
    if resume.how == "never":
        return None
    if resume.path is None and folder.holds_a_run and (rules := rules_of_run(folder.resolved)) is not None:
        return rules, f"the run in {folder.path}"
    steps = [] if resume.path else CheckpointFolder(folder.checkpoints).steps()
    found = checkpoint_named(resume.path) if resume.path else steps[0][1] if steps else None
    if found is None:
        return None
    try:
        return rules_of_checkpoint(Manifest.read(found).recipe), str(found)
    except DataError:
        return None  # opening the run finds another checkpoint, or reports that there is none


def finished(resolved: ResolvedRecipe, run_dir: str | None, resume: Resume) -> str:
    """Return the line to show if the run has come to its end already, else "".

    RecipeError if the recipe shows that it must not go on from its newest checkpoint.
    """
    if resume.how == "never":
        return ""
    folder = RunFolder.of(resolved.recipe, run_dir)
    if resume.path is not None:
        newest = checkpoint_named(resume.path)
    elif steps := CheckpointFolder(folder.checkpoints).steps():
        newest = steps[0][1]
    else:
        return ""
    try:
        manifest = Manifest.read(newest)
    except DataError:
        return ""  # opening the run finds another one, or reports the damage
    begun = rules_begun_with(folder, resume)
    kept = resolved if begun is None else as_begun(resolved, *begun)[0]
    given = as_json({**recipe_facts(kept.recipe), **_model_facts(resolved)})
    if given[FORMAT] is None:
        del given[FORMAT]  # known where the devices are
    if lines := refusals(str(newest), manifest.step, manifest.facts, given, resume.allowed):
        raise RecipeError(lines)
    if resume.path is not None:
        return ""
    last = _last_step(resolved.recipe, newest, manifest, resume)
    return "" if last is None else _said_finished(folder, resolved.recipe, manifest.step, last)


def _said_finished(folder: RunFolder, recipe: Recipe, reached: int, last: int) -> str:
    """Return the line if the run came to its end with the checkpoint of the step that it reached,
    and if the recipe, whose last step is `last`, does not let it go on."""
    # An earlier end does not count: the run has gone on from it, and was killed since.
    if folder.finished_step is None or folder.finished_step < min(reached, last):
        return ""
    otherwise = "for a new run, choose another run.name or --resume never"
    if reached >= last:
        length = "train.steps" if recipe.train.epochs is None else "train.epochs"
        return f"{folder.path} has reached step {reached} of {last}: nothing to do; to go on, raise {length}; {otherwise}"
    try:
        why = out_of_patience(recipe, Evaluations.read(folder.evaluations))
    except DataError:
        return ""  # opening the run reports the damage
    if not why:
        return ""
    return (
        f"{folder.path} ended by patience at step {reached} of {last}: {why}: nothing to do; to go on, raise or remove "
        f"train.patience; {otherwise}"
    )


def _last_step(recipe: Recipe, newest: Path, manifest: Manifest, resume: Resume) -> int | None:
    """Return the last step of a recipe; None if that is known only when the data is open.

    The steps of its epochs are those that the run settled, unless the epochs or the data may have
    changed.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    try:
        settled = recipe_of(newest, manifest.recipe).train
    except DataError:
        return None
    return settled.steps if settled.epochs == recipe.train.epochs and DATA not in resume.allowed else None


def as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts as they read back: lists for tuples."""
    value: dict[str, Any] = json.loads(json.dumps(facts))
    return value


def _model_facts(resolved: ResolvedRecipe) -> dict[str, Any]:
    """Return the facts of the network, as far as it is known without opening the tokenizer or the
    hub."""
    from trainer.model.hf_config import to_hf

    if resolved.recipe.model.family == AUTO or resolved.hf_config is None:
        return {}
    vocab_size = tokenizer_vocab_size(resolved.recipe.data)
    named = "vocab_size" in resolved.hf_config
    if vocab_size is None and not named:
        return {}
    facts = model_facts(to_hf(resolved.network(vocab_size=vocab_size), dtype="float32", eos_token_id=None))
    # A tokenizer that is trained on a small corpus may find fewer symbols than requested.
    unknown = set() if named else {"model.config.vocab_size"}
    if not resolved.recipe.data.classes:
        unknown |= {"model.config.id2label", "model.config.label2id"}  # the data says them
    return {key: value for key, value in facts.items() if key not in unknown}
