"""`triaxis chat`: talk with a model."""

from __future__ import annotations

import argparse

from trainer.commands.arguments import add_model, add_sampling, writing_of
from trainer.errors import EXIT_OK

SUMMARY = "Talk with a model by its chat template: a run's, a checkpoint's, a Hugging Face folder's or an adapter's."
NEW_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the system says before the first message")
    add_sampling(parser, new_tokens=NEW_TOKENS, longest="answer")


def run(arguments: argparse.Namespace) -> int:
    from trainer.inference.dialogue import Dialogue, require_template
    from trainer.inference.model_folder import opened
    from trainer.inference.repl import Repl
    from trainer.inference.terminal import Terminal
    from trainer.inference.text_model import TextModel

    terminal = Terminal()
    with opened(arguments.model, base=arguments.base) as found:
        chat, remarks = require_template(found, named=arguments.model)
        model = TextModel(found, seed=arguments.seed)
        dialogue = Dialogue(model, chat, writing_of(arguments), system=arguments.system)
    for remark in remarks:
        terminal.tell(remark)
    if terminal.interactive:
        terminal.tell(f"{found.described}: {model.described}")
        terminal.tell("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
    Repl(dialogue, terminal).run()
    return EXIT_OK
