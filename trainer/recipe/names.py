"""The names of files, folders, tokenizers and the hub in a recipe: which is meant, and whether it
is there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from trainer.chat_templates.named import KEY, is_file, names
from trainer.files.paths import expanded, occupied, wrong_with
from trainer.recipe.marks import KeyPath, dotted, leaves, pattern, put
from trainer.redaction import shown
from trainer.schema import STDLIB, Data, Finding, Recipe, Source
from trainer.spelling import nearest
from trainer.tasks import TASKS

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
DATA_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".gz", ".zst")
SMALLEST_BPE = 257  # 256 bytes and the end of a document
LARGEST_BPE = 1 << 24
# The keys of folders that are written to.
WRITTEN_TO = ("run.dir", "data.cache_dir", "zero.offload_optimizer.nvme_path", "zero.offload_param.nvme_path")
PATHS = (
    *WRITTEN_TO,
    *(f"data.{sources}[].{key}" for sources in ("sources", "eval_sources") for key in ("path", "target_path")),
    *("data.tokenizer", "data.chat_template", "model.from_pretrained", "parallel.schedule"),
)


def looks_local(name: str) -> bool:
    """Return whether a name can only be a path: not of the form NAME or OWNER/NAME, or with a data
    file's ending."""
    return not HUB_NAME.fullmatch(name) or name.endswith(DATA_SUFFIXES)


def tokenizer_vocab_size(data: Data) -> int | None:
    """Return the number of symbols of a tokenizer that the recipe determines; None if it must be
    opened to know."""
    size = _named_size(data.tokenizer)
    # A mask is one more symbol.
    return None if size is None else size + (TASKS[data.task].target == "masked") + len(data.new_tokens)


def tokenizer_is_ours(tokenizer: str) -> bool:
    """Return whether the tokenizer is made here, instead of taken from a folder or the hub."""
    return _named_size(tokenizer) is not None


def _named_size(tokenizer: str) -> int | None:
    if tokenizer == "bytes":
        return SMALLEST_BPE
    size = tokenizer.removeprefix("bpe:")
    return int(size) if size != tokenizer and size.isascii() and size.isdecimal() else None


def with_paths(recipe: Recipe) -> tuple[Recipe, list[Finding]]:
    """Return the recipe with its paths in the form for the operating system, and what is wrong with
    impossible ones.

    All later readers of a recipe's path get it resolved.
    """
    values, findings, is_changed = recipe.model_dump(), [], False
    for path, name in _paths(recipe):
        key = dotted(path)
        if fault := wrong_with(name) or _stands_in_the_way(key, name):
            findings.append(Finding((key,), f"{key} = {shown(name)} {fault}"))
        elif expanded(name) != name:
            put(values, path, expanded(name))
            is_changed = True
    return Recipe.model_validate(values) if is_changed else recipe, findings


def _paths(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """Yield every value that names a file or a folder, or may do so."""
    for path, value in leaves(recipe.model_dump()):
        if isinstance(value, str) and pattern(dotted(path)) in PATHS:
            yield path, value


def _stands_in_the_way(key: str, name: str) -> str:
    file = occupied(expanded(name)) if key in WRITTEN_TO else ""
    return f"must be a folder, but {file} is a file: name another one" if file else ""


def name_findings(recipe: Recipe) -> Iterator[Finding]:
    for group in ("sources", "eval_sources"):
        for index, source in enumerate(getattr(recipe.data, group)):
            where = f"data.{group}[{index}]"
            missing = list(_missing(f"{where}.path", source.path, (STDLIB,)))
            yield from missing or _exclude_findings(source, where)
            if source.target_path is not None and not wrong_with(source.target_path) and not exists(source.target_path):
                key = f"data.{group}[{index}].target_path"
                message = f"{key} = {json.dumps(source.target_path)} does not exist (looked from {Path.cwd()})"
                yield Finding((key,), message)
    yield from _tokenizer_findings(recipe.data.tokenizer)
    yield from _template_findings(recipe.data.chat_template)
    if recipe.model.from_pretrained is not None:
        yield from _missing("model.from_pretrained", recipe.model.from_pretrained, ())
        if recipe.model.revision is not None and exists(recipe.model.from_pretrained):
            message = f"model.revision is for hub names, but {recipe.model.from_pretrained} is a folder here: remove it"
            yield Finding(("model.revision", "model.from_pretrained"), message)
    elif recipe.model.revision is not None:
        yield Finding(("model.revision", "model.from_pretrained"), "model.revision needs model.from_pretrained, a hub name")
    for name in ("offload_optimizer", "offload_param"):
        path = getattr(recipe.zero, name).nvme_path
        if path is not None and not exists(os.path.dirname(os.path.abspath(path))):
            message = (
                f"zero.{name}.nvme_path = {json.dumps(path)}: its parent folder does not exist; mount the drive or create it"
            )
            yield Finding((f"zero.{name}.nvme_path",), message)


def _exclude_findings(source: Source, where: str) -> Iterator[Finding]:
    if not source.exclude or source.path == STDLIB or wrong_with(source.path) or os.path.isdir(source.path):
        return
    message = f"{where}.exclude leaves out files of a folder, and {json.dumps(source.path)} is none: remove it"
    yield Finding((f"{where}.exclude", f"{where}.path"), message)


def exists(name: str) -> bool:
    return not wrong_with(name) and os.path.exists(name)


def _missing(key: str, name: str, words: tuple[str, ...]) -> Iterator[Finding]:
    if name in words or exists(name) or wrong_with(name):
        return
    said = f"{key} = {json.dumps(name)}"
    if meant := nearest(name, words, within=1):
        yield Finding((key,), f"{said} does not exist here; did you mean {json.dumps(meant)}?")
    elif looks_local(name):
        yield Finding((key,), f"{said} does not exist (looked from {Path.cwd()})")


def _template_findings(chosen: str | None) -> Iterator[Finding]:
    if chosen is None or wrong_with(chosen) or chosen in names():
        return
    said = f"{KEY} = {json.dumps(chosen)}"
    if is_file(chosen):
        if not exists(chosen):
            yield Finding((KEY,), f"{said} does not exist (looked from {Path.cwd()})")
    elif meant := nearest(chosen, names()):
        yield Finding((KEY,), f"{said}: did you mean {json.dumps(meant)}?")
    else:
        yield Finding((KEY,), f"{said}: legal: {', '.join(names())}, or the path of a .jinja file")


def _tokenizer_findings(name: str) -> Iterator[Finding]:
    if not name.startswith("bpe:"):
        yield from _missing("data.tokenizer", name, ("bytes",))
        return
    size = _named_size(name)
    if size is None or not SMALLEST_BPE <= size <= LARGEST_BPE:
        legal = f"bpe:{SMALLEST_BPE} (256 bytes and the end of a document) to bpe:{LARGEST_BPE}"
        yield Finding(("data.tokenizer",), f"data.tokenizer = {json.dumps(name)}: legal: {legal}")
