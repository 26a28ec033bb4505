"""The comparison of a run's tokenizer with the one that came with the weights it starts from."""

from __future__ import annotations

from pathlib import Path

from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import load_tokenizer
from trainer.errors import UserError

# Files by which a folder has a tokenizer.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def not_of_model(named: str, tokenizer: Tokenizer, folder: Path, model: str) -> list[str]:
    """Return a warning, in one line, if symbols of the tokenizer in the model's folder have other
    numbers in the run's tokenizer, or are not in it; else [].

    `named` and `model`: how the recipe calls the two. A tokenizer that only has more symbols is the
    model's.
    """
    if not any((folder / name).is_file() for name in FILES):
        return []
    try:
        theirs = load_tokenizer(str(folder)).backend.get_vocab(with_added_tokens=True)
    except UserError:  # the run does not need it
        return []
    ours = tokenizer.backend.get_vocab(with_added_tokens=True)
    unlike = sum(ours.get(symbol) != number for symbol, number in theirs.items())
    if not unlike:
        return []
    return [
        f"warning: data.tokenizer {named} is not that of model.from_pretrained {model}: {unlike:,} of its {len(theirs):,} "
        f"symbols have another number or none, and the weights know them by number; give data.tokenizer {model}, unless the "
        "embeddings are to be learned anew"
    ]
