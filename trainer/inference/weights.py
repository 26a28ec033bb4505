"""The weights that a command line names, and the recipe with which they are opened again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.check import read_sound
from trainer.checkpoint.choice import weights_of
from trainer.checkpoint.folder import HUGGING_FACE
from trainer.checkpoint.manifest import Manifest
from trainer.errors import RecipeError
from trainer.model.auto_rules import AUTO
from trainer.model.families import FAMILIES
from trainer.model.hf_config import classes_of
from trainer.model.hugging_face import read_config
from trainer.model.model_files import CONFIG, TASK
from trainer.recipe.earlier import recipe_of
from trainer.tasks import TASKS, TaskName

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
    def named(cls, name: str, *, option: str = "WEIGHTS") -> Weights:
        """Find the weights. RecipeError, which names `option`, where there are none, DataError
        where the checkpoint is damaged."""
        path = Path(name)
        if (path / CONFIG).is_file():
            return cls(path, path, None)
        checkpoint = weights_of(name, option=option, also="a Hugging Face folder, ").path
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
