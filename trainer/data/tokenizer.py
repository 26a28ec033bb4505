"""Texts ↔ tokens: byte-level, trained on the corpus, or from Hugging Face, all behind one class.

`tokenizers` does the work; `transformers` is imported only for a hub name or a folder without tokenizer.json.
A text never yields the end-of-document token, not even a text that spells it: only we put it between documents, and a chat
template at the end of turns. Of special tokens it yields only those that a recipe names as new.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from trainer.data.chat_template import DEFAULT_TEMPLATE
from trainer.data.digests import fingerprint_of
from trainer.durable import make_private, private_file, read_json, write_json
from trainer.errors import DataError, RecipeError

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_BPE = 257  # 256 bytes and the end of document
MASK = "<|mask|>"
KEPT_CONFIG = (
    *("bos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"),
    *("chat_template", "model_max_length"),
    "new_tokens",  # ours: those that a text spells where it means them
)
SPECIAL_TOKENS = ("bos_token", "unk_token", "pad_token")  # of these, what a chat template may write; eos_token besides


class Tokenizer:
    """Texts ↔ token ids in [0, vocab_size)."""

    def __init__(
        self, backend: Backend, *, end_of_document: str, config: dict[str, Any] | None = None, reads_special: bool = False
    ) -> None:
        """`config`: what else a Hugging Face tokenizer_config.json said and a saved one should say again. `reads_special`: a
        saved one takes special tokens that are spelt in a text, as chat templates and masked texts spell them."""
        token_id = backend.token_to_id(end_of_document)
        if token_id is None:
            raise RecipeError(
                f"data.tokenizer: its end-of-document token (eos_token) {end_of_document!r} is not in its vocabulary; "
                "correct eos_token in tokenizer_config.json"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.new_tokens = tuple(map(str, (config or {}).get("new_tokens") or ()))
        self.end_of_document: int = token_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._backend = backend
        self._reader = _parsing(backend, self.new_tokens) if self.new_tokens else backend
        self._eos_token = end_of_document
        self._config = {key: value for key, value in (config or {}).items() if key in KEPT_CONFIG}
        self._reads_special = reads_special
        self._ids_are_bytes = self.vocab_size == SMALLEST_BPE and backend.to_str() == _bytes_backend().to_str()

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode equally and end documents equally."""
        return fingerprint_of([self._reader.to_str(), self.end_of_document])

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without end-of-document or other added tokens."""
        if self._ids_are_bytes:  # the backend gives the same, at 2.6 MB/s on one core
            return [list(text.encode()) for text in texts]
        encodings = self._reader.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @property
    def start_of_target(self) -> int:
        """What comes before a translation: the token for padding, where there is one, as in Marian and T5; else the one that
        ends documents."""
        padding = _spelling(self._config.get("pad_token"))
        token_id = None if padding is None else self._backend.token_to_id(padding)
        return self.end_of_document if token_id is None else int(token_id)

    def ending_texts(self) -> Tokenizer:
        """This tokenizer, which where transformers encodes a text ends it as a source is ended here, and pads it."""
        config = {"pad_token": self._eos_token, **self._config}
        backend = Backend.from_str(self._backend.to_str())
        if backend.post_processor is None:
            end = (self._eos_token, self.end_of_document)
            backend.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
        return Tokenizer(backend, end_of_document=self._eos_token, config=config)

    def with_new_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """This tokenizer with these special tokens, each of which a text that spells it means; those that it has already keep
        their numbers. RecipeError where its numbers leave no room for them."""
        if not tokens:
            return self
        backend = Backend.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if len(set(vocabulary.values())) < len(vocabulary):
            raise RecipeError(
                "data.new_tokens: this tokenizer leaves numbers out, and would give a new token that of another symbol: add "
                "the tokens to its folder, and name them here all the same"
            )
        config = {**self._config, "new_tokens": list(dict.fromkeys([*self.new_tokens, *tokens]))}
        return Tokenizer(backend, end_of_document=self._eos_token, config=config, reads_special=True)

    def ids_of(self, tokens: Iterable[str]) -> dict[str, int]:
        """The numbers of those of these symbols that it has."""
        found = {token: self._backend.token_to_id(token) for token in tokens}
        return {token: number for token, number in found.items() if number is not None}

    def from_number(self, first: int) -> dict[str, bool]:
        """The symbols with this number or a higher one, in order, and whether each is an added token."""
        added = self._backend.get_added_tokens_decoder()
        numbers = self._backend.get_vocab(with_added_tokens=True)
        return {
            token: number in added for token, number in sorted(numbers.items(), key=lambda item: item[1]) if number >= first
        }

    def for_chat(self) -> Tokenizer:
        """This tokenizer with a chat template: its own, or ours where it has none."""
        config = {**self._config, "chat_template": self.chat_template}
        backend = Backend.from_str(self._backend.to_str())
        if self.end_of_document not in self.special_ids:  # a template writes it as text, which must become that token
            backend.add_special_tokens([AddedToken(self._eos_token, special=True, normalized=False)])
        return Tokenizer(backend, end_of_document=self._eos_token, config=config, reads_special=True)

    def for_classification(self) -> Tokenizer:
        """This tokenizer with what begins and ends a text that is classified: its own special tokens, or, where it has none,
        the end of document before it. None then ends it: transformers' decoders read the last token that does not pad."""
        backend = Backend.from_str(self._backend.to_str())
        config = {"pad_token": self._eos_token, **self._config}
        if not backend.encode("", add_special_tokens=True).ids:
            opening = processors.TemplateProcessing(
                single=[self._eos_token, "$A"], special_tokens=[(self._eos_token, self.end_of_document)]
            )
            backend.post_processor = (
                processors.Sequence([backend.post_processor, opening]) if backend.post_processor else opening
            )
        return Tokenizer(backend, end_of_document=self._eos_token, config=config)

    def for_masking(self) -> Tokenizer:
        """This tokenizer with a mask token: its own, or one more symbol."""
        backend, config = Backend.from_str(self._backend.to_str()), self._config
        if self.mask is None:
            backend.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
            config = {**config, "mask_token": MASK}
        return Tokenizer(backend, end_of_document=self._eos_token, config=config, reads_special=True)

    @property
    def mask(self) -> int | None:
        """The token that stands for one which is to be guessed."""
        return self._id_of("mask_token")

    @property
    def padding(self) -> int | None:
        return self._id_of("pad_token")

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
        """At most `max_tokens` tokens of a text with the special tokens around it, as transformers gives them, and how many
        were cut off."""
        self._reader.enable_truncation(max_tokens)
        try:
            encoding = self._reader.encode(text, add_special_tokens=True)
        finally:
            self._reader.no_truncation()
        around = self._reader.num_special_tokens_to_add(is_pair=False)
        return encoding.ids, sum(len(more.ids) - around for more in encoding.overflowing)

    @property
    def chat_template(self) -> str:
        """Of several that a tokenizer brings, the one named "default"."""
        template = self._config.get("chat_template") or DEFAULT_TEMPLATE
        if isinstance(template, list):  # as tokenizer_config.json has several
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if not isinstance(template, str):
            raise RecipeError('data.tokenizer: none of its chat templates is named "default"; name one so')
        return template

    @property
    def special_tokens(self) -> dict[str, str]:
        """What a chat template may write by name."""
        spelt = {name: _spelling(self._config.get(name)) for name in SPECIAL_TOKENS}
        return {name: token for name, token in spelt.items() if token is not None} | {"eos_token": self._eos_token}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, and of added ones that the chat template writes: what ends turns is one of them."""
        added, template = self._backend.get_added_tokens_decoder(), self.chat_template
        return frozenset(number for number, token in added.items() if token.special or token.content in template)

    @property
    def special_spellings(self) -> list[str]:
        """Of the special tokens that a text which spells them does not mean."""
        added = self._backend.get_added_tokens_decoder()
        spelt = [token.content for number, token in added.items() if number in self.special_ids]
        return [token for token in spelt if token not in self.new_tokens]

    def encode_with_offsets(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens, and where in the text each stands; `special`: a spelt special token is that token."""
        self._reader.encode_special_tokens = not special
        try:
            encoding = self._reader.encode(text, add_special_tokens=False)
        finally:
            self._reader.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the tokens, added tokens spelt out; bytes that are no UTF-8 become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads and that encodes and decodes the same."""
        make_private(folder)
        write_json(
            folder / "tokenizer_config.json",
            {
                **self._config,
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self._eos_token,
                "split_special_tokens": not self._reads_special,
                "clean_up_tokenization_spaces": False,
            },
        )
        with private_file(folder / "tokenizer.json") as file:
            file.write(self._backend.to_str().encode())


def make_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a recipe's data.tokenizer names, unless it must be trained: "bytes", a folder or a hub name."""
    if spec == "bytes":
        return Tokenizer(_bytes_backend(), end_of_document=END_OF_DOCUMENT)
    return load_tokenizer(spec)


def bpe_size(spec: str) -> int | None:
    """N of "bpe:N", None for another kind of tokenizer; RecipeError for an N that cannot be."""
    if not spec.startswith("bpe:"):
        return None
    digits = spec.removeprefix("bpe:")
    if not (digits.isascii() and digits.isdigit() and SMALLEST_BPE <= int(digits) <= 1 << 24):
        raise RecipeError(
            f"data.tokenizer: {spec!r} needs a whole number of symbols from {SMALLEST_BPE} (256 bytes + end of document) "
            f"to {1 << 24}, such as bpe:4096"
        )
    return int(digits)


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` symbols; the same documents give the same merges."""
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
    backend.train_from_iterator(_batches(documents), trainer)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise RecipeError(
            f"data.tokenizer: the sources are too small for bpe:{vocab_size}: they give at most {reached} symbols; "
            f"use bpe:{reached} or smaller, or add sources"
        )
    return Tokenizer(backend, end_of_document=END_OF_DOCUMENT)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or hub name. Its code, if it brings any, is never run."""
    folder = Path(name).expanduser()
    if (folder / "tokenizer.json").is_file():
        return _load_folder(folder)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or ":" in name):
        raise RecipeError(f"data.tokenizer: {name!r} is neither 'bytes', 'bpe:N', a folder here nor a hub name; correct it")
    return _load_with_transformers(name)


def _load_folder(folder: Path) -> Tokenizer:
    config_path = folder / "tokenizer_config.json"
    try:
        config = read_json(config_path) if config_path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{config_path}: not readable JSON: {error}; mend the file") from None
    try:
        template = folder / "chat_template.jinja"  # where transformers saves it since version 4.53
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{template}: not readable as UTF-8 text: {error}; mend the file") from None
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception for damaged files
        raise DataError(f"{folder / 'tokenizer.json'}: damaged: {error}; fetch it again") from None
    return Tokenizer(backend, end_of_document=_eos_of(config, str(config_path)), config=config)


def _load_with_transformers(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, use_fast=True, trust_remote_code=False)
        backend = Backend.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # transformers, its hub client and its HTTP client each raise kinds of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"data.tokenizer: {name!r} is not 'bytes' or 'bpe:N', and no tokenizer could be loaded from it: {reason}"
        ) from None
    config = {key: getattr(loaded, key, None) for key in KEPT_CONFIG}
    kept = {key: value for key, value in config.items() if value is not None}
    return Tokenizer(backend, end_of_document=_eos_of({**kept, "eos_token": loaded.eos_token}, name), config=kept)


def _eos_of(config: dict[str, Any], place: str) -> str:
    spelling = _spelling(config.get("eos_token")) or _spelling(config.get("sep_token"))
    if spelling is None:
        raise RecipeError(f"data.tokenizer: {place} names no eos_token or sep_token, which ends documents; add one to it")
    return spelling


def _spelling(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it, a text or an object with the text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _parsing(backend: Backend, tokens: Collection[str]) -> Backend:
    """The backend with these added tokens not marked special: so it finds them in every text, whatever it does with others."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in tokens
    parsing = Backend.from_str(json.dumps(state))
    parsing.encode_special_tokens = True
    return parsing


def _bytes_backend() -> Backend:
    """Token id = byte value; 256 ends a document."""
    backend = Backend(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table) → the byte.

    Bytes that print as themselves in Latin-1 stand for themselves; the others follow from U+0100 on, in order.
    """
    printable = {byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _batches(documents: Iterable[str], size: int = 64) -> Iterator[list[str]]:
    batch = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
