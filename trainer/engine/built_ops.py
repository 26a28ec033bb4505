"""DeepSpeed's extensions that were compiled ahead of time, by `triaxis doctor --build`.

DeepSpeed compiles an extension at first use. Its build folder is shared with every environment of
this user, whose other flags start the compiler again; ranks that wait for a build wait on a lock
that a killed one leaves behind for ever; and a build for one processor ends on another with an
illegal instruction. Here a build has a folder that is named after all that it depends on, and what
is there is loaded as it is, without a lock or a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.git_version_info import installed_ops, version
from deepspeed.ops.op_builder.builder import OpBuilder

from trainer.engine.extension_folder import extensions_folder

LOADED_FIRST = {"async_io": "pin_memory"}  # which holds functions that the other one calls


def root() -> Path:
    """Return the folder of the extensions that fit this Python, torch, DeepSpeed and processor."""
    digest = hashlib.sha256(json.dumps(made_with()).encode()).hexdigest()[:12]
    return extensions_folder(os.environ) / f"triaxis-{digest}"


def made_with() -> dict[str, str]:
    """Return all that a compiled extension depends on."""
    return {
        "python": sys.implementation.cache_tag,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "deepspeed": version,
        "processor": _processor(),
    }


def _processor() -> str:
    """Return the processor's instruction sets, for which an extension is compiled."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return " ".join(sorted(flags[1].split())) if flags else ""


def built_file(name: str) -> Path:
    """Return the path of an extension that was, or will be, built here."""
    return root() / name / f"{name}.so"


def use_built(name: str) -> bool:
    """Make DeepSpeed use the extension that was built here. Return whether there is one.

    An extension that came with DeepSpeed is left to it. ImportError or OSError if the one that is
    here cannot be loaded.
    """
    if installed_ops.get(name):
        return True
    if first := LOADED_FIRST.get(name):
        use_built(first)
    if name not in OpBuilder._loaded_ops:
        path = built_file(name)
        if not path.is_file():
            return False
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        OpBuilder._loaded_ops[name] = _loaded(name, path)
    return True


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not an extension of Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
