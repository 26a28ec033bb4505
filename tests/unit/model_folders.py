"""Folders of models that are read as a run reads them, and refused in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.oracle import random_model
from tests.unit.shapes import GPT2
from tests.unit.stages import stage_from
from trainer.errors import UserError
from trainer.model.hf_config import from_hf
from trainer.model.hugging_face import PretrainedWeights, read_config
from trainer.model.names import names_of
from trainer.model.transformer import logical_specs


def read_all(folder: Path) -> None:
    """What a run does with a folder."""
    hf_config = read_config(folder)
    network = from_hf(hf_config["model_type"], hf_config)
    names = names_of(network)
    specs = logical_specs(network)
    is_unused = partial(names.is_for_other_heads, network)
    PretrainedWeights(folder).check_names(specs, ties=names.ties(specs), is_unused=is_unused)
    stage_from(folder)


def assert_refused(folder: Path, kind: type[UserError], exit_code: int, *said: str) -> None:
    with pytest.raises(kind) as refused:
        read_all(folder)
    assert refused.value.exit_code == exit_code
    assert len(refused.value.lines) == 1
    for words in (str(folder), *said):
        assert words in refused.value.lines[0]


def saved(folder: Path, family: str = "gpt2", shape: dict[str, Any] = GPT2) -> Path:
    random_model(family, shape).save_pretrained(folder)
    return folder


class Bomb:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.made),)
