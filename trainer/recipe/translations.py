"""Where the keys of translations and the others do not go together."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trainer.recipe.rows import reads_stdlib
from trainer.schema import STDLIB, Finding, Recipe, Source

SIDES = ("source", "target")  # fields of a row
OTHERS = ("field", "shape")  # keys of a source that pairs do not have
SHORTEST = 3  # a token of the text, what begins or ends it, and the filler that every row ends with
KEYS = ("train.eval_translations", "train.beams", "train.length_penalty")  # that only this task reads


def translation_findings(recipe: Recipe, given: Collection[str]) -> Iterator[Finding]:
    """`given`: the dotted keys that were written."""
    translates = recipe.data.task == "translate"
    sources = [
        (f"data.{group}[{number}]", source)
        for group in ("sources", "eval_sources")
        for number, source in enumerate(getattr(recipe.data, group))
    ]
    if not translates:
        for key in KEYS:
            if key in given:
                yield Finding((key, "data.task"), f'{key} is used only with data.task "translate": remove it')
        for where, source in sources:
            yield from _unused_findings(where, source)
        return
    if reads_stdlib(recipe, given):
        yield Finding(
            ("data.sources", "data.task"),
            f'data.sources is "{STDLIB}", source code, which holds no translations: data.task "translate" '
            'needs data.sources with pairs, such as [{"path": "train.en", "target_path": "train.de"}]',
        )
    if not recipe.data.isolate_documents:
        yield Finding(
            ("data.isolate_documents", "data.task"),
            'data.isolate_documents = false, but with data.task "translate" each target belongs to one source: remove it',
        )
    if recipe.train.sample_prompt is not None:
        yield Finding(
            ("train.sample_prompt", "data.task"),
            'train.sample_prompt is continued by models of one text, and data.task "translate" has two: remove it; '
            "train.eval_translations shows translations",
        )
    if recipe.data.seq_len < SHORTEST:
        yield Finding(
            ("data.seq_len", "data.task"),
            f"data.seq_len = {recipe.data.seq_len} has no room for a source and its end, or a target and its start: legal with "
            f'data.task "translate": {SHORTEST} or more',
        )
    if recipe.train.eval_translations and not recipe.data.eval_sources:
        yield Finding(
            ("train.eval_translations", "data.eval_sources"),
            f"train.eval_translations = {recipe.train.eval_translations} compares translations with those of "
            "data.eval_sources, and there are none: give them, or train.eval_translations 0",
        )
    for where, source in sources:
        yield from _source_findings(where, source, given)


def _unused_findings(where: str, source: Source) -> Iterator[Finding]:
    sides = [f"fields.{side}" for side in SIDES if source.fields and getattr(source.fields, side) is not None]
    for name in [*sides, *(["target_path"] if source.target_path is not None else [])]:
        message = f'{where}.{name} is used only with data.task "translate": remove it'
        yield Finding((f"{where}.{name}", "data.task"), message)


def _source_findings(where: str, source: Source, given: Collection[str]) -> Iterator[Finding]:
    for name in OTHERS:
        if f"{where}.{name}" in given:
            hint = "; what rows call their sides is said in fields" if name == "field" else ""
            message = f'{where}.{name} is not used with data.task "translate": remove it{hint}'
            yield Finding((f"{where}.{name}", "data.task"), message)
    for name in sorted(source.names.keys() - set(SIDES)):
        message = f'{where}.fields.{name} is not used with data.task "translate"; legal: {", ".join(SIDES)}'
        yield Finding((f"{where}.fields.{name}", "data.task"), message)
    for name in ("fields", "columns"):
        if source.target_path is not None and getattr(source, name):
            message = f"{where}.{name} names what rows have, but with {where}.target_path there are lines: remove one of them"
            yield Finding((f"{where}.{name}", f"{where}.target_path"), message)
