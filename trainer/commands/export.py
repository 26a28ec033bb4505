"""`triaxis export`: write a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse

from trainer.commands.arguments import path, path_name
from trainer.commands.output import open_console, say
from trainer.errors import EXIT_DIFFERS, EXIT_OK

SUMMARY = "Write a checkpoint's weights as a Hugging Face folder, in one process."


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


def run(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.choice import weights_of

    chosen = weights_of(arguments.checkpoint, option="CHECKPOINT", last=arguments.last)
    checkpoint = chosen.path
    from trainer.checkpoint.export import LOGITS_TOLERANCE, compare_logits, export, require_mergeable

    if arguments.merge:
        require_mergeable(checkpoint)
    console = open_console()
    exported = export(checkpoint, arguments.out, dtype=arguments.dtype, whole=arguments.merge)
    say(
        console,
        f"{exported.folder}: {exported.tensors} tensors of step {exported.step} in {exported.dtype}, "
        f"{exported.num_bytes:,} bytes, read back and equal",
    )
    if chosen.why:
        say(console, f"exported: {chosen.why}")
    if not arguments.verify:
        return EXIT_OK
    difference = compare_logits(checkpoint, arguments.out, exported.dtype)
    say(console, f"logits: training network and transformers differ by {difference:.1e} of the largest one")
    return EXIT_OK if difference <= LOGITS_TOLERANCE else EXIT_DIFFERS
