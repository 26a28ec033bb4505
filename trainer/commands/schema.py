"""`triaxis schema`: print the JSON Schema of a recipe."""

from __future__ import annotations

import argparse
import json
import sys

from trainer.errors import EXIT_OK

SUMMARY = "Print the JSON Schema of a recipe, for editors."


def add_arguments(_: argparse.ArgumentParser) -> None:
    """Do nothing: the command has no arguments."""


def run(_: argparse.Namespace) -> int:
    from trainer.recipe import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    return EXIT_OK
