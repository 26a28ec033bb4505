"""An exhausted memory is one line that says what was asked for, where, and what to change."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.errors import RecipeError
from trainer.launch import Place
from trainer.memory import OutOfMemory, exhausted

ROOT = str(Path(__file__).parents[2])
GIB = 2**30


def test_errors_of_hosts_devices_and_python_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert exhausted(caught.value) == "1.07e+09 GiB of host memory were asked for at once"
    device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
    assert exhausted(device) == str(device)
    wrapped = RuntimeError("stage 0 failed")
    wrapped.__cause__ = MemoryError()
    assert exhausted(wrapped) == "no memory was left"
    assert exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert (
        OutOfMemory(3, "backward of step 7", "2 GiB")
        .lines[0]
        .startswith("rank 3: out of memory in backward of step 7: 2 GiB; lower")
    )


def test_a_model_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    """A weight of 8 GiB where the system gives 9."""
    shape = {"hidden_size": 16384, "num_hidden_layers": 1, "num_attention_heads": 128, "intermediate_size": 65536}
    config = {**shape, "max_position_embeddings": 32}
    (tmp_path / "corpus.txt").write_text("to be or not to be " * 100)
    data = {"sources": [{"path": "corpus.txt"}], "seq_len": 32, "eval_fraction": 0.0}
    (tmp_path / "recipe.json").write_text(json.dumps({"model": {"family": "llama", "config": config}, "data": data}))
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "recipe.json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ROOT},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (9 * GIB, 9 * GIB)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith(
        "triaxis: error: rank 0: out of memory in building the model: 8 GiB of host memory were asked"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("named", "says"),
    [("cuda", "DS_ACCELERATOR=cuda, but this torch was built without CUDA|no CUDA device here"), ("xpu", "legal: cuda, cpu")],
)
def test_an_accelerator_that_is_not_there_is_one_line(named: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Place.from_environment({"DS_ACCELERATOR": named})
    assert Place.from_environment({"DS_ACCELERATOR": "cpu"}).device.type == "cpu"
