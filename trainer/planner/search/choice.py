"""A choice of the keys that a search changes, and the recipe and the settings that it means. No
torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from parallel.schedules import SCHEDULES
from trainer.recipe import ResolvedRecipe
from trainer.recipe.marks import dotted, leaves
from trainer.schema import Parallel, Recipe, Zero

Offload = Literal["none", "cpu", "nvme"]
Recompute = Literal["none", "selective", "full"]
OF_ONE_STAGE = "1f1b"  # what parallel.schedule is where there is no pipeline
# The fields of a choice, and the keys of a recipe that they stand for.
KEYS: Mapping[str, str] = {
    "tensor": "parallel.tensor",
    "pipeline": "parallel.pipeline",
    "virtual_stages": "parallel.virtual_stages",
    "schedule": "parallel.schedule",
    "context": "parallel.context",
    "divides_tokens": "parallel.sequence_parallel",
    "zero_stage": "zero.stage",
    "offload_optimizer": "zero.offload_optimizer.device",
    "offload_param": "zero.offload_param.device",
    "recompute": "train.recompute",
    "micro_sequences": "batch.micro_sequences",
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The values of the keys that a search changes."""

    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    schedule: str = OF_ONE_STAGE
    context: int = 1
    divides_tokens: bool = False
    zero_stage: int = 0
    offload_optimizer: Offload = "none"
    offload_param: Offload = "none"
    recompute: Recompute = "none"
    micro_sequences: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Choice:
        """Return the choice that a recipe has made."""
        parallel, zero = recipe.parallel, recipe.zero
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_stages=parallel.virtual_stages,
            schedule=parallel.schedule if parallel.pipeline > 1 else OF_ONE_STAGE,
            context=parallel.context,
            divides_tokens=parallel.divides_tokens,
            zero_stage=zero.stage,
            offload_optimizer=zero.offload_optimizer.device,
            offload_param=zero.offload_param.device,
            recompute=recipe.train.recompute,
            micro_sequences=recipe.batch.micro_sequences,
        )

    @property
    def splits_backward(self) -> bool:
        return self.pipeline > 1 and self.schedule in SCHEDULES and SCHEDULES[self.schedule].splits_backward

    def differing(self, other: Choice) -> list[str]:
        """Return the fields in which two choices differ."""
        return [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]

    def changed_keys(self, other: Choice) -> dict[str, object]:
        """Return the keys of a recipe in which this choice differs from another, with its
        values."""
        return {KEYS[name]: getattr(self, name) for name in self.differing(other)}

    def recipe(self, base: Recipe) -> Recipe:
        """Return the recipe with this choice. It is not validated: `settings` are."""
        finds_micro = base.train.auto_micro_batch and self.micro_sequences == base.batch.micro_sequences
        return base.model_copy(
            update={
                "parallel": self._parallel(base.parallel),
                "batch": base.batch.model_copy(update={"micro_sequences": self.micro_sequences}),
                "train": base.train.model_copy(update={"recompute": self.recompute, "auto_micro_batch": finds_micro}),
                "zero": self._zero(base.zero),
            }
        )

    def _parallel(self, base: Parallel) -> Parallel:
        same_stages = (self.pipeline, self.virtual_stages) == (base.pipeline, base.virtual_stages)
        return base.model_copy(
            update={
                "tensor": self.tensor,
                "pipeline": self.pipeline,
                "context": self.context,
                "virtual_stages": self.virtual_stages,
                "schedule": self.schedule,
                "sequence_parallel": self.divides_tokens,
                "balance": base.balance if same_stages else None,
            }
        )

    def _zero(self, base: Zero) -> Zero:
        optimizer: dict[str, Any] = {"device": self.offload_optimizer, "nvme_path": None}
        param: dict[str, Any] = {"device": self.offload_param, "nvme_path": None}
        if self.offload_optimizer == "nvme":
            optimizer["nvme_path"] = base.offload_optimizer.nvme_path
        else:
            optimizer |= {"pipeline_read": False, "pipeline_write": False}
        if self.offload_param == "nvme":
            param["nvme_path"] = base.offload_param.nvme_path
        return base.model_copy(
            update={
                "stage": self.zero_stage,
                "offload_optimizer": base.offload_optimizer.model_copy(update=optimizer),
                "offload_param": base.offload_param.model_copy(update=param),
            }
        )

    def settings(self, resolved: ResolvedRecipe) -> list[str]:
        """Return the KEY=VALUE of --set that turn a recipe into one with this choice."""
        chosen = dict(_values(self.recipe(resolved.recipe)))
        written = {dotted(path) for path, value in leaves(resolved.given) if value is not None}
        changed = {key: chosen[key] for key, value in _values(resolved.recipe) if chosen[key] != value}
        divides = "parallel.sequence_parallel"
        changed.pop(divides, None)
        if self.divides_tokens != (resolved.recipe.parallel.divides_tokens if divides in written else self.tensor > 1):
            changed[divides] = self.divides_tokens
        if self.tensor == 1 and "parallel.overlap" in written:  # nothing would read it
            changed["parallel.overlap"] = False
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changed.items()]


def _values(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield the values of the sections that a choice changes, by dotted key."""
    for section in ("parallel", "batch", "zero", "train"):
        for path, value in leaves(getattr(recipe, section).model_dump(), (section,)):
            yield dotted(path), value


def as_words(settings: Iterable[str]) -> str:
    """Return settings as the words of a command line."""
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
