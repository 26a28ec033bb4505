"""Recipes of small runs, and commands as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 40
CONFIG = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
BERT_SEQ_LEN = 32
BERT = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "max_position_embeddings": BERT_SEQ_LEN,
}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A small Llama on a small corpus; `changes` by dotted key with '__' for the dot."""
    text = "the quick brown fox jumps over the lazy dog while the cat looks on and says nothing at all. "
    documents = [json.dumps({"text": text * (1 + i % 5) + str(i)}) for i in range(300)]
    (folder / "corpus.jsonl").write_text("\n".join(documents))
    recipe: dict[str, Any] = {
        "run": {"name": "small", "dir": str(folder / "runs")},
        "model": {"family": "llama", "config": CONFIG},
        "data": {
            "sources": [{"path": str(folder / "corpus.jsonl")}],
            "tokenizer": "bytes",
            "seq_len": 64,
            "eval_fraction": 0.1,
        },
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "train": {"steps": STEPS, "eval_every": 20, "eval_sequences": 21, "sample_prompt": "the "},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        recipe.setdefault(section, {})[key] = value
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def start(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end with this interpreter's scripts first on the PATH."""
    repository = str(Path(__file__).parents[2])
    variables = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    variables |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": repository,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=240, check=False)


def write_bert_recipe(folder: Path, task: str) -> Path:
    """Two kinds of texts that a small network tells apart; its dropout is that of Bert, 0.1."""
    rows = [{"text": f"{i} is {'odd' if i % 2 else 'even'}", "label": ["even", "odd"][i % 2]} for i in range(120)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "run": {"name": task, "dir": str(folder / "runs")},
        "model": {"family": "bert", "config": BERT},
        "data": {"task": task, "sources": [{"path": str(folder / "rows.jsonl")}], "seq_len": BERT_SEQ_LEN, "workers": 1},
        "batch": {"global_sequences": 4, "micro_sequences": 2},
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant"},
        "checkpoint": {"every": 2, "keep": 9},
    }
    path = folder / f"{task}.json"
    path.write_text(json.dumps(recipe))
    return path
