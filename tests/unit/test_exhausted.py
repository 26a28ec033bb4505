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
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from trainer.errors import RecipeError
from trainer.exhausted import exhausted
from trainer.files.reading import NotAFile
from trainer.launch.ranks import Place
from trainer.model.hf_config import from_hf
from trainer.recipe.batch_plan import BatchPlan
from trainer.run.memory_check import Machine, host_bytes, require_memory
from trainer.schema import Recipe

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
        (OSError(errno.ELOOP, "", "/a/b"), 78, "/a/b: Too many levels of symbolic links: a link there leads to itself"),
        (
            NotAFile(errno.EINVAL, "a pipe, not a file", "/a/b"),
            78,
            "/a/b: a pipe, not a file: remove it, or name another place",
        ),
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
        [sys.executable, "-m", "trainer", "train", "recipe.json", "--no-plan-check"],
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


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
MACHINE = Machine(host_bytes=64 * GIB, local_ranks=4, gpu_bytes=None)


def demanded(network: dict[str, Any] | None = None, machine: Machine = MACHINE, world_size: int = 4, **sections: Any) -> None:
    """`require_memory` for a Llama of 4 layers on so many ranks."""
    config = {"vocab_size": 257, **SMALL, **(network or {}), "max_position_embeddings": 2**24}
    recipe = Recipe.model_validate({"model": {"family": "llama", "config": config}, **sections})
    plan = BatchPlan.from_recipe(recipe, world_size, "a test")
    require_memory(recipe, plan, from_hf("llama", config), machine)


@pytest.mark.parametrize(
    ("demand", "said"),
    [
        ({"batch": {"micro_sequences": 2**20, "global_sequences": 2**22}, "data": {"seq_len": 2**20}},
         r"what the layers keep of a micro-batch \(batch\.micro_sequences 1048576 × data\.seq_len 1048576\)"),
        ({"batch": {"global_sequences": 2**30}, "data": {"seq_len": 16}},
         r"the data of a step \(batch\.global_sequences 1073741824 × data\.seq_len 16\)"),
        ({"batch": {"global_sequences": 2**26}, "data": {"seq_len": 1}, "parallel": {"pipeline": 4}},
         r"the schedule of 67108864 micro-batches \(batch\.global_sequences 67108864\)"),
        ({"network": {"hidden_size": 2**16, "intermediate_size": 2**18}}, r"the weights \(model\.config\)"),
        ({"zero": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "n", "buffer_size": 2**40}}},
         r"the swap buffers \(zero\.offload_param\.buffer_count 5 × buffer_size 1099511627776\)"),
    ],
)  # fmt: skip
def test_what_no_machine_of_this_size_can_hold_is_refused_before_it_is_tried(demand: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        demanded(**demand)
    assert "and this machine has 16 GiB of memory for each of its 4 ranks: lower what is named" in str(refused.value)
    demanded(**{**demand, "machine": Machine(2**60, 1, None)})


def test_what_lies_on_a_gpu_is_not_asked_of_the_host() -> None:
    wide = {"hidden_size": 2**13, "intermediate_size": 2**15}  # 17 GB of weights
    with pytest.raises(RecipeError, match="and this GPU has 8 GiB"):
        demanded(wide, Machine(GIB, 1, 8 * GIB))
    demanded(wide, Machine(GIB, 1, 80 * GIB))
    demanded(wide, Machine(GIB, 4, 8 * GIB), zero={"stage": 3})


def test_this_machine_has_memory() -> None:
    assert GIB // 4 < host_bytes() < 2**50


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("named", "says"),
    [("cuda", "DS_ACCELERATOR=cuda, but this torch was built without CUDA|no CUDA device here"), ("xpu", "legal: cuda, cpu")],
)
def test_an_accelerator_that_is_not_there_is_one_line(named: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Place.from_environment({"DS_ACCELERATOR": named})
    assert Place.from_environment({"DS_ACCELERATOR": "cpu"}).device.type == "cpu"
