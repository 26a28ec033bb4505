"""The pages of the repository: what they show, taken apart so that tests can check and run it.

A page shows commands in ```bash blocks, recipes and rows in ```json, programs in ```python. A block whose paragraph says
"Write `NAME`" is the content of that file. In text, a `code span` may be a command, a key of a recipe or a path.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)$")
SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
NAMED_FILE = re.compile(r"Write `([\w./-]+)`")
SEPARATORS = frozenset(";&|")  # and what they make together: &&, ||, ;;
ASSIGNMENT = re.compile(r"\w+=\S*")
SHELL_WORDS = frozenset({"for", "in", "do", "done", "if", "then", "fi"})


@dataclass(frozen=True)
class Block:
    """A fenced block. `file` is the name of the file that it is to be written to, "" where the page names none."""

    language: str
    text: str
    line: int
    file: str


@dataclass(frozen=True)
class Page:
    """One Markdown file. `path` is relative to the root of the repository."""

    path: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))

    @property
    def folder(self) -> Path:
        return (ROOT / self.path).parent

    @cached_property
    def blocks(self) -> list[Block]:
        """Return all fenced blocks, in order."""
        return [part for part in self._parts if isinstance(part, Block)]

    @cached_property
    def prose(self) -> list[tuple[int, str]]:
        """Return all lines outside of fenced blocks, each with its number."""
        return [part for part in self._parts if not isinstance(part, Block)]

    @cached_property
    def _parts(self) -> list[Block | tuple[int, str]]:
        parts: list[Block | tuple[int, str]] = []
        language, lines, first, paragraph = None, [], 0, ""
        for number, line in enumerate(self.text.splitlines(), 1):
            fence = FENCE.match(line)
            if language is not None:
                if fence:
                    named = NAMED_FILE.findall(paragraph)
                    parts.append(Block(language, "\n".join(lines) + "\n", first, named[-1] if named else ""))
                    language, lines, paragraph = None, [], ""
                else:
                    lines.append(line)
            elif fence:
                language, first = fence[1], number + 1
            else:
                parts.append((number, line))
                new = not line.strip() or line.startswith("#")
                # The blank line between a paragraph and its block does not end the paragraph.
                paragraph = "" if new and line.strip() else f"{paragraph} {line}" if line.strip() else paragraph
        return parts

    @property
    def headings(self) -> list[str]:
        return [line.lstrip("#").strip() for _, line in self.prose if line.startswith("#")]

    @property
    def spans(self) -> Iterator[tuple[int, str]]:
        """Yield every code span with the number of its line."""
        for number, line in self.prose:
            for _, span in SPAN.findall(line):
                yield number, span.strip().replace("\\|", "|")

    @property
    def links(self) -> Iterator[tuple[int, str]]:
        """Yield the target of every link with the number of its line."""
        for number, line in self.prose:
            for target in LINK.findall(line):
                yield number, target

    @property
    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the cells of every row of a table with the number of its line."""
        for number, line in self.prose:
            if line.startswith("|") and not set(line) <= set("|- "):
                cells = re.split(r"(?<!\\)\|", SPAN.sub(lambda span: span[0].replace("|", "\\|"), line).strip("|"))
                yield number, [cell.strip().replace("\\|", "|") for cell in cells]

    def section(self, heading: str) -> Page:
        """Return the part of the page under a heading, up to the next one of its level or above, as a page."""
        lines = self.text.splitlines()
        first = next(n for n, line in enumerate(lines) if line.startswith("#") and line.lstrip("#").strip() == heading)
        level = len(lines[first]) - len(lines[first].lstrip("#"))
        above = re.compile(rf"#{{1,{level}}} ")
        end = next((n for n in range(first + 1, len(lines)) if above.match(lines[n])), len(lines))
        return Page(self.path, "\n".join(lines[first + 1 : end]))


def pages() -> list[Page]:
    """Return every page, the README first."""
    found = sorted(
        path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    )
    found = [path for path in found if path.relative_to(ROOT).parts[0] not in ("runs", "build")]
    return [Page.read(path) for path in sorted(found, key=lambda path: path != ROOT / "README.md")]


def simple_commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every simple command of a shell text, without its variables and redirections.

    ValueError for a text that no shell would read.
    """
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in lexer:
            if word and set(word) <= SEPARATORS:
                yield from _cleaned(command)
                command = []
            else:
                command.append(word)
        yield from _cleaned(command)


def _cleaned(command: list[str]) -> Iterator[list[str]]:
    words = list(command)
    while words and (words[0] in SHELL_WORDS - {"for"} or ASSIGNMENT.fullmatch(words[0])):
        words.pop(0)
    if not words or words[0] == "for":
        return
    words = words[: words.index(">")] if ">" in words else words
    if words:
        yield words
    for before, script in pairwise(words):  # bash -c '…'
        if before == "-c" and " " in script:
            yield from simple_commands(script)


def trainer_words(command: list[str]) -> list[str] | None:
    """Return what a command gives to `triaxis`, whichever launcher starts it; None where it does not."""
    for place, word in enumerate(command):
        if word.rpartition("/")[2] == "triaxis" and place == 0:
            return command[1:]
        if word in ("-m", "--module") and command[place + 1 : place + 2] == ["trainer"]:
            return command[place + 2 :]
    return None
