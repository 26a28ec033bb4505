"""The console on which commands write."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from trainer.redaction import redact_text

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_COLUMNS = 160  # the width of a pipe, which has no terminal to ask


def open_console() -> Console:
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, markup=False, emoji=False, width=None if terminal else DEFAULT_COLUMNS)


def say(console: Console, text: str) -> None:
    console.print(redact_text(text), soft_wrap=True)
