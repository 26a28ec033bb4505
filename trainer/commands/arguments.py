"""The arguments that several commands take, and their types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.files.paths import expanded, wrong_with

if TYPE_CHECKING:
    from trainer.inference.text_model import Writing

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def add_recipe(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("recipe", type=path, metavar="RECIPE", nargs=None if required else "?", help="a JSON file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, as in --set train.steps=10; may be repeated",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model that writes a text."""
    parser.add_argument(
        "model",
        type=path_name,
        metavar="MODEL",
        help="a run's folder, for its newest checkpoint; a checkpoint's; a Hugging Face folder; or an adapter's (by peft)",
    )
    parser.add_argument(
        "--base", type=path_name, metavar="FOLDER", help="of an adapter: its model; default: the one that its config names"
    )


def add_sampling(parser: argparse.ArgumentParser, *, new_tokens: int, longest: str) -> None:
    """Add how a text is written. `longest`: what --max-new-tokens bounds."""
    parser.add_argument(
        "--max-new-tokens", type=whole(1), default=new_tokens, metavar="N", help=f"the longest {longest}; default: {new_tokens}"
    )
    parser.add_argument(
        "--temperature", type=number, metavar="T", help="0 takes the likeliest token; default: generation_config.json's, or 0.8"
    )
    parser.add_argument(
        "--top-k", type=whole(1), metavar="K", help="sample among the K likeliest; default: generation_config.json's, or 50"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S", help="of the tokens that are drawn; default: 0")


def writing_of(arguments: argparse.Namespace) -> Writing:
    """Return what `add_sampling` has read."""
    from trainer.inference.text_model import Writing

    return Writing(arguments.max_new_tokens, arguments.temperature, arguments.top_k)


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


def positive(text: str) -> float:
    value = number(text)
    if not 0 < value < 1e18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def tokens(text: str) -> int:
    """Return a number of tokens, as 15T, 300B, 1.5M or 2000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?)", text.upper(), re.ASCII)
    count = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if not 0 < count < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens, as 15T, 300B or 1.5M")
    return count
