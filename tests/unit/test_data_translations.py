"""Translations: rows and lines of two files, their tokens and targets, and how they lie in rows of two halves."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from parallel.loss import IGNORE
from tests.unit.tokenizer_folders import write_word_level
from trainer.data import prepare
from trainer.data.loader import EvalData, TrainData
from trainer.data.prepared import PreparedData, held_out_pairs
from trainer.data.tokenizer_loading import make_tokenizer
from trainer.data.translations import Translation, TranslationRows, Translations
from trainer.errors import DataError, RecipeError
from trainer.schema import Data

S, END = 24, 256
ENGLISH = [f"a {'very ' * (i % 3)}small dog {i}" for i in range(40)]
GERMAN = [f"ein {'ganz ' * (i % 2)}kleiner Hund {i}"[: S - 2].strip() for i in range(40)]


def data_of(folder: Path, source: dict[str, object], **more: object) -> Data:
    return Data.model_validate(
        {"task": "translate", "seq_len": S, "sources": [source], "workers": 1, "cache_dir": str(folder / "cache"), **more}
    )


def prepared(folder: Path, data: Data) -> PreparedData:
    return prepare(data, seed=0, cache_dir=folder / "cache", build=True, progress=lambda done, total, what: None)


def two_files(folder: Path, english: list[str], german: list[str]) -> dict[str, object]:
    (folder / "train.de").write_text("".join(f"{line}\n" for line in german))
    with gzip.open(folder / "train.en.gz", "wt") as file:
        file.write("\n".join(english))  # without a last newline
    return {"path": str(folder / "train.en.gz"), "target_path": str(folder / "train.de")}


def test_each_source_lies_opposite_its_target(tmp_path: Path) -> None:
    found = prepared(tmp_path, data_of(tmp_path, two_files(tmp_path, ENGLISH, GERMAN), eval_fraction=0.0))
    data = TrainData(found.train, found.weights, row_tokens=2 * S, seed=0, isolate_documents=True, global_sequences=1)
    seen = []
    for step in range(data.num_samples):
        (batch,) = data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1)
        (lengths,), tokens, labels = batch.documents.lengths, batch.tokens_BS[0].tolist(), batch.labels_BS[0].tolist()
        half = len(lengths) // 2
        assert sum(lengths[:half]) == sum(lengths[half:]) == S
        assert set(labels[:S]) == {IGNORE}
        ends = np.cumsum(lengths).tolist()
        for source_end, target_end, n, m in zip(ends, ends[half:], lengths, lengths[half:], strict=False):
            source, target = tokens[source_end - n : source_end], tokens[target_end - m : target_end]
            if set(target) == {END}:  # filler
                assert set(labels[target_end - m : target_end]) == {IGNORE}
                continue
            assert source[-1] == target[0] == END
            assert labels[target_end - m : target_end] == [*target[1:], IGNORE]
            seen.append((bytes(source[:-1]).decode(), bytes(target[1:-1]).decode()))
    # A source of more than S - 1 tokens with its end is cut there.
    assert sorted(seen) == sorted((en[: S - 2], de) for en, de in zip(ENGLISH, GERMAN, strict=True))


def test_rows_without_a_target_have_two_halves_too(tmp_path: Path) -> None:
    found = prepared(tmp_path, data_of(tmp_path, two_files(tmp_path, ENGLISH, GERMAN), eval_fraction=0.2))
    held_out = EvalData(found.evaluation, row_tokens=2 * S, isolate_documents=True, sequences=1)
    (last,) = held_out.micro_batches(dp_rank=1, dp=2, micro_sequences=1)
    assert last.documents.lengths == ((S, S),)
    assert last.num_targets == 0


def test_what_is_too_long_or_empty_is_counted(tmp_path: Path) -> None:
    german = ["", "x" * 50, *GERMAN[2:]]
    found = prepared(tmp_path, data_of(tmp_path, two_files(tmp_path, ["a b"] * 40, german), eval_fraction=0.0))
    notes = "\n".join(found.notes)
    assert "1 of 40 pairs were longer than 23 tokens on a side: truncated, 29 targets lost" in notes
    assert "1 of 40 pairs left out: a side is empty" in notes


def test_a_target_that_is_cut_does_not_learn_to_stop() -> None:
    pairs = Translations(make_tokenizer("bytes"), seq_len=S)
    source, target = pairs.tokenize(Translation("s" * 50, "t" * 50)).documents
    assert source.ids == [ord("s")] * (S - 2) + [END]
    assert not source.is_target.any()
    assert target.ids == [END] + [ord("t")] * (S - 2)
    assert target.is_target.tolist() == [False] + [True] * (S - 2)


def test_a_target_begins_with_the_token_that_pads_where_there_is_one(tmp_path: Path) -> None:
    """As decoders of Marian and T5 are started. Tokens kept from a tokenizer that has none are not taken for these."""
    plain, padded = (
        Translations(make_tokenizer(str(write_word_level(tmp_path / name, {"eos_token": "</s>", **more}))), seq_len=S)
        for name, more in (("plain", {}), ("padded", {"pad_token": "<unk>"}))
    )
    pair = Translation("a b", "b")
    assert [document.ids for document in padded.tokenize(pair).documents] == [[2, 3, 1], [0, 3, 1]]
    assert [document.ids for document in plain.tokenize(pair).documents] == [[2, 3, 1], [1, 3, 1]]
    assert plain.fingerprint != padded.fingerprint


def test_fields_are_found_inside_of_objects(tmp_path: Path) -> None:
    rows = TranslationRows("translation.en", "translation.de")
    assert rows.example_of({"translation": {"en": " a ", "de": "ein"}}) == Translation("a", "ein")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"en": "a", "de": "ein"}) + "\n" + json.dumps({"en": "b"}) + "\n")
    source = {"path": str(path), "fields": {"source": "en", "target": "de"}}
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: no pair: it has 'en', and needs 'de'"):
        prepared(tmp_path, data_of(tmp_path, source))


def test_files_of_different_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 40 lines but .* has 39 lines"):
        prepared(tmp_path, data_of(tmp_path, two_files(tmp_path, ENGLISH, GERMAN[1:])))


def test_a_missing_second_file_is_refused(tmp_path: Path) -> None:
    source = two_files(tmp_path, ENGLISH, GERMAN) | {"target_path": "nowhere.de"}
    with pytest.raises(RecipeError, match=r"data\.sources\[0\]\.target_path: no such file: 'nowhere\.de'"):
        prepared(tmp_path, data_of(tmp_path, source))


def test_a_tokenizer_is_trained_on_both_sides(tmp_path: Path) -> None:
    found = prepared(tmp_path, data_of(tmp_path, two_files(tmp_path, ENGLISH, GERMAN), tokenizer="bpe:270"))
    assert len(found.tokenizer.encode("small")) < 5
    assert len(found.tokenizer.encode("kleiner")) < 7


def test_held_out_pairs_are_as_they_are_written(tmp_path: Path) -> None:
    source = two_files(tmp_path, ["", *ENGLISH[1:]], GERMAN)
    data = data_of(tmp_path, source, eval_sources=[source])
    pairs = held_out_pairs(data, cache_dir=tmp_path / "cache", limit=2)
    assert pairs == [Translation(ENGLISH[1], GERMAN[1]), Translation(ENGLISH[2], GERMAN[2])]
