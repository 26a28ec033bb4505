"""What an exhausted memory looks like, of the host or of a device, in one line."""

from __future__ import annotations

import re

from trainer.errors import EXIT_RECIPE, UserError
from trainer.redaction import redact_text

# How torch's allocator of the host says so; on devices it has a class of its own.
HOST = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)
ASKED = re.compile(r"you tried to allocate (\d+) bytes")
REMEDY = (
    "lower batch.micro_sequences or data.seq_len, set train.recompute, raise zero.stage or offload (zero.offload_optimizer, "
    "zero.offload_param), or divide the model over more ranks (parallel.tensor, parallel.pipeline)"
)


class OutOfMemory(UserError):
    """The recipe asks for more than this machine has."""

    exit_code = EXIT_RECIPE

    def __init__(self, rank: int, doing: str, asked: str) -> None:
        super().__init__(f"rank {rank}: out of memory in {doing}: {asked}; {REMEDY}")


def exhausted(error: BaseException | None) -> str | None:
    """What was asked for, where an error or one that it was raised from says that there was no memory for it."""
    while error is not None:
        is_device = type(error).__name__ == "OutOfMemoryError"
        if is_device or isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and HOST.search(str(error))):
            if asked := ASKED.search(str(error)):
                return f"{int(asked[1]) / 2**30:.3g} GiB of host memory were asked for at once"
            lines = str(error).strip().splitlines() or ["no memory was left"]
            return redact_text(lines[0][:300])
        error = error.__cause__ or error.__context__
    return None
