"""`triaxis eval`: the evaluation of a model on data, in any layout."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trainer import schema
from trainer.checkpoint.export import export
from trainer.data import PreparedData, prepare
from trainer.data.loader import EvalData
from trainer.data.prepared import held_out_pairs
from trainer.data.targets import targets_of
from trainer.errors import RecipeError
from trainer.inference.open_model import OpenModel, open_model
from trainer.inference.translator import Search, Translator, scores
from trainer.inference.weights import Weights
from trainer.launch.ranks import together
from trainer.model.measures import ClassMeasures, EvalResult
from trainer.tasks import TASKS
from trainer.track.progress import work_progress
from trainer.track.text import percent, short

Found = dict[str, Any]
SHARES = ("accuracy", "exact_match", "majority", "f1", "f1_positive")


@dataclass(frozen=True)
class Request:
    """The arguments of an evaluation.

    `files`: as in data.eval_sources; none: the data that the run held out. `sequences`: the most to
    evaluate. `translations`: for a model that translates, how many texts to translate for BLEU and
    chrF; None: all.
    """

    weights: str
    files: tuple[Mapping[str, str], ...] = ()
    settings: tuple[str, ...] = ()
    sequences: int | None = None
    translations: int | None = None


def evaluate(request: Request) -> Found | None:
    """Return the figures, as JSON values by name, after the arguments; None on all ranks but the
    first.

    All of the launcher's ranks must call it together. RecipeError or DataError, in one line.
    """
    with open_model(request.weights, request.settings, files=request.files) as model:
        with together(), work_progress(shown=model.place.is_first) as progress:
            _require_no_reference(model.recipe)
            data = _data(model.recipe, alone=bool(request.files))
            prepared = prepare(
                data,
                seed=model.recipe.run.seed,
                cache_dir=Path(str(data.cache_dir)),
                build=model.place.is_first,
                progress=progress,
            )
            rows = _rows(model, prepared, request)
        dp = model.mesh.data
        micro_batches = rows.micro_batches(dp_rank=dp.rank, dp=dp.size, micro_sequences=model.plan.micro_sequences)
        result = model.evaluator.evaluate(micro_batches, prepared.tokens_per_byte)
    if not model.place.is_first:
        return None
    asked = {"task": data.task, "data": list(prepared.eval_sources), "sequences": rows.num_sequences}
    return {**model.described, **asked, **_measured(model, result), **_translated(model, data, request)}


def _require_no_reference(recipe: schema.Recipe) -> None:
    if recipe.needs_reference:
        raise RecipeError(
            f"preference.loss = {recipe.preference.loss!r} compares with the model before training, which no checkpoint has: "
            "what the run itself measured is in its evaluations.jsonl; legal: --set preference.loss=orpo, or --set "
            "data.task=sft and a FILE of conversations"
        )


def _data(recipe: schema.Recipe, *, alone: bool) -> schema.Data:
    """Return the data of the recipe. `alone`: without its sources, so that only data.eval_sources
    is read."""
    return recipe.data.model_copy(update={"sources": []}) if alone else recipe.data


def _rows(model: OpenModel, prepared: PreparedData, request: Request) -> EvalData:
    data, network = model.recipe.data, model.network
    if not prepared.evaluation:
        raise RecipeError(f"{model.weights.folder}: its run held nothing out: name a FILE to evaluate on")
    everything = sum(store.num_tokens for store in prepared.evaluation) if request.files else model.recipe.train.eval_sequences
    return EvalData(
        prepared.evaluation,
        row_tokens=data.row_tokens,
        isolate_documents=data.isolate_documents,
        sequences=request.sequences or everything,
        targets=targets_of(data, prepared.tokenizer, causal=network.causal, seed=model.recipe.run.seed, part="evaluation"),
    )


def _measured(model: OpenModel, result: EvalResult) -> Found:
    found: Found = {name.removeprefix("eval_"): value for name, value in model.measures.record(result).items()}
    if isinstance(model.measures, ClassMeasures) and (matrix := model.measures.confusion(result)):
        classes = model.recipe.data.classes
        found["confusion"] = {true: dict(zip(classes, row, strict=True)) for true, row in zip(classes, matrix, strict=True)}
    return found


def _translated(model: OpenModel, data: schema.Data, request: Request) -> Found:
    """Return BLEU and chrF, by the first rank: a search of one text after another cannot be
    divided."""
    if not TASKS[data.task].translates or request.translations == 0 or not data.eval_sources:
        return {}
    limit = request.translations or 2**62
    pairs = held_out_pairs(data, cache_dir=Path(str(data.cache_dir)), limit=limit)
    keys = model.recipe.train
    with tempfile.TemporaryDirectory(prefix="triaxis-eval-") as scratch:
        folder = _whole_model(model.weights, Path(scratch) / "model")
        found = scores(Translator(folder), pairs, Search(keys.beams, keys.length_penalty))
    return {"translations": len(pairs), "bleu": found.bleu, "chrf": found.chrf, "sacrebleu": found.signature}


def _whole_model(weights: Weights, scratch: Path) -> Path:
    """Return a Hugging Face folder of the weights."""
    return weights.folder if weights.manifest is None else export(weights.folder, scratch, whole=True).folder


def table(found: Found) -> Iterator[Table]:
    """Yield the tables of the figures for the console."""
    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in found.items():
        if name not in ("confusion", "tasks"):
            rows.add_row(name.replace("_", " "), Text(_said(name, value)))
    for task, measured in found.get("tasks", {}).items():
        for name, value in measured.items():
            if isinstance(value, float):
                rows.add_row(Text(f"{task} {name}"), short(value))
    yield rows
    if confusion := found.get("confusion"):
        matrix = Table(box=None, pad_edge=False)
        matrix.add_column("true class, by the one that was named")
        for named in confusion:
            matrix.add_column(Text(named), justify="right")
        for true, counts in confusion.items():
            matrix.add_row(Text(true), *(f"{count:,}" for count in counts.values()))
        yield matrix


def _said(name: str, value: Any) -> str:
    if name in SHARES:
        return percent(value)
    if isinstance(value, dict):
        return " × ".join(f"{axis} {degree}" for axis, degree in value.items()) or "one process"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return short(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
