"""The ways a run can fail that are not bugs, each with its exit code.

A `UserError` is shown as its lines, never as a traceback. Everything else is a bug: exit 70 and a
traceback in the log.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.redaction import redact_text

EXIT_OK = 0
EXIT_DIFFERS = 1  # verify: a layout does not train the same; the code of diff(1)
EXIT_DATA = 65  # data or checkpoint damaged
EXIT_INTERNAL = 70
EXIT_REQUEUE = 75  # interrupted, or another rank is gone: start the run again
EXIT_RECIPE = 78  # recipe wrong
# Every step is skipped, or the model is not finite; starting again would change nothing.
EXIT_NO_PROGRESS = 93
EXIT_HANG = 124  # another process does not answer; the code of timeout(1)
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it


class UserError(Exception):
    """An error that the user can fix: each line names what, where, the value (without secrets) and
    the remedy."""

    exit_code = EXIT_INTERNAL

    def __init__(self, *lines: str | Sequence[str]) -> None:
        flat = [line for item in lines for line in ([item] if isinstance(item, str) else item)]
        self.lines = [printable(redact_text(" ".join(line.split()))) for line in flat]
        super().__init__("\n".join(self.lines))


def printable(line: str) -> str:
    """Escape control characters: a name in a recipe or a file must not control the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class RecipeError(UserError):
    """The recipe, or something it names on this machine, cannot work."""

    exit_code = EXIT_RECIPE


class DataError(UserError):
    """Data on disk is damaged, unreadable or changed while it was used."""

    exit_code = EXIT_DATA


class NotFinite(UserError):
    """A model holds NaN or infinity: it is no result, and going on from it would change nothing."""

    exit_code = EXIT_NO_PROGRESS

    def __init__(self, what: str, *, step: int | None = None, began: int | None = None) -> None:
        """Describe what is not finite.

        `what`: such as a tensor. `step`: after which it is so, if known. `began`: the first of the
        steps up to that one whose loss or gradient norm was not finite, None if the last one's were
        finite.
        """
        self.what = what
        when = "" if step is None else f" after step {step}"
        since = f" (it began in step {began or step})" if step is not None else ""
        super().__init__(
            f"{what} is not finite{when}{since}: the model is neither saved nor exported; lower optimizer.lr, or go on from an "
            "earlier checkpoint (--resume PATH)"
        )
