"""The end of a run, after its last step: the exported weights, a sample, the closing figures and
the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.best import evaluation
from trainer.checkpoint.resume import Found
from trainer.data import PreparedData, unigram_perplexity
from trainer.data.handed_on_tokenizer import require_same
from trainer.data.prepared import held_out_pairs
from trainer.data.targets import Targets
from trainer.data.texts import Texts
from trainer.engine.engine import Engine
from trainer.engine.evaluator import Evaluator
from trainer.engine.execution import DTYPES
from trainer.errors import NotFinite
from trainer.files.durable import remove
from trainer.inference.generate import sample
from trainer.inference.last_space import without_last_space
from trainer.inference.translator import Search, Translator, scores
from trainer.launch.ranks import together
from trainer.model.hugging_face import assembled, write_folder
from trainer.model.measures import EVAL, OF_TRANSLATIONS
from trainer.model.model_files import ModelFiles
from trainer.run_folder import RunFolder
from trainer.schema import Recipe
from trainer.track.text import short
from trainer.tuning.adapter_folder import AdapterFormat, leaves_adapter, write_adapter
from trainer.tuning.merge import merged
from trainer.tuning.methods import method_of
from trainer.tuning.targets import is_added

SAMPLE_TOKENS = 96


@dataclass(frozen=True)
class Exported:
    """The facts of the model that a run exported: the figures of its evaluation, for the summary,
    and lines to show."""

    figures: Mapping[str, Any]
    lines: Sequence[str] = ()


def exported(recipe: Recipe, best: Found | None, last: Mapping[str, float | int | None], steps_done: int) -> Exported:
    """Return what to say of the exported model. `best`: its checkpoint, None if it is the model of
    the last step, whose evaluation is `last`."""
    figure = recipe.checkpoint.best
    if figure is None:
        return Exported(last)
    if best is None:
        return Exported(last, [f"warning: no whole checkpoint has a finite {figure}: the last step is exported"])
    step, measured = best.manifest.step, evaluation(best.manifest)
    said = f"exported: step {step}, the best {figure} {short(measured[figure], 5)}"
    other = "it is the last step" if step == steps_done else f"the last step had {short(last.get(figure), 5)}"
    return Exported({**measured, "best_step": step}, [f"{said}; {other}"])


def export(
    engine: Engine, files: ModelFiles, folder: RunFolder, *, step: int, is_first: bool, note: Callable[[str], None]
) -> None:
    """Write the weights, which are those of `step`, as a Hugging Face folder, or the parameters
    trained beside them as an adapter.

    NotFinite or DataError on all ranks, and no folder, where a weight is not finite or transformers
    would tokenize differently.
    """
    what = _write(engine, files, folder.export if is_first else None, step, whole=not leaves_adapter(engine.recipe))
    note(f"{what}: {folder.export}")


def _write(engine: Engine, files: ModelFiles, folder: Path | None, step: int, *, whole: bool) -> str:
    """Write a Hugging Face folder, and return the word for what is in it. All ranks must call it
    together; see `export`."""
    with together(lambda: engine.watch.doing):
        try:
            return _write_folder(engine, files, folder, whole=whole)
        except NotFinite as error:
            raise NotFinite(error.what, step=step) from None


def _write_folder(engine: Engine, files: ModelFiles, folder: Path | None, *, whole: bool) -> str:
    """Write the model, or the adapter, and return the word for it. `folder` is None on ranks that
    only take part in the gathering."""
    recipe, network = engine.recipe, engine.network
    tensors, dtype = engine.gathered_tensors(), DTYPES[recipe.precision.settled]
    if not whole:
        form = AdapterFormat.of(recipe, network)
        write_adapter(assembled(tensors), folder, dtype=dtype, form=form, save_beside=_others(files))
        return "adapter"
    write_folder(
        tensors,
        folder,
        dtype=dtype,
        config=files.config,
        save_beside=_with_unmerged(engine, files, dtype),
        through=partial(merged, tuning=recipe.tuning, network=network),
    )
    return "weights"


def _others(files: ModelFiles) -> Callable[[Path], None]:
    """Return a function that writes the tokenizer and the other files into a folder, and raises an
    error if transformers tokenizes differently with them."""

    def save(folder: Path) -> None:
        files.save_others(folder)
        require_same(folder, files.tokenizer)

    return save


def _with_unmerged(engine: Engine, files: ModelFiles, dtype: torch.dtype) -> Callable[[Path], None]:
    """Return a function that writes the files beside the weights into a whole model's folder: the
    tokenizer, and an adapter that cannot be merged into the weights."""
    method = method_of(engine.recipe.tuning)
    if not method.parts or method.merges:
        return _others(files)
    form = AdapterFormat.of(engine.recipe, engine.network)
    adapter = [(name, tensor) for name, tensor in assembled(engine.gathered_tensors()) if is_added(name)]

    def save(folder: Path) -> None:
        _others(files)(folder)
        form.write(adapter, folder, dtype)

    return save


def baseline(recipe: Recipe, prepared: PreparedData, targets: Targets) -> dict[str, float]:
    """Return the perplexity of the held-out data under the frequencies of their tokens, which any
    model should beat."""
    return {
        "unigram_perplexity": unigram_perplexity(
            prepared.train,
            prepared.evaluation,
            prepared.tokenizer.vocab_size,
            row_tokens=recipe.data.row_tokens,
            isolate_documents=recipe.data.isolate_documents,
            sequences=recipe.train.eval_sequences,
            targets=targets,
        )
    }


def sampled(recipe: Recipe, prepared: PreparedData, evaluator: Evaluator) -> dict[str, str]:
    """Return the model's continuation of train.sample_prompt, or its answer; {} without a prompt.
    All ranks must call it together."""
    asked, tokenizer, chat = recipe.train.sample_prompt, prepared.tokenizer, prepared.chat
    if asked is None:
        return {}
    prompt = chat.prompt(asked) if chat else (prepared.texts or Texts()).prompt(tokenizer, asked)
    given, first = (prompt, []) if chat else without_last_space(prompt, tokenizer.spellings)
    tokens = sample(
        evaluator.next_logits,
        given,
        new_tokens=SAMPLE_TOKENS,
        context=recipe.data.seq_len,
        end=chat.end_of_turn if chat else tokenizer.end_of_document,
        temperature=0.8,
        top_k=50,
        seed=recipe.run.seed,
        first=first,
    )
    written = tokenizer.decode(tokens)
    if first:  # which begins with the space that the prompt ends in
        written = written.removeprefix(asked[len(asked.rstrip(" ")) :])
    return {"sample_prompt": asked, "sample": written}


def translated(
    recipe: Recipe, export: Path, *, tick: Callable[[], None], note: Callable[[str], None]
) -> dict[str, float | str]:
    """Return BLEU and chrF of the exported weights on held-out pairs; {} if none are asked for.
    Other ranks need not call it."""
    data, keys = recipe.data, recipe.train
    if not keys.eval_translations:
        return {}
    pairs = held_out_pairs(data, cache_dir=Path(str(data.cache_dir)), limit=keys.eval_translations)
    found = scores(Translator(export), pairs, Search(keys.beams, keys.length_penalty), tick=tick)
    note(f"translation of {len(pairs):,} pairs: BLEU {found.bleu}, chrF {found.chrf} ({found.signature})")
    return {"bleu": found.bleu, "chrf": found.chrf, "sacrebleu": found.signature}


def translated_meanwhile(
    engine: Engine, files: ModelFiles, folder: RunFolder, *, step: int, is_first: bool, note: Callable[[str], None]
) -> dict[str, float]:
    """Return, on the first rank, the figures of translations by the weights of `step` while the run
    goes on; {} unless checkpoint.best is one of them. All ranks must call it together."""
    if engine.recipe.checkpoint.best not in OF_TRANSLATIONS:
        return {}
    _write(engine, files, folder.translating if is_first else None, step, whole=True)
    if not is_first:
        return {}
    found = translated(engine.recipe, folder.translating, tick=engine.watch.tick, note=note)
    remove(folder.translating)
    return {name: float(found[name.removeprefix(EVAL)]) for name in OF_TRANSLATIONS}
