"""The arguments that several commands take, and their types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from trainer.files.paths import expanded, wrong_with


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=path, metavar="RECIPE", help="a JSON file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, as in --set train.steps=10; may be repeated",
    )


def path_name(text: str) -> str:
    """Return a path as it is used from here on, with the home folder in place of ~."""
    if fault := wrong_with(text):
        raise argparse.ArgumentTypeError(f"{text!r} {fault}")
    return expanded(text)


def path(text: str) -> Path:
    """Return the same as a Path."""
    return Path(path_name(text))


def whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


def number(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return float(text)
