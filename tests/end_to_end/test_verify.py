"""`triaxis verify`, as a user starts it: right layouts agree, mistakes in the ranks are found and named.

A mistake is made by a module that Python imports at the start of every process (`sitecustomize`), not by the product.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import start

ROOT = Path(__file__).parents[2]
LLAMA = {
    "family": "llama",
    "config": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 2816,
        "max_position_embeddings": 512,
    },
}
GPT2 = {"family": "gpt2", "config": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 512}}  # has dropout
LAYOUTS = ("tp2", "dp2", "tp2xdp2")


def verify(
    folder: Path, model: dict[str, Any], stage: int, *layouts: str, mistake: str = ""
) -> subprocess.CompletedProcess[str]:
    recipe = {
        "model": model,
        "data": {"seq_len": 512},
        "batch": {"global_sequences": 64, "micro_sequences": 4},
        "precision": {"dtype": "bf16"},
        "zero": {"stage": stage},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "sitecustomize.py").write_text(IN_RANKS + textwrap.indent(mistake or "pass", "    "))
    return start(
        *(sys.executable, "-m", "trainer", "verify", "recipe.json", "--layouts", *layouts),
        cwd=folder,
        PYTHONPATH=f"{folder}:{ROOT}",
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line[:2] in ("tp", "dp", "on")}


@pytest.mark.parametrize(
    ("model", "stage"), [pytest.param(LLAMA, 2, id="llama", marks=pytest.mark.grid), pytest.param(GPT2, 1, id="gpt2")]
)
def test_right_layouts_agree(model: dict[str, Any], stage: int, tmp_path: Path) -> None:
    done = verify(tmp_path, model, stage, *LAYOUTS)
    assert (done.returncode, done.stderr) == (0, "")
    table = rows(done)
    assert table.keys() == {"one", *LAYOUTS}
    for layout in LAYOUTS:
        initial, *numbers, verdict = table[layout]
        assert initial == table["one"][1]
        assert verdict == "rounding"
        loss, norm, update, *double = map(float, numbers)
        # Sums of 4 to 16 micro-batches and of 2 ranks in another order: seen 1e-7, 1e-7 and 3e-6.
        assert max(loss, norm) < 2e-6
        assert update < 1e-4
        assert max(double) < 1e-12  # seen 1e-14
    assert "scaled down: hidden_size" in done.stdout
    assert "precision.dtype bf16 → fp32" in done.stdout


IN_RANKS = """
import sys
if any("forkserver" in word for word in sys.orig_argv):  # the process that the ranks are forked from
"""
PARTIAL = """
import trainer.model.transformer
trainer.model.transformer.complete_partial_gradients = lambda block: None
"""
DECAY = """
import trainer.engine.engine
make = trainer.engine.engine.make_optimizer
def decaying(recipe, parameters, device, **more):
    optimizer = make(recipe, parameters, device, **more)
    for group in optimizer.param_groups:
        if trainer.engine.engine.dist.get_world_size() > 1:
            group["weight_decay"] = recipe.optimizer.weight_decay
    return optimizer
trainer.engine.engine.make_optimizer = decaying
"""


def test_a_mistake_in_the_gradients_is_found_and_named(tmp_path: Path) -> None:
    """Norms under sequence parallelism are left with their own tokens' gradients."""
    done = verify(tmp_path, LLAMA, 1, "tp2", mistake=PARTIAL)
    assert done.returncode == 1, done.stdout + done.stderr
    assert rows(done)["tp2"][7:] == ["mistake", "model.layers.0.input_layernorm.weight", "(gradient)"]


@pytest.mark.grid
def test_a_mistake_after_the_gradients_and_a_refused_layout(tmp_path: Path) -> None:
    """Embeddings decay, which the gradient in float64 does not show; and 16 heads do not divide by 3."""
    done = verify(tmp_path, LLAMA, 3, "dp2", "tp3", mistake=DECAY)
    assert done.returncode == 1, done.stdout + done.stderr
    table = rows(done)
    assert table["dp2"][7:10] == ["mistake", "model.embed_tokens.weight", "(after"]
    assert float(table["dp2"][6]) < 1e-12
    assert table["tp3"][7] == "refused"
    assert "parallel.tensor = 3 does not divide num_attention_heads = 16" in " ".join(done.stdout.split())
