"""The way from a file to a `ResolvedRecipe`, or to one line for each thing wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.chat_templates.named import tokens_of
from trainer.convert.tools import TOOLS, command_for, recognised
from trainer.errors import RecipeError
from trainer.fine_tuning import BY_DEVICE
from trainer.learning_rate import decay_steps
from trainer.model.config import TransformerConfig
from trainer.model.new_tokens import number_at_the_end, stand_ins
from trainer.recipe.keys import validate
from trainer.recipe.marks import KeyPath, Mark, Problem, dotted, first_mark, leaves
from trainer.recipe.names import name_findings, tokenizer_is_ours, with_paths
from trainer.recipe.network import fit_findings, network_from, read_network, with_head
from trainer.recipe.overlay import Layer, read_chain
from trainer.recipe.pipeline import pipeline_findings
from trainer.recipe.rules import section_findings
from trainer.recipe.task_defaults import FORMAT, with_task_defaults
from trainer.recipe.task_defaults import ORIGIN as TASK_DEFAULT
from trainer.redaction import redact
from trainer.schema import Dtype, Recipe

MAX_LINES = 100  # of problems shown
MICRO_BATCH = "batch.micro_sequences"
TRIED = "tried on the devices"  # the origin of a micro-batch that the first start has found


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe that has passed every check.

    * `origins`: dotted key of every value → "default", "task default" (`task_defaults.py`), "file
      NAME", "--set", "derived" or "tried on the devices".
    * `given`: what was written, after `extends` and `--set`.
    * `sources`: the files read, the one named by the user last.
    * `hf_config`: the network in Hugging Face's names, None while it is still on the hub.
    """

    recipe: Recipe
    origins: dict[str, str]
    given: dict[str, Any]
    sources: tuple[Path, ...]
    hf_config: dict[str, Any] | None

    def network(
        self,
        *,
        vocab_size: int | None,
        new_tokens: Collection[int] | None = None,
        pretrained: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
    ) -> TransformerConfig:
        """Return the network to build; RecipeError if it does not translate or the tokenizer does
        not fit.

        * `vocab_size`: symbols of the tokenizer, used if the config gives no number.
        * `new_tokens`: the numbers of those of data.new_tokens; None if the tokenizer was not
          opened.
        * `pretrained`: the config.json that came from the hub.
        * `classes`: those of a classifier, as they are found in the data.
        """
        hf_config = {**pretrained, **self.recipe.model.config} if pretrained is not None else self.hf_config
        if hf_config is None:
            raise RecipeError("model.from_pretrained is a hub name: its config.json must be fetched first")
        family = self.recipe.model.family or str(hf_config.get("model_type"))
        num_new = len(self.recipe.data.new_tokens)
        if new_tokens is not None and vocab_size is not None:
            num_new = number_at_the_end(vocab_size, new_tokens)
        fixed = self.recipe.model.from_pretrained is not None
        config, findings = network_from(family, hf_config, vocab_size, num_new=num_new, fixed=fixed)
        if config is None or findings:
            raise RecipeError([f"model.config: {finding.message}" for finding in findings])
        if new_tokens is None:
            new_tokens = stand_ins(num_new, config.vocab_size)
        config = replace(with_head(self.recipe, config, classes), new_tokens=tuple(sorted(new_tokens)))
        if unfit := list(fit_findings(self.recipe, config)):
            raise RecipeError([finding.message for finding in unfit])
        return config

    def settled(self, dtype: Dtype) -> ResolvedRecipe:
        """Return the recipe in the compute format that its devices decided, where it left that
        open."""
        return self if self.recipe.precision.dtype is not None else replace(self, recipe=self.recipe.with_format(dtype))

    def with_micro_batch(self, sequences: int) -> ResolvedRecipe:
        """Return the recipe with the micro-batch that was found on the devices."""
        batch = self.recipe.batch.model_copy(update={"micro_sequences": sequences})
        recipe = self.recipe.model_copy(update={"batch": batch})
        return replace(self, recipe=recipe, origins=self.origins | {MICRO_BATCH: TRIED})

    def as_resolved_json(self, deepspeed_config: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the content of resolved.json, which is also shown on screen.

        It has every value with its origin, and DeepSpeed's dict once the world size is known,
        without secrets. A compute format that is still open says what decides it.
        """
        values = {
            dotted(path): {"value": value, "origin": self.origins[dotted(path)]}
            for path, value in leaves(self.recipe.model_dump())
        }
        if self.recipe.precision.dtype is None:
            values[FORMAT]["at_start"] = BY_DEVICE
        if self.recipe.train.auto_micro_batch and self.origins[MICRO_BATCH] != TRIED:
            values[MICRO_BATCH]["at_start"] = "the largest that fits"
        resolved = {"values": values} | ({} if deepspeed_config is None else {"deepspeed_config": deepspeed_config})
        return dict(redact(resolved))


def load(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Read, merge and validate a recipe.

    RecipeError holds one line for each thing that is wrong, in the order of the file.
    """
    return _admitted(read_chain(Path(path), []), overrides)


def load_given(given: Mapping[str, Any], where: Path, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Load a value that is in no file; `where` stands for the file in messages."""
    return _admitted(Layer(dict(given), {}, [where]), overrides)


def load_changed(resolved: ResolvedRecipe, settings: Sequence[str]) -> ResolvedRecipe:
    """Return a recipe with further settings of --set over it, by the same rules as the first
    time."""
    where = resolved.sources[-1]
    paths = [path for path, _ in leaves(resolved.given)]
    marks = {path[:length]: Mark(0, 0, 0, str(where)) for path in paths for length in range(1, len(path) + 1)}
    return _admitted(Layer(copy.deepcopy(resolved.given), marks, [*resolved.sources]), settings)


def _admitted(layer: Layer, overrides: Sequence[str]) -> ResolvedRecipe:
    for order, override in enumerate(overrides, len(layer.sources)):
        layer.set(override, order)
    marks = layer.named_marks()
    recipe, problems, faulty = validate(layer.value, marks)
    recipe, findings = with_paths(recipe)
    faulty |= {key for finding in findings for key in finding.keys}
    problems += [Problem(first_mark(finding.keys, marks), finding.message) for finding in findings]
    # Not those with a mark: what is in no file has none.
    written = {dotted(path) for path, _ in leaves(layer.value)}
    recipe, by_task = with_task_defaults(recipe, written)
    hf_config, findings = read_network(recipe)
    findings += pipeline_findings(recipe)
    rules = [*section_findings(recipe, marks.keys()), *name_findings(recipe), *findings]
    # A rule about a key that is itself wrong would only repeat or mislead.
    sound = [finding for finding in rules if not any(_under(key, bad) for key in finding.keys for bad in faulty)]
    problems += [Problem(first_mark(finding.keys, marks), finding.message) for finding in sound]
    if problems := [*layer.problems, *problems]:
        lines = [str(p) for p in dict.fromkeys(sorted(problems, key=lambda p: (p.mark, p.message)))]
        lines = [*_of_another_tool(layer), *lines]
        more = len(lines) - MAX_LINES
        raise RecipeError(lines[:MAX_LINES], [f"and {more} more"] * (more > 0))
    return _resolve(recipe, layer, hf_config, by_task)


def _of_another_tool(layer: Layer) -> list[str]:
    """Return the line about a file that is another tool's config, with the command that makes a
    recipe of it; [] for a recipe with faults."""
    tool = TOOLS.get(recognised(layer.value) or "")
    if tool is None or len(layer.sources) > 1 or not layer.marks:
        return []
    path = layer.sources[0]
    return [f"{path} is a config of {tool.title}, and no recipe: {command_for(path)}"]


def _resolve(recipe: Recipe, layer: Layer, hf_config: dict[str, Any] | None, by_task: Collection[KeyPath]) -> ResolvedRecipe:
    derived: dict[tuple[str, str], Any] = {}
    if recipe.data.cache_dir is None:
        derived["data", "cache_dir"] = str(Path(recipe.run.dir) / "data")
    if tokenizer_is_ours(recipe.data.tokenizer):  # it is made for this run, and cannot have them
        lacking = [token for token in tokens_of(recipe.data.chat_template) if token not in recipe.data.new_tokens]
        derived |= {("data", "new_tokens"): [*recipe.data.new_tokens, *lacking]} if lacking else {}
    if recipe.parallel.sequence_parallel is None:
        derived["parallel", "sequence_parallel"] = recipe.parallel.divides_tokens
    if recipe.train.steps is None:  # epochs.py settles them when the data is known
        derived["train", "steps"] = None
    elif recipe.schedule.name == "wsd" and recipe.schedule.decay_steps is None:
        derived["schedule", "decay_steps"] = decay_steps(recipe.schedule, recipe.train.steps)
    if recipe.model.family is None and hf_config is not None:
        derived["model", "family"] = hf_config["model_type"]
    values = recipe.model_dump()
    for (section, key), value in derived.items():
        values[section][key] = value
    resolved = Recipe.model_validate(values)
    taken_back = {path for path, value in leaves(layer.value) if value is None}

    def origin(path: KeyPath, value: Any) -> str:
        if path in by_task:
            return TASK_DEFAULT
        if path in derived:
            return "derived"
        if path not in layer.marks or (path in taken_back and value is not None):
            return "default"
        return layer.marks[path].origin

    origins = {dotted(path): origin(path, value) for path, value in leaves(resolved.model_dump())}
    return ResolvedRecipe(resolved, origins, layer.value, tuple(layer.sources), hf_config)


def _under(key: str, faulty: str) -> bool:
    return key == faulty or key.startswith((f"{faulty}.", f"{faulty}["))
