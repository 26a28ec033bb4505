"""The commands, one file each. Each imports what it needs when it runs, so that `check` starts in a
fraction of a second."""

from __future__ import annotations

import argparse
from typing import Protocol

from trainer.commands import (
    chat,
    check,
    checkpoints,
    convert,
    data,
    doctor,
    evaluate,
    export,
    generate,
    plan,
    report,
    runs,
    schedule,
    schema,
    submit,
    train,
    verify,
)


class Command(Protocol):
    """The interface of a command's file."""

    SUMMARY: str

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, arguments: argparse.Namespace, /) -> int:
        """Run the command and return the exit code. UserError if the user must change something."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "check": check,
    "plan": plan,
    "verify": verify,
    "schedule": schedule,
    "schema": schema,
    "report": report,
    "runs": runs,
    "checkpoints": checkpoints,
    "export": export,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "submit": submit,
    "doctor": doctor,
    "data": data,
    "convert": convert,
}
