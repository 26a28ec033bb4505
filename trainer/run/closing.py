"""What a run leaves when it has reached its last step: weights, a sample, figures, the report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from trainer.data import unigram_perplexity
from trainer.data.handed_on_tokenizer import require_same
from trainer.data.prepared import held_out_pairs
from trainer.data.texts import Texts
from trainer.engine.execution import DTYPES
from trainer.errors import NotFinite
from trainer.files.spare import Spare
from trainer.inference.generate import sample
from trainer.inference.translator import Search, Translator, scores
from trainer.launch.ranks import together
from trainer.model.hugging_face import assembled, write_folder
from trainer.run.session import Session, targets_for
from trainer.track.report import write_report
from trainer.tuning.adapter_folder import AdapterFormat, leaves_adapter, write_adapter
from trainer.tuning.merge import merged
from trainer.tuning.methods import method_of
from trainer.tuning.targets import is_added

SAMPLE_TOKENS = 96


def export(run: Session) -> None:
    """Write the weights as a Hugging Face folder, or what was trained beside them as an adapter. NotFinite or DataError on all
    ranks, and no folder, where a weight is not finite or transformers would tokenize otherwise."""
    with together(lambda: run.engine.watch.doing):
        try:
            _write_export(run)
        except NotFinite as error:
            raise NotFinite(error.what, step=run.recipe.train.steps) from None


def _write_export(run: Session) -> None:
    tensors, dtype = run.engine.gathered_tensors(), DTYPES[run.recipe.precision.dtype]
    folder = run.folder.export if run.place.is_first else None
    if leaves_adapter(run.recipe):
        form = AdapterFormat.of(run.recipe, run.network)
        write_adapter(assembled(tensors), folder, dtype=dtype, form=form, save_beside=_others(run))
        run.tracker.note(f"adapter: {run.folder.export}")
        return
    write_folder(
        tensors,
        folder,
        dtype=dtype,
        config=run.files.config,
        save_beside=_with_unmerged(run, dtype),
        through=partial(merged, tuning=run.recipe.tuning, network=run.network),
    )
    run.tracker.note(f"weights: {run.folder.export}")


def _others(run: Session) -> Callable[[Path], None]:
    """Return the function that puts the tokenizer, and what else belongs there, into a folder, and looks whether transformers
    reads it so."""

    def save(folder: Path) -> None:
        run.files.save_others(folder)
        require_same(folder, run.files.tokenizer)

    return save


def _with_unmerged(run: Session, dtype: torch.dtype) -> Callable[[Path], None]:
    """What goes into a whole model's folder beside its weights: the tokenizer, and an adapter that no weight can take up."""
    method = method_of(run.recipe.tuning)
    if not method.parts or method.merges:
        return _others(run)
    form = AdapterFormat.of(run.recipe, run.network)
    adapter = [(name, tensor) for name, tensor in assembled(run.engine.gathered_tensors()) if is_added(name)]

    def save(folder: Path) -> None:
        _others(run)(folder)
        form.write(adapter, folder, dtype)

    return save


def finish(run: Session, summary: dict[str, object]) -> None:
    """What is worth knowing at the end: a sample, the baseline, the report."""
    recipe, tokenizer = run.recipe, run.prepared.tokenizer
    if run.eval_data is not None and run.place.is_first and run.engine.measures.predicts_tokens:
        summary["unigram_perplexity"] = unigram_perplexity(
            run.prepared.train,
            run.prepared.evaluation,
            tokenizer.vocab_size,
            seq_len=recipe.data.row_tokens,
            isolate_documents=recipe.data.isolate_documents,
            sequences=recipe.train.eval_sequences,
            targets=targets_for(recipe, run.prepared, run.network, "evaluation"),
        )
    if recipe.train.sample_prompt is not None:
        chat, texts = run.prepared.chat, run.prepared.texts or Texts()
        asked = recipe.train.sample_prompt
        prompt = chat.prompt(asked) if chat else texts.prompt(tokenizer, asked)
        tokens = sample(
            run.engine.evaluator.next_logits,
            prompt,
            new_tokens=SAMPLE_TOKENS,
            context=recipe.data.seq_len,
            end=chat.end_of_turn if chat else tokenizer.end_of_document,
            temperature=0.8,
            top_k=50,
            seed=recipe.run.seed,
        )
        summary |= {"sample_prompt": recipe.train.sample_prompt, "sample": tokenizer.decode(tokens)}
    if recipe.train.eval_translations and run.place.is_first:
        summary |= _translation_scores(run)
    summary |= run.goodput(recipe.train.steps)
    summary |= {"num_params": run.engine.num_params, "world_size": run.place.world_size, "devices": run.devices}
    run.tracker.finish(summary)
    run.end_account(recipe.train.steps)
    if run.place.is_first:
        with Spare(run.folder.report, "triaxis report writes it again").written():
            write_report(run.folder.path)


def _translation_scores(run: Session) -> dict[str, object]:
    """Of the exported weights; the other ranks need not take part."""
    data, keys = run.recipe.data, run.recipe.train
    pairs = held_out_pairs(data, cache_dir=Path(str(data.cache_dir)), limit=keys.eval_translations)
    search = Search(keys.beams, keys.length_penalty)
    found = scores(Translator(run.folder.export), pairs, search, tick=run.engine.watch.tick)
    run.tracker.note(f"translation of {len(pairs):,} pairs: BLEU {found.bleu}, chrF {found.chrf} ({found.signature})")
    return {"bleu": found.bleu, "chrf": found.chrf, "sacrebleu": found.signature}
