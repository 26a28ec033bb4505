"""config.json as others write it. No torch.

It is read as transformers reads it: with the numbers that JSON has not (Infinity in a Mamba 2's time_step_limit), however many
labels it names. Recipes are read strictly instead; see `recipe/json_reader.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.errors import DataError, RecipeError

LONGEST = 64 << 20  # bytes: more than a million labels


def read_config(folder: Path) -> dict[str, Any]:
    """RecipeError where there is none, DataError where it is damaged."""
    path = folder / "config.json"
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}: a Hugging Face folder needs config.json") from error
    if len(content) > LONGEST:
        raise DataError(f"{path}: larger than {LONGEST >> 20} MiB: not the config of a model")
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}): fetch the folder again") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: not a JSON object: fetch the folder again")
    return config
