"""The training loop, as prose."""

from __future__ import annotations

import math
import time

from trainer.checkpoint.door import Resume
from trainer.data import unigram_perplexity
from trainer.engine import DTYPES
from trainer.errors import EXIT_OK
from trainer.generate import sample
from trainer.launch import among_ranks
from trainer.meter import Meter
from trainer.model.hugging_face import write_folder
from trainer.recipe import ResolvedRecipe
from trainer.schedule import lr_at
from trainer.session import Session, open_session
from trainer.track.report import write_report

SAMPLE_TOKENS = 96


def train(resolved: ResolvedRecipe, run_dir: str | None, resume: Resume) -> int:
    """Run a recipe to its last step; the exit code."""
    step = 0
    with open_session(resolved, run_dir, resume) as run, among_ranks(lambda: f"{run.engine.watch.phase} of step {step + 1}"):
        started = time.monotonic()
        keys, steps = run.recipe.train, run.recipe.train.steps
        meter = Meter(run)
        evaluation: dict[str, float] = {}
        for step in range(run.checkpoints.start_step, steps):
            with run.engine.watch("data"):
                micro_batches = run.micro_batches(step)
            lr = lr_at(step, schedule=run.recipe.schedule, peak=run.recipe.optimizer.lr, total_steps=steps)
            result = run.engine.step(micro_batches, step=step, lr=lr)
            meter.record(step + 1, lr, result, micro_batches)
            if step + 1 == steps or (keys.eval_every and (step + 1) % keys.eval_every == 0):
                with run.engine.watch("evaluation"):
                    evaluation = evaluate(run, steps_done=step + 1)
                meter.restart()
            if run.checkpoints.due(step + 1):
                with run.engine.watch("saving"):
                    run.say(run.checkpoints.save(step + 1, run.engine, {"meter": meter.state()}))
                meter.restart()
        with run.engine.watch("saving"):
            run.say(run.checkpoints.wait())
        with run.engine.watch("export"):
            export(run)
        summary = {"steps": steps, "wall_s": time.monotonic() - started}
        finish(run, {**summary, **meter.summary(), **evaluation})
    return EXIT_OK


def evaluate(run: Session, *, steps_done: int) -> dict[str, float]:
    """Loss and perplexity on held-out documents; {} when nothing is held out."""
    if run.eval_data is None:
        return {}
    batches = run.eval_data.micro_batches(
        dp_rank=run.mesh.dp.rank, dp=run.mesh.dp.size, micro_sequences=run.plan.micro_sequences
    )
    result = run.engine.evaluate(batches)
    perplexity = math.exp(min(result.loss, 700.0))  # beyond, a float overflows
    record = {"eval_loss": result.loss, "eval_perplexity": perplexity, "eval_targets": result.num_targets}
    run.tracker.evaluate({"step": steps_done, **record})
    return record


def export(run: Session) -> None:
    """Write the weights as a Hugging Face folder."""
    write_folder(
        run.engine.gathered_tensors(),
        run.folder.export if run.place.is_first else None,
        dtype=DTYPES[run.recipe.precision.dtype],
        config=run.files.config,
        save_beside=run.files.save_others,
    )
    run.tracker.note(f"weights: {run.folder.export}")


def finish(run: Session, summary: dict[str, object]) -> None:
    """What is worth knowing at the end: a sample, the baseline, the report."""
    recipe, tokenizer = run.recipe, run.prepared.tokenizer
    if run.eval_data is not None and run.place.is_first:
        summary["unigram_perplexity"] = unigram_perplexity(
            run.prepared.train,
            run.prepared.evaluation,
            tokenizer.vocab_size,
            seq_len=recipe.data.seq_len,
            isolate_documents=recipe.data.isolate_documents,
            sequences=recipe.train.eval_sequences,
        )
    if recipe.train.sample_prompt is not None:
        tokens = sample(
            run.engine.next_logits,
            tokenizer.encode(recipe.train.sample_prompt) or [tokenizer.end_of_document],
            new_tokens=SAMPLE_TOKENS,
            context=recipe.data.seq_len,
            end=tokenizer.end_of_document,
            temperature=0.8,
            top_k=50,
            seed=recipe.run.seed,
        )
        summary |= {"sample_prompt": recipe.train.sample_prompt, "sample": tokenizer.decode(tokens)}
    summary |= {"num_params": run.engine.num_params, "world_size": run.place.world_size, "devices": run.devices}
    run.tracker.finish(summary)
    if run.place.is_first:
        write_report(run.folder.path)
