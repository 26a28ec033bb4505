"""The config.json of a Hugging Face folder. No torch.

It is read as transformers reads it: with numbers that JSON does not have (Infinity in Mamba 2's
time_step_limit), and with any number of labels. Recipes are read strictly instead; see
`recipe/json_reader.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.errors import DataError, RecipeError
from trainer.files.reading import read_json, told


def read_config(folder: Path) -> dict[str, Any]:
    """Return the contents. RecipeError where there is no file, DataError where it is damaged."""
    path = folder / "config.json"
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: {error.strerror}: a Hugging Face folder needs config.json") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {told(error)}: fetch the folder again") from error
