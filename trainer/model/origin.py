"""The special tokens and the generation settings of a pretrained folder.

They are passed on with the trained weights. Where the recipe gives the model another tokenizer, ids
mean other tokens, and only settings without tokens are passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError
from trainer.files.reading import read_json

GENERATION_CONFIG = "generation_config.json"
# Keys of config.json and generation_config.json that hold ids of tokens.
IDS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)
ID_LISTS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "sequence_bias")
# Where it is true, transformers derives the whole file from config.json.
DERIVED = "_from_model_config"


@dataclass(frozen=True)
class Origin:
    """The settings of the folder that a run started from. `ids`: special tokens by their names in
    config.json, {} with another tokenizer. `generation`: generation_config.json."""

    ids: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer, *, same_tokenizer: bool) -> Origin:
        """Read the settings of a folder.

        `same_tokenizer`: the recipe names the folder itself; else the two tokenizers' tokens are
        compared. DataError for a damaged generation_config.json.
        """
        generation = {key: value for key, value in _generation(folder).items() if key != DERIVED}
        ids = {name: config[name] for name in IDS if config.get(name) is not None}
        named = [*_tokens(ids.values()), *_tokens(generation[name] for name in IDS if name in generation)]
        if same_tokenizer or tokenizer.spells_as(folder, named):
            return cls(ids, generation)
        return cls({}, {key: value for key, value in generation.items() if key not in (*IDS, *ID_LISTS)})


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION_CONFIG
    try:
        return read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON: {error}; fix or remove the file") from None


def _tokens(values: Any) -> Iterator[int]:
    for value in values:
        yield from (token for token in as_list(value) if isinstance(token, int))


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
