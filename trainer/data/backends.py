"""The backends of tokenizers: bytes, or what a folder's tokenizer.json holds."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from trainer.data.fault import first_line
from trainer.data.native import is_of_library, require_numbers
from trainer.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_BPE = 257  # 256 bytes and the end of document


def bytes_backend() -> Backend:
    """Return a backend whose token ids are byte values; 256 ends a document."""
    backend = Backend(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return backend


def _byte_vocabulary() -> dict[str, int]:
    """Return the byte for each printable character that byte-level tokenizers write for it (GPT-2's
    table).

    Bytes that print as themselves in Latin-1 stand for themselves; the others follow from U+0100
    on, in order.
    """
    printable = {byte for byte in range(256) if chr(byte).isprintable() and not chr(byte).isspace()}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_backend(folder: Path) -> Backend:
    """Return the backend of a folder's tokenizer.json. DataError if it is damaged."""
    path = folder / "tokenizer.json"
    try:
        backend = Backend.from_file(str(path))
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise DataError(f"{path}: damaged: {first_line(error)}; fetch it again") from None
    require_numbers(backend)
    return backend
