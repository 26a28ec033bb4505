"""Figures that others published, measured again with the recipes. TRIAXIS_DATA names the folder with their data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tools.campaign.ranks import run_ranks, train
from trainer.track import read_metrics

RECIPES = Path(__file__).parents[2] / "ds_configs"
OF_TRAINING = 1003854  # characters: the first 90 %, as nanoGPT divides them


@pytest.mark.grid
@pytest.mark.timeout(3600)  # three minutes of a core that nothing else uses
def test_nanogpt_s_run_for_a_cpu(tmp_path: Path) -> None:
    text = Path(os.environ.get("TRIAXIS_DATA", "data"), "tinyshakespeare.txt")
    if not text.is_file():
        pytest.skip("TRIAXIS_DATA names no folder with tinyshakespeare.txt")
    content = text.read_bytes()
    settings = [f"run.dir={tmp_path}"]
    for group, part in (("sources", content[:OF_TRAINING]), ("eval_sources", content[OF_TRAINING:])):
        (tmp_path / f"{group}.txt").write_bytes(part)
        settings.append(f"data.{group}={json.dumps([{'path': str(tmp_path / f'{group}.txt')}])}")
    words = [str(RECIPES / "nanogpt_shakespeare.json"), *(f"--set={setting}" for setting in settings)]
    ended = run_ranks(train, words, world_size=1, log=tmp_path / "log", timeout_s=3600.0)
    assert ended.codes == (0,), ended.said[-3000:]
    last = read_metrics(tmp_path / "nanogpt-shakespeare" / "evaluations.jsonl")[-1]
    assert last["eval_targets"] == len(content) - OF_TRAINING, "each held-out character but the first, and the end"
    # published with two decimals, of random initial weights; 20 evaluations of 12 random blocks each spread by 0.02
    assert float(last["eval_loss"] or 0) == pytest.approx(1.88, abs=0.03)
