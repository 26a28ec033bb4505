"""The checkpoints of a run: the one it goes on from, and those it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parallel.messages import Messages
from parallel.topology import Layout
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.resume import CheckpointSource, Found, newest_whole
from trainer.checkpoint.save import Saved, Saver
from trainer.engine.engine import Engine
from trainer.errors import DataError, NotFinite
from trainer.files.paths import as_loaded
from trainer.launch.ranks import PeerFailed
from trainer.recipe.batch_plan import BatchPlan
from trainer.redaction import redact
from trainer.schema import Recipe
from trainer.update_rules import states_of
from trainer.versions import versions


@dataclass
class Checkpoints:
    """The checkpoints of a run. Every rank must call its methods together.

    `facts`: see `facts.py`. `found`: the checkpoint that the run last went on from.
    """

    recipe: Recipe
    plan: BatchPlan
    layout: Layout
    facts: Mapping[str, Any]
    folder: CheckpointFolder
    messages: Messages
    found: Found | None
    save_beside: Callable[[Path], None]  # puts config.json, tokenizer and code into a folder
    rewinds: int = 0  # rewinds to `found` in a row

    @property
    def start_step(self) -> int:
        """The number of steps done before this start."""
        return self.found.manifest.step if self.found else 0

    @property
    def saved_step(self) -> int | None:
        """The step of this run's newest checkpoint, None while it has none."""
        found = self.found.manifest.step if self.found else None
        return found if self._saver.saved_step is None else self._saver.saved_step

    @property
    def memory(self) -> Mapping[str, Any]:
        """The values that the run asked to have back when it was saved; see `save`."""
        return self.found.manifest.state["memory"] if self.found else {}

    def restore(self, engine: Engine) -> None:
        """Restore the engine to its saved state; do nothing if the run starts at step 0."""
        if self.found is None:
            return
        state = self.found.manifest.state
        source = CheckpointSource(self.found, states=[kept.name for kept in states_of(self.recipe.optimizer)])
        engine.state.restore(source, updates=state["updates"])
        engine.scaler.restore(state["loss_scale"])

    def rewind(self, engine: Engine) -> list[str]:
        """Restore the engine from the newest checkpoint, and return lines to show. DataError if
        none is whole."""
        lines = self.wait()
        found, remarks = newest_whole(self.folder, self.messages)
        if found is None:
            raise DataError(f"{self.folder.path}: the checkpoints are gone: bring the folder back (is its disk mounted?)")
        self.rewinds = self.rewinds + 1 if self.found is not None and self.found.manifest.step == found.manifest.step else 1
        self.found = found
        self.restore(engine)
        return [*lines, *remarks]

    def due(self, steps_done: int) -> bool:
        every = self.recipe.checkpoint.every
        return every > 0 and (steps_done % every == 0 or steps_done == self.recipe.train.steps)

    def save(self, steps_done: int, engine: Engine, memory: Mapping[str, Any]) -> list[str]:
        """Save at the end of a step, and return lines to show. `memory`: JSON that the run gets
        back when it goes on."""
        manifest = Manifest(
            step=steps_done,
            sequences=(steps_done + memory.get("data", {}).get("skipped_steps", 0)) * self.plan.global_sequences,
            time=time.time(),
            recipe=_described(self.recipe),
            facts=dict(self.facts),
            layout={**asdict(self.layout), "zero": self.recipe.zero.stage},
            state={"updates": engine.state.updates, "loss_scale": engine.scaler.state(), "memory": dict(memory)},
            versions=versions(),
        )
        return self._told(self._saver.save(manifest, engine.state, save_beside=self.save_beside))

    def wait(self) -> list[str]:
        """Wait until nothing is being written, and return lines to show."""
        return self._told(self._saver.wait())

    @cached_property
    def _saver(self) -> Saver:
        keys = self.recipe.checkpoint
        return Saver(self.folder, self.messages, keep=keys.keep, asynchronous=keys.asynchronous)

    def _told(self, saves: list[Saved]) -> list[str]:
        """Return lines to show. NotFinite if the model is not: then the checkpoints already there
        stay the newest."""
        for saved in saves:
            if saved.not_finite:
                wrong = NotFinite(saved.not_finite, step=saved.step, began=saved.began)
                raise wrong if self.messages.is_first else PeerFailed(wrong.exit_code)
        return [
            f"warning: no checkpoint of step {saved.step}: {saved.failure}; training goes on, and tries again at the next one"
            if saved.failure
            else f"warning: checkpoints older than step {saved.step} stay: {saved.litter}; the next save removes them"
            for saved in saves
            if saved.failure or saved.litter
        ]


def _described(recipe: Recipe) -> dict[str, Any]:
    """Return every value of the recipe without secrets, and the folder that the run started from by
    its absolute path: an export may be made from elsewhere."""
    values = recipe.model_dump(mode="json")
    values["model"]["from_pretrained"] = as_loaded(recipe.model.from_pretrained)
    described: dict[str, Any] = redact(values)
    return described
