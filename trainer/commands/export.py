"""`triaxis export`: write a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import TYPE_CHECKING

from trainer.commands.arguments import path, path_name
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_DIFFERS, EXIT_OK, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.checkpoint.hub import Repository
    from trainer.checkpoint.model_card import Trained

SUMMARY = "Write a checkpoint's weights as a Hugging Face folder, in one process, and upload it if asked to."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=path_name,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a run's for its newest, or its best by checkpoint.best",
    )
    parser.add_argument("out", type=path, metavar="OUT", help="a new folder, or an empty one")
    parser.add_argument("--last", action="store_true", help="of a run: its newest, also where it has a best one")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the format of training")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a tuned model: all of it, what was learned added, instead of an adapter for peft",
    )
    parser.add_argument("--verify", action="store_true", help="also compare logits: training network against transformers")
    parser.add_argument(
        "--replace",
        action="store_true",
        help="OUT may be an earlier export, which is gone when the new one is whole; so may what --push finds on the hub",
    )
    parser.add_argument(
        "--license",
        type=_license,
        metavar="ID",
        help="licence of the model, for its card: the hub's word for it, such as apache-2.0; default: model.license",
    )
    parser.add_argument(
        "--push", metavar="NAME", help="upload OUT to the Hugging Face hub as OWNER/NAME or NAME, private, in one commit"
    )
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    parser.add_argument("--message", metavar="TEXT", help="with --push: of the commit; default: the run's name and the step")


def _license(text: str) -> str:
    from trainer.schema import LICENSE

    if not re.fullmatch(LICENSE, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no identifier of the hub, such as apache-2.0, mit or llama3.1")
    return text


def run(arguments: argparse.Namespace) -> int:
    if not arguments.push and (unread := "--public" if arguments.public else "--message" if arguments.message else ""):
        raise RecipeError(f"{unread} is used only with --push: remove it, or add --push NAME")
    from trainer.checkpoint.choice import weights_of

    chosen = weights_of(arguments.checkpoint, option="CHECKPOINT", last=arguments.last)
    checkpoint = chosen.path
    from trainer.checkpoint.export import LOGITS_TOLERANCE, compare_logits, export, require_free, require_mergeable
    from trainer.checkpoint.model_card import Trained, require_export, write_card

    if arguments.merge:
        require_mergeable(checkpoint)
    (require_export if arguments.replace else require_free)(arguments.out)
    repository = _repository(arguments)
    trained = Trained.of_checkpoint(checkpoint, license=arguments.license)
    name = repository.name if repository else str(arguments.out)
    console = open_console()
    exported = export(
        checkpoint,
        arguments.out,
        dtype=arguments.dtype,
        whole=arguments.merge,
        replace=arguments.replace,
        write_beside=lambda draft: write_card(draft, trained, name=name),
    )
    say(
        console,
        f"{exported.folder}: {exported.tensors} tensors of step {exported.step} in {exported.dtype}, "
        f"{exported.num_bytes:,} bytes, read back and equal",
    )
    if chosen.why:
        say(console, f"exported: {chosen.why}")
    if arguments.verify:
        difference = compare_logits(checkpoint, arguments.out, exported.dtype)
        say(console, f"logits: training network and transformers differ by {difference:.1e} of the largest one")
        if difference > LOGITS_TOLERANCE:
            return EXIT_DIFFERS
    if repository:
        _push(arguments, repository, trained, console)
    say(console, f"next: {trained.task.used_by.format(shlex.quote(str(arguments.out)))}")
    return EXIT_OK


def _repository(arguments: argparse.Namespace) -> Repository | None:
    """Return the place on the hub that the export goes to; None if it stays here."""
    if not arguments.push:
        return None
    from trainer.checkpoint.hub import look_at

    return look_at(arguments.push, public=arguments.public, replace=arguments.replace)


def _push(arguments: argparse.Namespace, repository: Repository, trained: Trained, console: Console) -> None:
    from trainer.checkpoint.hub import push

    message = arguments.message or f"{trained.recipe.run.name}, step {trained.step}"
    url = push(arguments.out, repository, message=message)
    say(console, f"pushed to {url} ({'private' if repository.private else 'public'}), in one commit")
    if trained.needs_local_base(arguments.out):
        say(
            console, f"the base of this adapter is a folder of this machine, {trained.recipe.model.from_pretrained}: hand it on"
        )
