"""The model card of an export: README.md, as the hub reads it.

Its front matter says to programs what the model is: licence, base, task, figures, and the files
that belong to the export. Its text says the same to people, with the recipe, the data and how to
load it. Everything comes from the checkpoint or the run and its history, nothing from a clock, so
the same training has the same card.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.checkpoint.load_code import kind_of, load_code
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.tensor_file import TensorFile
from trainer.errors import RecipeError
from trainer.files.durable import replacing_file
from trainer.model.model_files import CONFIG
from trainer.recipe.earlier import recipe_of
from trainer.recipe.names import looks_local
from trainer.redaction import redact, redact_text
from trainer.run_folder import RunFolder, SourcePart, read_data
from trainer.schema import STDLIB, Recipe
from trainer.tasks import TASKS, Task
from trainer.track.console import EVAL_WORDS
from trainer.track.jsonl import Number, Summary, read_metrics, read_summary
from trainer.track.text import printable, scaled, short

CARD = "README.md"
OURS = "triaxis"  # the tag of our cards, and the key of what only we read
# Sections with the keys whose default is the task's where a model is gone on from.
BY_TASK = {
    "optimizer": ("lr", "weight_decay"),
    "schedule": ("name", "min_lr_ratio", "warmup_ratio", "warmup_steps"),
    "precision": ("dtype",),
}
LIBRARIES = {"model": "transformers", "peft": "peft"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The facts that a card states.

    * `step`: of the exported weights.
    * `layout`: the degrees and the ZeRO stage.
    * `versions`: of the packages.
    * `measured`: the evaluations up to that step.
    * `last`: the last training record up to that step; {} if none is known.
    * `closing`: the summary of a run that ended there.
    * `sources`: what the sources held; () if that is not known.
    * `license`: in place of model.license.
    """

    recipe: Recipe
    step: int
    layout: Mapping[str, int]
    versions: Mapping[str, str]
    measured: Sequence[Mapping[str, Number]] = ()
    last: Mapping[str, Number] = field(default_factory=dict)
    closing: Summary = field(default_factory=lambda: Summary())
    sources: Sequence[SourcePart] = ()
    license: str | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, *, license: str | None = None) -> Trained:
        """Return the facts of a checkpoint, with the history of the run in whose folder it lies."""
        manifest = Manifest.read(checkpoint)
        layout = {name: int(degree) for name, degree in manifest.layout.items()}
        recipe = recipe_of(checkpoint, manifest.recipe)
        trained = cls(recipe=recipe, step=manifest.step, layout=layout, versions=manifest.versions, license=license)
        return trained.with_history(RunFolder(checkpoint.absolute().parents[1]))

    def with_history(self, run: RunFolder) -> Trained:
        """Return the facts with what the run recorded up to this step; nothing is added where there
        is no run. DataError if its files are damaged."""
        records, measured = (
            [r for r in read_metrics(file) if _step(r) <= self.step] for file in (run.metrics, run.evaluations)
        )
        summary = read_summary(run.path)
        ended_here = summary.get("steps") == self.step and "ended_by" not in summary
        return replace(
            self,
            measured=measured,
            last=records[-1] if records else {},
            closing=summary if ended_here else Summary(),
            sources=read_data(run.data),
        )

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.data.task]

    @property
    def stated_license(self) -> str | None:
        return self.license or self.recipe.model.license

    @property
    def base(self) -> str | None:
        """The hub name of the model that training began with; None for a folder, or for none."""
        name = self.recipe.model.from_pretrained
        return None if name is None or looks_local(name) or name.startswith(".") else name

    def needs_local_base(self, folder: Path) -> bool:
        """Return whether the export is an adapter for a model that is not on the hub."""
        return self.base is None and not (folder / CONFIG).exists()

    @property
    def hub_sources(self) -> list[str]:
        paths = [source.path for source in self.recipe.data.sources]
        return [path for path in paths if path != STDLIB and not looks_local(path) and not Path(path).exists()]


def _step(record: Mapping[str, Number]) -> int:
    return int(record["step"] or 0)


def write_card(folder: Path, trained: Trained, *, name: str) -> None:
    """Write the card into an export whose other files are there. `name`: by which it is loaded, a
    hub name or a folder."""
    text = card(folder, trained, name=name)
    with replacing_file(folder / CARD) as file:
        file.write(text.encode())


def card(folder: Path, trained: Trained, *, name: str) -> str:
    """Return the text of the card."""
    files = sorted({*(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), CARD})
    body = "\n".join(_body(folder, trained, name))
    return f"---\n{_front_matter(kind_of(folder), trained, files)}\n---\n\n{redact_text(body)}\n"


def files_of_export(folder: Path) -> list[str] | None:
    """Return the files that the card of a folder counts to its export; None where there is no card
    of ours."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard((folder / CARD).read_text(encoding="utf-8")).data
        files = data.get(OURS, {})["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    except Exception as error:  # yaml's own, which we do not import
        if type(error).__module__.partition(".")[0] != "yaml":
            raise
        return None
    is_list = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return files if is_list and OURS in (data.get("tags") or ()) else None


def require_export(folder: Path) -> None:
    """Raise RecipeError unless the folder is missing or empty, or holds an export and nothing
    else."""
    if not os.path.lexists(folder):
        return
    is_folder = folder.is_dir() and not folder.is_symlink()
    if is_folder and not any(folder.iterdir()):
        return
    if not is_folder or (files := files_of_export(folder)) is None:
        raise RecipeError(f"--replace: {folder} is no export with a card of triaxis: remove it, or give another folder")
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    if others := sorted(set(there) - set(files)):
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise RecipeError(f"--replace: {folder} also holds {others[0]}{more}, not of the export: move it away")


def _front_matter(kind: str, trained: Trained, files: Sequence[str]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, task = trained.recipe, trained.task
    results = [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type=_identifier(_eval_data(trained)),
            dataset_name=_eval_data(trained),
            dataset_split="held-out",
            metric_type=key.removeprefix("eval_").replace("/", "_"),
            metric_name=label,
            metric_value=value,
        )
        for key, label, value, _ in _measures(trained)
        if key != "eval_majority"  # of no model
    ]
    data: Any = ModelCardData(
        license=trained.stated_license,
        base_model=trained.base,
        base_model_relation=("finetune" if kind == "model" else "adapter") if trained.base else None,
        pipeline_tag=task.pipeline_tag,
        library_name=LIBRARIES.get(kind),
        datasets=trained.hub_sources or None,
        tags=[OURS, recipe.data.task, *([recipe.tuning.method] if recipe.tuning.method else [])],
        model_name=recipe.run.name,
        eval_results=results or None,
    )
    if not results:  # the name is that of their list
        data.model_name = None
    data[OURS] = {"step": trained.step, "files": list(files)}
    return str(data.to_yaml())


def _identifier(name: str) -> str:
    """Return a name as an identifier of a data set, as far as the hub allows its characters."""
    if not looks_local(name):
        return name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def _eval_data(trained: Trained) -> str:
    """Return the name of the data that the figures were measured on."""
    data = trained.recipe.data
    names = [
        Path(source.path).name if looks_local(source.path) else source.path for source in data.eval_sources or data.sources
    ]
    return redact_text(", ".join(dict.fromkeys(names)))


def _measures(trained: Trained) -> Iterator[tuple[str, str, float, str]]:
    """Yield the key, name, value and written value of each finite measure at the exported step, or
    the last before it."""
    record = dict(trained.measured[-1]) if trained.measured else {}
    words = {**EVAL_WORDS, "bleu": ("BLEU", short), "chrf": ("chrF", short)}
    record |= {key: value for key, value in trained.closing.items() if key in ("bleu", "chrf")}  # type: ignore[misc]
    for key, (label, say) in words.items():
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            yield key, label, value, say(value)


def _body(folder: Path, trained: Trained, name: str) -> Iterator[str]:
    recipe = trained.recipe
    yield f"# {recipe.run.name}"
    yield ""
    if recipe.description:
        yield _in_line(recipe.description)
        yield ""
    yield _what_it_is(folder, trained)
    yield ""
    yield "## Use"
    yield ""
    yield "```python"
    yield load_code(folder, recipe, name)
    yield "```"
    yield ""
    yield "## Figures"
    yield ""
    yield from _table(("", "value"), _figures(trained))
    if signature := trained.closing.get("sacrebleu"):
        yield f"BLEU and chrF are those of sacreBLEU: `{_in_line(signature)}`."
        yield ""
    yield from _evaluations(trained)
    yield "## Data"
    yield ""
    yield from _data(trained)
    yield "## Recipe"
    yield ""
    yield "For `triaxis train`. Every key that is not here has its default."
    yield ""
    yield "```json"
    yield json.dumps(redact(_as_written(recipe)), indent=2, ensure_ascii=False)
    yield "```"


def _as_written(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as somebody would write it to train the same: without defaults, but with
    the rates of a model that is gone on from, whose defaults are those of its task."""
    given: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    if recipe.train.epochs is not None:
        given["train"].pop("steps", None)  # they follow from the epochs, and only one is legal
    if recipe.model.from_pretrained is not None:
        for section, keys in BY_TASK.items():
            rates = getattr(recipe, section).model_dump(mode="json", include=set(keys))
            given[section] = rates | given.get(section, {})
    return given


def _what_it_is(folder: Path, trained: Trained) -> str:
    recipe, kind = trained.recipe, kind_of(folder)
    method = recipe.tuning.method
    what = "A model" if kind == "model" else f"An adapter ({method})"
    learned = trained.task.learns
    start = recipe.model.from_pretrained
    if start is None:
        origin = "trained from random weights"
    else:
        shown = f"[{start}](https://huggingface.co/{start})" if trained.base else f"the folder `{Path(start).name}`"
        origin = f"for {shown}, trained" if kind != "model" else f"fine-tuned from {shown}"
        origin += f" with {method}" if method and kind == "model" else ""
    license = trained.stated_license
    stated = f" Licence: {license}." if license else " No licence is stated."
    return f"{what} of {scaled(_num_params(folder))} parameters, {origin} on {learned} (task `{recipe.data.task}`).{stated}"


def _num_params(folder: Path) -> int:
    return sum(TensorFile(path).numel for path in sorted(folder.glob("*.safetensors")))


def _figures(trained: Trained) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table of figures."""
    recipe, layout = trained.recipe, trained.layout
    yield "steps", f"{trained.step:,}"
    yield "sequences of a step", f"{recipe.batch.global_sequences:,} of {recipe.data.seq_len:,} tokens"
    if (tokens := trained.last.get("tokens")) is not None:
        yield "tokens", f"{tokens:,.0f}"
    if (loss := trained.last.get("loss")) is not None:
        yield f"training loss, step {_step(trained.last):,}", short(loss)
    for _, label, _, written in _measures(trained):
        yield f"{label}, held out", written
    degrees = " × ".join(f"{word} {layout[axis]}" for axis, word in AXES.items() if layout.get(axis, 1) > 1 or axis == "dp")
    yield "layout", f"{degrees}, ZeRO-{layout.get('zero', 0)}, {recipe.precision.dtype}"
    yield "versions", ", ".join(f"{package} {version}" for package, version in trained.versions.items() if version)


AXES = {"dp": "data-parallel", "tp": "tensor", "pp": "pipeline", "cp": "context"}


def _evaluations(trained: Trained) -> Iterator[str]:
    """Yield a table of the evaluation with the lowest loss, where it was before the last one."""
    losses = [(float(value), record) for record in trained.measured if (value := record.get("eval_loss")) is not None]
    finite = [(loss, record) for loss, record in losses if math.isfinite(loss)]
    if not finite:
        return
    lowest, record = min(finite, key=lambda found: found[0])
    if record is not trained.measured[-1]:
        yield f"The lowest held-out loss, {short(lowest)}, was that of step {_step(record):,}."
        yield ""


def _data(trained: Trained) -> Iterator[str]:
    if trained.sources:
        rows = [(_cell(s["source"]), s["part"], f"{s['documents']:,} {s['noun']}", f"{s['tokens']:,}") for s in trained.sources]
        yield from _table(("source", "part", "contents", "tokens"), rows)
        return
    for source in trained.recipe.data.sources:
        yield f"* {_cell(source.path)}"
    yield ""


def _cell(text: str) -> str:
    """Return a text as code in a cell of a table."""
    return f"`{_in_line(text).replace('`', '').replace('|', chr(92) + '|')}`"


def _in_line(text: str) -> str:
    return printable(" ".join(redact_text(text).split()))


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
    yield ""
