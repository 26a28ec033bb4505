"""Run folders as a training of any length leaves them, made without one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from trainer.track.jsonl import to_json


def training_record(step: int, steps: int, noise: random.Random, **changes: Any) -> dict[str, Any]:
    done = step / steps
    step_time_s = 0.42 + 0.02 * noise.random()
    record = {
        "step": step,
        "loss": 2.1 + 7.0 * math.exp(-9 * done) + noise.gauss(0, 0.1),
        "grad_norm": math.exp(noise.gauss(2 * math.exp(-8 * done) - 0.2, 0.25)),
        "lr": 6e-4 * min(1.0, 20 * done) * (0.55 + 0.45 * math.cos(math.pi * done)),
        "loss_scale": 1.0,
        "tokens": step * 16384,
        "tokens_per_s": 16384 / step_time_s,
        "step_time_s": step_time_s,
        "time_data_s": 0.004,
        "time_forward_s": 0.3 * step_time_s,
        "time_backward_s": 0.55 * step_time_s,
        "time_optimizer_s": 0.08 * step_time_s,
        "time_other_s": 0.07 * step_time_s - 0.004,
        "mfu": 0.16 / step_time_s,
        "memory_gib": 2.1 if done < 0.1 else 2.4,
        "skipped": 0,
        "num_targets": 16000,
        "time": 1.7954e9 + 0.43 * step,
    }
    return record | changes


def write_run(folder: Path, steps: int, *, summary: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run folder with `steps` records; `changes` replace values in all of them, or call with the step."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            changed = {name: value(step) if callable(value) else value for name, value in changes.items()}
            file.write(json.dumps(to_json(training_record(step, steps, noise, **changed))) + "\n")
    with (folder / "evaluations.jsonl").open("w") as file:
        for step in range(max(1, steps // 10), steps + 1, max(1, steps // 10)):
            loss = 2.2 + 7.0 * math.exp(-9 * step / steps)
            record = {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_targets": 130816}
            file.write(json.dumps(record) + "\n")
    values = {
        "description": {"value": "A run <made> for a test & nothing else.", "origin": "file:r.json"},
        "train.steps": {"value": steps, "origin": "--set"},
        "train.clip_norm": {"value": 1.0, "origin": "default"},
        "optimizer.lr": {"value": 6e-4, "origin": "file:r.json"},
        "data.sources": {"value": [{"path": "https://me:hunter2@host/x"}], "origin": "file:r.json"},
        "data.cache_dir": {"value": "runs/data", "origin": "derived"},
        "zero.stage": {"value": 1, "origin": "default"},
    }
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}
    (folder / "resolved.json").write_text(json.dumps({"values": values, "deepspeed_config": config}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(to_json(summary)))
    return folder


SUMMARY = {
    "steps": 300,
    "wall_s": 129.0,
    "final_loss": 2.1,
    "eval_loss": 2.2,
    "eval_perplexity": 9.03,
    "unigram_perplexity": 512.3,
    "num_params": 10_412_032,
    "world_size": 2,
    "devices": "2 CPU processes",
    "sample_prompt": "def mean(values):",
    "sample": '\n    """<b>Not markup</b> \x1b[31m"""\n    return sum(values) / len(values)\n',
}
