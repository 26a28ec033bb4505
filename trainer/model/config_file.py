"""config.json as others write it. No torch.

It is read as transformers reads it: with the numbers that JSON has not (Infinity in a Mamba 2's time_step_limit), however many
labels it names. Recipes are read strictly instead; see `recipe/json_reader.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.errors import DataError, RecipeError
from trainer.files.reading import read_json, told


def read_config(folder: Path) -> dict[str, Any]:
    """RecipeError where there is none, DataError where it is damaged."""
    path = folder / "config.json"
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: {error.strerror}: a Hugging Face folder needs config.json") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {told(error)}: fetch the folder again") from error
