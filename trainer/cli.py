"""The command line: words into a command, errors into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from trainer.commands import COMMANDS
from trainer.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_OK, RecipeError, UserError
from trainer.redaction import RedactedRecord, redact_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit codes are in `errors.py`."""
    logging.setLogRecordFactory(RedactedRecord)  # libraries have loggers and handlers of their own
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        return COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        for line in error.lines:
            sys.stderr.write(f"triaxis: error: {line}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("triaxis: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe left (`triaxis check R | head`); nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except Exception:
        sys.stderr.write(redact_text(traceback.format_exc()))
        return EXIT_INTERNAL


class _Parser(argparse.ArgumentParser):
    """Reports a wrong word like a wrong recipe: one line, the nearest legal word, exit 78."""

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument .*: invalid choice: '(.*)' \(choose from (.*)\)", message, re.DOTALL)
        if choice:
            names = re.findall(r"[\w-]+", choice.group(2))
            message = f"unknown command {choice.group(1)}{_did_you_mean(choice.group(1), names)}; legal: {', '.join(names)}"
        raise RecipeError(f"{message} (see {self.prog} --help)")

    def flags(self) -> list[str]:
        """The long flags of this parser and of the commands in it."""
        found = []
        for action in self._actions:
            found += [flag for flag in action.option_strings if flag.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found


def _did_you_mean(word: str, names: list[str]) -> str:
    from trainer.spelling import nearest

    meant = nearest(word, names)
    return f"; did you mean {meant}?" if meant else ""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="triaxis", description="3D-parallel training of transformers on DeepSpeed.", allow_abbrev=False)
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
