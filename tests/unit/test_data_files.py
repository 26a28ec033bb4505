"""Files of every format, packed or not: the rows that Python's own json and csv and pandas find in them, and damage by name."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import schema
from trainer.data import PreparedData, kinds, prepare, sources
from trainer.data.digests import Digests
from trainer.data.files import packing_of, unpacked, unpacked_name
from trainer.data.readers import Shard
from trainer.data.row_files import json_rows
from trainer.data.sources import Corpus, look_at
from trainer.data.tasks import ROW_TASKS
from trainer.errors import DataError, RecipeError

TEXTS = ["first", "zweiter: äöü", 'with "quotes", commas; and ;', "third\nwith lines\r\nof both kinds", "四 🙂"]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".GZ": gzip.compress,
}
MARK = b"\xef\xbb\xbf"


def as_csv(texts: list[str], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def rows_of(texts: list[str]) -> list[dict[str, Any]]:
    return [{"id": number, "text": text} for number, text in enumerate(texts)]


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": lambda texts: "".join(json.dumps(row) + "\n" for row in rows_of(texts)).encode(),
    "b.json": lambda texts: json.dumps(rows_of(texts), indent=1).encode(),
    "c.json": lambda texts: json.dumps({"version": [1, {"data": []}], "data": rows_of(texts), "more": 1}).encode(),
    "d.json": lambda texts: json.dumps(texts, ensure_ascii=False).encode(),
    "e.json": lambda texts: "\r\n".join(map(json.dumps, rows_of(texts))).encode() + b"\r\n\r\n",  # JSON lines
    "f.json": lambda texts: json.dumps({"data": texts}).encode(),
    "g.jsonl": lambda texts: json.dumps(rows_of(texts)).encode(),  # a list
    "h.csv": as_csv,
    "i.csv": lambda texts: as_csv(texts, ";"),
    "j.CSV": lambda texts: b" id , text \r\n" + as_csv(texts).partition(b"\r\n")[2] + b"\r\n\r\n",
    "k.JSON": lambda texts: json.dumps(rows_of(texts)).encode(),
    "l.tsv": lambda texts: "".join(f"{i}\t{text}\n" for i, text in [("id", "text"), *enumerate(texts)]).encode(),
    "m.ndjson": lambda texts: "".join(json.dumps(row) + "\n" for row in rows_of(texts)).encode(),
}


def corpus_of(path: Path, tmp_path: Path, task: str = "pretrain", **keys: Any) -> Corpus:
    source = schema.Source.model_validate({"path": str(path), **keys})
    return look_at(source, where="data.sources[0]", digests=Digests(tmp_path / "cache"), task=task)


def again(shard: Shard, task: str) -> Shard:
    """As a worker gets it."""
    format = ROW_TASKS[task].format if task in ROW_TASKS else None
    return Shard.from_json(json.loads(json.dumps(asdict(shard))), format)


def texts_of(corpus: Corpus) -> list[str]:
    return [text for shard in corpus.shards for text in again(shard, "pretrain").documents()]


@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_texts(name: str, packing: str, mark: bytes, tmp_path: Path) -> None:
    texts = TEXTS if not name.endswith(".tsv") else [text for text in TEXTS if "\n" not in text]
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACK[packing](mark + FORMATS[name](texts)))
    corpus = corpus_of(path, tmp_path)
    assert texts_of(corpus) == texts
    assert texts_of(corpus_of(path, tmp_path, field="text")) == texts
    said = "\n".join(corpus.notes)
    assert ("divided by ';'" in said) == (name == "i.csv")
    assert ("it is one JSON list, not JSON lines" in said) == (name == "g.jsonl")
    assert ("1 are read as rows by the field 'text'" in said) == (not name.endswith(("jsonl", "ndjson")))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py", "d"])
def test_packed_text_is_text(name: str, packing: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}{packing}").write_bytes(PACK[packing](MARK + b"one\r\ntwo\n"))
    assert texts_of(corpus_of(tmp_path / f"{name}{packing}", tmp_path)) == ["one\r\ntwo\n"]


@pytest.mark.parametrize("task", ["sft", "preference", "translate", "classify"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_task_of_rows_reads_every_format(task: str, packing: str, tmp_path: Path) -> None:
    rows = {
        "sft": [{"prompt": f"q{i}", "completion": f"a, {i}"} for i in range(9)],
        "preference": [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no; not"} for i in range(9)],
        "translate": [{"source": f"one {i}", "target": f"eins {i}"} for i in range(9)],
        "classify": [{"text": f"text {i}", "label": "pos" if i % 2 else "neg"} for i in range(9)],
    }[task]
    names = list(rows[0])
    lines = [names, *([row[name] for name in names] for row in rows)]
    contents = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "b.json": json.dumps(rows),
        "c.json": json.dumps({"data": rows}),
        "d.json": "\n".join(map(json.dumps, rows)),
        "e.tsv": "".join("\t".join(line) + "\r\n" for line in lines),
        "f.csv": "".join(",".join(f'"{value}"' for value in line) + "\r\n" for line in lines),
        "g.csv": "".join(";".join(f'"{value}"' for value in line) + "\r\n" for line in lines),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}{packing}").write_bytes(PACK[packing](MARK + content.encode()))
    found = {
        name: [
            example
            for shard in corpus_of(tmp_path / f"{name}{packing}", tmp_path, task).shards
            for example in again(shard, task).examples(lambda example: example)
        ]
        for name in contents
    }
    assert len(found["a.jsonl"]) == 9
    assert all(examples == found["a.jsonl"] for examples in found.values())


@pytest.mark.parametrize("packing", PACK)
def test_lines_of_windows_with_marks_and_empty_ends_belong_together(packing: str, tmp_path: Path) -> None:
    (tmp_path / f"en.txt{packing}").write_bytes(PACK[packing](MARK + b"one\r\ntwo\r\n\r\n\r\n"))
    (tmp_path / f"de.txt{packing}").write_bytes(PACK[packing](MARK + b"eins\nzwei\n"))
    corpus = corpus_of(tmp_path / f"en.txt{packing}", tmp_path, "translate", target_path=str(tmp_path / f"de.txt{packing}"))
    (shard,) = corpus.shards
    assert list(shard.examples(tuple)) == [("one", "eins"), ("two", "zwei")]
    (tmp_path / f"de.txt{packing}").write_bytes(PACK[packing](b"eins\nzwei\ndrei\nvier\nacht"))
    (shard,) = corpus_of(
        tmp_path / f"en.txt{packing}", tmp_path, "translate", target_path=str(tmp_path / f"de.txt{packing}")
    ).shards
    with pytest.raises(DataError, match=r"en.txt.* has 4 lines but .*de.txt.* has 5 lines"):
        list(shard.examples(tuple))


def test_a_folder_of_source_code_keeps_its_settings_as_texts(tmp_path: Path) -> None:
    root = tmp_path / "code"
    root.mkdir()
    contents = {
        "a.json": '{"name": "package", "data": [1, 2], "text": "of a button"}',
        "b.json": '// a comment\n{"a": 1}',
        "c.json": '[{"body": "x"}]',
        "d.csv": "x,y\r\n1,2\r\n",
        "d.json": '[{"text": {"color": "red"}}]',
        "e.py": "pass\n",
        "f.json": "[" * 10_000,
        "g.json": "",
        "h.json": '{"a": 1}\n{"a": 2}\n',
    }
    for name, content in contents.items():
        (root / name).write_text(content, newline="")
    corpus = corpus_of(root, tmp_path)
    assert texts_of(corpus) == list(contents.values())
    said = (
        f"data.sources[0]: of the .json, .csv, .tsv files of {root} 0 are read as rows by the field 'text', 8 as one text "
        "each, whose rows have no such field (data.sources[].field names another)"
    )
    assert corpus.notes == (said,)
    (root / "i.json").write_text('[{"text": "row"}]')
    assert texts_of(corpus_of(root, tmp_path))[-1] == "row"
    assert texts_of(corpus_of(root / "a.json", tmp_path)) == [contents["a.json"]]
    (root / "a.json").unlink()
    with pytest.raises(DataError, match=r"b.json:1: not JSON"):
        texts_of(corpus_of(root, tmp_path, field="text"))
    (root / "b.json").unlink()
    with pytest.raises(DataError, match=r"c.json:1: no field 'text'; it has 'body'"):
        texts_of(corpus_of(root, tmp_path, field="text"))


@pytest.mark.parametrize(
    ("name", "content", "keys", "said"),
    [
        ("a.csv", b"id,body\n1,x\n", {}, "a.csv:2: no field 'text'; it has 'id', 'body'; set data.sources"),
        ("a.csv", b"id,text\n1,x\n", {"field": "body"}, "a.csv:2: no field 'body'"),
        ("a.json", b'[{"body": 1}]', {}, "a.json:1: no field 'text'; it has 'body'"),
        ("a.json", b'[\n{"text": "a"},\n{"text": null}]', {}, "a.json:3: field 'text' is null"),
        ("a.json", b'[{"text": "a"},\n7]', {}, "a.json:2: a JSON object is needed, this is a number"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"]', {}, "a.json:2: not JSON"),
        ("a.json", b'{"a": 1}', {"field": "text"}, "a.json:1: no field 'text'; it has 'a'"),
        ("a.csv", b"text,text\na,b\n", {}, "a.csv:1: two columns are named 'text'"),
        ("a.csv", b"id,text\n1,x,y\n", {}, "a.csv:2: 3 values for the 2 columns"),
        ("a.csv", b'id,text\n1,"x\n', {}, "a.csv:2: unexpected end of data"),
        ("a.txt", "naïve café".encode("cp1252"), {}, "a.txt:1: byte 2 .* not utf-8 text; it looks like Windows-1252 (cp1252"),
        ("a.csv", "id,text\n1,naïve\n".encode("cp1252"), {}, "byte 0xef is not utf-8; it looks like Windows-1252 (cp1252"),
        ("a.jsonl", '{"text": "naïve"}\n'.encode("cp1252"), {}, "a.jsonl:1: byte 12 .* it looks like Windows-1252 (cp1252"),
        ("a.json", '[{"text": "naïve"}]'.encode("cp1252"), {}, "a.json:1: byte 13 .* it looks like Windows-1252 (cp1252"),
        ("a.txt", "text".encode("utf-16"), {}, "it looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "text of letters".encode("utf-16-le"), {}, "a.txt:1: it looks like UTF-16: convert it with iconv"),
        ("a.csv", "id,text\n1,x\n".encode("utf-16"), {}, "it looks like UTF-16"),
        ("a.csv", "id,text\n1,x\n".encode("utf-16-be"), {}, "a.csv:0: it looks like UTF-16"),
        ("a.jsonl", '{"text": "naive"}\n'.encode("utf-16"), {}, "a.jsonl:1: .* it looks like UTF-16"),
        ("a.jsonl", '{"text": "naive"}\n'.encode("utf-16-le"), {}, "a.jsonl:1: .* it looks like UTF-16"),
        ("a.json", '[{"text": "naive"}]'.encode("utf-16"), {}, "it looks like UTF-16"),
        ("a.txt", "text".encode("utf-32"), {}, "it looks like UTF-32"),
        ("a.txt", gzip.compress(b"text", mtime=0), {}, "it is a gzip file: let its name end in .gz"),
        ("a.jsonl", zstandard.compress(b"text"), {}, "it is a zstd file: let its name end in .zst"),
        ("a.txt", bytes(range(128, 256)) * 9, {}, "convert the file or remove it from the source"),
        ("a.csv.gz", b"id,text\n1,x\n", {}, "a.csv.gz: not a whole gzip file"),
        ("a.csv.zst", b"id,text\n1,x\n", {}, "a.csv.zst: not a whole zstd file"),
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(9999), mtime=0)[:-99], {}, "a.txt.gz: not a whole gzip file"),
        ("a.json.zst", zstandard.compress(b'["a"]' * 999)[:-3], {"field": "x"}, "a.json.zst: not a whole zstd file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 999)[:-3], {}, "a.jsonl.zst: not a whole zstd file"),
    ],
)
def test_damage_is_named(name: str, content: bytes, keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts_of(corpus_of(tmp_path / name, tmp_path, **keys))
    (line,) = caught.value.lines
    beginning, _, end = said.partition(" .* ")
    assert beginning in line
    assert end in line
    assert str(tmp_path / name) in line


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["data", "a", '"', "b"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(VALUES, max_size=4), indent=st.sampled_from([None, 1]))
def test_rows_of_json_are_those_that_json_finds(values: list[Any], indent: int | None) -> None:
    def inside(value: Any) -> list[Any]:
        if isinstance(value, dict):
            found = value.get("data")
            return found if isinstance(found, list) and found and isinstance(found[0], dict | str) else [value]
        return value if isinstance(value, list) else [value]

    text = "\n".join(json.dumps(value, indent=indent) for value in values)
    assert [row for _, row in json_rows(text)] == [row for value in values for row in inside(value)]
    listed = json.dumps(values, indent=indent)
    found = list(json_rows(f" {listed} "))
    assert [row for _, row in found] == values
    assert all(json.JSONDecoder().raw_decode(f" {listed} ", at)[0] == row for at, row in found)


def test_a_long_first_row_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "FIRST_BYTES", 8)
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x" * 100, "text": "a"}]))
    (tmp_path / "b.json").write_text(json.dumps({"x": "y" * 300, "data": [{"text": "b"}]}))
    (tmp_path / "c.json").write_text(json.dumps({"text": "c"}) + "\n" + json.dumps({"text": "d"}))
    assert texts_of(corpus_of(tmp_path, tmp_path)) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("seed", range(3))
def test_several_frames_and_members_are_one_content(seed: int, tmp_path: Path) -> None:
    stream = random.Random(seed)
    parts = [stream.randbytes(stream.choice([0, 1, 99, 300_000])) * 2 for _ in range(5)]
    for packing in (".gz", ".zst"):
        path = tmp_path / f"a{packing}"
        path.write_bytes(b"".join(map(PACK[packing], parts)))
        with unpacked(str(path)) as file:
            assert file.read() == b"".join(parts)


def test_names_of_packed_files() -> None:
    assert [packing_of(name) for name in ("a.gz", "A.ZST", "a.gzip", "zst")] == [".gz", ".zst", "", ""]
    assert unpacked_name("Corpus.CSV.GZ") == "corpus.csv"


def test_a_long_jsonl_in_lines_named_json_is_read_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 100)
    texts = [f"text {i}" for i in range(99)]
    (tmp_path / "a.json").write_bytes(MARK + FORMATS["a.jsonl"](texts))
    corpus = corpus_of(tmp_path / "a.json", tmp_path)
    assert len(corpus.shards) > 9
    assert texts_of(corpus) == texts


# ------------------------------------------------------------------------------------- whole sources, as a run has them


def prepared(data: dict[str, Any], tmp_path: Path) -> PreparedData:
    section = schema.Data.model_validate({"seq_len": 16, "workers": 1, **data})
    return prepare(section, seed=0, cache_dir=tmp_path / "cache", build=True, progress=lambda done, total, what: None)


def test_keys_that_are_not_read_are_counted_and_stay_known(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(FORMATS["a.jsonl"](TEXTS * 9) + b'{"text": "x", "meta": {}}\n')
    said = f"data: {tmp_path / 'a.jsonl'}: keys of rows that nothing reads: id (45), meta (1)"
    for _ in range(2):
        assert said in prepared({"sources": [{"path": str(tmp_path / "a.jsonl")}]}, tmp_path).notes
    (tmp_path / "b.csv").write_bytes(as_csv(TEXTS))
    notes = prepared({"sources": [{"path": str(tmp_path / "b.csv")}]}, tmp_path).notes
    assert f"data: {tmp_path / 'b.csv'}: keys of rows that nothing reads: id (5)" in notes


def test_labels_are_one_class_with_white_space_or_without_it(tmp_path: Path) -> None:
    lines = ["text,label", "a,pos", "b,pos ", "c, neg", "d,neg", "e,\ufeffpos"]
    (tmp_path / "a.csv").write_text("\r\n".join(lines))
    found = prepared({"task": "classify", "sources": [{"path": str(tmp_path / "a.csv")}], "eval_fraction": 0.0}, tmp_path)
    assert found.classes == ("neg", "pos")
    assert sorted(found.train[0].labels(0, found.train[0].num_tokens).tolist()) == [-1, 0, 0, 1, 1, 1]
    said = f"data: {tmp_path / 'a.csv'}: 3 of 5 labels are read without the white space around them"
    assert said in found.notes


def test_whole_numbers_are_one_class_however_they_are_written(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([1, "1", 1.0, 0, "0 ", 2.5])]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows[:-1]))
    assert prepared({"task": "classify", "sources": [{"path": str(path)}]}, tmp_path).classes == ("0", "1")
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"a.json:1: 'label' is 2.5: a label is a word or a whole number"):
        prepared({"task": "classify", "sources": [{"path": str(path)}]}, tmp_path)


def test_the_fingerprint_follows_how_a_file_is_read(tmp_path: Path) -> None:
    """Names and contents alone do not say it: the same bytes under other keys, and the earlier fingerprint where they do."""
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a", "body": "b"}]')
    prints = {corpus_of(path, tmp_path, **keys).fingerprint for keys in ({}, {"field": "body"})}
    (tmp_path / "b.csv").write_text("a,text\n1,2\n")
    prints |= {corpus_of(tmp_path / "b.csv", tmp_path, **keys).fingerprint for keys in ({}, {"columns": ["x", "text"]})}
    assert len(prints) == 4
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "t.tsv").write_text("text\tlabel\na\tb\n")
    # Those of version 4de7b33, whose stores are found again.
    assert corpus_of(tmp_path / "a.txt", tmp_path).fingerprint == "37b1c9ece31b6ab81eead96445a60c7f"
    assert corpus_of(tmp_path / "a.jsonl", tmp_path).fingerprint == "b976d6b12ea5de5680f8ad60e8ff3b35"
    assert corpus_of(tmp_path / "t.tsv", tmp_path, "classify").fingerprint == "4709b87a55bc10cd4e49c3b7f176242e"
    assert (
        corpus_of(tmp_path / "t.tsv", tmp_path, "classify", columns=["text", "label"]).fingerprint
        == "0bbc3b0f793e8d962441d5c2c337a275"
    )


def test_columns_of_texts_must_have_the_field(tmp_path: Path) -> None:
    from trainer.recipe import load

    (tmp_path / "a.csv").write_text("1,2\n")
    recipe = {"model": {"family": "gpt2"}, "data": {"sources": [{"path": str(tmp_path / "a.csv"), "columns": ["id", "body"]}]}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(RecipeError, match=r'columns has no "text" \("id", "body"\): name the one that holds the text'):
        load(tmp_path / "recipe.json")
    load(tmp_path / "recipe.json", ["data.sources[0].field=body"])
