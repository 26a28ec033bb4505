"""LLaMA-Factory's data sets: names, which dataset_info.json explains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.convert.draft import Draft
from trainer.convert.reading import read_mapping
from trainer.convert.rows import listed, number, text
from trainer.errors import RecipeError
from trainer.tasks import TASKS, Task

INFO = "dataset_info.json"
REMOTE = "REMOTE:"
# dataset_info's names of columns → ours of fields, by what the rows are.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system"}
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
PAIRS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "system": "system", "tools": "tools"}
# the columns where dataset_info.json names none
THEIRS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
MEDIA = ("images", "videos", "audios")
ROLES = {"role_tag": "from", "content_tag": "value"}
MESSAGES = {"role_tag": "role", "content_tag": "content"}


def sources(draft: Draft) -> None:
    """Bring the data sets, each to a source."""
    folder = draft.read("dataset_dir", text) or "data"
    info = _read_info(draft, folder)
    for name, to in (("dataset", "data.sources"), ("eval_dataset", "data.eval_sources")):
        sets = draft.read(name, listed)
        if sets:
            draft.put(to, [_source(draft, one, info, folder, name) for one in sets], name)
    _weigh(draft)


def _read_info(draft: Draft, folder: str) -> Mapping[str, Any]:
    for place in (Path(folder), draft.folder / folder, draft.folder):
        if (place / INFO).is_file():
            try:
                return read_mapping(place / INFO)
            except RecipeError as error:
                draft.miss("dataset_dir", error.lines[0])
    return {}


def _source(draft: Draft, name: str, info: Mapping[str, Any], folder: str, key: str) -> dict[str, Any]:
    known = info.get(name)
    if not isinstance(known, Mapping):
        hub = name.removeprefix(REMOTE)
        if hub == name:
            draft.miss(
                key, f"{name} is not in {folder}/{INFO} here: the recipe takes it for a hub name; set data.sources[].path"
            )
        return {"path": hub}
    source: dict[str, Any] = {}
    for where in ("hf_hub_url", "file_name"):
        if known.get(where):
            source["path"] = known[where] if where == "hf_hub_url" else str(Path(folder) / str(known[where]))
            break
    else:
        draft.miss(key, f"{name} has neither hf_hub_url nor file_name in {INFO}: set data.sources[].path")
        source["path"] = name
    if known.get("split") and "hf_hub_url" in known:
        source["split"] = known["split"]
    for word in ("subset", "folder", "num_samples", "script_url", "ms_hub_url", "cloud_file_name"):
        if known.get(word):
            draft.miss(
                key, f"{name}: {word} = {known[word]} of {INFO} has no counterpart: keep the rows that are meant in a file"
            )
    task = TASKS[draft.values.get("data.task", "pretrain")]
    source.update(_columns(draft, name, known, task, key))
    return source


def _columns(draft: Draft, name: str, known: Mapping[str, Any], task: Task, key: str) -> dict[str, Any]:
    """Return the names of the fields of a data set's rows, where they are not our own."""
    columns = {**known.get("columns", {})}
    for word in [word for word in MEDIA if columns.pop(word, None)]:
        draft.miss(key, f"{name}: {word} are not read: texts are all that is learned here")
    if not task.rows:
        column = columns.get("prompt", "text")
        return {} if column == "text" else {"field": column}
    turns = known.get("formatting") == "sharegpt"
    tags = {**ROLES, **{tag: value for tag, value in known.get("tags", {}).items() if tag in ROLES}}
    if turns and tags not in (ROLES, MESSAGES):
        draft.miss(key, f"{name}: turns with {tags} are not read: rename their keys to role and content in the file")
    names = PAIRS if task.compares else SHAREGPT if turns else ALPACA
    if turns and not task.compares and tags == MESSAGES:
        names = {**SHAREGPT, "messages": "messages"}
    fields = {}
    for theirs, ours in names.items():
        word = "messages" if task.compares and turns and theirs == "prompt" else theirs
        column = columns.pop(word, None if columns else THEIRS.get(word))
        if column and column != ours:
            fields[ours] = column
    for word, column in columns.items():
        if column and word not in names:
            draft.miss(key, f"{name}: column {word} = {column} has no counterpart in rows of {task.rows}")
    return {"fields": fields} if fields else {}


def _weigh(draft: Draft) -> None:
    shares = draft.read("interleave_probs", listed)
    named = draft.values.get("data.sources", [])
    if not shares:
        return
    if len(shares) != len(named):
        draft.miss("interleave_probs", f"there are {len(named)} data sets: set data.sources[].weight")
        return
    weighed = [{**source, "weight": float(number(share))} for source, share in zip(named, shares, strict=True)]
    draft.put("data.sources", weighed, "dataset", "interleave_probs")
