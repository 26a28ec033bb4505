"""The tokenizer: byte-level, trained on the corpus, or from Hugging Face, all behind one class.

`tokenizers` does the work; `tokenizer_loading.py` knows where one comes from. A text never yields a
special token, not even one that it spells, unless the recipe says so (`data.special_tokens`) or
names that token (`data.new_tokens`): we put special tokens around documents, and a chat template
around turns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from trainer.data import auto_tokenizer
from trainer.data.backends import SMALLEST_BPE, bytes_backend, read_backend
from trainer.data.chat_template import DEFAULT_TEMPLATE
from trainer.data.digests import fingerprint_of
from trainer.data.native import (
    TokenizerFails,
    bounded,
    decoded,
    encoded,
    require_numbers,
)
from trainer.errors import RecipeError
from trainer.files.durable import make_private, private_file, write_json

MASK = "<|mask|>"
# eos_token is another one.
SPECIAL_TOKENS = ("bos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NEW_TOKENS = "new_tokens"  # our key of a saved config: special tokens that a text may spell


class Tokenizer:
    """A map between texts and token ids in [0, vocab_size)."""

    def __init__(
        self,
        backend: Backend,
        *,
        end_of_document: str,
        config: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        remarks: Sequence[str] = (),
        dropout: float | None = None,
    ) -> None:
        """Wrap a backend.

        `config`: the content of its tokenizer_config.json; None: it is made here. `settings`: what
        transformers makes of the config, if it comes from elsewhere; see
        `auto_tokenizer.settings_of`. `remarks`: lines about how it was read. `dropout`: the dropout
        of merges that its tokenizer.json asks for; none is applied here, so that a text always
        gives the same tokens.
        """
        require_numbers(backend)
        token_id = backend.token_to_id(end_of_document)
        if token_id is None:
            raise RecipeError(
                f"data.tokenizer: its end-of-document token (eos_token) {end_of_document!r} is not in its vocabulary; "
                "correct eos_token in tokenizer_config.json"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        if of_merges := getattr(backend.model, "dropout", None):
            dropout, backend.model.dropout = of_merges, None
        self.new_tokens: tuple[str, ...] = tuple((config or {}).get(NEW_TOKENS, ()))
        self.end_of_document: int = token_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.settings = settings
        self.remarks = tuple(remarks)
        self._backend = backend
        self._dropout = dropout
        self._reader = _parsing(backend, self.new_tokens) if self.new_tokens else backend
        self._eos_token = end_of_document
        self._config = _own_config() if config is None else dict(config)
        if eos_of(self._config) is None:
            self._config["eos_token"] = end_of_document
        self._ids_are_bytes = self.vocab_size == SMALLEST_BPE and backend.to_str() == bytes_backend().to_str()

    def changed(self, backend: Backend | None = None, **config: Any) -> Tokenizer:
        """Return this tokenizer with some keys of its config changed, and perhaps another
        backend."""
        settings = {**self.settings, **_settings_among(config)} if self.settings is not None else None
        return Tokenizer(
            backend or self._backend,
            end_of_document=self._eos_token,
            config={**self._config, **config},
            settings=settings,
            remarks=self.remarks,
            dropout=self._dropout,
        )

    @property
    def backend(self) -> Backend:
        return self._backend

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of its tokenizer_config.json."""
        return self._config

    @property
    def notes(self) -> Iterator[str]:
        """Yield what a run should say about it."""
        yield from self.remarks
        if self._dropout:
            yield (
                f"data.tokenizer: its tokenizer.json drops merges at random (dropout {self._dropout:g}): not here, so that a "
                "text always gives the same tokens; the export asks for it as before"
            )

    def _copied_backend(self) -> Backend:
        return Backend.from_str(self._backend.to_str())

    @property
    def fingerprint(self) -> str:
        """The fingerprint, equal for tokenizers that encode equally and end documents equally."""
        return fingerprint_of([self._reader.to_str(), self.end_of_document])

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Return the tokens of each text, without tokens around them.

        `special`: a special token that a text spells is that token, as transformers reads it by
        default; else it is ordinary text.
        """
        # Faster than the backend, which reads 2.6 MB/s per core.
        if self._ids_are_bytes and not special:
            return [list(text.encode()) for text in texts]
        return [encoding.ids for encoding in self._encoded(texts, special=special)]

    def _encoded(
        self,
        texts: Sequence[str],
        *,
        special: bool = False,
        around: bool = False,
        places: bool = False,
        most: int | None = None,
    ) -> list[Any]:
        """Return the backend's encodings, each of at most `most` tokens. TokenizerFails if it
        fails."""
        reader = self._reader

        def encode() -> list[Any]:
            reader.encode_special_tokens = not special
            if most is not None:
                reader.enable_truncation(most)
            try:
                return encoded(reader, texts, around=around, places=places)
            finally:
                reader.encode_special_tokens = True
                reader.no_truncation()

        what = f"encoding {texts[0][:40]!r}" if len(texts) == 1 else "encoding a text"
        return bounded(encode, what, size=sum(map(len, texts)))

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The tokens that its post-processor writes before a text: Llama 3's and Gemma's begin
        token, Bert's [CLS]; mostly ()."""
        (whole,), (text,) = ([encoding.ids for encoding in self._encoded(["a"], around=around)] for around in (True, False))
        self._require_known(whole)
        for begin in range(len(whole) - len(text) + 1):
            if text and whole[begin : begin + len(text)] == text:
                return tuple(whole[:begin])
        return ()

    def _require_known(self, ids: Sequence[int]) -> None:
        """Raise TokenizerFails for a token that it does not have, because a post-processor writes
        any number."""
        if max(ids, default=0) >= self.vocab_size:
            raise TokenizerFails(
                f"data.tokenizer: its post_processor writes the token {max(ids)}, and its tokens are below {self.vocab_size}; "
                "fix its tokenizer.json, or give another tokenizer"
            )

    @property
    def start_of_target(self) -> int:
        """The token before a translation: that for padding, if there is one, as in Marian and T5;
        else the one that ends documents."""
        return self.end_of_document if self.padding is None else self.padding

    def ending_texts(self) -> Tokenizer:
        """Return this tokenizer changed so that transformers ends a text as a source is ended here,
        and pads with it."""
        backend = self._copied_backend()
        if backend.post_processor is None:
            end = (self._eos_token, self.end_of_document)
            backend.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
        return self.changed(backend, **self._padded)

    def with_new_tokens(self, tokens: Sequence[str], *, unspelt: Collection[str] = ()) -> Tokenizer:
        """Return this tokenizer with these special tokens, which a text may spell, except those
        `unspelt`. Tokens that it has already keep their numbers.

        RecipeError if its numbers leave no room for them.
        """
        if not tokens:
            return self
        backend = self._copied_backend()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if len(set(vocabulary.values())) < len(vocabulary):
            raise RecipeError(
                "data.new_tokens: this tokenizer leaves numbers out, and would give a new token the number of another "
                "symbol: add the tokens to its folder, and name them here all the same"
            )
        named = list(dict.fromkeys([*self.new_tokens, *(token for token in tokens if token not in unspelt)]))
        return self.changed(backend, **({NEW_TOKENS: named} if named else {}), **self._reading_special)

    def ids_of(self, tokens: Iterable[str]) -> dict[str, int]:
        """Return the numbers of those of these symbols that it has."""
        found = {token: self._backend.token_to_id(token) for token in tokens}
        return {token: number for token, number in found.items() if number is not None}

    def from_number(self, first: int) -> dict[str, bool]:
        """Return the symbols with this number or a higher one, in order, and whether each is an
        added token."""
        added = self._backend.get_added_tokens_decoder()
        numbers = self._backend.get_vocab(with_added_tokens=True)
        return {
            token: number in added for token, number in sorted(numbers.items(), key=lambda item: item[1]) if number >= first
        }

    def for_chat(self) -> Tokenizer:
        """Return this tokenizer with a chat template: its own, or ours if it has none."""
        backend = self._backend
        # A template writes it as text, which must become that token.
        if self._eos_token not in self.added_tokens:
            backend = self._copied_backend()
            backend.add_special_tokens([AddedToken(self._eos_token, special=True, normalized=False)])
        template = {} if self.has_template else {"chat_template": self.chat_template}
        return self.changed(backend, **template, **self._reading_special)

    def for_classification(self) -> Tokenizer:
        """Return this tokenizer with the tokens around a text that is classified.

        They are its own special tokens or, if it has none, an end of document before the text and
        nothing behind it: transformers' decoders read the last token that is not padding.
        """
        backend = self._copied_backend()
        if not self._encoded([""], around=True)[0].ids:
            opening = processors.TemplateProcessing(
                single=[self._eos_token, "$A"], special_tokens=[(self._eos_token, self.end_of_document)]
            )
            backend.post_processor = (
                processors.Sequence([backend.post_processor, opening]) if backend.post_processor else opening
            )
        return self.changed(backend, **self._padded)

    def for_masking(self) -> Tokenizer:
        """Return this tokenizer with a mask token: its own, or one more symbol."""
        if self.mask is not None:
            return self.reading_special()
        backend = self._copied_backend()
        backend.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
        return self.changed(backend, mask_token=MASK, **self._reading_special)

    def reading_special(self) -> Tokenizer:
        """Return this tokenizer changed so that transformers reads a spelt special token as that
        token."""
        return self.changed(**self._reading_special)

    @property
    def _padded(self) -> dict[str, Any]:
        return {} if _spelling(self._config.get("pad_token")) else {"pad_token": self._eos_token}

    @property
    def _reading_special(self) -> dict[str, Any]:
        return {"split_special_tokens": False} if self._config.get("split_special_tokens") else {}

    @property
    def mask(self) -> int | None:
        """The token that stands for one to be guessed."""
        return self._id_of("mask_token")

    @property
    def padding(self) -> int | None:
        return self._id_of("pad_token")

    @property
    def bos(self) -> int | None:
        """The token that begins texts, if the config names one."""
        return self._id_of("bos_token")

    def _id_of(self, name: str) -> int | None:
        spelling = _spelling(self._config.get(name))
        number: int | None = None if spelling is None else self._backend.token_to_id(spelling)
        return number

    @property
    def ordinary_ids(self) -> list[int]:
        """The tokens that stand for text, in order."""
        added = self._backend.get_added_tokens_decoder()
        special = {self.end_of_document, *(number for number, token in added.items() if token.special)}
        return sorted(set(self._backend.get_vocab(with_added_tokens=True).values()) - special)

    def encode_sequence(self, text: str, *, max_tokens: int) -> tuple[list[int], int]:
        """Return at most `max_tokens` tokens of a text with the special tokens around it, as in
        transformers, and how many were cut off."""
        (encoding,) = self._encoded([text], around=True, places=True, most=max_tokens)
        self._require_known(encoding.ids)
        around = self._reader.num_special_tokens_to_add(is_pair=False)
        return encoding.ids, sum(len(more.ids) - around for more in encoding.overflowing)

    @property
    def chat_template(self) -> str:
        """The chat template; of several the one named "default"."""
        template = self._templates.get("default")
        if template is None:
            raise RecipeError('data.tokenizer: none of its chat templates is named "default"; name one so')
        return template

    @property
    def tool_template(self) -> str:
        """The template of conversations with tools: of several the one named "tool_use", as in
        transformers."""
        return self._templates.get("tool_use") or self.chat_template

    @cached_property
    def _templates(self) -> dict[str, str]:
        given = self._config.get("chat_template") or DEFAULT_TEMPLATE
        if isinstance(given, list):  # the form of several templates in tokenizer_config.json
            given = {str(entry.get("name")): entry.get("template") for entry in given if isinstance(entry, dict)}
        named = given if isinstance(given, dict) else {"default": given}
        return {str(name): template for name, template in named.items() if isinstance(template, str)}

    @property
    def has_template(self) -> bool:
        """Return whether it brings a chat template of its own."""
        return bool(self._config.get("chat_template"))

    @property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that a chat template may write by name, as in transformers, with those that a
        model names itself."""
        named = self._config.get("extra_special_tokens")
        tokens = {**{name: self._config.get(name) for name in SPECIAL_TOKENS}, **(named if isinstance(named, dict) else {})}
        spelt = {name: _spelling(token) for name, token in tokens.items()}
        return {name: token for name, token in spelt.items() if token is not None} | {"eos_token": self._eos_token}

    @cached_property
    def added_tokens(self) -> dict[str, bool]:
        """The spellings of the tokens added to those of the model, and whether each is a special
        one."""
        return {token.content: token.special for token in self._backend.get_added_tokens_decoder().values()}

    @cached_property
    def added_ids(self) -> frozenset[int]:
        return frozenset({self.end_of_document, *self._backend.get_added_tokens_decoder()})

    def encode_with_offsets(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the tokens and the place of each in the text. With `special` a spelt special token
        is that token."""
        (encoding,) = self._encoded([text], special=special, places=True)
        return encoding.ids, encoding.offsets

    def spelling_of(self, token: int) -> str:
        return str(self._backend.id_to_token(token))

    @property
    def spellings(self) -> list[str | None]:
        """The spelling of each token in the vocabulary, None for a number without one."""
        return [self._backend.id_to_token(token) for token in range(self.vocab_size)]

    def spells_as(self, folder: Path, tokens: Sequence[int]) -> bool:
        """Return whether a folder also has a tokenizer, in which these tokens are the same."""
        if not (folder / "tokenizer.json").is_file():
            return False
        theirs = read_backend(folder)
        return all(theirs.id_to_token(token) == self._backend.id_to_token(token) for token in tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the tokens, added tokens spelt out. Bytes that are not UTF-8 become
        U+FFFD."""
        return bounded(lambda: decoded(self._backend, ids), "decoding tokens", size=len(ids))

    def save(self, folder: Path) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads and that encodes
        and decodes the same.

        Its config is that of the source, without what only concerns the source's own machine, and
        with what was changed here.
        """
        make_private(folder)
        write_json(folder / "tokenizer_config.json", self._config)
        if "auto_map" in self._config:
            auto_tokenizer.save_code(folder)
        with private_file(folder / "tokenizer.json") as file:
            file.write(self._with_dropout().encode())

    def _with_dropout(self) -> str:
        """Return tokenizer.json, with the dropout that its source asks for."""
        text = self._backend.to_str()
        if not self._dropout:
            return text
        value = json.loads(text)
        value["model"]["dropout"] = self._dropout
        return json.dumps(value, ensure_ascii=False)


def _own_config() -> dict[str, Any]:
    """Return the config of a tokenizer made here: a spelt special token is text, as it was in
    training."""
    return {"tokenizer_class": auto_tokenizer.PLAIN_CLASS, "split_special_tokens": True, "clean_up_tokenization_spaces": False}


def eos_of(config: Mapping[str, Any]) -> str | None:
    """Return the spelling of the token that ends documents."""
    return _spelling(config.get("eos_token")) or _spelling(config.get("sep_token"))


def _settings_among(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name in auto_tokenizer.SETTINGS}


def _spelling(token: Any) -> str | None:
    """Return the spelling of a special token in tokenizer_config.json: a text, or an object with
    the text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _parsing(backend: Backend, tokens: Collection[str]) -> Backend:
    """Return the backend with these added tokens not marked special, so that it finds them in every
    text."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in tokens
    parsing = Backend.from_str(json.dumps(state))
    parsing.encode_special_tokens = True
    return parsing
