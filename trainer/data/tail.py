"""The end of a single text, held out: a hash of documents would hold out all of it or nothing."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.data.origins import FOLDER as ROWS
from trainer.data.store import StoreWriter, TokenStore
from trainer.data.tokenizer import Tokenizer
from trainer.files.durable import private_file, sync_folder

MAIN = "main"
HELD_OUT = "held_out"
LOOKED_AT = 4096  # tokens, for the beginning of a line
SHORTEST = 64  # tokens: the end of a shorter text says nothing about a model


def hold_out_tail(folder: Path, tokenizer: Tokenizer, fraction: float) -> None:
    """Divide the main store in two where it holds a single text: about `fraction` of the tokens at
    its end are held out, from the beginning of a line on.

    The text that is trained does not end there, so no token says that it does.
    """
    whole = TokenStore.open(folder / MAIN)
    if whole.num_documents != 1 or whole.packing or whole.num_tokens < SHORTEST:
        return
    tokens = whole.tokens[:]
    cut = _cut(whole, tokenizer, fraction)
    tail_bytes = min(len(tokenizer.decode(tokens[cut:-1].tolist()).encode()), whole.contents.text_bytes)
    beginning = folder / "beginning"
    for path, part, text_bytes in (
        (beginning, tokens[:cut], whole.contents.text_bytes - tail_bytes),
        (folder / HELD_OUT, tokens[cut:], tail_bytes),
    ):
        with StoreWriter(path, whole.contents.vocab_size) as writer:
            writer.append(part, np.array([len(part)]))
            writer.finish(replace(whole.contents, text_bytes=text_bytes))
    shutil.rmtree(folder / MAIN)
    os.rename(beginning, folder / MAIN)
    with private_file(folder / ROWS / f"{HELD_OUT}.bin") as file:
        file.write((folder / ROWS / f"{MAIN}.bin").read_bytes())
    sync_folder(folder / ROWS)


def _cut(store: TokenStore, tokenizer: Tokenizer, fraction: float) -> int:
    """Return the first token of the tail.

    It is the first that begins a line in the first quarter of `fraction` of the tokens, though not
    thousands of tokens away; else the first that follows a space; else the first.
    """
    size = store.num_tokens
    begin = min(size - math.ceil(size * fraction), size - 2)
    looked_at = range(begin, begin + min((size - begin) // 4, LOOKED_AT) + 1)
    before = [tokenizer.decode([token]) for token in store.slice(begin - 1, looked_at.stop - 1).tolist()]
    for end in ("\n", " "):
        if (found := next((at for at, text in zip(looked_at, before, strict=True) if text.endswith(end)), None)) is not None:
            return found
    return begin
