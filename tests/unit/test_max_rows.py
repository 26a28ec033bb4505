"""data.max_rows: the first rows of each source, the same ones however the source is divided and read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer import schema
from trainer.data import PreparedData, prepare, readers, sources
from trainer.data.readers import Shard
from trainer.data.sources import Corpus, first_rows, rows_left_out

ROWS = 300


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 rows in about a dozen shards; every seventh is empty, and is a row all the same."""
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(n)}) + "\n" for n in range(ROWS)))
    return path


def text_of(n: int) -> str:
    return "" if n % 7 == 3 else f"row {n}: {'words ' * (n % 5)}"


def prepared(cache_dir: Path, path: Path, **keys: Any) -> PreparedData:
    data = schema.Data.model_validate({"sources": [{"path": str(path)}], "seq_len": 16, "workers": 1, **keys})
    return prepare(data, seed=0, cache_dir=cache_dir, build=True, progress=lambda *_: None)


def documents(found: PreparedData, part: str = "train") -> list[str]:
    stores = getattr(found, part)
    return [
        found.tokenizer.decode(store.slice(begin, end - 1).tolist())
        for store in stores
        for begin, end in zip(store.documents[:-1], store.documents[1:], strict=True)
    ]


def said(found: PreparedData) -> list[str]:
    return [note for note in found.notes if "max_rows" in note]


@pytest.mark.parametrize("most", [1, 40, 200])
def test_the_first_rows_are_used_and_the_rest_is_counted(most: int, corpus: Path, tmp_path: Path) -> None:
    found = prepared(tmp_path / "cache", corpus, max_rows=most, eval_fraction=0.0, workers=2)
    assert documents(found) == [text for n in range(most) if (text := text_of(n))]
    line = f"data.max_rows: the first {most} of 300 rows are used, {ROWS - most} are left out"
    assert said(found) == [f"data: {corpus}: {line}"]
    assert said(prepared(tmp_path / "cache", corpus, max_rows=most, eval_fraction=0.0)) == said(found), "from the cache too"


def test_more_than_there_are_is_all_and_the_same_data(corpus: Path, tmp_path: Path) -> None:
    everything, enough, fewer = (prepared(tmp_path / "cache", corpus, max_rows=most) for most in (None, ROWS, 299))
    assert said(enough) == []
    assert enough.fingerprint == everything.fingerprint
    assert fewer.fingerprint != everything.fingerprint, "a run does not go on over other rows unnoticed"


def test_held_out_documents_are_of_those_rows_and_eval_sources_are_whole(corpus: Path, tmp_path: Path) -> None:
    found = prepared(tmp_path / "cache", corpus, max_rows=100, eval_fraction=0.2)
    assert sorted([*documents(found), *documents(found, "evaluation")]) == sorted(filter(None, map(text_of, range(100))))
    found = prepared(tmp_path / "cache", corpus, max_rows=100, eval_sources=[{"path": str(corpus)}])
    assert len(documents(found)) == len([n for n in range(100) if text_of(n)])
    assert len(documents(found, "evaluation")) == len([n for n in range(ROWS) if text_of(n)])


def packed(folder: Path) -> Path:
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"row {n}"}) + "\n" for n in range(9))
    return folder / "rows.jsonl.gz"


def table(folder: Path) -> Path:
    (folder / "rows.csv").write_text("text,x\n" + "".join(f"row {n},1\n" for n in range(9)))
    return folder / "rows.csv"


def json_list(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps([{"text": f"row {n}"} for n in range(9)]))
    return folder / "rows.json"


def texts(folder: Path) -> Path:
    (folder / "texts").mkdir()
    for n in range(9):
        (folder / "texts" / f"{n}.txt").write_text(f"row {n}")
    return folder / "texts"


@pytest.mark.parametrize("make", [packed, table, json_list, texts], ids=lambda make: make.__name__)
def test_every_kind_of_file(make: Callable[[Path], Path], tmp_path: Path) -> None:
    found = prepared(tmp_path / "cache", make(tmp_path), max_rows=4, eval_fraction=0.0)
    assert documents(found) == [f"row {n}" for n in range(4)]
    assert "the first 4 of 9 rows are used, 5 are left out" in said(found)[0]


def test_conversations_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(20)))
    found = prepared(tmp_path / "cache", path, task="sft", seq_len=64, max_rows=6, eval_fraction=0.2)
    packings = [store.packing for store in (*found.train, *found.evaluation)]
    assert sum(packing.examples for packing in packings if packing) == 6


def test_what_comes_from_elsewhere_is_not_fetched_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []

    def fetch(shard: Shard, of_row: Callable[[Any], Any]) -> Iterator[Any]:
        for n in range(10):
            fetched.append(n)
            yield of_row({"text": str(n)})

    monkeypatch.setitem(readers.READERS, "hub", fetch)
    shards = tuple(Shard("hub", "data.sources[0]", begin=part, end=3, field="text") for part in range(3))
    corpus = Corpus("owner/name", "data.sources[0]", shards, "f")
    found = first_rows(corpus, 12, lambda *_: None)
    assert list(found.corpus.documents()) == [*map(str, range(10)), "0", "1"]
    assert rows_left_out(found.counts) == "data.max_rows: the first 12 rows are used, those after them are not fetched"
    fetched.clear()
    assert first_rows(corpus, 10, lambda *_: None).left_out is None
    assert len(fetched) == 11, "one row more tells that there are more"
