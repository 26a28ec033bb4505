"""Micro-batches: the right tokens in the right order, whatever the layout, and targets only where a target is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.loss import IGNORE
from tests.unit.stores import END, S, make_store
from trainer.data import loader, unigram_perplexity
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.rows import row_at
from trainer.data.sampling import Blend
from trainer.data.store import TokenStore


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStore]:
    root = tmp_path_factory.mktemp("stores")
    return [make_store(root / "a", [5, 17, 3, 8, 1, 30, 2] * 5), make_store(root / "b", [40, 9, 100], first_token=400)]


def train_data(stores: list[TokenStore], **keys: object) -> TrainData:
    settings = {"weights": [2.0, 1.0], "row_tokens": S, "seed": 3, "isolate_documents": True, "global_sequences": 8}
    return TrainData(stores, **{**settings, **keys})


def rows_of(micro_batches: list[MicroBatch]) -> list[tuple]:
    return [
        (tuple(tokens.tolist()), tuple(labels.tolist()), documents)
        for batch in micro_batches
        for tokens, labels, documents in zip(batch.tokens_BS, batch.labels_BS, batch.documents.lengths, strict=True)
    ]


def test_rows_without_tokens_have_their_targets_and_documents(
    stores: list[TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"dp_rank": 1, "dp": 2, "micro_sequences": 2}
    expected = [batch for step in range(9) for batch in train_data(stores).micro_batches(step, **place)]
    monkeypatch.setattr(TokenStore, "slice", lambda *_: pytest.fail("a token was read"))
    got = [batch for step in range(9) for batch in train_data(stores).micro_batches(step, **place, read=False)]
    assert [batch.documents for batch in got] == [batch.documents for batch in expected]
    assert [batch.num_targets for batch in got] == [batch.num_targets for batch in expected]


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro_sequences", [1, 2])
def test_order_does_not_depend_on_the_layout(stores: list[TokenStore], dp: int, micro_sequences: int) -> None:
    data = train_data(stores)
    for step in (0, 1, 777):
        whole = rows_of(list(data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=8)))
        parts = [list(data.micro_batches(step, dp_rank=rank, dp=dp, micro_sequences=micro_sequences)) for rank in range(dp)]
        assert [row for part in parts for row in rows_of(part)] == whole
        assert {len(part) for part in parts} == {8 // dp // micro_sequences}
        assert {batch.tokens_BS.shape for part in parts for batch in part} == {(micro_sequences, S)}


def test_changing_dp_in_the_middle_gives_every_sample_once_per_epoch(stores: list[TokenStore]) -> None:
    data = train_data(stores[:1], weights=[1.0], global_sequences=12)
    steps, rest = divmod(data.num_samples, 12)
    assert (data.num_samples, steps, rest) == (42, 3, 6)
    seen: Counter[tuple] = Counter()
    for step, dp in zip(range(42), [1, 2, 4, 3] * 11, strict=False):
        for rank in range(dp):
            seen.update(row[0] for row in rows_of(list(data.micro_batches(step, dp_rank=rank, dp=dp, micro_sequences=1))))
    assert len(seen) == 42
    assert set(seen.values()) == {12}  # 42 steps of 12 sequences are 12 epochs of 42


def test_isolated_documents(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [3, 5, 4, 1, 6])
    #  stream: 0 1 E 3 4 5 6 E | 8 9 10 E E 13 14 15 | 16 17 E
    first = row_at(store, 0, row_tokens=S, isolate_documents=True)
    assert first.tokens.tolist() == [0, 1, END, 3, 4, 5, 6, END]
    assert first.labels.tolist() == [1, END, 3, 4, 5, 6, END, 8]
    assert first.is_target.tolist() == [True, True, False, True, True, True, True, False]
    assert first.documents == (3, 5)
    second = row_at(store, 8, row_tokens=S, isolate_documents=True)
    assert second.documents == (4, 1, 3)
    assert np.flatnonzero(~second.is_target).tolist() == [3, 4]
    whole = row_at(store, 0, row_tokens=S, isolate_documents=False)
    assert (whole.documents, whole.is_target.all()) == ((S,), True)
    last = row_at(store, 16, row_tokens=S, isolate_documents=True)
    assert last.tokens.tolist() == [16, 17] + [END] * 6
    assert last.labels[last.is_target].tolist() == [17, END]
    assert last.documents == (2, 6)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), seq_len=st.integers(1, 12), begin=st.integers(0, 60))
def test_rows_agree_with_their_definition(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, begin: int
) -> None:
    total = sum(lengths)
    begin = min(begin, max(0, total - 2))
    store = make_store(tmp_path_factory.mktemp("s") / "s", lengths)
    row = row_at(store, begin, row_tokens=seq_len, isolate_documents=True)
    stream = store.tokens[:].tolist()
    owner = np.repeat(np.arange(len(lengths)), lengths).tolist()
    present = [at for at in range(begin, begin + seq_len) if at + 1 < total]
    assert row.tokens.tolist()[: len(present)] == [stream[at] for at in present]
    assert np.flatnonzero(row.is_target).tolist() == [at - begin for at in present if owner[at] == owner[at + 1]]
    assert row.labels[row.is_target].tolist() == [stream[at + 1] for at in present if owner[at] == owner[at + 1]]
    assert sum(row.documents) == seq_len
    owners = [owner[at] for at in present] + [-1] * (seq_len - len(present))
    assert list(row.documents) == [owners.count(document) for document in dict.fromkeys(owners)]


def test_micro_batch_of_training(stores: list[TokenStore]) -> None:
    (batch,) = train_data(stores).micro_batches(0, dp_rank=0, dp=1, micro_sequences=8)
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    ends = batch.tokens_BS == END
    assert torch.equal(batch.labels_BS == IGNORE, ends)
    inner = ~ends[:, :-1]
    assert torch.equal(batch.labels_BS[:, :-1][inner], batch.tokens_BS[:, 1:][inner])
    assert batch.num_targets == int((~ends).sum())
    (packed,) = train_data(stores, isolate_documents=False).micro_batches(0, dp_rank=0, dp=1, micro_sequences=8)
    assert packed.num_targets == 8 * S
    assert packed.documents.lengths == ((S,),) * 8


def test_fingerprint_and_sizes(stores: list[TokenStore]) -> None:
    data = train_data(stores)
    assert (data.num_samples, train_data(stores, tails=False).num_samples) == (42 + 19, 41 + 18)
    others = [train_data(stores, seed=4), train_data(stores, row_tokens=4), train_data(stores, weights=[1.0, 1.0])]
    others += [train_data(stores, isolate_documents=False), train_data(stores[::-1])]
    others += [train_data(stores, tails=False), train_data(stores, weights=None)]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 8
    assert train_data(stores, global_sequences=4).fingerprint == data.fingerprint


@pytest.mark.parametrize("isolate_documents", [True, False])
@pytest.mark.parametrize("size", [2, 5, 8, 9, 10, 63, 64, 65, 66])
def test_an_epoch_has_every_target_once_to_the_last(tmp_path: Path, size: int, isolate_documents: bool) -> None:
    lengths = [5] * ((size - 2) // 5) + [size - (size - 2) // 5 * 5]
    store = make_store(tmp_path / "s", lengths)
    data = train_data([store], weights=None, global_sequences=1, isolate_documents=isolate_documents)
    batches = [b for step in range(data.num_samples) for b in data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1)]
    learned = sorted(label for batch in batches for label in batch.labels_BS[batch.labels_BS != IGNORE].tolist())
    first = [] if not isolate_documents else np.cumsum([0, *lengths[:-1]]).tolist()
    expected = [token for at, token in enumerate(store.tokens[:].tolist()) if at > 0 and at not in first]
    assert learned == sorted(expected)
    assert all(batch.num_targets > 0 for batch in batches)
    assert all(sum(batch.documents.lengths[0]) == S for batch in batches)
    cut = [batch.documents.lengths[0] for batch in batches if (batch.labels_BS == IGNORE).all(0)[-1] and not isolate_documents]
    assert cut == ([] if isolate_documents or (size - 1) % S == 0 else [((size - 1) % S, S - (size - 1) % S)])


def test_earlier_orders_have_their_earlier_fingerprints(stores: list[TokenStore], tmp_path: Path) -> None:
    """Those that version 4de7b33 gave, without which its checkpoints would be refused."""
    assert train_data(stores, tails=False).fingerprint == "18f4168bf50186e35621ab4cec32faed"
    whole = make_store(tmp_path / "c", [9, 8])
    assert train_data([whole], weights=[1.0]).fingerprint == "adcdad345f01da5e411d1ee2cd38e06b", "no tail, so no difference"


def test_what_is_said_of_each_source(stores: list[TokenStore]) -> None:
    by_size = list(train_data(stores, weights=None, global_sequences=1).described(("a", "b"), 122))
    assert by_size == [
        "a: 42 sequences, 68.9% of the steps, 2 passes in 122 steps",
        "b: 19 sequences, 31.1% of the steps, 2 passes in 122 steps",
    ]
    weighted = list(train_data(stores, weights=[1.0, 1.0], tails=False, global_sequences=8).described(("a", "b"), 9))
    assert weighted == [
        'a: 41 sequences, 50.0% of the steps, 0.878 passes in 9 steps; data.tails "drop" leaves out its last 1 tokens',
        'b: 18 sequences, 50.0% of the steps, 2 passes in 9 steps; data.tails "drop" leaves out its last 4 tokens',
    ]


@pytest.mark.parametrize(("dp", "micro_sequences"), [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("sequences", [5, 1000])
def test_evaluation_covers_every_target_once(stores: list[TokenStore], dp: int, micro_sequences: int, sequences: int) -> None:
    data = EvalData(stores, row_tokens=S, isolate_documents=False, sequences=sequences)
    parts = [list(data.micro_batches(dp_rank=rank, dp=dp, micro_sequences=micro_sequences)) for rank in range(dp)]
    assert len({len(part) for part in parts}) == 1
    assert {batch.tokens_BS.shape for part in parts for batch in part} == {(micro_sequences, S)}
    batches = [batch for part in parts for batch in part]
    labels = torch.cat([batch.labels_BS.flatten() for batch in batches])
    targets = labels[labels != IGNORE].tolist()
    assert sum(batch.num_targets for batch in batches) == len(targets)
    assert all(sum(lengths) == S for batch in batches for lengths in batch.documents.lengths)
    if sequences == 1000:
        assert data.num_sequences == 42 + 19
        assert targets == [token for store in stores for token in store.tokens[1:].tolist()]
    else:
        assert data.num_sequences == 5
        assert targets == stores[0].tokens[1 : 3 * S + 1].tolist() + stores[1].tokens[1 : 2 * S + 1].tolist()


def test_unigram_baseline_has_the_targets_of_the_evaluation(stores: list[TokenStore]) -> None:
    keys = {"row_tokens": S, "isolate_documents": True, "sequences": 7}
    batches = list(EvalData(stores[1:], **keys).micro_batches(dp_rank=0, dp=1, micro_sequences=7))
    labels = batches[0].labels_BS[batches[0].labels_BS != IGNORE]
    counts = torch.bincount(torch.from_numpy(stores[0].tokens[:].astype(np.int64)), minlength=1000) + 1
    expected = torch.exp(-torch.log(counts / counts.sum()).double()[labels].mean())
    assert unigram_perplexity(stores[:1], stores[1:], 1000, **keys) == pytest.approx(float(expected), rel=1e-6)


def test_a_late_step_takes_no_more_work_than_the_first(stores: list[TokenStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the steps before it is made again."""
    done = Counter[str]()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **named: Any) -> Any:
            done[name] += 1
            return real(*args, **named)

        return work

    monkeypatch.setattr(Blend, "_block", counted("block", Blend._block))
    monkeypatch.setattr(loader, "row_at", counted("row", row_at))
    data = train_data(stores)
    works = []
    for step in (0, 10**6):
        done.clear()
        list(data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=8))
        works.append(dict(done))
    assert works[0] == works[1] == {"block": 1, "row": 8}
