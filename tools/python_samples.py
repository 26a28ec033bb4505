"""Say how often a model that learned Python writes Python: the share of samples that `ast.parse`
accepts.

    python tools/python_samples.py runs/quickstart/export

A sample ends where its tokens end, mostly in the middle of a statement, so it is cut at its last
whole statement. It is accepted if something is left and `ast.parse` reads it. Nothing that the
model writes is run.
"""

from __future__ import annotations

import argparse
import ast
import codeop
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

SAMPLES = 50
# Two blank lines and a def are the top level of a module. A bare def says nothing of its place,
# and most functions that the model has seen are methods.
PROMPT = "\n\n\ndef "
NEW_TOKENS = 96
TEMPERATURE, TOP_K = 0.5, 50
INCOMPLETE = "incomplete input"  # the parser's message where more text could still make it valid


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Hugging Face folder, such as RUN_DIR/export")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--max-new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--show", action="store_true", help="print all samples, those that are accepted first")
    arguments = parser.parse_args(words)
    cut = [whole_statements(text) for text in written(arguments)]
    accepted = [text for text in cut if is_python(text)]
    if arguments.show:
        for text in sorted(cut, key=is_python, reverse=True):
            sys.stdout.write(f"{'accepted' if is_python(text) else 'refused'}:\n{text}\n")
    sys.stdout.write(
        f"{len(accepted)} of {len(cut)} samples of {arguments.prompt!r} are Python (ast.parse accepts them, cut at their last "
        f"whole statement; {arguments.max_new_tokens} tokens, temperature {arguments.temperature:g}, top-k {TOP_K})\n"
    )
    return 0


def written(arguments: argparse.Namespace) -> list[str]:
    """Return the samples, each with the prompt before it."""
    import torch
    from transformers.utils import logging

    from trainer.inference.generate import begun
    from trainer.inference.last_space import beginning_with
    from trainer.inference.model_folder import load_folder

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model, tokenizer = load_folder(arguments.folder)
    tokens, first = begun(tokenizer, arguments.prompt)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=arguments.samples,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=True,
            temperature=arguments.temperature,
            top_k=TOP_K,
            pad_token_id=tokenizer.eos_token_id,
            logits_processor=[beginning_with(first, len(tokens))],
        )
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def whole_statements(text: str) -> str:
    """Return the text up to the end of its last whole statement.

    Only what a longer text could still complete is cut: a text with an error before that is
    returned up to its last whole line, with the error in it.
    """
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    if _parser_says("".join(lines)) == INCOMPLETE:
        while lines and _parser_says("".join(lines)):
            lines.pop()
    return "".join(lines)


def is_python(text: str) -> bool:
    """Return whether the text holds a statement, and nothing that is not Python."""
    return bool(text.strip()) and not _parser_says(text)


def _parser_says(text: str) -> str:
    """Return what ast.parse finds wrong, "" for nothing."""
    flags = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in texts
        try:
            compile(text, "<sample>", "exec", flags)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            # the others: null bytes, deep nesting
            return str(getattr(error, "msg", error))
    return ""


if __name__ == "__main__":
    sys.exit(main())
