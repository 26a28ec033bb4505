"""The checkpoints of a run: the one it goes on from, and those it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from parallel.messages import Messages
from parallel.topology import Layout
from trainer.checkpoint.best import Best, Contest, to_remember
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.resume import CheckpointSource, Found, first_whole, newest_whole
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

    `facts`: see `facts.py`. `evaluated_on`: the fingerprint of the held-out data. `found`: the
    checkpoint that the run last went on from.
    """

    recipe: Recipe
    plan: BatchPlan
    layout: Layout
    facts: Mapping[str, Any]
    evaluated_on: str
    folder: CheckpointFolder
    messages: Messages
    found: Found | None
    save_beside: Callable[[Path], None]  # puts config.json, tokenizer and code into a folder
    rewinds: int = 0  # rewinds to `found` in a row
    # the best checkpoint that is there, by checkpoint.best
    best: Best | None = field(default=None, init=False)
    # a better one that is being saved
    _better: Best | None = field(default=None, init=False)

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
        self._fill(engine, self.found)
        if self._contest is not None:
            contest, messages = self._contest, self.messages
            best = contest.best(self.folder) if messages.is_first else None
            told = messages.broadcast([best.step, best.value] if best else None)
            self.best = Best(*told) if told else None

    def restore_best(self, engine: Engine, steps_done: int) -> tuple[Found | None, list[str]]:
        """Give the engine the weights of the best checkpoint, after the last step, and return the
        checkpoint with lines to show. None, and nothing changes, if no evaluated one is whole."""
        lines = self.wait()
        contest, folder = self._contest, self.folder
        if contest is None:
            return None, lines

        def choose() -> Path | None:
            best = contest.best(folder)
            return folder.of_step(best.step) if best else None

        found, remarks = first_whole(folder, self.messages, choose)
        if found is not None and found.manifest.step != steps_done:
            self._fill(engine, found)
        return found, [*lines, *remarks]

    def _fill(self, engine: Engine, found: Found) -> None:
        state = found.manifest.state
        source = CheckpointSource(found, states=[kept.name for kept in states_of(self.recipe.optimizer)])
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

    def due(self, steps_done: int, measured: Mapping[str, float | int | None], *, last: bool) -> bool:
        """Return whether to save after a step. `measured`: its evaluation, {} without one. `last`:
        the run ends with it."""
        every = self.recipe.checkpoint.every
        return every > 0 and (last or steps_done % every == 0 or self.improved_by(measured))

    def improved_by(self, measured: Mapping[str, float | int | None]) -> bool:
        """Return whether an evaluation is better than those of all checkpoints that are there or
        being saved, by checkpoint.best."""
        if self._contest is None:
            return False
        return self._contest.improves(self._contest.aim.value(measured), self._better or self.best)

    def save(
        self, steps_done: int, engine: Engine, memory: Mapping[str, Any], measured: Mapping[str, float | int | None]
    ) -> list[str]:
        """Save at the end of a step, and return lines to show. `memory`: JSON that the run gets
        back when it goes on. `measured`: the step's evaluation, {} without one."""
        lines = self.wait()
        memory = {**memory, "evaluation": to_remember(measured, self.evaluated_on)}
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
        value = self._contest.aim.value(measured) if self._contest else None
        if value is not None and self.improved_by(measured):
            self._better = Best(steps_done, value)
        best = self._better or self.best
        saves = self._saver.save(manifest, engine.state, save_beside=self.save_beside, spared=[best.step] if best else [])
        return [*lines, *self._told(saves)]

    def wait(self) -> list[str]:
        """Wait until nothing is being written, and return lines to show."""
        return self._told(self._saver.wait())

    @cached_property
    def _contest(self) -> Contest | None:
        return Contest.of(self.recipe, self.evaluated_on)

    @cached_property
    def _saver(self) -> Saver:
        keys = self.recipe.checkpoint
        return Saver(self.folder, self.messages, keep=keys.keep, asynchronous=keys.asynchronous)

    def _told(self, saves: list[Saved]) -> list[str]:
        """Return lines to show. NotFinite if the model is not: then the checkpoints already there
        stay the newest."""
        for saved in saves:
            if self._better is not None and self._better.step == saved.step:
                self.best, self._better = self.best if saved.failure else self._better, None
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
