"""Bounded calls into the library `tokenizers`: a failure in it becomes one line, and no call runs
for a day or fills the memory.

The regular expressions, replacements and vocabularies that it runs come with downloaded folders.
Some take a time that doubles with every letter of a text, or write a text that doubles. So each
call runs in a thread of its own, which Python can abandon: native code that has released the
interpreter cannot be stopped, but need not be waited for.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from tokenizers import Tokenizer as Backend

from trainer.data.fault import first_line
from trainer.errors import RecipeError

T = TypeVar("T")

# Sizes are in characters of text. Tokenizers read at least 300,000 a second on one core. We expect
# a third of that and add time for a busy machine: half a minute for a batch of texts (`shards.py`).
PATIENCE_S = 20.0
SLOWEST_PER_S = 100_000
# A token with its offsets takes some 100 bytes, a letter that a normalizer moved 16 for each byte.
ROOM_BYTES = 1 << 30
ROOM_EACH = 256
# What is written between two looks, at a gigabyte a second, is small against ROOM_BYTES.
LOOK_S = 0.05
# The largest number of a symbol. Numbers are rows of the embedding, and saving a vocabulary takes
# as many steps as its largest number.
LARGEST_VOCABULARY = 1 << 24
# Published tokenizers leave out at most some thousand numbers, reserved for future tokens.
LARGEST_GAP = 1 << 16
# Bytes. The largest published files have some 2^25; a file takes eight times its size when read.
LARGEST_FILE = 1 << 28
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
REMEDY = "fix its tokenizer.json, or give another tokenizer"


class TokenizerFails(RecipeError):
    """A failure of the tokenizer that a recipe names."""


def bounded(work: Callable[[], T], doing: str, *, size: int | None) -> T:
    """Return what `work` returns.

    TokenizerFails if the library fails in it, or if it takes more time or memory than a text of
    `size` characters can need. `size` None: no bound is known. `doing` describes the work, such as
    "encoding a text". After a failure the work may still be running with the tokenizer locked, so
    the tokenizer must not be used again.
    """
    patience_s = PATIENCE_S + size / SLOWEST_PER_S if size is not None else math.inf
    room = ROOM_BYTES + ROOM_EACH * size if size is not None else math.inf
    helper = _helper()
    outcome: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
    helper.tasks.put((work, outcome))
    try:
        value, error = _awaited(outcome, doing, patience_s, room)
    except BaseException:  # also an interruption: nobody waits for the thread any longer
        _leave(helper)
        raise
    if error is None:
        return cast(T, value)
    if is_of_library(error):
        raise TokenizerFails(f"data.tokenizer: {doing} fails: {first_line(error)}; {REMEDY}") from None
    raise error


def is_of_library(error: BaseException) -> bool:
    """Return whether `tokenizers` raised the error: a plain Exception, or a panic, whose class
    cannot be imported."""
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


_Outcome = tuple[Any, BaseException | None]
_Task = tuple[Callable[[], Any], "queue.SimpleQueue[_Outcome]"]


def _awaited(outcome: queue.SimpleQueue[_Outcome], doing: str, patience_s: float, room: float) -> _Outcome:
    """Return the outcome of a task. Looks are counted instead of seconds, so that time in a stopped
    process does not count."""
    looks, before = 0, math.inf
    while looks * LOOK_S < patience_s:
        with suppress(queue.Empty):
            return outcome.get(timeout=LOOK_S)
        looks += 1
        # Not before the first look: most calls end before it.
        before = min(before, _resident_bytes())
        if _resident_bytes() - before > room:
            raise TokenizerFails(f"data.tokenizer: {doing} takes more than {room / 2**30:.1f} GiB of memory; {REMEDY}")
    raise TokenizerFails(
        f"data.tokenizer: {doing} takes longer than {patience_s:.0f} s: look for a regular expression in its tokenizer.json "
        f"with a repetition inside a repetition, such as (a+)+; {REMEDY}"
    )


def _resident_bytes() -> int:
    """Return the memory that this process holds [bytes]; 0 on systems that do not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Helper:
    """A thread that does one task after another. It ends with its process, or when it is given
    None."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a forked child has this object, but not the thread
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self.tasks,), name="tokenizing", daemon=True).start()


_of_thread = threading.local()


def _helper() -> _Helper:
    helper: _Helper | None = getattr(_of_thread, "helper", None)
    if helper is None or helper.process != os.getpid():
        helper = _of_thread.helper = _Helper()
    return helper


def _leave(helper: _Helper) -> None:
    helper.tasks.put(None)
    _of_thread.helper = None


def _serve(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        _do(*task)
        del task


def _do(work: Callable[[], Any], outcome: queue.SimpleQueue[_Outcome]) -> None:
    try:
        value = work()
    except BaseException as error:
        # A panic is not an Exception; the waiting thread raises it again.
        outcome.put((None, error))
    else:
        outcome.put((value, None))


# ------------------------------------------------------------------------------------------ numbers


def require_numbers(backend: Backend) -> None:
    """Raise TokenizerFails if the numbers of symbols are too high, or leave too many out."""
    numbers = backend.get_vocab(with_added_tokens=True)
    token = max(numbers, key=lambda token: numbers[token], default=None)
    if token is None:
        return
    largest = min(LARGEST_VOCABULARY, 2 * len(numbers) + LARGEST_GAP)
    if numbers[token] > largest:
        raise TokenizerFails(
            f"data.tokenizer: the symbol {token[:40]!r} has the number {numbers[token]}, and of {len(numbers)} symbols none "
            f"may have one above {largest}; {REMEDY}"
        )


def require_files(folder: Path) -> None:
    """Raise TokenizerFails if one of the folder's tokenizer files is not a regular file, or is
    larger than any tokenizer's."""
    for path in (*(folder / name for name in FILES), *(folder / "additional_chat_templates").glob("*.jinja")):
        if not path.exists():
            continue
        if not path.is_file():
            raise TokenizerFails(f"data.tokenizer: {path} is not a regular file; give a folder with a tokenizer's files")
        if path.stat().st_size > LARGEST_FILE:
            raise TokenizerFails(
                f"data.tokenizer: {path} has {path.stat().st_size} bytes, and at most {LARGEST_FILE} are read of a tokenizer; "
                "fetch it again, or give another tokenizer"
            )


# --------------------------------------------------------------------------------- what Rust prints


@contextmanager
def silent_panics() -> Iterator[None]:
    """Drop what native code writes to stderr in the block: Rust reports each panic there, although
    it is caught.

    Only for a process in which no other thread may have something to say.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ---------------------------------------------------------------------------- encoding and decoding


def encoded(backend: Backend, texts: Sequence[Any], *, around: bool, places: bool) -> list[Any]:
    """Return the encodings of texts, or of pairs of texts.

    `around`: with the tokens that the post-processor adds. `places`: with the offsets of each token
    in the text. Of the ways to encode, only those for several texts release the interpreter.
    """
    encode = backend.encode_batch if places else backend.encode_batch_fast
    return list(encode(list(texts), add_special_tokens=around))


def decoded(backend: Backend, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Return the text of some tokens."""
    return str(backend.decode_batch([list(ids)], skip_special_tokens=skip_special)[0])
