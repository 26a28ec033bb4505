"""Rows of every shape become the same conversation; a row of none is told what it lacks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from trainer import schema
from trainer.data.conversations import SHAPES, SURROUNDINGS, ChatRows, Conversation, Message, Turns
from trainer.data.digests import Digests
from trainer.data.fault import Fault
from trainer.data.sources import Corpus, look_at
from trainer.errors import DataError, RecipeError
from trainer.tasks import TASKS

ASKED, ANSWERED = Message("user", "why?", False), Message("assistant", "so.", True)
SYSTEM = Message("system", "be brief", False)
EXCHANGE = (ASKED, ANSWERED)
TURNS = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]
SAID = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], Turns]] = {
    "messages": ({"messages": TURNS, "id": 7}, {}, EXCHANGE),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "wh"}, "y?"]}, TURNS[1]]},
        {},
        (replace(ASKED, parts=("wh", "y?")), ANSWERED),
    ),
    "sharegpt": ({"conversations": SAID}, {}, EXCHANGE),
    "sharegpt in roles": ({"conversations": TURNS}, {}, EXCHANGE),
    "sharegpt with system": ({"conversations": SAID, "system": "be brief"}, {}, (SYSTEM, *EXCHANGE)),
    "prompt": ({"prompt": "why?", "completion": "so."}, {}, EXCHANGE),
    "prompt of messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, EXCHANGE),
    "alpaca": ({"instruction": "why?", "output": "so."}, {}, EXCHANGE),
    "alpaca, empty input": ({"instruction": "why?", "input": "", "output": "so."}, {}, EXCHANGE),
    "alpaca with input": (
        {"instruction": "Say", "input": "it", "output": "so."},
        {},
        (Message("user", "Say\n\nit", False), ANSWERED),
    ),
    "question and answer": (
        {"question": "why?", "answer": "so."},
        {"fields": {"prompt": "question", "completion": "answer"}},
        EXCHANGE,
    ),
    "another name for messages": ({"dialog": TURNS}, {"fields": {"messages": "dialog"}}, EXCHANGE),
    "both, and messages win": ({"messages": TURNS, "prompt": "x", "completion": "y"}, {}, EXCHANGE),
    "both, and the shape decides": ({"messages": 3, "prompt": "why?", "completion": "so."}, {"shape": "prompt"}, EXCHANGE),
    "null is no field": ({"messages": None, "prompt": "why?", "completion": "so."}, {}, EXCHANGE),
    "no answer": ({"messages": TURNS[:1]}, {}, (ASKED,)),
    "a turn of weight 0": (
        {"messages": [{**TURNS[1], "weight": 0}, *TURNS]},
        {},
        (Message("assistant", "so.", False), *EXCHANGE),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_shape_is_read(name: str) -> None:
    row, keys, expected = ROWS[name]
    assert ChatRows(**keys).example_of(row) == Conversation(expected)


def test_what_a_prompt_says_is_not_learned() -> None:
    row = {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]}
    assert [turn.counts for turn in ChatRows().example_of(row).turns] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        (
            {"text": "x", "id": 1},
            {},
            r"no conversation: it has 'text', 'id', and needs 'messages' \(messages\) or "
            r"'conversations' \(sharegpt\) or 'prompt' \+ 'completion' \(prompt\) or 'instruction' \+ 'output' \(alpaca\); "
            "fix the row, or name",
        ),
        ({}, {}, "it has no field"),
        (
            {"question": "x"},
            {"fields": {"prompt": "question", "completion": "answer"}},
            r"it has 'question', and needs 'question' \+ 'answer' \(prompt\)",
        ),
        ({"prompt": "x", "completion": "y"}, {"shape": "alpaca"}, r"needs 'instruction' \+ 'output' \(alpaca\)"),
        ({"messages": "x"}, {}, "'messages' is text, not a list of turns"),
        ({"messages": ["x"]}, {}, r"messages\[0\] is text; a turn is \{\"role\": \"…\", \"content\": \"…\"\}"),
        ({"messages": [{"role": "user"}]}, {}, r"messages\[0\] has 'role'; a turn is"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            {},
            r"messages\[0\]: role is 'narrator'; legal: system, user, assistant",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, {}, r"messages\[0\]: content is a number, not text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, {}, r"messages\[0\]: tool_calls is a list"),
        (
            {"messages": [{**TURNS[1], "weight": 0.5}]},
            {},
            r"messages\[0\]: weight is '0.5'; legal: 1 \(learned\) and 0 \(not\)",
        ),
        ({"conversations": [{"from": "human", "value": [1]}]}, {}, r"conversations\[0\]: value\[0\] is a number, not text"),
        ({"prompt": 3, "completion": "x"}, {}, "'prompt' is a number, not text"),
        ({"instruction": "x", "input": 3, "output": "y"}, {}, "'input' is a number, not text"),
        ({"prompt": "a\ud800", "completion": "x"}, {}, "'prompt' holds half of a surrogate pair"),
        ({"prompt": "a\ufdd0", "completion": "x"}, {}, r"'prompt' holds U\+FDD0, which Unicode keeps for programs' own marks"),
    ],
)
def test_a_row_that_is_none(row: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(Fault, match=message):
        ChatRows(**keys).example_of(row)


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLED = {"tool_calls": [{"type": "function", "function": CALL}], "content": None}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALLS: dict[str, dict[str, Any]] = {
    "tool_calls": {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    "tool_calls as text": {"role": "assistant", "tool_calls": json.dumps([{"type": "function", "function": CALL}])},
    "function_call": {"role": "assistant", "content": None, "function_call": CALL},
    "a role of its own": {"role": "function_call", "content": json.dumps(CALL)},
    "sharegpt": {"from": "function_call", "value": json.dumps([CALL])},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_tools_are_read_however_they_are_written(name: str) -> None:
    turn = CALLS[name]
    row = {"conversations" if "from" in turn else "messages": [turn]}
    (read,) = ChatRows().example_of(row).turns
    assert (read.role, read.content, read.counts, read.keys) == ("assistant", "", True, CALLED)


def test_what_calls_tools_say_is_a_turn_of_the_tool() -> None:
    for turn in ({"from": "observation", "value": "sunny"}, {"from": "function_response", "value": "sunny"}):
        assert ChatRows().example_of({"conversations": [turn]}).turns == (Message("tool", "sunny", False),)


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_of_a_row(key: str, as_text: bool) -> None:
    given: Any = TOOLS if key == "tools" else [tool["function"] for tool in TOOLS]
    row = {"messages": TURNS, key: json.dumps(given) if as_text else given, "chat_template_kwargs": {"enable_thinking": False}}
    conversation = ChatRows().example_of(row)
    assert (list(conversation.tools), conversation.options) == (TOOLS, {"enable_thinking": False})
    assert ChatRows().example_of({"messages": TURNS, key: "" if as_text else []}).tools == ()


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_has_a_key_of_its_own(key: str) -> None:
    turns = ChatRows().example_of({"messages": [TURNS[0], {**TURNS[1], key: "as it must"}]}).turns
    assert (turns[1].thought, turns[1].keys) == ("as it must", {key: "as it must"})


@pytest.mark.parametrize(
    ("keys", "is_learned"),
    [
        *(({key: value}, bool(value)) for key in ("train", "loss", "trainable", "do_train") for value in (True, False, 1, 0)),
        *(({key: value}, bool(value)) for key in ("weight", "loss_weight") for value in (1, 0, 1.0, 0.0)),
        ({"mask": True}, False),
        ({"mask": False}, True),
        ({"weight": 1, "train": False}, False),
        ({"weight": None, "train": None}, True),
    ],
)
def test_a_turn_says_whether_it_is_learned(keys: dict[str, Any], is_learned: bool) -> None:
    asked, answered = ChatRows().example_of({"messages": [TURNS[0], {**TURNS[1], **keys}]}).turns
    assert (asked.counts, answered.counts) == (False, is_learned)


def test_only_a_flag_has_another_role_learned() -> None:
    for keys, is_learned in (
        ({"train": True}, True),
        ({"weight": 1}, False),
        ({"loss": True}, False),
        ({"mask": False}, False),
    ):
        assert ChatRows().example_of({"messages": [{**TURNS[0], **keys}]}).turns[0].counts is is_learned


def test_earlier_turns_of_alpaca_are_learned_too() -> None:
    row = {"instruction": "why?", "output": "so.", "history": [["who?", "me"], ["when?", "now"]]}
    turns = ChatRows().example_of(row).turns
    assert [(turn.role, turn.content, turn.counts) for turn in turns] == [
        ("user", "who?", False),
        ("assistant", "me", True),
        ("user", "when?", False),
        ("assistant", "now", True),
        ("user", "why?", False),
        ("assistant", "so.", True),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS, "images": ["a.png"]}, "it has 'images', and texts alone are trained here"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\] is of type 'image'"),
        ({"messages": TURNS, "tools": "x"}, "'tools' is text that is not JSON"),
        ({"messages": TURNS, "tools": {"name": "x"}}, "'tools' is an object, not a list of objects"),
        ({"messages": TURNS, "chat_template_kwargs": "x"}, "'chat_template_kwargs' is text, not an object"),
        ({"messages": [{"role": "function_call", "content": "weather()"}]}, r"messages\[0\]: content is text that is not JSON"),
        ({"messages": [{"role": "assistant", "function_call": {"arguments": {}}}]}, "function_call is not a call"),
        ({"messages": [{**TURNS[1], "train": "yes"}]}, r"train is 'yes'; legal: 1 \(learned\) and 0 \(not\); fix"),
        ({"messages": [{**TURNS[1], "mask": 2}]}, "or the other way round: it masks"),
        ({"instruction": "a", "output": "b", "history": "x"}, "'history' is text, not a list of pairs"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"history\[0\] is not a pair"),
        ({"messages": [{**TURNS[1], "tool_calls": [{"name": "a\ufdd0"}]}]}, r"tool_calls\.name holds U\+FDD0"),
    ],
)
def test_a_row_whose_surroundings_are_none(row: dict[str, Any], message: str) -> None:
    with pytest.raises(Fault, match=message):
        ChatRows().example_of(row)


def test_keys_that_nothing_reads_are_known() -> None:
    row = {"messages": TURNS, "id": 7, "tools": [], "system": "", "source": "web", "null": None}
    assert sorted(ChatRows().unread(row)) == ["unread:id", "unread:source"]
    renamed = ChatRows(fields={"messages": "dialog"})
    assert sorted(renamed.unread({"dialog": TURNS, "messages": 3})) == ["unread:messages"]
    assert ChatRows().keys_read({"messages": TURNS}) >= SURROUNDINGS


def test_the_door_knows_the_same_names() -> None:
    assert {name: {*shape.needs, *shape.may, "tools"} for name, shape in SHAPES.items()} == {
        name: {*names} for name, names in TASKS["sft"].shapes.items()
    }
    ours = {name for task in TASKS.values() for names in task.shapes.values() for name in names}
    assert ours == set(schema.Fields.model_fields)


# ---------------------------------------------------------------------------------------------------------- kinds of files

QUESTIONS = [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(5)]
GSM = {"fields": {"prompt": "question", "completion": "answer"}}


def as_jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def as_gz(folder: Path) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return path


def as_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(QUESTIONS).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_saved(folder: Path) -> Path:
    datasets.Dataset.from_list(QUESTIONS).save_to_disk(folder / "saved")
    return folder / "saved"


def as_folder(folder: Path) -> Path:
    inside = folder / "snapshot"
    inside.mkdir()
    as_jsonl(inside)
    (inside / "README.md").write_text("about it")
    return inside


def corpus_of(path: Path, **keys: Any) -> Corpus:
    source = schema.Source.model_validate({"path": str(path), **keys})
    return look_at(source, where="data.sources[0]", digests=Digests(path.parent / "cache"), task="sft")


def contents_of(corpus: Corpus) -> list[tuple[str, ...]]:
    return [
        tuple(turn.content for turn in conversation.turns)
        for shard in corpus.shards
        for conversation in shard.examples(lambda conversation: conversation)
    ]


@pytest.mark.parametrize("write", [as_jsonl, as_gz, as_parquet, as_saved, as_folder])
def test_every_kind_of_file_with_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    corpus = corpus_of(write(tmp_path), **GSM)
    assert contents_of(corpus) == [(row["question"], row["answer"]) for row in QUESTIONS]
    texts = [text for shard in corpus.shards for text in shard.texts()]
    assert texts == [text for row in QUESTIONS for text in row.values()]
    passed_over = (f"data.sources[0]: text files passed over in {tmp_path / 'snapshot'}: README.md",)
    assert corpus.notes == (passed_over if write is as_folder else ())


def test_how_rows_are_read_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    turned = {"fields": {"prompt": "answer", "completion": "question"}}
    prints = {corpus_of(path, **keys).fingerprint for keys in (GSM, turned, {**GSM, "shape": "prompt"}, {})}
    text = look_at(schema.Source(path=str(path)), where="", digests=Digests(tmp_path / "cache"))
    assert len({*prints, text.fingerprint}) == 5


@pytest.mark.parametrize("write", [as_jsonl, as_gz, as_parquet])
def test_a_bad_row_is_named_by_its_place(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    place = f"{path}: row 0" if write is as_parquet else f"{path}:1"
    with pytest.raises(DataError, match=f"{place}: no conversation: it has 'question', 'answer'") as caught:
        contents_of(corpus_of(path))
    assert caught.value.exit_code == 65


def test_text_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["a", "b"]')
    with pytest.raises(
        RecipeError, match=r"data\.sources\[0\]\.path: .*list\.json' is text \(list\.json\), which holds no"
    ) as caught:
        corpus_of(tmp_path / "list.json")
    assert caught.value.exit_code == 78
    assert "reads .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, also .gz and .zst" in str(caught.value)
