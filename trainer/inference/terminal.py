"""The terminal, or the pipe, from which a user's messages come and to which answers go."""

from __future__ import annotations

import shutil
import sys
import textwrap

from trainer.errors import RecipeError
from trainer.inference.shown import harmless

PROMPT, CONTINUED = "> ", ". "
QUOTES = '"""'  # around a message of several lines


class Terminal:
    """A terminal with line editing, or a pipe: each line of it is a message, and only answers go to
    stdout. Everything else is told on stderr."""

    def __init__(self) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.escapes = sys.stdout.isatty()

    def message(self) -> str | None:
        """Return the next message, or None at the end.

        A line that ends in a backslash goes on in the next one, and so does everything between two
        lines of three quotes. RecipeError for a line that is no UTF-8, or quotes without an end.
        """
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return self._quoted(line.lstrip().removeprefix(QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            if (line := self._line(CONTINUED)) is None:
                break
            lines.append(line)
        return "\n".join(lines)

    def _quoted(self, first: str) -> str | None:
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTES):
            if (line := self._line(CONTINUED)) is None:
                if self.interactive:
                    return None
                raise RecipeError(f"stdin: a message begins with {QUOTES} and has no end: close it with {QUOTES}")
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        try:
            if self.interactive:
                import readline  # noqa: F401 - with it input() edits a line and knows earlier ones

                return input(prompt)
            line = sys.stdin.readline()
        except EOFError:
            sys.stdout.write("\n")
            return None
        except UnicodeDecodeError:
            raise RecipeError("stdin: a line is not UTF-8: write it so") from None
        return line.removesuffix("\n").removesuffix("\r") if line else None

    def show(self, text: str) -> None:
        """Write a piece of an answer."""
        sys.stdout.write(harmless(text) if self.escapes else text)
        sys.stdout.flush()

    def end_answer(self) -> None:
        self.show("\n\n" if self.interactive else "\n")

    def tell(self, line: str, *, indent: int = 0) -> None:
        """Write a remark; at a terminal broken between words, and its further lines indented."""
        sys.stdout.flush()
        text = harmless(line)
        if self.interactive and text:
            columns = max(20, shutil.get_terminal_size().columns - 1)
            deeper = " " * min(indent, columns // 4)
            text = textwrap.fill(text, columns, subsequent_indent=deeper, break_long_words=False, break_on_hyphens=False)
        sys.stderr.write(f"{text}\n")
