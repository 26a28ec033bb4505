"""The strict door: a JSON file becomes a validated recipe, or all that is wrong with it is reported
at once.

In order: read JSON with the place of each key (`json_reader.py`, `marks.py`), lay the files named
by `extends` and `--set` over each other (`overlay.py`), check keys, types and ranges against
`schema.py` (`keys.py`, `unknown_keys.py`, `suggestions.py`), then what only the whole recipe shows:
combinations (`rules.py`), names of files (`names.py`), the network (`network.py`), the pipeline
(`pipeline.py`). `resolve.py` runs them. No torch here: a recipe is checked on a login node in a
fraction of a second.
"""

from trainer.recipe.names import looks_local, tokenizer_vocab_size
from trainer.recipe.resolve import ResolvedRecipe, load, load_changed, load_given
from trainer.recipe.unknown_keys import known_keys
from trainer.recipe.wording import json_schema

__all__ = [
    "ResolvedRecipe",
    "json_schema",
    "known_keys",
    "load",
    "load_changed",
    "load_given",
    "looks_local",
    "tokenizer_vocab_size",
]
