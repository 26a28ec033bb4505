"""Stores of tokens that tell their places."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.data.store import Contents, StoreWriter, TokenStore

END = 999
S = 8


def make_store(path: Path, lengths: list[int], first_token: int = 0) -> TokenStore:
    """Documents of those lengths, end of document included; all other tokens count up, so each tells its place."""
    tokens = np.arange(first_token, first_token + sum(lengths))
    tokens[np.cumsum(lengths) - 1] = END
    with StoreWriter(path, 1000) as writer:
        writer.append(tokens, np.array(lengths, np.int64))
        writer.finish(Contents(1000, end_of_document=END, tokenizer="t", source=path.name))
    return TokenStore.open(path, verify="full")
