"""An exhausted memory is one line that says what was asked for, where, and what to change."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from trainer.errors import RecipeError
from trainer.exhausted import exhausted
from trainer.launch import Place

ROOT = str(Path(__file__).parents[2])
GIB = 2**30


def test_errors_of_hosts_devices_and_python_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert told(caught.value).startswith(
        "rank 3: backward: out of memory: 1.07e+09 GiB of host memory were asked for at once; "
    )
    device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
    assert str(device) in told(device)
    wrapped = RuntimeError("stage 0 failed")
    wrapped.__cause__ = MemoryError()
    assert "no memory was left; lower batch.micro_sequences" in told(wrapped)
    assert exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "backward") is None


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(errno.ENOSPC, "", "/a/b"), 65, "/a/b: No space left on device: make room there"),
        (OSError(errno.EDQUOT, ""), 65, "rank 3: backward: Disk quota exceeded: make room there"),
        (OSError(errno.EMFILE, ""), 78, r"Too many open files: raise the limit \(ulimit -n\)"),
        (PermissionError(errno.EACCES, "", "/a/b"), 78, "/a/b: Permission denied: give this user the right"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 65, "backward: No space left on device"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), 78, "ulimit"),
    ],
)
def test_what_a_machine_does_not_give_is_one_line(error: Exception, code: int, says: str) -> None:
    said = exhausted(error, "rank 3: backward")
    assert said is not None
    assert (said.exit_code, len(said.lines)) == (code, 1)
    assert re.search(says, said.lines[0])
    wrapper = ValueError("wrapped")
    wrapper.__cause__ = error
    assert exhausted(wrapper, "rank 3: backward") is not None


@pytest.mark.parametrize(
    "error",
    [KeyError("No space left on device"), FileNotFoundError(errno.ENOENT, "", "/a"), PermissionError(errno.EPERM, "kill")],
)
def test_a_fault_of_ours_stays_one(error: Exception) -> None:
    assert exhausted(error, "backward") is None
    error.__context__ = OSError(errno.ENOSPC, "", "/a/b")  # it came up while that was handled
    assert exhausted(error, "backward") is None


def told(error: Exception) -> str:
    said = exhausted(error, "rank 3: backward")
    assert said is not None
    return said.lines[0]


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
    assert done.stderr.startswith("triaxis: error: rank 0: building the model: out of memory: 8 GiB of host memory were asked")
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
