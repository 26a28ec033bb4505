"""Tokenizers in the form in which they are handed on: folders that AutoTokenizer loads as the
tokenizer that trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.data.auto_tokenizer import AUTO_MAP, NAMED, PLAIN_CLASS, first_difference, load, reason, settings_of
from trainer.data.native import TokenizerFails
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError


def beside_model(tokenizer: Tokenizer, model_config: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer in a form that AutoTokenizer, beside this config.json, loads as the one
    that trained.

    The form is its own class if that works; else the plain class; else one that makes AutoTokenizer
    ignore its model_type's class. DataError if none works.
    """
    wrong = ""
    for candidate in _candidates(tokenizer):
        with tempfile.TemporaryDirectory(prefix="triaxis-tokenizer-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
            candidate.save(Path(folder))
            wrong = _unlike(Path(folder), candidate)
        if not wrong:
            return candidate
    raise DataError(
        f"data.tokenizer: beside a model of type {model_config.get('model_type')!r} transformers would not load the "
        f"tokenizer that trains: {wrong}; give another tokenizer"
    )


def _candidates(tokenizer: Tokenizer) -> Iterator[Tokenizer]:
    yield tokenizer
    said = {
        name: value for name, value in (tokenizer.settings or {}).items() if value is not None and name not in tokenizer.config
    }
    plain = tokenizer.changed(tokenizer_class=PLAIN_CLASS, **said)
    yield plain
    yield plain.changed(auto_map=AUTO_MAP)


def require_same(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise DataError if AutoTokenizer does not load the folder as the tokenizer that trained."""
    if wrong := _unlike(folder, tokenizer):
        raise DataError(
            f"{folder.name}: transformers would not load the tokenizer that trained: {wrong}; it is not written: install "
            "the version of transformers that trained, and write the newest checkpoint with triaxis export"
        )


def _unlike(folder: Path, tokenizer: Tokenizer) -> str:
    """Return how the tokenizer that AutoTokenizer loads from the folder differs, or "" if it does
    not."""
    try:
        _, loaded = load(str(folder))
    except TokenizerFails:
        raise
    except Exception as error:  # transformers raises many kinds
        return reason(error)
    expected = tokenizer.settings or {name: _content(tokenizer.config[name]) for name in NAMED if name in tokenizer.config}
    found = settings_of(loaded)
    for name, value in expected.items():
        if value != found[name]:
            return f"{name} is {str(value)[:60]!r} and {str(found[name])[:60]!r}"
    return first_difference(tokenizer.backend, loaded.backend_tokenizer) or ""


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token
