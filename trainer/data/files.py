"""The way from files to bytes to text: decompresses, and names damage and foreign encodings.

`zstandard` is imported only for a file that needs it.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, AnyStr, BinaryIO

from trainer.data.digests import unreadable
from trainer.data.fault import Fault
from trainer.errors import DataError, RecipeError
from trainer.files.reading import open_regular

GZIP, ZSTD = ".gz", ".zst"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 17
LOOKED_AT = 4096  # bytes inspected to recognise an encoding
# Limits on one document and one row: a few bytes in a compressed file may claim any length, and
# tokens take ten times as much memory.
LARGEST_TEXT = 1 << 30  # bytes
LONGEST_ROW = 256 << 20  # bytes, or characters
# The first bytes of files of other kinds, and the remedy.
OTHER_KINDS = (
    (b"\x1f\x8b", f"it is a gzip file: let its name end in {GZIP}"),
    (b"\x28\xb5\x2f\xfd", f"it is a zstd file: let its name end in {ZSTD}"),
    (b"BZh", "it is a bzip2 file: unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "it is an xz file: unpack it with unxz"),
    (b"PK\x03\x04", "it is a zip archive: unpack it with unzip"),
    (b"PAR1", "it is a Parquet file: let its name end in .parquet"),
    (b"%PDF", "it is a PDF file: give its text"),
    (b"\xff\xfe\x00\x00", "it looks like UTF-32: convert it with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "it looks like UTF-32: convert it with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
)


def packing_of(name: str) -> str:
    """Return the compression that a name indicates: ".gz", ".zst" or ""."""
    return next((packing for packing in (GZIP, ZSTD) if name.lower().endswith(packing)), "")


def unpacked_name(name: str) -> str:
    """Return the name of the content, in lower case, since names such as NAME.CSV.GZ occur."""
    return name.lower().removesuffix(packing_of(name))


@contextmanager
def unpacked(path: str) -> Iterator[io.BufferedReader]:
    """Open the bytes in a file, to be read once. DataError, also during reading, if it is damaged
    or cannot be read."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(_opened(path, stack))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file: {error}; fetch or compress it again") from None
        except OSError as error:
            raise unreadable(path, error) from None


def _opened(path: str, stack: ExitStack) -> io.BufferedReader:
    match packing_of(path):
        case ".gz":
            packed = gzip.GzipFile(fileobj=stack.enter_context(opened(path)))
            return io.BufferedReader(stack.enter_context(packed), CHUNK_BYTES)
        case ".zst":
            return io.BufferedReader(_Unzstd(path, stack.enter_context(open_regular(path))), CHUNK_BYTES)
        case _:
            return opened(path)


def opened(path: str) -> io.BufferedReader:
    """Open a file as it is, compressed or not. OSError if it cannot be read."""
    return io.BufferedReader(open_regular(path), CHUNK_BYTES)


class _Unzstd(io.RawIOBase):
    """A stream of the bytes in the frames of a zstd file. zstandard's own reader accepts a
    truncated file as complete."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise RecipeError(f"{path}: a {ZSTD} file needs the package zstandard: pip install zstandard") from None
        self._zstandard = zstandard
        self._path, self._file = path, file
        self._frame: Any = None
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            chunk = self._packed or self._file.read(CHUNK_BYTES)
            if not chunk:
                if self._frame is not None:
                    raise self._damage("it ends within a frame")
                return 0
            self._content = memoryview(self._decompressed(chunk))
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompressed(self, chunk: bytes) -> bytes:
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            content: bytes = self._frame.decompress(chunk)
        except self._zstandard.ZstdError as error:
            raise self._damage(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return content

    def _damage(self, fault: str) -> DataError:
        return DataError(f"{self._path}: not a whole zstd file: {fault}; fetch or compress it again")


def content_of(path: str) -> bytes:
    """Return all bytes in a file. DataError if it cannot be read, or if they are too many for one
    text."""
    with unpacked(path) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise DataError(
            f"{path}: more than {LARGEST_TEXT >> 30} GiB in one text, which would be one document: divide it into several "
            "files, or write it as .jsonl, a document to a line"
        )
    return content


def lines_of(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a file. Fault if one is longer than a row may be."""
    while line := file.readline(LONGEST_ROW + 1):
        if len(line) > LONGEST_ROW:
            raise Fault(f"a line of more than {LONGEST_ROW >> 20} MiB; is it one row? Divide or remove it")
        yield line


def decoded(content: bytes, path: str, encoding: str = "utf-8-sig") -> str:
    """Return the text in a file, without a byte order mark.

    If it is not text, DataError gives the line, the byte and the encoding it looks like.
    """
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start} (0x{content[error.start]:02x}) is not {encoding.removesuffix('-sig')} text; "
            + (foreign(content, error.start) or "convert the file or remove it from the source")
        ) from None
    require_no_wide_characters(content, path)
    return text


def require_no_wide_characters(content: bytes, path: str) -> None:
    """Raise DataError for UTF-16 without a byte order mark, which would pass as UTF-8 because every
    other byte is 0."""
    if is_wide(content):
        raise DataError(f"{path}:1: {foreign(content)}")


def is_wide(content: bytes) -> bool:
    sample = content[:LOOKED_AT]
    return max(sample[0::2].count(0), sample[1::2].count(0)) > len(sample) // 4 > 0


def foreign(content: bytes, bad: int = 0) -> str:
    """Return what bytes that are not UTF-8 look like, with the remedy; "" if they look like nothing
    known.

    `bad`: the index of the first bad byte.
    """
    for beginning, said in OTHER_KINDS:
        if content.startswith(beginning):
            return said
    if is_wide(content):
        return "it looks like UTF-16: convert it with iconv -f UTF-16LE (or UTF-16BE) -t UTF-8"
    around = content[max(0, bad - LOOKED_AT // 2) : bad + LOOKED_AT // 2]
    beyond_ascii = sum(byte > 127 for byte in around)
    if 0 < beyond_ascii * 4 <= len(around) and _decodes(around, "cp1252"):
        return "it looks like Windows-1252 (cp1252, of which Latin-1 is a part): convert it with iconv -f WINDOWS-1252 -t UTF-8"
    return ""


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
