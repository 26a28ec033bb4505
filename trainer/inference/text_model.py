"""A model that continues tokens, with transformers' own generation and its cache of keys and
values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.rng import derive_seed
from trainer.errors import RecipeError
from trainer.inference.last_space import beginning_with
from trainer.inference.model_folder import ModelFolder, load

TEMPERATURE, TOP_K = 0.8, 50


@dataclass(frozen=True)
class Writing:
    """The way in which a text is written. `temperature`, `top_k`: None for those in
    generation_config.json, or else 0.8 and 50."""

    new_tokens: int
    temperature: float | None
    top_k: int | None


@dataclass(frozen=True)
class Continued:
    """The tokens that a model wrote, without the one that ended them. `ended`: such a token came.
    `stopped`: the user stopped it."""

    tokens: list[int]
    ended: bool = False
    stopped: bool = False


@dataclass
class _Listener:
    """The object that transformers calls with the prompt, and then with each token."""

    ends: Sequence[int]
    hear: Callable[[list[int]], None]
    written: list[int] = field(default_factory=list)
    has_prompt: bool = False

    def put(self, tokens: torch.Tensor) -> None:
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.written += tokens.tolist()
        if self.written[-1] not in self.ends:
            self.hear(self.written[-1:])

    def end(self) -> None:
        pass


class TextModel:
    """A model with its tokenizer, on a GPU if there is one.

    The keys and values of what it read and wrote last are kept, so that a conversation is read once
    and not again with each question.
    """

    def __init__(self, found: ModelFolder, *, seed: int) -> None:
        """Load the model. Its random stream begins with `seed`. RecipeError for a model that does
        not continue texts, DataError for a folder that does not load whole."""
        self.found = found
        self._model, self.tokenizer = load(found)
        if self._model.config.is_encoder_decoder:
            raise RecipeError(f"the model in {found.named} translates: ask it with triaxis generate")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self.device)
        self._cache: Any = None
        self._cached: list[int] = []  # the tokens whose keys and values the cache has
        torch.manual_seed(derive_seed(seed, "sample"))

    @property
    def positions(self) -> int:
        """The most tokens that it can read and write; endless for one with slopes (ALiBi) or a
        state space."""
        return int(getattr(self._model.config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def described(self) -> str:
        """The size, the device and the context of the model, for a user."""
        size = sum(parameter.numel() for parameter in self._model.parameters())
        context = f", context {self.positions:,} tokens" if self.positions < sys.maxsize else ""
        return f"{size:,} parameters on {self.device.type}{context}"

    def more(
        self,
        tokens: Sequence[int],
        writing: Writing,
        *,
        ends: Sequence[int],
        hear: Callable[[list[int]], None],
        first: Sequence[int] = (),
    ) -> Continued:
        """Return how the model goes on after `tokens`: until one of `ends`, the longest text, its
        last position, or Ctrl-C. `hear` gets each token as it is written; the first is one of
        `first`, if that is given."""
        listener = _Listener(ends, hear)
        cache = self._cache_for(tokens)
        self._cache = None  # not whole if this fails
        ids = torch.tensor([list(tokens)], device=self.device)
        try:
            with torch.no_grad():
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(writing.new_tokens, self.positions - len(tokens)),
                    num_beams=1,  # a beam cannot be shown: another may win
                    eos_token_id=list(ends) or None,
                    pad_token_id=ends[0] if ends else self.tokenizer.eos_token_id,
                    past_key_values=cache,
                    return_dict_in_generate=True,
                    streamer=listener,
                    logits_processor=[beginning_with(first, len(tokens))] if first else None,
                    **_sampling(writing, self._model.generation_config),
                )
        except KeyboardInterrupt:
            return Continued(listener.written, stopped=True)
        self._keep(out.past_key_values, [*tokens, *listener.written])
        ended = bool(listener.written) and listener.written[-1] in ends
        return Continued(listener.written[: -1 if ended else None], ended=ended)

    def _keep(self, cache: Any, tokens: list[int]) -> None:
        """Keep a cache that can be cut back to any earlier token: one that forgets nothing."""
        if getattr(cache, "is_croppable", False) and not any(cache.is_sliding):
            self._cache, self._cached = cache, tokens[: cache.get_seq_length()]

    def _cache_for(self, tokens: Sequence[int]) -> Any:
        """Return the cache with the keys and values of those first tokens that it has; None if it
        has none. At least the last token is read anew: its output is the next one's."""
        if self._cache is None:
            return None
        same = 0
        for known, asked in zip(self._cached, tokens[:-1], strict=False):
            if known != asked:
                break
            same += 1
        if same == 0:
            return None
        if same < len(self._cached):
            self._cache.crop(same - len(self._cached))
        return self._cache


def _sampling(writing: Writing, said: Any) -> dict[str, Any]:
    """Return the settings of generation: those of the command line, else of the folder; temperature
    0 takes the likeliest token."""
    temperature = writing.temperature if writing.temperature is not None else said.temperature or TEMPERATURE
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    top_k = writing.top_k if writing.top_k is not None else said.top_k or TOP_K
    return {"do_sample": True, "temperature": temperature, "top_k": top_k}
