"""The command line: arguments become a command, errors become one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from trainer.commands import COMMANDS
from trainer.errors import EXIT_DATA, EXIT_INTERNAL, EXIT_INTERRUPTED, RecipeError, UserError
from trainer.exhausted import exhausted
from trainer.launch.stop_request import Interrupted
from trainer.outputs import standard_outputs
from trainer.redaction import RedactedRecord, redact_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code (`errors.py`)."""
    logging.setLogRecordFactory(RedactedRecord)  # libraries have loggers and handlers of their own
    with standard_outputs() as stdout:
        words = sys.argv[1:] if argv is None else argv
        code = _run(words)
    if stdout is None or stdout.failure is None or isinstance(stdout.failure, BrokenPipeError):
        return code  # the reader of a pipe may leave (`triaxis check R | head`)
    _say(f"stdout: {stdout.failure.strerror}: output is lost")
    # A run's results are in its folder.
    return code if code or words[:1] == ["train"] else EXIT_DATA


def _run(words: Sequence[str]) -> int:
    doing = "the command line"
    try:
        _require_surroundings(words)
        arguments = parse(words)
        doing = arguments.command
        return COMMANDS[doing].run(arguments)
    except (UserError, Interrupted) as error:
        return _told(error)
    except SystemExit as done:  # argparse has shown its help
        return int(done.code or 0)
    except KeyboardInterrupt:
        sys.stderr.write("triaxis: interrupted\n")
        return EXIT_INTERRUPTED
    except Exception as error:
        if said := exhausted(error, doing):
            return _told(said)
        sys.stderr.write(redact_text(traceback.format_exc()))
        return EXIT_INTERNAL


def _told(error: UserError | Interrupted) -> int:
    for line in error.lines:
        _say(line)
    return error.exit_code


def _say(line: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"triaxis: error: {line}\n")


def _require_surroundings(words: Sequence[str]) -> None:
    """Raise RecipeError for arguments and folders that none of our files, all of them UTF-8, could
    name."""
    for word in words:
        if not _is_text(word):
            raise RecipeError(f"the argument {word!r} is not UTF-8: write it so, or rename what it names")
    try:
        here = os.getcwd()
    except FileNotFoundError:
        raise RecipeError("the current folder is gone: cd to one that is there") from None
    if not _is_text(here):
        raise RecipeError(f"the current folder {here!r} has a name that is not UTF-8: rename it")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument like a wrong recipe: one line, the nearest legal word,
    exit 78."""

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument .*: invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if choice:
            names = re.findall(r"[\w-]+", choice.group(2))
            message = f"unknown command {choice.group(1)}{_did_you_mean(choice.group(1), names)}; legal: {', '.join(names)}"
        raise RecipeError(f"{message} (see {self.prog} --help)")

    def flags(self) -> list[str]:
        """Return the long flags of this parser and of the commands in it."""
        found = []
        for action in self._actions:
            found += [flag for flag in action.option_strings if flag.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found


class _Version(argparse.Action):
    """The flag that shows the versions of this package and of those under it, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from trainer.versions import versions

        own, *others = (f"{name} {version or '(not installed)'}" for name, version in versions().items())
        sys.stdout.write(f"{own} ({', '.join(others)}, Python {platform.python_version()})\n")
        parser.exit()


def _did_you_mean(word: str, names: list[str]) -> str:
    from trainer.spelling import nearest

    meant = nearest(word, names)
    return f"; did you mean {meant}?" if meant else ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what the words of a command line mean. RecipeError for words that mean nothing."""
    parser = _Parser(prog="triaxis", description="3D-parallel training of transformers on DeepSpeed.", allow_abbrev=False)
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="show the versions of triaxis and what it stands on, and end"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY, allow_abbrev=False)
        command.add_arguments(added)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        flags = commands.choices[arguments.command].flags()
        parser.error(f"unknown argument {word}{_did_you_mean(word, flags) if word.startswith('-') else ''}")
    return arguments
