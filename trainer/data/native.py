"""Calls into the library `tokenizers`, each with an end: what goes wrong in it is one line, and none takes a day or a memory.

Its regular expressions, replacements and vocabularies come with downloaded folders. One of them may look at a text in ways
that double with every letter, or write a text that doubles. So a call runs in a thread of its own, which Python can leave:
native code that lets go of the interpreter cannot be stopped, but need not be waited for.
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

# Sizes are in letters of text. Tokenizers read 300,000 a second and more on one core: a third of that, and time for a machine
# with other things to do; half a minute for a batch of texts (`shards.py`).
PATIENCE_S = 20.0
SLOWEST_PER_S = 100_000
# A token with its place takes some 100 bytes, a letter that a normalizer moved 16 for each byte.
ROOM_BYTES = 1 << 30
ROOM_EACH = 256
LOOK_S = 0.05  # at a gigabyte a second, what is written between two looks is small against ROOM_BYTES
# The largest that is trained here. Numbers are rows of the embedding; and what has a number is written by going through all
# numbers below it.
LARGEST_VOCABULARY = 1 << 24
# Published tokenizers leave out at most some thousand numbers, as room for tokens to come.
LARGEST_GAP = 1 << 16
LARGEST_FILE = 1 << 28  # bytes; the largest that are published have some 2^25, and one that was read takes eight times that
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
REMEDY = "mend its tokenizer.json, or give another tokenizer"


class TokenizerFails(RecipeError):
    """The tokenizer that a recipe names cannot do what it is for."""


def bounded(work: Callable[[], T], doing: str, *, size: int | None) -> T:
    """What `work` gives. TokenizerFails where the library fails in it, or takes more time or memory than a text of `size` can
    need; None for what has no end that is known. `doing` says what it is, such as "encoding a text".

    After a failure `work` may go on, and a tokenizer in use is locked: nothing else may be done with it then.
    """
    patience_s = PATIENCE_S + size / SLOWEST_PER_S if size is not None else math.inf
    room = ROOM_BYTES + ROOM_EACH * size if size is not None else math.inf
    helper = _helper()
    outcome: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
    helper.tasks.put((work, outcome))
    try:
        value, error = _awaited(outcome, doing, patience_s, room)
    except BaseException:  # an interruption, too: what it does is not ours any longer
        _leave(helper)
        raise
    if error is None:
        return cast(T, value)
    if is_of_library(error):
        raise TokenizerFails(f"data.tokenizer: {doing} fails: {first_line(error)}; {REMEDY}") from None
    raise error


def is_of_library(error: BaseException) -> bool:
    """Return whether `tokenizers` raised it: it knows plain Exception, and panics, whose class cannot be imported."""
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


_Outcome = tuple[Any, BaseException | None]
_Task = tuple[Callable[[], Any], "queue.SimpleQueue[_Outcome]"]


def _awaited(outcome: queue.SimpleQueue[_Outcome], doing: str, patience_s: float, room: float) -> _Outcome:
    """Return what became of a task. Looks are counted, not seconds: a process that was stopped has not waited."""
    looks, before = 0, math.inf
    while looks * LOOK_S < patience_s:
        with suppress(queue.Empty):
            return outcome.get(timeout=LOOK_S)
        looks += 1
        before = min(before, _resident_bytes())  # most calls are done before the first look, and need none
        if _resident_bytes() - before > room:
            raise TokenizerFails(f"data.tokenizer: {doing} takes more than {room / 2**30:.1f} GiB of memory; {REMEDY}")
    raise TokenizerFails(
        f"data.tokenizer: {doing} takes longer than {patience_s:.0f} s: look for a regular expression in its tokenizer.json "
        f"that repeats what repeats, such as (a+)+; {REMEDY}"
    )


def _resident_bytes() -> int:
    """What this process holds in memory; 0 on systems that do not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class _Helper:
    """A thread that does one thing after another; it ends with its process, or when it finds None to do."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a child that was forked has the object, but not the thread
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
    except BaseException as error:  # a panic is none of Exception; whoever waits raises it again
        outcome.put((None, error))
    else:
        outcome.put((value, None))


# ------------------------------------------------------------------------------------------------ numbers


def require_numbers(backend: Backend) -> None:
    """TokenizerFails where the numbers of symbols are too high, or leave out too many."""
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
    """TokenizerFails where what a folder has of a tokenizer is no file, such as a pipe, or larger than any tokenizer's."""
    for path in (*(folder / name for name in FILES), *(folder / "additional_chat_templates").glob("*.jinja")):
        if not path.exists():
            continue
        if not path.is_file():
            raise TokenizerFails(f"data.tokenizer: {path} is no regular file; give a folder with a tokenizer's files")
        if path.stat().st_size > LARGEST_FILE:
            raise TokenizerFails(
                f"data.tokenizer: {path} has {path.stat().st_size} bytes, and at most {LARGEST_FILE} are read of a tokenizer; "
                "fetch it again, or give another tokenizer"
            )


# ------------------------------------------------------------------------------------------------ what Rust prints


@contextmanager
def silent_panics() -> Iterator[None]:
    """What native code writes to stderr in the block is dropped: Rust tells of each panic there, which is caught all the same.
    For a process that has no other thread with something to say."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# ------------------------------------------------------------------------------------------------ encoding and decoding


def encoded(backend: Backend, texts: Sequence[Any], *, around: bool, places: bool) -> list[Any]:
    """The encodings of some texts, or pairs of texts. `around`: with the tokens that its post-processor writes. `places`: with
    where in the text each token stands. Of the ways to encode, only those for several texts let go of the interpreter."""
    encode = backend.encode_batch if places else backend.encode_batch_fast
    return list(encode(list(texts), add_special_tokens=around))


def decoded(backend: Backend, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """The text of some tokens."""
    return str(backend.decode_batch([list(ids)], skip_special_tokens=skip_special)[0])
