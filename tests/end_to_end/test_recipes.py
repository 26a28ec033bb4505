"""Every recipe in ds_configs trains: scaled down by `--set` alone, divided as it says, with its own task and its export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from parallel.topology import Layout
from tools.campaign.ranks import run_ranks, train
from trainer.data.tokenizer_loading import make_tokenizer
from trainer.recipe import ResolvedRecipe, load
from trainer.track import read_metrics

ROOT = Path(__file__).parents[2]
CHECKED_ONLY = "llama_405b_pretrain_3d"  # it differs from llama_70b_3d in its sizes
RECIPES = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.stem != CHECKED_ONLY)
STEPS = 3
# Of the families' configs, by the names that they may have there.
SMALL: dict[str, Any] = {
    **{"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "max_position_embeddings": 64},
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
# Weights in few bits have blocks of 64 inputs.
SMALL_QUANTIZED = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"text": f"{n} times {n} is {n * n}."} for n in range(400)],
    "sft": [{"prompt": f"{n} times {n}?", "completion": f"{n * n}."} for n in range(200)],
    "translate": [{"source": f"{n} times {n}.", "target": f"{n} mal {n}."} for n in range(200)],
    "preference": [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(40)],
    "classify": [{"text": f"{n} times {n}", "label": n % 3} for n in range(200)],
}


def degrees(resolved: ResolvedRecipe) -> Layout:
    """The recipe's axes, none of them more than two ranks; two replicas where there is no other axis."""
    tensor, pipeline = (min(2, degree) for degree in (resolved.recipe.parallel.tensor, resolved.recipe.parallel.pipeline))
    return Layout(tp=tensor, pp=pipeline, dp=2 if tensor * pipeline == 1 else 1)


def settings(path: Path, resolved: ResolvedRecipe, layout: Layout, folder: Path) -> Iterator[str]:
    recipe, task = resolved.recipe, resolved.recipe.data.task
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
    source: dict[str, Any] = {"path": str(rows)}
    yield f"data.sources={json.dumps([source])}"
    if recipe.data.eval_sources:
        yield f"data.eval_sources={json.dumps([source])}"
    yield f"data.seq_len={64 if task == 'preference' else 32}"
    if recipe.model.from_pretrained is None:
        given = resolved.given["model"]["config"]
        yield from (f"model.config.{name}={json.dumps(SMALL[name])}" for name in given if name in SMALL)
        yield "data.tokenizer=bytes"
    else:
        sizes = SMALL_QUANTIZED if recipe.tuning.quantize else SMALL
        pretrained = small_pretrained(path, sizes, folder / "pretrained")
        yield f"model.from_pretrained={pretrained}"
        yield f"data.tokenizer={pretrained}"
    yield f"batch.global_sequences={4 * layout.dp}"
    yield "batch.micro_sequences=1"
    yield f"train.steps={STEPS}"
    yield "train.eval_sequences=4"
    yield "train.log_every=1"
    if recipe.train.eval_every:
        yield "train.eval_every=2"
    if recipe.train.eval_translations:
        yield "train.eval_translations=4"
    yield "schedule.warmup_steps=1"
    if recipe.schedule.decay_steps is not None:
        yield "schedule.decay_steps=1"
    yield f"parallel.tensor={layout.tp}"
    yield f"parallel.pipeline={layout.pp}"
    if recipe.parallel.virtual_stages > 1:
        yield "parallel.virtual_stages=2"
    for part in ("offload_optimizer", "offload_param"):
        if getattr(recipe.zero, part).device == "nvme":
            yield f"zero.{part}.nvme_path={folder / 'nvme'}"
    if recipe.tracking.wandb.mode != "disabled":
        yield "tracking.wandb.mode=disabled"
    yield "checkpoint.every=2"
    yield f"run.dir={folder / 'runs'}"


def small_pretrained(path: Path, small: dict[str, Any], folder: Path) -> Path:
    """A Hugging Face folder of the kind that the recipe names on the hub, drawn at random."""
    tokenizer = make_tokenizer("bytes")
    kind = next(kind for kind in PRETRAINED if kind in path.stem)
    config, architecture = PRETRAINED[kind]
    sizes = {name: size for name, size in small.items() if hasattr(config(), name)}
    model = architecture(config(vocab_size=tokenizer.vocab_size, **sizes))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


PRETRAINED: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


EVERY_DAY = ("llama_70b_3d", "llama3_8b_qlora", "llama3_70b_lora_zero3_offload")  # the others are checked, and run in the grid


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in EVERY_DAY else [pytest.mark.grid]) for path in RECIPES],
)
def test_a_recipe_trains_when_it_is_scaled_down(path: Path, tmp_path: Path) -> None:
    resolved = load(path)
    layout = degrees(resolved)
    words = [word for key in settings(path, resolved, layout, tmp_path) for word in ("--set", key)]
    ended = run_ranks(train, [str(path), *words], world_size=layout.world_size, log=tmp_path / "log")
    assert set(ended.codes) == {0}, ended.said[-3000:]
    run_dir = tmp_path / "runs" / resolved.recipe.run.name
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert not any(record["skipped"] for record in records)
    assert list((run_dir / "checkpoints").glob(f"step-{STEPS:08d}"))
    assert list((run_dir / "export").glob("*.safetensors"))
    if resolved.recipe.train.eval_translations:
        assert "translation of 4 pairs: BLEU" in ended.said
