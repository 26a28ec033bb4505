"""`triaxis generate`: continue, answer or translate a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.arguments import add_model, add_sampling, number, path, whole, writing_of
from trainer.errors import EXIT_OK, RecipeError
from trainer.files.reading import RECIPE_BYTES, read_text, told

if TYPE_CHECKING:
    from trainer.inference.model_folder import ModelFolder

SUMMARY = "Continue a text, answer or translate it, with the model of a run, a checkpoint, a Hugging Face folder or an adapter."
NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument(
        "--prompt-file", type=path, metavar="FILE", help="all of a UTF-8 file as one prompt, without the newline at its end"
    )
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
    add_sampling(parser, new_tokens=NEW_TOKENS, longest="continuation")
    parser.add_argument("--beams", type=whole(1), default=4, metavar="N", help="of a translation; 1 takes the likeliest token")
    parser.add_argument("--length-penalty", type=number, default=1.0, metavar="A", help="of a translation's beams")
    parser.add_argument("--attention", type=path, metavar="FILE.png", help="draw where a translation's tokens look")


def run(arguments: argparse.Namespace) -> int:
    from trainer.inference.generate import translates
    from trainer.inference.model_folder import opened

    key, prompt = _prompt(arguments)
    with opened(arguments.model, base=arguments.base) as found:
        if translates(found):
            _translate(arguments, found.model, prompt)
        else:
            _write(arguments, found, prompt, key)
    sys.stdout.write("\n")
    return EXIT_OK


def _prompt(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the prompt, after what gave it."""
    file = arguments.prompt_file
    if file is None:
        return "--prompt", arguments.prompt
    key = f"--prompt-file {file}"
    try:
        return key, read_text(file, RECIPE_BYTES).removesuffix("\n")
    except OSError as error:
        raise RecipeError(f"{key}: {told(error)}: give a file of text") from None
    except ValueError:
        raise RecipeError(f"{key}: not UTF-8: write it so") from None


def _write(arguments: argparse.Namespace, found: ModelFolder, prompt: str, key: str) -> None:
    from trainer.inference.generate import way_of, write_text
    from trainer.inference.terminal import Terminal

    if arguments.attention is not None:
        raise RecipeError(f"--attention: the model in {found.named} continues texts: give one that translates")
    way, why = way_of(found, arguments.way)
    terminal = Terminal()
    terminal.tell(why)
    write_text(found, prompt, writing_of(arguments), seed=arguments.seed, show=terminal.show, way=way, key=key)


def _translate(arguments: argparse.Namespace, folder: Path, prompt: str) -> None:
    from trainer.inference.translator import Search, Translator

    if arguments.way is not None:
        raise RecipeError(f"--{arguments.way}: the model in {folder} translates: leave it out")
    translator, search = Translator(folder), Search(arguments.beams, arguments.length_penalty)
    if arguments.attention is not None:
        translator.attention(prompt, search).draw(arguments.attention)
    (found,) = translator.translate([prompt], search)
    sys.stdout.write(found)
