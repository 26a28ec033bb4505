"""Prompts that end in a space.

In a text a space is mostly part of the token of the word behind it. A model has seen few spaces
alone, and continues them badly. So the prompt is given without it, and the first token that is
drawn is one that begins with it: the text is the same, and the model's view of it the usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# as tokenizers spell it: plain, in a byte-level BPE (Ġ), in SentencePiece (▁)
SPACES = frozenset(" \u0120\u2581")


def without_last_space(tokens: Sequence[int], spellings: Sequence[str | None]) -> tuple[list[int], list[int]]:
    """Return the tokens that a model is given of a prompt, and those of which the next must be one;
    [] for any.

    `spellings`: the vocabulary's, by token.
    """
    last = spellings[tokens[-1]] or ""
    begin_so = [token for token, spelling in enumerate(spellings) if spelling and spelling.startswith(last)]
    if len(tokens) < 2 or not last or not set(last) <= SPACES or len(begin_so) < 2:
        return list(tokens), []
    return list(tokens[:-1]), begin_so


def only(logits_V: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the logits with all tokens but these impossible; unchanged for []. Shape: [..., V]."""
    if not tokens:
        return logits_V
    allowed = torch.full_like(logits_V, float("-inf"))
    allowed[..., list(tokens)] = 0.0
    return logits_V + allowed


def beginning_with(first: Sequence[int], prompt_tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor of transformers after which the first token behind the prompt is
    one of `first`."""

    def process(ids_BS: Tensor, logits_BV: Tensor) -> Tensor:
        return only(logits_BV, first if ids_BS.shape[1] == prompt_tokens else ())

    return process
