"""Continue or translate a text."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from trainer.commands.arguments import number, whole
from trainer.errors import EXIT_OK, RecipeError

SUMMARY = "Continue a text with an exported model, or with a checkpoint's weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a Hugging Face folder, such as RUN_DIR/export")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=whole(1), default=64, metavar="N")
    parser.add_argument("--temperature", type=number, default=0.8, metavar="T", help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=whole(1), default=50, metavar="K", help="sample among the K likeliest")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S")
    parser.add_argument("--beams", type=whole(1), default=4, metavar="N", help="of a translation; 1 takes the likeliest token")
    parser.add_argument("--length-penalty", type=number, default=1.0, metavar="A", help="of a translation's beams")
    parser.add_argument("--attention", type=Path, metavar="FILE.png", help="draw where a translation's tokens look")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="triaxis-generate-") as folder:
        sys.stdout.write(f"{_continued(arguments, Path(folder))}\n")
    return EXIT_OK


def _continued(arguments: argparse.Namespace, scratch: Path) -> str:
    """The text, from a Hugging Face folder, or from a checkpoint by way of one in `scratch`."""
    from trainer.checkpoint.manifest import MANIFEST

    folder = arguments.folder
    if (folder / MANIFEST).is_file():
        from trainer.checkpoint.export import export

        folder = export(folder, scratch / "model", whole=True).folder
    from trainer.generate import continue_from_folder, translates

    if translates(folder):
        return _translated(arguments, folder)
    if arguments.attention is not None:
        raise RecipeError(f"--attention: the model in {folder} continues texts: give one that translates")
    return continue_from_folder(
        folder,
        arguments.prompt,
        new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )


def _translated(arguments: argparse.Namespace, folder: Path) -> str:
    from trainer.translator import Search, Translator

    translator, search = Translator(folder), Search(arguments.beams, arguments.length_penalty)
    if arguments.attention is not None:
        translator.attention(arguments.prompt, search).draw(arguments.attention)
    (found,) = translator.translate([arguments.prompt], search)
    return found
