"""Every kind of source gives its documents in order, whatever the shards; damage is named by file and place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import schema
from trainer.data import sources
from trainer.data.digests import Digests
from trainer.data.readers import Shard
from trainer.data.sources import Corpus, look_at
from trainer.data.workers import ENVIRONMENT
from trainer.errors import DataError, RecipeError

TEXTS = ["first", "zweiter: äöü", "", "third\nwith lines\n", "四 🙂"]


@pytest.fixture
def digests(tmp_path: Path) -> Digests:
    return Digests(tmp_path / "cache")


def corpus_of(path: Path | str, digests: Digests, **keys: str) -> Corpus:
    return look_at(schema.Source(path=str(path), **keys), where="data.sources[0]", digests=digests)


def texts_of(corpus: Corpus) -> list[str]:
    """The documents as a worker would read them: shard by shard, each gone through JSON."""
    shards = [Shard.from_json(json.loads(json.dumps(asdict(shard))), None) for shard in corpus.shards]
    return [text for shard in shards for text in shard.documents()]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def test_text_file_is_one_document_without_byte_order_mark(tmp_path: Path, digests: Digests) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert texts_of(corpus_of(path, digests)) == ["one\r\ntwo\n"]


def test_any_extension_may_be_text(tmp_path: Path, digests: Digests) -> None:
    (tmp_path / "notes.xyz").write_text("hello")
    assert texts_of(corpus_of(tmp_path / "notes.xyz", digests)) == ["hello"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path: Path, digests: Digests, name: str) -> None:
    plain = write_jsonl(tmp_path / "plain", TEXTS, "body").read_bytes() + b"\n  \n"  # blank lines are no documents
    (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith("gz") else plain)
    assert texts_of(corpus_of(tmp_path / name, digests, field="body")) == TEXTS


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1), shard_bytes=st.integers(1, 200)
)
def test_jsonl_ranges_give_every_line_once(texts: list[str], shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MIN_SHARD_BYTES", shard_bytes)
        path = write_jsonl(Path(folder, "a.jsonl"), texts)
        assert texts_of(corpus_of(path, Digests(Path(folder, "cache")))) == texts


def test_parquet_and_arrow(tmp_path: Path, digests: Digests) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))})
    rows.to_parquet(tmp_path / "a.parquet")
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "a.arrow")) as writer:
        for text in TEXTS:
            writer.write({"text": text})
        writer.finalize()
    assert texts_of(corpus_of(tmp_path / "a.parquet", digests)) == TEXTS
    assert texts_of(corpus_of(tmp_path / "a.arrow", digests)) == TEXTS


@pytest.mark.parametrize("by_split", [False, True])
def test_saved_data_set_is_read_in_ranges(
    tmp_path: Path, digests: Digests, monkeypatch: pytest.MonkeyPatch, by_split: bool
) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    saved = datasets.DatasetDict(train=rows.select([0]), dev=rows) if by_split else rows
    saved.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 200)
    corpus = corpus_of(tmp_path / "saved", digests, split="dev")
    assert len(corpus.shards) > 1
    assert texts_of(corpus) == TEXTS
    if by_split:
        with pytest.raises(RecipeError, match=r"data.sources\[0\].split: .*no split 'other'; it has dev, train"):
            corpus_of(tmp_path / "saved", digests, split="other")


def test_folder_is_read_sorted_and_says_what_it_passes_over(tmp_path: Path, digests: Digests) -> None:
    root = tmp_path / "corpus"
    (root / "b" / ".git").mkdir(parents=True)
    (root / "b" / "x.md").write_text("x")
    (root / "b" / ".git" / "hidden.txt").write_text("hidden")
    write_jsonl(root / "a.jsonl", ["j1", "j2"])
    (root / "c.txt").write_text("c")
    (root / "picture.png").write_bytes(b"\x89PNG")
    corpus = corpus_of(root, digests)
    assert texts_of(corpus) == ["j1", "j2", "x", "c"]
    assert corpus.notes == (f"data.sources[0]: files of unknown kind passed over in {root}: 1 × .png",)


def test_files_of_a_folder_can_be_left_out(tmp_path: Path, digests: Digests) -> None:
    root = tmp_path / "corpus"
    (root / "a" / "tests").mkdir(parents=True)
    for name in ("a/x.txt", "a/tests/y.txt", "z.txt"):
        (root / name).write_text(name)

    def excluding(*patterns: str) -> Corpus:
        return look_at(schema.Source(path=str(root), exclude=list(patterns)), where="data.sources[0]", digests=digests)

    corpus = excluding("*/tests/*", "z.TXT")
    assert texts_of(corpus) == ["a/x.txt", "z.txt"]
    assert corpus.notes == (
        f"data.sources[0].exclude leaves out 1 of 3 files of {root}",
        f"data.sources[0].exclude: no file of {root} matches 'z.TXT'",
    )
    everything = corpus_of(root, digests)
    assert excluding("no*").fingerprint == everything.fingerprint != corpus.fingerprint, "equal documents are equal data"
    with pytest.raises(DataError, match="holds no document"):
        excluding("*")


def test_files_of_a_saved_data_set_cannot_be_left_out(tmp_path: Path, digests: Digests) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    source = schema.Source(path=str(tmp_path / "saved"), exclude=["*.arrow"])
    with pytest.raises(RecipeError, match=r"data.sources\[0\].exclude leaves out files, and .* is a saved data set: remove it"):
        look_at(source, where="data.sources[0]", digests=digests)


def test_modules_of_stdlib_can_be_left_out(digests: Digests) -> None:
    source = schema.Source(path="stdlib", exclude=["encodings/*", "argparse.py"])
    names = [file.name for shard in look_at(source, where="", digests=digests).shards for file in shard.files]
    assert "ast.py" in names
    assert not any(name == "argparse.py" or name.startswith("encodings/") for name in names)


def test_stdlib_is_decoded_as_python_decodes_it(digests: Digests) -> None:
    corpus = corpus_of("stdlib", digests)
    names = [file.name for shard in corpus.shards for file in shard.files]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert not any(part in {"site-packages", "test", "tests", "__pycache__"} for name in names for part in Path(name).parts)
    texts = dict(zip(names, corpus.documents(), strict=True))
    assert sum(map(len, texts.values())) > 5_000_000
    files = {file.name: file.path for shard in corpus.shards for file in shard.files}
    for name in names[:: len(names) // 20]:
        with tokenize.open(files[name]) as file:
            assert texts[name] == file.read()


def test_python_sources_keep_to_their_declared_encoding(tmp_path: Path, digests: Digests) -> None:
    (tmp_path / "old.py").write_bytes("# -*- coding: latin-1 -*-\r\nx = 'é'\r\n".encode("latin-1"))
    (shard,) = sources._corpus_of_files(
        schema.Source(path="stdlib"), "data.sources[0]", tmp_path, [tmp_path / "old.py"], digests, python=True
    ).shards
    assert list(shard.documents()) == ["# -*- coding: latin-1 -*-\nx = 'é'\n"]


def test_fingerprint_follows_content_not_place(tmp_path: Path, digests: Digests) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    one = corpus_of(tmp_path / "one", digests)
    assert one.fingerprint == corpus_of(tmp_path / "two", digests).fingerprint
    path = tmp_path / "one" / "a.txt"
    times = path.stat()
    path.write_text("SAME")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert corpus_of(tmp_path / "one", digests).fingerprint != one.fingerprint


def test_digests_are_remembered_and_a_rewritten_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.digests.RACY_S", -1.0)  # remember at once
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = Digests(tmp_path / "cache").of([str(path)])
    with monkeypatch.context() as patch:
        patch.setattr("trainer.data.digests._hash_content", lambda path: pytest.fail(f"{path} was read again"))
        assert Digests(tmp_path / "cache").of([str(path)]) == first
    replaced = tmp_path / "new"
    replaced.write_text("two")
    os.utime(replaced, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    replaced.rename(path)
    assert Digests(tmp_path / "cache").of([str(path)])[0][1] != first[0][1]
    (tmp_path / "cache" / "digests.json").write_text("{broken")
    assert Digests(tmp_path / "cache").of([str(path)])[0][1] != first[0][1]


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "~/nothing-at-all", "nothing.jsonl", "a/b.parquet", "x.txt.gz"])
def test_missing_local_path_is_a_recipe_error(digests: Digests, path: str) -> None:
    with pytest.raises(RecipeError, match=r"data.sources\[0\].path: no such file or folder") as caught:
        corpus_of(path, digests)
    assert caught.value.exit_code == 78
    assert repr(path) in str(caught.value)


def test_neither_file_nor_hub_name(digests: Digests) -> None:
    with pytest.raises(RecipeError, match=r"'no such thing' is neither a file or folder here nor a hub name"):
        corpus_of("no such thing", digests)


def test_unreachable_hub_is_a_recipe_error(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trainer import schema; from trainer.errors import RecipeError\n"
        "from trainer.data.sources import look_at; from trainer.data.digests import Digests\n"
        "try: look_at(schema.Source(path='nobody/nothing'), where='data.sources[2]', digests=Digests(Path(sys.argv[1])))\n"
        "except RecipeError as error: sys.exit(str(error))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert "data.sources[2].path: no file or folder 'nobody/nothing' here, and not to be had from the hub" in ended.stderr


DAMAGED_LINES = [
    (b'{"text": "a\n', "not JSON"),
    (b'{"text": "\xff"}\n', "byte 10 of the line is not utf-8"),
    (b'{"body": "a"}\n', "no field 'text'; it has 'body'"),
    (b'{"text": 3}\n', "field 'text' is a number, not text"),
    (b'{"text": null}\n', "field 'text' is null, not text"),
    (b'["a"]\n', "a JSON object is needed, this is a list"),
    (b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    (b"[" * 100_000 + b"\n", "not JSON"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGED_LINES, ids=[message for _, message in DAMAGED_LINES])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_damaged_line_is_named(tmp_path: Path, digests: Digests, name: str, line: bytes, message: str) -> None:
    content = b'{"text": "good"}\n' * 2 + line
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=message) as caught:
        texts_of(corpus_of(tmp_path / name, digests))
    assert caught.value.exit_code == 65
    assert f"{tmp_path / name}:3: " in str(caught.value)
    assert len(caught.value.lines) == 1


def test_bad_utf8_is_named_by_line_and_byte(tmp_path: Path, digests: Digests) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nbroken \xe9 here")
    with pytest.raises(DataError, match=rf"{path}:2: byte 12 \(0xe9\) is not utf-8 text"):
        texts_of(corpus_of(path, digests))


def test_python_without_a_known_encoding_is_named(tmp_path: Path, digests: Digests) -> None:
    (tmp_path / "odd.py").write_bytes(b"# coding: nonsense\n")
    (shard,) = sources._corpus_of_files(
        schema.Source(path="stdlib"), "data.sources[0]", tmp_path, [tmp_path / "odd.py"], digests, python=True
    ).shards
    with pytest.raises(DataError, match=r"odd.py: .*nonsense"):
        list(shard.documents())


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz"])
def test_unreadable_container_is_named(tmp_path: Path, digests: Digests, name: str) -> None:
    (tmp_path / name).write_bytes(b"this is not what its name says" * 10)
    with pytest.raises(DataError) as caught:
        texts_of(corpus_of(tmp_path / name, digests))
    assert str(tmp_path / name) in str(caught.value)
    assert len(caught.value.lines) == 1


def test_truncated_gzip_is_named(tmp_path: Path, digests: Digests) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(9999)))[:-200])
    with pytest.raises(DataError, match="not a whole gzip file"):
        texts_of(corpus_of(path, digests))


def test_damaged_saved_data_set_is_named(tmp_path: Path, digests: Digests) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="a damaged or empty saved data set"):
        corpus_of(tmp_path / "saved", digests)


def test_row_without_text_is_named(tmp_path: Path, digests: Digests) -> None:
    datasets.Dataset.from_dict({"text": ["a", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: row 1: field 'text' is null, not text"):
        texts_of(corpus_of(tmp_path / "a.parquet", digests))


@pytest.mark.parametrize("make", ["empty file", "empty folder", "empty saved"])
def test_source_without_a_document(tmp_path: Path, digests: Digests, make: str) -> None:
    path = tmp_path / "none.txt" if make == "empty file" else tmp_path / "none"
    if make == "empty saved":
        datasets.Dataset.from_dict({"text": []}).save_to_disk(path)
    elif make == "empty file":
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(DataError, match=r"data.sources\[0\]: .* holds no document|none: a damaged or empty saved data set"):
        corpus_of(path, digests)


@pytest.fixture
def closed_file() -> Iterator[Path]:
    """A file we may not read, also when the tests run as root; in /tmp, as pytest's own folders are closed to all others."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "closed.txt")
        path.write_text("secret")
        path.chmod(0)
        if os.geteuid():
            yield path
            return
        os.seteuid(65534)
        try:
            yield path
        finally:
            os.seteuid(0)


def test_file_without_permission_is_named(closed_file: Path) -> None:
    denied = pytest.raises(DataError, match="cannot be read: Permission denied")
    with tempfile.TemporaryDirectory(dir="/tmp") as cache, denied as caught:
        corpus_of(closed_file, Digests(Path(cache)))
    assert str(closed_file) in str(caught.value)


@pytest.mark.parametrize("kind", ["text", "jsonl", "gone"])
def test_file_that_changes_while_it_is_read(tmp_path: Path, digests: Digests, kind: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS) if kind == "jsonl" else tmp_path / "a.txt"
    path.write_text(path.read_text() if kind == "jsonl" else "text")
    documents = corpus_of(path, digests).documents()
    if kind == "gone":
        path.unlink()
        with pytest.raises(DataError, match="cannot be read"):
            list(documents)
        return
    next(documents)
    with path.open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match=r"changed while it was being read \(\d+ bytes before, \d+ now\)"):
        list(documents)


def test_readers_import_no_torch(tmp_path: Path, digests: Digests) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    (shard,) = corpus_of(tmp_path / "a.parquet", digests).shards
    program = (
        "import sys, json, trainer.data.worker; from trainer.data.readers import Shard\n"
        "assert len(list(Shard.from_json(json.loads(sys.argv[1]), None).documents())) == 5\n"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(asdict(shard))], check=True, env=os.environ | ENVIRONMENT)
