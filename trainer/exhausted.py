"""The recognition of a machine that has run out of memory, disk, open files or rights: one line,
with the remedy.

Such an error is no fault of the program, which could have done nothing else. It is recognised by
the system's number for it, or, where a library gives only words, by those. Every other error is a
bug of ours until somebody has looked at it. No torch.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from trainer.errors import DataError, RecipeError, UserError
from trainer.files.reading import NotAFile

# The messages of torch's host allocator. Device allocators raise a class of their own, and the
# libraries of devices have only words.
HOST = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)
DEVICE = re.compile(r"(CUDA|HIP) (error: )?out of memory|CU\w+_STATUS_ALLOC_FAILED|failure.*'out of memory'", re.IGNORECASE)
ASKED = re.compile(r"you tried to allocate (\d+) bytes")
MORE_MEMORY = (
    "lower batch.micro_sequences or data.seq_len, set train.recompute, raise zero.stage or offload (zero.offload_optimizer, "
    "zero.offload_param), or divide the model over more ranks (parallel.tensor, parallel.pipeline)"
)
MORE_ROOM = "make room there, and start the same command again"
# The remedy by the system's error number: exit code 65 for disks, 78 for the way the program was
# started.
OF_DISKS = {
    errno.ENOSPC: MORE_ROOM,
    errno.EDQUOT: MORE_ROOM,
    errno.EFBIG: "raise the limit (ulimit -f), and start the same command again",
    errno.EIO: "is the disk sound? Then start the same command again",
    errno.ESTALE: "is the disk mounted? Then start the same command again",
    errno.ENOLCK: "no lock can be made there: name a folder on a disk that has locks",
}
NO_TEMPORARY = "No usable temporary directory"
OF_LIMITS = {errno.EMFILE: "raise the limit (ulimit -n)", errno.ENFILE: "the whole machine has as many open as it can"}
OF_PLACES = dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "give this user the right to write and read there, or name another place"
) | {errno.ELOOP: "a link there leads to itself: remove it, or name another place"}
WORDS = {os.strerror(number).lower(): number for number in (*OF_DISKS, *OF_LIMITS)}
WORD = re.compile("|".join(map(re.escape, WORDS)), re.IGNORECASE)  # torch writes them small


class OutOfMemory(RecipeError):
    """The recipe asks for more memory than this machine has. `said`: what was asked for, and where;
    `on_device`: of a GPU, not of the host."""

    def __init__(self, said: str, *, on_device: bool, remedy: str = MORE_MEMORY) -> None:
        super().__init__(f"{said}; {remedy}")
        self.said, self.on_device = said, on_device

    def remedied(self, remedy: str) -> OutOfMemory:
        """Return the same error with a remedy that somebody knows better."""
        return OutOfMemory(self.said, on_device=self.on_device, remedy=remedy)


def exhausted(error: BaseException | None, doing: str) -> UserError | None:
    """Return the error for the user if an error, or one that it was raised from, says that the
    machine has run out of something.

    None for any other error. `doing`: what was being done, such as "rank 3: backward of step 7".
    """
    for cause in _causes(error, also_before=True):
        if asked := _memory_asked(cause):
            return OutOfMemory(f"{doing}: out of memory: {asked}", on_device=_is_of_device(cause))
    # An error that was handled before another one came up is not the cause of that one.
    return next(filter(None, (_said_of_disk(cause, doing) for cause in _causes(error, also_before=False))), None)


def _causes(error: BaseException | None, *, also_before: bool) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (error.__context__ if also_before else None)


def _memory_asked(error: BaseException) -> str:
    in_words = isinstance(error, RuntimeError) and HOST.search(str(error))
    if not (_is_of_device(error) or isinstance(error, MemoryError) or in_words):
        return ""
    if asked := ASKED.search(str(error)):
        return f"{int(asked[1]) / 2**30:.3g} GiB of host memory were asked for at once"
    lines = str(error).strip().splitlines() or ["no memory was left"]
    return lines[0][:300]


def _is_of_device(error: BaseException) -> bool:
    in_words = isinstance(error, RuntimeError) and DEVICE.search(str(error))
    return type(error).__name__ == "OutOfMemoryError" or bool(in_words)


def _said_of_disk(error: BaseException, doing: str) -> UserError | None:
    if isinstance(error, OSError) and NO_TEMPORARY in str(error):  # Python has tried all folders
        return DataError(f"{doing}: {error.strerror}: make room in one of them, or set TMPDIR to another folder")
    number, file = _number(error), getattr(error, "filename", None)
    if isinstance(error, NotAFile):
        return RecipeError(f"{file}: {error.strerror}: remove it, or name another place")
    if number in OF_DISKS:
        return DataError(f"{file or doing}: {os.strerror(number)}: {OF_DISKS[number]}")
    if number in OF_LIMITS or (file and number in OF_PLACES):
        return RecipeError(f"{file or doing}: {os.strerror(number)}: {(OF_LIMITS | OF_PLACES)[number]}")
    return None


def _number(error: BaseException) -> int:
    """Return the system's number of an error; of safetensors, torch and the dynamic loader, which
    have only words, by these."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    in_words = isinstance(error, ImportError | RuntimeError | OSError) or type(error).__name__ == "SafetensorError"
    word = WORD.search(str(error)) if in_words else None
    return WORDS[word[0].lower()] if word else 0
