"""The tokenizer that a recipe names: "bytes", one trained on the sources, a folder, or the hub's.

`transformers` decides how a folder from elsewhere is to be read (`auto_tokenizer.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer.data import auto_tokenizer
from trainer.data.backends import END_OF_DOCUMENT, SMALLEST_BPE, bytes_backend, read_backend
from trainer.data.fault import kind_of
from trainer.data.native import LARGEST_VOCABULARY, TokenizerFails, bounded, require_files
from trainer.data.tokenizer import NEW_TOKENS, Tokenizer, eos_of
from trainer.errors import DataError, RecipeError
from trainer.files.reading import read_json, read_text


def make_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer that a recipe's data.tokenizer names, unless it must be trained:
    "bytes", a folder or a hub name."""
    if spec == "bytes":
        return Tokenizer(bytes_backend(), end_of_document=END_OF_DOCUMENT)
    return load_tokenizer(spec)


def bpe_size(spec: str) -> int | None:
    """Return N of "bpe:N", or None for another kind of tokenizer. RecipeError for an impossible
    N."""
    if not spec.startswith("bpe:"):
        return None
    digits = spec.removeprefix("bpe:")
    if not (digits.isascii() and digits.isdigit() and SMALLEST_BPE <= int(digits) <= LARGEST_VOCABULARY):
        raise RecipeError(
            f"data.tokenizer: {spec!r} needs a whole number of symbols from {SMALLEST_BPE} (256 bytes + end of document) "
            f"to {LARGEST_VOCABULARY}, such as bpe:4096"
        )
    return int(digits)


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` symbols. The same documents give the same
    merges."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is not worth a symbol
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bounded(lambda: backend.train_from_iterator(_batches(documents), trainer), "training it", size=None)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise RecipeError(
            f"data.tokenizer: the sources are too small for bpe:{vocab_size}: they give at most {reached} symbols; "
            f"use bpe:{reached} or smaller, or add sources"
        )
    return Tokenizer(backend, end_of_document=END_OF_DOCUMENT)


def load_tokenizer(name: str) -> Tokenizer:
    """Load a Hugging Face folder or hub name as transformers' AutoTokenizer reads it. Code in it is
    never run."""
    folder = Path(name)
    if folder.is_dir():
        require_files(folder)
    if (folder / "tokenizer.json").is_file():
        return _load_folder(folder)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or ":" in name):
        raise RecipeError(f"data.tokenizer: {name!r} is neither 'bytes', 'bpe:N', a folder here nor a hub name; correct it")
    try:
        config, loaded = auto_tokenizer.load(name)
    except TokenizerFails:
        raise
    except Exception as error:
        # transformers, its hub client and its HTTP client each raise kinds of their own.
        raise RecipeError(
            f"data.tokenizer: {name!r} is not 'bytes' or 'bpe:N', and no tokenizer could be loaded from it: "
            f"{auto_tokenizer.reason(error, folder)}"
        ) from None
    config |= auto_tokenizer.named_by(loaded, config)
    backend, settings = auto_tokenizer.backend_of(loaded), auto_tokenizer.settings_of(loaded)
    return Tokenizer(backend, end_of_document=_require_eos(config, name), config=config, settings=settings)


def reopen_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer that was saved here. Its tokenizer.json is all that counts, so transformers
    is not needed."""
    config = _read_config(folder)
    return Tokenizer(read_backend(folder), end_of_document=_require_eos(config, str(folder)), config=config)


def _load_folder(folder: Path) -> Tokenizer:
    """Load a user's folder. If transformers builds another tokenizer than tokenizer.json has, as
    for some classes, that one is taken.

    Whoever trained the model had that one, and whoever gets the export will have it.
    """
    config, backend = _read_config(folder), read_backend(folder)
    settings, remarks = None, []
    try:
        _, loaded = auto_tokenizer.load(str(folder))
    except TokenizerFails:
        raise
    except Exception as error:  # for example a class that needs code of its own
        remarks.append(
            f"data.tokenizer: transformers does not load {folder} ({auto_tokenizer.reason(error)}): its tokenizer.json is read "
            "as it is"
        )
    else:
        config |= auto_tokenizer.named_by(loaded, config)
        settings = auto_tokenizer.settings_of(loaded)
        if difference := auto_tokenizer.first_difference(backend, loaded.backend_tokenizer):
            backend = auto_tokenizer.backend_of(loaded)
            remarks.append(
                f"data.tokenizer: transformers builds a {type(loaded).__name__} for {folder}, which differs from its "
                f"tokenizer.json ({difference}): tokens are those of transformers"
            )
    where = str(folder / "tokenizer_config.json")
    return Tokenizer(backend, end_of_document=_require_eos(config, where), config=config, settings=settings, remarks=remarks)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, or {} if there is none, with chat templates from files of their
    own, which take precedence."""
    path = folder / "tokenizer_config.json"
    try:
        config = auto_tokenizer.kept(read_json(path)) if path.exists() else {}
        # Fails on half a surrogate pair, legal in JSON.
        json.dumps(config, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON: {error}; fix the file") from None
    named = config.get(NEW_TOKENS, [])
    if not isinstance(named, list) or not all(isinstance(token, str) for token in named):
        raise DataError(f"{path}: {NEW_TOKENS} is {kind_of(named)}, not a list of texts; fix the file")
    # Where transformers saves them since version 4.53.
    templates = {"default": folder / "chat_template.jinja"}
    templates |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    found = {name: _read_text(path) for name, path in templates.items() if path.is_file()}
    return {**config, "chat_template": auto_tokenizer.templates_in_config(found)} if found else config


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}; fix the file") from None


def _require_eos(config: Mapping[str, Any], place: str) -> str:
    spelling = eos_of(config)
    if spelling is None:
        raise RecipeError(f"data.tokenizer: {place} names no eos_token or sep_token, which ends documents; add one to it")
    return spelling


def _batches(documents: Iterable[str], size: int = 64) -> Iterator[list[str]]:
    batch = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
