"""The recipes and layouts of the campaigns, and the facts of a run that must be the same to the
bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.check import check_files, read_sound
from trainer.checkpoint.reader import Reader
from trainer.track import read_metrics

NUMBERS = ("step", "loss", "grad_norm", "lr", "loss_scale", "num_targets", "skipped", "tokens")


@dataclass(frozen=True)
class Way:
    """A layout: the recipe's keys that make it, and its number of processes."""

    name: str
    processes: int
    keys: tuple[str, ...] = ()


def _zero(stage: int) -> Way:
    # Otherwise ZeRO-3 would leave so small a model undivided.
    small = ("zero.stage3_param_persistence_threshold=100",) if stage == 3 else ()
    return Way(f"dp2-zero{stage}", 2, (f"zero.stage={stage}", *small))


WAYS = (
    Way("one", 1),
    *(_zero(stage) for stage in (0, 1, 2, 3)),
    Way("tp2", 2, ("parallel.tensor=2",)),
    Way("pp2", 2, ("parallel.pipeline=2",)),
    Way("tp2xpp2", 4, ("parallel.tensor=2", "parallel.pipeline=2")),
)


def write_recipe(folder: Path, *, steps: int, every: int, keep: int, hidden: int = 32, **more: Any) -> Path:
    """Write the recipe of a GPT-2 of 4 layers with tied embeddings and dropout, and its text; a
    step takes some milliseconds."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}; the remainder of {n} by 7 is {n % 7}.\n\n" for n in range(2000)))
    recipe: dict[str, Any] = {
        "run": {"name": "campaign", "dir": str(folder)},
        "model": {
            "family": "gpt2",
            "config": {
                **{"n_embd": hidden, "n_layer": 4, "n_head": 4, "n_positions": 32},
                **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
            },
        },
        "data": {"sources": [{"path": str(text)}], "tokenizer": "bytes", "seq_len": 32, "eval_fraction": 0.0},
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "schedule": {"name": "cosine", "warmup_steps": 4},
        "train": {"steps": steps, "clip_norm": 0.5},
        "checkpoint": {"every": every, "keep": keep},
        "guard": {"timeout_s": 60},
    }
    for section, keys in more.items():
        recipe[section] = {**recipe.get(section, {}), **keys}
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def arguments(recipe: Path, run_dir: Path, way: Way, *keys: str, resume: str = "auto") -> list[str]:
    """Return the arguments of `triaxis train`."""
    settings = [word for key in (*way.keys, *keys) for word in ("--set", key)]
    return [str(recipe), "--run-dir", str(run_dir), "--resume", resume, *settings]


def numbers(run_dir: Path, *, after: int = 0) -> list[tuple[Any, ...]]:
    """Return what a run logged of each step, except times and rates, with floats to the bit."""
    records: Iterable[dict[str, Any]] = read_metrics(run_dir / "metrics.jsonl")
    return [
        tuple(value.hex() if isinstance(value, float) else value for value in (record[key] for key in NUMBERS))
        for record in records
        if record["step"] > after
    ]


def digests(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every logical tensor in each of its states, from the fragments of a
    verified checkpoint."""
    manifest = read_sound(checkpoint)
    check_files(checkpoint, manifest.files)
    reader = Reader(checkpoint, manifest)
    return {
        f"{name} {state}": hashlib.sha256(
            reader.whole(name, state).contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in sorted(manifest.tensors.items())
        for state in tensor.dtypes
    }


def remembered(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint records besides its tensors and the layout."""
    manifest = read_sound(checkpoint)
    return {"step": manifest.step, "sequences": manifest.sequences, **manifest.state}


def first_difference(got: Sequence[Any], expected: Sequence[Any]) -> Any:
    """Return the first item that is not the same, or None."""
    pairs = zip(got, expected, strict=False)
    return next((theirs for mine, theirs in pairs if mine != theirs), None if len(got) == len(expected) else "length")


def report(**case: Any) -> None:
    """Print one JSON line for a case."""
    print(json.dumps(case), flush=True)
