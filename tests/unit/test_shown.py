"""A model's text as its tokens come: whole characters, each once, and nothing that drives a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from trainer.data.tokenizer_loading import make_tokenizer
from trainer.inference.shown import UNKNOWN, TextStream, harmless, text_of


def byte_level() -> Backend:
    backend = make_tokenizer("bytes").backend
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return backend


def sentencepiece_like() -> Backend:
    """As Llama 2 has it: a word's token has its leading space, the first one of a text is cut, unknown ones are bytes.

    A space is never written as a byte, so there is no token of it.
    """
    words = ["▁the", "▁cat", "▁", "s", "▁\n", "é", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte != 0x20)]
    backend = Backend(
        models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def word_pieces() -> Backend:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "cat", "##s", "the", ".", "##é"])}
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


BACKENDS = {"bytes": byte_level(), "sentencepiece": sentencepiece_like(), "word pieces": word_pieces()}


def pieces_of(tokenizer: Any, tokens: list[int], prompt: int = 0) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(tokens[:prompt])
    for token in tokens[prompt:]:
        stream.put([token])
    stream.end()
    return pieces


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_pieces_are_the_text_of_any_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[name])
    ids = st.integers(0, BACKENDS[name].get_vocab_size() - 1)
    tokens = data.draw(st.lists(ids, min_size=1, max_size=12))
    prompt = data.draw(st.integers(0, len(tokens)))
    shown, text = "".join(pieces_of(tokenizer, tokens, prompt)), text_of(tokenizer, tokens)
    # A byte that is no character makes unknown ones of all bytes before it too, for this decoder: they have been shown by
    # then, as the characters that they are.
    assert shown == text or (name == "sentencepiece" and UNKNOWN in text and num_bytes(shown) == num_bytes(text))


def num_bytes(text: str) -> int:
    """How many bytes a text was written with, each unknown character in place of one."""
    return sum(1 if letter == UNKNOWN else len(letter.encode()) for letter in text)


def test_bytes_that_were_characters_when_they_were_shown() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS["sentencepiece"])
    tokens = [BACKENDS["sentencepiece"].token_to_id(f"<0x{byte:02X}>") for byte in (0xC2, 0x80, 0x00, 0x80)]
    assert text_of(tokenizer, tokens) == UNKNOWN * 4
    assert pieces_of(tokenizer, tokens) == ["\x80", "\x00", UNKNOWN]


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=12))
def test_no_piece_has_half_a_character_and_each_comes_at_once(text: str) -> None:
    """As tokenizers' own DecodeStream gives them."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS["bytes"])
    tokens = BACKENDS["bytes"].encode(text, add_special_tokens=False).ids
    stream = DecodeStream(skip_special_tokens=True)
    expected = [piece for token in tokens if (piece := stream.step(BACKENDS["bytes"], token))]
    assert pieces_of(tokenizer, tokens) == expected
    assert "".join(expected) == text or UNKNOWN in text or "<|" in text


def test_an_emoji_waits_for_its_last_byte() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS["bytes"])
    assert pieces_of(tokenizer, list("a🙂b".encode())) == ["a", "🙂", "b"]
    assert pieces_of(tokenizer, list("a🙂".encode())[:-1]) == ["a", UNKNOWN], "what stays half is shown at the end"


def test_control_characters_are_spelt_out() -> None:
    assert harmless("\x1b[2J\x1b]0;title\x07\r\n\ta") == "\\x1b[2J\\x1b]0;title\\x07\\r\n\ta"
    assert harmless("\x9b31m \u202eabc\u2066 é 🙂 👩‍👩‍👧 你好") == "\\x9b31m \\u202eabc\\u2066 é 🙂 👩‍👩‍👧 你好"
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x11000))))
    left = {letter for letter in harmless(everything) if ord(letter) < 32 or 127 <= ord(letter) < 160}
    assert left == {"\n", "\t"}
