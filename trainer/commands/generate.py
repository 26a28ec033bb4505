"""`triaxis generate`: continue or translate a text."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from trainer.commands.arguments import number, path, whole
from trainer.errors import EXIT_OK, RecipeError

SUMMARY = "Continue a text, or answer it, with an exported model or a checkpoint's weights."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, metavar="FOLDER", help="a Hugging Face folder, such as RUN_DIR/export")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=whole(1), default=64, metavar="N")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--chat",
        dest="way",
        action="store_const",
        const="chat",
        help="ask the text as a user's message, by the folder's chat template; default for a model that was taught one: by "
        "data.task sft or preference here, elsewhere where its generation ends at the end of a turn",
    )
    way.add_argument(
        "--raw", dest="way", action="store_const", const="raw", help="continue the text as it is; default for others"
    )
    parser.add_argument(
        "--temperature", type=number, metavar="T", help="0 takes the likeliest token; default: generation_config.json's, or 0.8"
    )
    parser.add_argument(
        "--top-k", type=whole(1), metavar="K", help="sample among the K likeliest; default: generation_config.json's, or 50"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="S")
    parser.add_argument("--beams", type=whole(1), default=4, metavar="N", help="of a translation; 1 takes the likeliest token")
    parser.add_argument("--length-penalty", type=number, default=1.0, metavar="A", help="of a translation's beams")
    parser.add_argument("--attention", type=path, metavar="FILE.png", help="draw where a translation's tokens look")


def run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="triaxis-generate-") as folder:
        sys.stdout.write(f"{_continued(arguments, Path(folder))}\n")
    return EXIT_OK


def _continued(arguments: argparse.Namespace, scratch: Path) -> str:
    """Return the text, from a Hugging Face folder, or from a checkpoint by way of such a folder in
    `scratch`."""
    from trainer.checkpoint.manifest import MANIFEST

    folder = arguments.folder
    if (folder / MANIFEST).is_file():
        from trainer.checkpoint.export import export

        folder = export(folder, scratch / "model", whole=True).folder
    from trainer.inference.generate import Writing, continue_from_folder, translates, way_of

    if translates(folder):
        if arguments.way is not None:
            raise RecipeError(f"--{arguments.way}: the model in {folder} translates: leave it out")
        return _translated(arguments, folder)
    if arguments.attention is not None:
        raise RecipeError(f"--attention: the model in {folder} continues texts: give one that translates")
    way, told = way_of(folder, arguments.way)
    sys.stderr.write(f"{told}\n")
    writing = Writing(arguments.max_new_tokens, arguments.temperature, arguments.top_k, arguments.seed)
    return continue_from_folder(folder, arguments.prompt, writing, way=way)


def _translated(arguments: argparse.Namespace, folder: Path) -> str:
    from trainer.inference.translator import Search, Translator

    translator, search = Translator(folder), Search(arguments.beams, arguments.length_penalty)
    if arguments.attention is not None:
        translator.attention(arguments.prompt, search).draw(arguments.attention)
    (found,) = translator.translate([arguments.prompt], search)
    return found
