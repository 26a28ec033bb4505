"""The case that the checks look at: an environment, and a recipe if one was given. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.doctor.findings import Finding
from trainer.engine.extension_folder import extensions_folder
from trainer.model.config import TransformerConfig
from trainer.recipe import ResolvedRecipe
from trainer.run_folder import RunFolder
from trainer.schema import Recipe
from trainer.update_rules import rule_of

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """The question of a user: this machine, or this machine for a recipe.

    `look` returns what a process saw that imported torch and DeepSpeed; it waits for that process,
    so checks that need nothing of it come first.
    """

    environment: Environment
    look: Callable[[], Mapping[str, Any]]
    resolved: ResolvedRecipe | None = None
    network: TransformerConfig | None = None
    file: Path | None = None  # of the recipe

    @property
    def recipe(self) -> Recipe | None:
        return self.resolved.recipe if self.resolved else None

    @cached_property
    def seen(self) -> Mapping[str, Any]:
        return self.look()

    @property
    def run_dir(self) -> Path:
        """The run folder; without a recipe the folder that holds run folders by default."""
        return RunFolder.of(self.recipe, None).path if self.recipe else Path("runs")

    @property
    def nvme_paths(self) -> dict[str, str]:
        """The folders of NVMe that the recipe offloads to, each with a key that names it."""
        if self.recipe is None:
            return {}
        states, weights = self.recipe.zero.offload_optimizer, self.recipe.zero.offload_param
        found = {str(weights.nvme_path): "zero.offload_param.nvme_path"} if weights.device == "nvme" else {}
        return found | ({str(states.nvme_path): "zero.offload_optimizer.nvme_path"} if states.device == "nvme" else {})

    @property
    def pins_memory(self) -> bool:
        """Say whether the recipe asks for page-locked host memory."""
        zero = self.recipe.zero if self.recipe else None
        return zero is not None and (zero.offload_optimizer.pin_memory or zero.offload_param.pin_memory)

    @property
    def needed_ops(self) -> tuple[str, ...]:
        """The extensions without which the recipe cannot train here."""
        extensions = rule_of(self.recipe.optimizer).extensions if self.recipe else None
        if self.recipe is None or extensions is None:
            return ()
        on_gpu = bool(self.gpus) and self.recipe.zero.offload_optimizer.device == "none"
        return (extensions.on_gpu if on_gpu else extensions.on_host,)

    @property
    def gpus(self) -> list[Mapping[str, Any]]:
        """The GPUs that torch sees."""
        found: list[Mapping[str, Any]] = self.seen.get("devices", {}).get("devices", [])
        return found

    @property
    def extensions(self) -> Path:
        """The folder below which torch and DeepSpeed compile extensions."""
        return extensions_folder(self.environment)

    @property
    def cache(self) -> Path:
        return Path(self.environment.get("XDG_CACHE_HOME") or self.home / ".cache")

    @property
    def home(self) -> Path:
        return Path(self.environment.get("HOME") or "~").expanduser()


Check = Callable[[Case], Iterator[Finding]]
