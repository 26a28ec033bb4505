"""A checkpoint or a Hugging Face folder, opened in any layout without an optimizer, for evaluation
and the harness.

The recipe is the one that a checkpoint was saved with, except for the layout, which `--set` alone
decides; the remaining ranks divide the data. Weights are read box by box, so each rank has its own
part of them, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel.mesh import Mesh
from parallel.params import owned_specs
from trainer.checkpoint.check import read_sound
from trainer.checkpoint.choice import weights_of
from trainer.checkpoint.folder import HUGGING_FACE
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.resume import examine
from trainer.checkpoint.weights import Filling
from trainer.data.tokenizer import Tokenizer, make_tokenizer, reopen_tokenizer
from trainer.engine.evaluator import Evaluator
from trainer.engine.execution import DTYPES, make_execution
from trainer.engine.first_weights import first_weights
from trainer.engine.group import joined
from trainer.engine.master_weights import require_in_range
from trainer.errors import RecipeError
from trainer.launch.ranks import Place, together
from trainer.model.auto_rules import AUTO
from trainer.model.families import FAMILIES
from trainer.model.hf_config import classes_of
from trainer.model.hugging_face import read_config
from trainer.model.measures import Measures, measures_of
from trainer.model.model_files import CONFIG, TASK
from trainer.model.network import Network
from trainer.recipe import ResolvedRecipe, load_given
from trainer.recipe.batch_plan import BatchPlan, layout_of
from trainer.recipe.earlier import recipe_of
from trainer.schema import Guard, Recipe
from trainer.tasks import TASKS, TaskName
from trainer.tuning.adapt import quantizing

# The sections of a saved recipe that describe the model and its data. Those of layout, offload and
# optimizer are left out.
KEPT = ("run", "model", "data", "precision", "tuning", "preference")
KEPT_OF_TRAINING = ("eval_sequences", "beams", "length_penalty")
# of a Hugging Face folder, unless it has fewer positions: it does not say how long its texts are
SEQ_LEN = 512


@dataclass(frozen=True)
class Weights:
    """The weights that a command line names. `config`: the folder with config.json and the
    tokenizer; `manifest` None: the weights are in that folder too."""

    folder: Path
    config: Path
    manifest: Manifest | None

    @classmethod
    def named(cls, name: str) -> Weights:
        """Find the weights. RecipeError where there are none, DataError where the checkpoint is
        damaged."""
        path = Path(name)
        if (path / CONFIG).is_file():
            return cls(path, path, None)
        checkpoint = weights_of(name, option="WEIGHTS").path
        return cls(checkpoint, checkpoint / HUGGING_FACE, read_sound(checkpoint))

    @property
    def step(self) -> int | None:
        return self.manifest.step if self.manifest else None

    def given(self, *, files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the contents of a recipe of this model. `files`: the data to evaluate on, in place
        of those of the run."""
        saved = recipe_of(self.folder, self.manifest.recipe).model_dump() if self.manifest else {}
        kept = {section: dict(saved.get(section, {})) for section in KEPT}
        model, data = kept["model"], kept["data"]
        if self.manifest and model.get("family") == AUTO:
            raise RecipeError(
                f"{self.folder}: family auto is transformers' own model: write it with triaxis export, and name that folder"
            )
        model |= {"from_pretrained": str(self.config), "revision": None, "config": {}}
        data |= {"tokenizer": str(self.config)}
        if self.manifest is not None:
            # checkpoints without the key are older than it, and had none
            data.setdefault("bos", False)
        config = read_config(self.config)
        if classes := _classes(config):
            data["task"] = _task_of_labels(config)
            if TASKS[data["task"]].learns_classes:
                data["classes"] = list(classes)
        if self.manifest is None:
            data["seq_len"] = min(SEQ_LEN, config.get("max_position_embeddings") or SEQ_LEN)
        if files:
            known = {**(data.get("sources") or [{}])[0], **(data.get("eval_sources") or [{}])[0]}
            data["eval_sources"] = [{**_named(known, file), **file} for file in files]
            # a recipe has some; these are never read
            data["sources"] = [{"path": str(self.config)}]
        batch = {"micro_sequences": saved.get("batch", {}).get("micro_sequences", 1)}
        asked = {key: value for key, value in saved.get("train", {}).items() if key in KEPT_OF_TRAINING}
        return {**kept, "batch": batch, "train": {**asked, "recompute": "none"}}


def _named(source: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's names of the fields of a row, for another file of such rows; lines have no
    names."""
    keys = () if "target_path" in file else ("field", "fields", "columns", "shape", "split")
    return {key: source[key] for key in keys if source.get(key) is not None}


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the classes of a Hugging Face folder's model, () if it is no classifier."""
    family = FAMILIES.get(str(config.get("model_type")))
    sorts = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    return classes_of(family, config) if family and sorts else ()


def _task_of_labels(config: Mapping[str, Any]) -> TaskName:
    """Return the task that trained a folder's head over texts; classify, if it names none of ours
    that has such a head."""
    named = (name for name, task in TASKS.items() if task.target == "label" and name == config.get(TASK))
    return next(named, "classify")


@dataclass(frozen=True)
class OpenModel:
    """An opened model, on every rank of the mesh."""

    weights: Weights
    recipe: Recipe
    place: Place
    mesh: Mesh
    plan: BatchPlan
    network: Network
    tokenizer: Tokenizer
    measures: Measures
    evaluator: Evaluator

    @property
    def described(self) -> dict[str, Any]:
        """Return the description of the model and its layout, as JSON values."""
        return {
            "weights": str(self.weights.folder),
            "step": self.weights.step,
            "layout": {axis: degree for axis, degree in asdict(self.mesh.layout).items() if degree > 1},
            "precision": self.recipe.precision.dtype,
        }


@contextmanager
def open_model(name: str, settings: Sequence[str], *, files: Sequence[Mapping[str, Any]] = ()) -> Iterator[OpenModel]:
    """Open a model on every rank that the launcher started. `settings`: those of --set.

    RecipeError or DataError, on the first rank that finds a mistake.
    """
    place = Place.from_environment(os.environ)
    timeout = timedelta(seconds=Guard().long_timeout_s)
    with ExitStack() as stack:
        group = stack.enter_context(joined(place, timeout))
        with together():
            weights = Weights.named(name)
            resolved = _in_layout(load_given(weights.given(files=files), weights.folder, settings), place)
        recipe = resolved.recipe
        mesh, messages = group.mesh(recipe.parallel), group.messages()
        with together():
            if weights.manifest is not None:
                examine(weights.folder, messages)
            tokenizer = reopen_tokenizer(weights.config) if weights.manifest else make_tokenizer(str(weights.config))
            network, fill = first_weights(resolved, tokenizer, recipe.data.classes, resumed=weights.manifest is not None)
            if weights.manifest is not None:
                fill = Filling(weights.folder, weights.manifest)
            plan = BatchPlan.from_recipe(recipe, place.world_size, place.how)
        measures, watch = measures_of(recipe.data.task, network), group.watch
        with together():
            execution = make_execution(
                network,
                recipe,
                plan,
                mesh,
                place.device,
                measures=measures,
                watch=watch,
                fill=_rounding(quantizing(fill, recipe.tuning), DTYPES[recipe.precision.dtype]),
            )
        if recipe.data.isolate_documents:
            execution.settle_lengths(place.device, plan.row_tokens, may_call_apart=True)
        yield OpenModel(
            weights=weights,
            recipe=recipe,
            place=place,
            mesh=mesh,
            plan=plan,
            network=network,
            tokenizer=tokenizer,
            measures=measures,
            evaluator=Evaluator(execution, measures, mesh, place.device, watch, vocab_size=network.vocab_size),
        )


def _rounding(fill: Callable[[nn.Module], None], dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Return a `fill` after which a block is in the compute format, to which its layers would
    otherwise round it at every use."""

    def fill_and_round(block: nn.Module) -> None:
        fill(block)
        for _, parameter, spec in owned_specs(block):
            require_in_range(parameter, spec, dtype)
            parameter.data = parameter.data.to(dtype)

    return fill_and_round


def _in_layout(resolved: ResolvedRecipe, place: Place) -> ResolvedRecipe:
    """Return the recipe with a batch that the ranks can divide; it is never trained."""
    recipe = resolved.recipe
    dp = layout_of(recipe.parallel, place.world_size, place.how).dp
    sequences = recipe.batch.micro_sequences * dp * recipe.parallel.pipeline * recipe.parallel.virtual_stages
    batch = recipe.batch.model_copy(update={"global_sequences": sequences})
    return replace(resolved, recipe=recipe.model_copy(update={"batch": batch}))
