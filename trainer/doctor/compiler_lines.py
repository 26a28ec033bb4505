"""The first line in a build's output that says what is wrong. No torch."""

from __future__ import annotations

import re

# What compilers, linkers, ninja and Python say; commands that ninja repeats are no messages.
WRONG = re.compile(
    r"(?:fatal |internal compiler )?error\b\s*[:#]|: undefined reference|cannot find -l|command not found|: not found"
    r"|No such file or directory|Permission denied|No space left on device|Killed|ninja: error|Error: |out of memory",
    re.IGNORECASE,
)
ECHOED = re.compile(
    r"^\s*(?:\[\d+/\d+\]|FAILED:|ninja: build stopped|RuntimeError: Error building|subprocess\.Called|File \"|raise )"
)
LONGEST = 300


def first_error(output: str) -> str:
    """Return the line, without the colours of a terminal; the last line where none says it."""
    lines = [re.sub(r"\x1b\[[0-9;]*[mK]", "", line).strip() for line in output.splitlines()]
    lines = [line for line in lines if line]
    found = (line for line in lines if WRONG.search(line) and not ECHOED.match(line))
    return next(found, lines[-1] if lines else "no output")[:LONGEST]
