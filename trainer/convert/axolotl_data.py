"""axolotl's data sets: a list of objects, each with the type of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.convert.draft import Draft, shown
from trainer.convert.rows import ASKS_NOTHING


@dataclass(frozen=True)
class Type:
    """A type of rows: the task that learns from them, and their fields, ours → those of the type,
    where they differ. `but`: what is not read as axolotl does."""

    task: str
    fields: Mapping[str, str] = field(default_factory=dict)
    but: str = ""


OTHER_WORDS = "the words around instruction and input are those of shape alpaca"
TYPES: Mapping[str, Type] = {
    "alpaca": Type("sft"),
    "alpaca_chat": Type("sft", {"instruction": "instruction"}),
    "alpaca_chat.load_qa": Type("sft", {"prompt": "question", "completion": "answer"}),
    "alpaca_w_system": Type("sft"),
    "alpaca_instruct": Type("sft"),
    "chat_template": Type("sft"),
    "chatml": Type("sft"),
    "sharegpt": Type("sft", {"conversations": "conversations"}),
    "gpteacher": Type("sft", {"output": "response"}),
    "jeopardy": Type("sft", {"prompt": "question", "completion": "answer"}, "the category of the question is not read"),
    "context_qa.load_404": Type("sft", {"prompt": "question", "completion": "answer"}, "the context is not read"),
    "oasst": Type("sft", {"prompt": "INSTRUCTION", "completion": "RESPONSE"}),
    "completion": Type("pretrain"),
    "pretrain": Type("pretrain"),
    # preferences
    "chat_template.default": Type("preference", {"prompt": "messages"}),
    "chat_template.argilla_chat": Type("preference"),
    **{
        f"{style}.argilla": Type("preference", {"prompt": "instruction", "chosen": "chosen_response"})
        for style in ("chatml", "llama3")
    },
    **{f"{style}.icr": Type("preference", {"prompt": "input"}) for style in ("chatml", "llama3")},
    **{f"{style}.intel": Type("preference", {"prompt": "question"}) for style in ("chatml", "llama3")},
    **{f"{style}.prompt_pairs": Type("preference") for style in ("chatml", "llama3")},
    **{f"{style}.ultra": Type("preference") for style in ("chatml", "llama3")},
    "zephyr.nectar": Type("preference"),
    "user_defined.default": Type("preference"),
    "chatml.argilla_chat": Type("preference"),
    "llama3.argilla_chat": Type("preference"),
}
# Keys of a type that the user defines → ours of fields; the others are words around them.
USER_FIELDS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
# Keys of a data set beside its type → ours of fields.
SET_FIELDS = {
    "field_messages": "messages",
    "field_tools": "tools",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_system": "system",
}
# Keys of a data set that have no counterpart, and with which values they ask for nothing.
MAPPINGS = "message_property_mappings"
READ_HERE = (
    "path",
    "type",
    "split",
    "data_files",
    "field",
    "text_column",
    "ds_type",
    MAPPINGS,
    "roles",
    *SET_FIELDS,
)
WITHOUT: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "name": ("a configuration of a hub data set is not chosen: write the rows that are meant into a file", ()),
    "revision": ("a data set of the hub is taken as it is: write its rows into a file", ("main",)),
    "shards": ("all rows of a source are read: shorten the file", ()),
    "shards_idx": ("all rows of a source are read: shorten the file", ()),
    "preprocess_shards": ("data.workers is all there is to it", ()),
    "skip": ("all rows of a source are read: shorten the file", (0,)),
    "conversation": ("conversations are written by the tokenizer's own chat template", ()),
    "chat_template": ("conversations are written by the tokenizer's own chat template", ("tokenizer_default",)),
    "chat_template_jinja": ("conversations are written by the tokenizer's own chat template", ()),
    "roles_to_train": ('data.learn "all" learns every turn; else the assistant\'s are learned', (["assistant"], ["gpt"])),
    "train_on_eos": ("the token that ends an answer is learned, no other", ("turn", "last")),
    "train_on_eot": ("the token that ends an answer is learned, no other", ("turn", "last")),
    "drop_system_message": ("remove the system messages in the file", ()),
    "message_field_role": ("rename the keys of turns to role and content in the file", ("role", "from")),
    "message_field_content": ("rename the keys of turns to role and content in the file", ("content", "value")),
    "message_field_training": (
        'a turn\'s "train" or "weight" says whether it is learned',
        ("train", "weight", "loss", "trainable"),
    ),
    "message_field_training_detail": ("a turn is learned whole or not at all", ()),
    "field_human": ("rows with these fields are of shape prompt", ()),
    "field_model": ("rows with these fields are of shape prompt", ()),
    "field_thinking": ("a turn's thoughts are in reasoning_content, thinking or reasoning", ("reasoning_content", "thinking")),
    "template_thinking_key": ("a turn's thoughts are in reasoning_content, thinking or reasoning", ("reasoning_content",)),
    "split_thinking": ("thoughts are written by the template", ()),
    "input_transform": ("rows are read as they are", ()),
    "input_format": ("rows are read as they are", ()),
    "logprobs_field": ("there is no distillation", ()),
    "temperature": ("there is no distillation", ()),
    "trust_remote_code": ("code of a data set is never run: write its rows into a file", ()),
}
# Names of readers that stand where a path would: the files are in data_files.
READERS = ("json", "jsonl", "csv", "parquet", "arrow", "text")
LISTS = {"datasets": "data.sources", "pretraining_dataset": "data.sources", "test_datasets": "data.eval_sources"}
SPLIT = re.compile(r"\w+")


def sources(draft: Draft) -> None:
    """Bring the data sets, each file or hub name to a source, and the task that learns from
    them."""
    for name, to in LISTS.items():
        sets = draft.get(name)
        if not sets:
            continue
        sets = [{"path": sets}] if isinstance(sets, str) else [sets] if isinstance(sets, dict) else sets
        found = []
        for number, one in enumerate(sets):
            if isinstance(one, dict):
                found += _of_set(draft, {"type": "pretrain", **one} if name.startswith("pre") else one, f"{name}[{number}]")
            else:
                draft.miss(name, f"{shown(one)} is no object with path and type")
        if found:
            draft.put(to, found, name)


def _of_set(draft: Draft, one: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the sources of a data set."""
    here = _Place(draft, where)
    kind, fields = _type(here, one.get("type"))
    draft.values.setdefault("data.task", kind.task)
    draft.origins.setdefault("data.task", f"{where}.type {shown(one.get('type'))}")
    if (task := draft.values["data.task"]) != kind.task:
        here.miss("type", one.get("type"), f"its rows are for data.task {kind.task}, and the recipe learns {task}: drop it")
        return []
    if kind.but:
        here.miss("type", one.get("type"), kind.but)
    source: dict[str, Any] = {**_fields(here, one, fields), **_split(here, one)}
    for name, value in one.items():
        if name in WITHOUT:
            why, idle = WITHOUT[name]
            if value not in (*ASKS_NOTHING, *idle):
                here.miss(name, value, why)
        elif name not in READ_HERE:
            here.miss(name, value, "is no key of a data set that is known here")
    return [{"path": path, **source} for path in _paths(here, one)]


@dataclass(frozen=True)
class _Place:
    """A data set of the file, whose keys are remarked with its place."""

    draft: Draft
    where: str

    def miss(self, name: str, value: Any, why: str) -> None:
        self.draft.miss(f"{self.where}.{name} = {shown(value)}", why)


def _type(place: _Place, given: Any) -> tuple[Type, dict[str, str]]:
    """Return the type of rows, and the names of fields that the user defines in it."""
    if isinstance(given, dict):
        fields = {USER_FIELDS[name]: str(value) for name, value in given.items() if name in USER_FIELDS and value}
        for name, value in given.items():
            if name not in USER_FIELDS and value:
                place.miss(f"type.{name}", value, OTHER_WORDS)
        return Type("preference" if fields.keys() & {"chosen", "rejected"} else "sft"), fields
    name = str(given or "alpaca")
    known = TYPES.get(name) or TYPES.get(name.partition(":")[0]) or TYPES.get(name.partition(".")[0])
    if known is None:
        place.miss(
            "type", given, "rows of this type are not known here: they are read by their fields; set data.sources[].fields"
        )
        return Type("sft"), {}
    if name not in TYPES:
        place.miss("type", given, "conversations are written by the tokenizer's own chat template, without its words")
    return known, dict(known.fields)


def _fields(place: _Place, one: Mapping[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Return the names of the fields of a set's rows, where they are not our own."""
    column = one.get("field") or one.get("text_column")
    if column and column != "text":
        return {"field": column}
    for theirs, ours in SET_FIELDS.items():
        if value := one.get(theirs):
            fields["prompt" if ours == "messages" and "prompt" in fields else ours] = str(value)
    mapping = one.get(MAPPINGS) or {}
    if mapping and not mapping.items() <= {"role": "role", "content": "content"}.items():
        if {mapping.get("role"), mapping.get("content")} == {"from", "value"}:
            fields["conversations"] = fields.pop("messages", "messages")
        else:
            place.miss(MAPPINGS, mapping, "rename the keys of turns to role and content in the file")
    named = {ours: theirs for ours, theirs in fields.items() if ours != theirs}
    return {"fields": {ours: fields[ours] for ours in fields}} if named else {}


def _split(place: _Place, one: Mapping[str, Any]) -> dict[str, str]:
    split = one.get("split")
    if split in (None, "train"):
        return {}
    if not SPLIT.fullmatch(str(split)):
        place.miss("split", split, "a part of a split is not chosen: write the rows that are meant into a file")
        return {}
    return {"split": str(split)}


def _paths(place: _Place, one: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files or the hub name of a data set."""
    path, files = one.get("path"), one.get("data_files")
    named = [files] if isinstance(files, str) else files or []
    if named and path in READERS:
        yield from map(str, named)
        return
    if named:
        place.miss("data_files", files, "a data set of the hub is read whole: name the files themselves in data.sources[].path")
    yield str(path)
