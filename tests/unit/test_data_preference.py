"""From files of pairs to micro-batches: which rows are pairs, whole pairs in rows, and only the answers as targets."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.loss import IGNORE
from trainer import schema
from trainer.data import PreparedData, prepare
from trainer.data.fault import Fault
from trainer.data.loader import MicroBatch, TrainData
from trainer.data.pairs import PairRows
from trainer.errors import DataError

S = 96
ROWS = [{"prompt": f"{i}?", "chosen": f"yes{i}" + "!" * (i % 4), "rejected": f"no{i}" + "." * (i % 7)} for i in range(40)]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, YES, NO = turn("user", "2?"), turn("assistant", "4"), turn("assistant", "5")
EARLIER = [turn("user", "1?"), turn("assistant", "2")]
SHAPES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [ASKED], "chosen": [YES], "rejected": [NO]},
    "a repeated prompt (UltraFeedback)": {"prompt": "2?", "chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "no prompt": {"chosen": [ASKED, YES], "rejected": [ASKED, NO]},
    "dialogue (HH)": {"chosen": "\n\nHuman: 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2?\n\nAssistant: 5"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_row_is_the_same_pair(shape: str) -> None:
    pair = PairRows().example_of(SHAPES[shape])
    told = [
        [(message.role, message.content, message.counts) for message in side.turns] for side in (pair.chosen, pair.rejected)
    ]
    assert told == [[("user", "2?", False), ("assistant", answer, True)] for answer in ("4", "5")]
    assert list(PairRows().texts_of(pair)) == ["2?", "4", "5"]


def test_what_was_said_before_is_no_answer() -> None:
    """Earlier turns of the assistant, which both conversations have, and what the system said."""
    row = {"system": "add", "better": [*EARLIER, ASKED, YES], "worse": [*EARLIER, ASKED, NO, ASKED, YES]}
    pair = PairRows({"chosen": "better", "rejected": "worse"}).example_of(row)
    assert [message.counts for message in pair.chosen.turns] == [False, False, False, False, True]
    assert [message.counts for message in pair.rejected.turns] == [False, False, False, False, True, False, True]
    assert pair.chosen.turns[0].role == "system"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "2?", "chosen": "4"}, "no pair: it has 'prompt', 'chosen', and no 'rejected'; fix the row, or name its"),
        ({"chosen": "4", "rejected": "5"}, "'chosen' is text without a 'prompt' beside it"),
        ({"prompt": "2?", "chosen": 4, "rejected": "5"}, "'chosen' is "),
        ({"chosen": [{"role": "user"}], "rejected": "5"}, "chosen[0] has 'role'; a turn is"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(Fault) as raised:
        PairRows().example_of(row)
    assert says in str(raised.value)


def prepared(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> PreparedData:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"task": "preference", "sources": [{"path": str(path)}], "seq_len": S, "workers": 1, "eval_fraction": 0.0, **keys}
    data = schema.Data.model_validate(given)
    return prepare(data, seed=0, cache_dir=folder / "cache", build=True, progress=lambda done, total, what: None)


def epoch(found: PreparedData) -> list[MicroBatch]:
    data = TrainData(found.train, found.weights, row_tokens=S, seed=0, isolate_documents=True, global_sequences=1)
    return [batch for step in range(data.num_samples) for batch in data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1)]


def test_an_epoch_has_every_pair_once_with_only_its_answers_as_targets(tmp_path: Path) -> None:
    found = prepared(tmp_path, ROWS)
    seen = []
    for batch in epoch(found):
        ends = np.cumsum([0, *batch.documents.lengths[0]]).tolist()
        answers = []
        for begin, end in list(pairwise(ends))[: len(batch.documents.lengths[0]) // 2 * 2]:
            tokens, labels = batch.tokens_BS[0, begin:end], batch.labels_BS[0, begin:end]
            answer = found.tokenizer.decode(labels[labels != IGNORE].tolist())
            prompt = found.tokenizer.decode(tokens[: int((labels != IGNORE).nonzero()[0])].tolist())
            answers.append((prompt.split("\n")[1].split("<")[0], answer.removesuffix("<|endoftext|>")))
            assert answer.endswith("<|endoftext|>"), "the end of the turn is learned"
        seen += [{"prompt": q, "chosen": yes, "rejected": no} for (q, yes), (_, no) in zip(*[iter(answers)] * 2, strict=True)]
    assert sorted(seen, key=str) == sorted(ROWS, key=str)


def test_pairs_that_are_not_learned_whole_are_told(tmp_path: Path) -> None:
    long = "x" * 60
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no"},
        {"prompt": "b", "chosen": long, "rejected": "no"},  # 17 + 61 and 20 tokens: more than a row
        {"prompt": long, "chosen": "yes", "rejected": "no"},  # which leaves no answer in half a row
        {"prompt": "c", "chosen": "yes", "rejected": ""},
        {"prompt": "d", "chosen": "yes", "rejected": "yes"},
    ]
    found = prepared(tmp_path, rows)
    answers = [length for batch in epoch(found) for length in batch.documents.lengths[0][:2]]
    assert sorted(answers) == [20, 20, 21, S // 2], "the long answer is cut at half a row"
    told = "\n".join(found.notes)
    cut = 17 + 61 - S // 2
    assert f"1 of 5 pairs were longer than {S} tokens: each answer with its prompt truncated to half of that, {cut} " in told
    assert "1 of 5 pairs left out: longer than 96 tokens, and an answer begins beyond half of that" in told
    assert "1 of 5 pairs left out: an answer is missing or empty" in told
    assert "1 of 5 pairs left out: both answers are the same" in told
    with pytest.raises(DataError, match="holds nothing to learn: of its 3 pairs 1 lack an answer, 1 have twice the same"):
        prepared(tmp_path, rows[2:])
