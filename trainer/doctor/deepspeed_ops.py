"""DeepSpeed's own answers about its extensions, and the build of one. Only `probe.py` imports this:
a process of its own."""

from __future__ import annotations

import os
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for other compilers
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops, version
from deepspeed.ops.op_builder.all_ops import ALL_OPS

from trainer.engine import built_ops


def look() -> dict[str, Any]:
    """Return DeepSpeed's version, and the state of each of its extensions."""
    return {
        "version": version,
        "accelerator": get_accelerator().device_name(),
        "root": str(built_ops.root()),
        "ops": {name: _state(name) for name in ALL_OPS},
    }


def _state(name: str) -> dict[str, Any]:
    """Return whether the extension came with DeepSpeed or was built here, and why it cannot be
    loaded."""
    installed = bool(installed_ops.get(name))
    there = installed or built_ops.built_file(name).is_file()
    error = ""
    if there:
        try:
            ALL_OPS[name].load(verbose=False) if installed else built_ops.use_built(name)
        except Exception as failed:  # another torch, another processor, a library that is gone
            error = str(failed) or type(failed).__name__
    return {"installed": installed, "built": there and not installed, "error": error}


def build(name: str) -> None:
    """Build an extension into its folder. RuntimeError with the compiler's output if it fails."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(built_ops.root())
    ALL_OPS[name].load(verbose=True)
