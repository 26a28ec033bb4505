"""The loop of `triaxis chat`: a message or a command, an answer, and again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.errors import RecipeError
from trainer.files.paths import expanded, wrong_with
from trainer.files.reading import open_regular, open_to_append, told
from trainer.inference.dialogue import Dialogue, Reply
from trainer.inference.terminal import QUOTES, Terminal
from trainer.spelling import nearest

COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
SUFFIX = ".jsonl"
HELP = (
    "/reset          forget the questions and answers; the system's text stays",
    "/undo           take back the last question and its answer",
    "/system TEXT    what the system says from now on; without TEXT: nothing",
    f"/save FILE      add the conversation to FILE{SUFFIX}, a row as data.task sft reads it",
    "/help           this list",
    "/quit           end; so does Ctrl-D",
    "",
    f"A message goes on in the next line after a backslash, and between two lines of {QUOTES}. One that begins like a command "
    "needs a space before it. Ctrl-C stops an answer.",
)


class Quit(Exception):
    """The user wants to end."""


class Repl:
    """A dialogue at a terminal, or from a pipe."""

    def __init__(self, dialogue: Dialogue, terminal: Terminal) -> None:
        self._dialogue = dialogue
        self._terminal = terminal
        self._commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "undo": self._undo,
            "system": self._system,
            "save": self._save,
            "help": self._help,
            "quit": self._quit,
            "exit": self._quit,
        }

    def run(self) -> None:
        """Go on until the end of the input. At a terminal a mistake is told, and the conversation
        goes on; from a pipe it is raised, because nobody is there to mend it."""
        while True:
            try:
                message = self._terminal.message()
                if message is None:
                    return
                self._take(message)
            except Quit:
                return
            except KeyboardInterrupt:
                if not self._terminal.interactive:
                    raise
                self._terminal.show("\n")
                self._terminal.tell("(Ctrl-D or /quit ends)")
            except RecipeError as error:
                if not self._terminal.interactive:
                    raise
                for line in error.lines:
                    self._terminal.tell(line)

    def _take(self, message: str) -> None:
        if found := COMMAND.fullmatch(message):
            name, rest = found[1], (found[2] or "").strip()
            if name not in self._commands:
                meant = nearest(name, self._commands)
                raise RecipeError(f"/{name} is no command{f'; did you mean /{meant}?' if meant else ''}; /help lists them")
            self._commands[name](rest)
        elif message.strip():
            self._tell_of(self._dialogue.ask(message.strip(), self._terminal.show))

    def _tell_of(self, reply: Reply) -> None:
        self._terminal.end_answer()
        for remark in _remarks(reply):
            self._terminal.tell(f"({remark})")

    def _reset(self, rest: str) -> None:
        self._dialogue.reset()
        self._terminal.tell("(forgotten: the next message begins a conversation)")

    def _undo(self, rest: str) -> None:
        question = self._dialogue.undo()
        self._terminal.tell("(nothing to take back)" if question is None else f"(taken back: {_short(question)})")

    def _system(self, rest: str) -> None:
        before = self._dialogue.system
        self._dialogue.set_system(rest or None)
        if rest:
            self._terminal.tell("(the system says so from now on)")
        else:
            self._terminal.tell("(the system says nothing" + (f"; it said: {_short(before)})" if before else ")"))

    def _save(self, rest: str) -> None:
        messages = self._dialogue.messages
        if fault := wrong_with(rest) if rest else "":
            raise RecipeError(f"/save {rest}: {fault}")
        path = Path(expanded(rest))
        if path.suffix != SUFFIX:
            raise RecipeError(f"/save {rest}: give a name that ends in {SUFFIX}, such as chats{SUFFIX}")
        if not any(message["role"] == "assistant" for message in messages):
            raise RecipeError("/save: there is no answer yet")
        try:
            is_new = _append(path, json.dumps({"messages": messages}, ensure_ascii=False))
        except OSError as error:
            raise RecipeError(f"/save {rest}: {told(error)}: give a file that can be written") from None
        self._terminal.tell(f"({'written to' if is_new else 'added as a row to'} {path})")

    def _help(self, rest: str) -> None:
        for line in HELP:
            self._terminal.tell(line, indent=16 if line.startswith("/") else 0)

    def _quit(self, rest: str) -> None:
        raise Quit


def _remarks(reply: Reply) -> Iterator[str]:
    if reply.stopped and reply.text:
        yield "stopped: the answer is remembered as far as it came; /undo takes it back"
    elif reply.stopped:
        yield "stopped: the answer had not begun, and the message is forgotten"
    if reply.cut:
        yield f"cut after {reply.cut:,} tokens: the longest answer (--max-new-tokens), or the model's last position"
    if reply.forgotten:
        yield (
            f"the context is full: the model no longer sees what came before question {reply.forgotten + 1:,}; "
            "/reset begins anew"
        )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"{words[:60]}…"


def _append(path: Path, row: str) -> bool:
    """Add a line to a file, whole or not at all, and return whether the file is new. OSError if
    that fails."""
    with open_to_append(path) as file:
        size = os.fstat(file.fileno()).st_size
        begin = "" if size == 0 or _last_byte(path, size) == b"\n" else "\n"
        line = f"{begin}{row}\n".encode()
        try:
            if file.write(line) != len(line):
                raise OSError(28, "no space left on the disk")
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
    return size == 0


def _last_byte(path: Path, size: int) -> bytes:
    with open_regular(path) as file:
        file.seek(size - 1)
        return file.read(1)
