"""The folder where NVMe offload keeps its files: private to this run and rank, removed when the run
ends.

DeepSpeed names its swap files by stage and rank only, so two runs with the same `nvme_path` would
overwrite each other's weights without an error.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import RecipeError

OFFLOADS = ("offload_optimizer", "offload_param")


@contextmanager
def private_swap_folders(deepspeed_config: dict[str, Any], run_folder: Path, rank: int) -> Iterator[dict[str, Any]]:
    """Yield the dict with each `nvme_path` replaced by a folder of this run, readable by its user
    only.

    A killed run leaves its folder behind; the same run's next start removes it.
    """
    config = copy.deepcopy(deepspeed_config)
    blocks = [config["zero_optimization"].get(name, {}) for name in OFFLOADS]
    key = hashlib.blake2b(str(run_folder.resolve()).encode(), digest_size=4).hexdigest()
    folders = []
    for block in blocks:
        if block.get("device") != "nvme":
            continue
        folder = Path(block["nvme_path"]) / f"{run_folder.name}-{key}-rank{rank:05d}"
        if folder not in folders:
            shutil.rmtree(folder, ignore_errors=True)
            folders.append(folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"zero.*.nvme_path = {block['nvme_path']}: {error.strerror}: give a folder to write in"
            ) from error
        block["nvme_path"] = str(folder)
    try:
        yield config
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
