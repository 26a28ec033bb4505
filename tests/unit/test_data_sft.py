"""From files of conversations to micro-batches: whole conversations in rows, answers as targets, nothing lost in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.loss import IGNORE
from trainer import schema
from trainer.data import PreparedData, prepare, prepare_summary, sources, unigram_perplexity
from trainer.data.loader import EvalData, MicroBatch, TrainData
from trainer.data.packing import pack
from trainer.data.store import TokenStore
from trainer.errors import DataError, RecipeError

S = 80
ROWS = [{"prompt": f"what is {i}?", "completion": f"{i} is " + "so and " * (i % 5) + "not more"} for i in range(60)]


def silent(done: int, total: int, what: str) -> None: ...


def write(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, progress: Callable[[int, int, str], None] = silent, **keys: Any) -> PreparedData:
    given = {"task": "sft", "sources": [{"path": str(path)}], "seq_len": S, "workers": 1, "eval_fraction": 0.0, **keys}
    data = schema.Data.model_validate(given)
    return prepare(data, seed=0, cache_dir=path.parent / "cache", build=True, progress=progress)


def train_data(found: PreparedData, *, seq_len: int = S, isolate: bool = True, seed: int = 0) -> TrainData:
    return TrainData(found.train, found.weights, row_tokens=seq_len, seed=seed, isolate_documents=isolate, global_sequences=4)


def answers_of(found: PreparedData, batches: Iterator[MicroBatch] | list[MicroBatch]) -> list[str]:
    """The targets of the batches, decoded, one text for each run of them."""
    end, answers = found.tokenizer.end_of_document, []
    for batch in batches:
        for labels in batch.labels_BS:
            tokens = labels[labels != IGNORE].tolist()
            assert not tokens or tokens[-1] == end or len(tokens) < S
            answers += found.tokenizer.decode(tokens).split("<|endoftext|>")[:-1]
    return answers


def epoch(found: PreparedData, **keys: Any) -> list[MicroBatch]:
    """Every sample once."""
    data = train_data(found, **keys)
    steps, batches = -(-data.num_samples // 4), []
    for step in range(steps):
        batches += list(data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=1))
    return batches[: data.num_samples]


@pytest.mark.parametrize("isolate", [True, False])
def test_an_epoch_learns_every_answer_once_with_its_question_before_it(isolate: bool, tmp_path: Path) -> None:
    found = prepared(write(tmp_path))
    batches = epoch(found, isolate=isolate)
    assert sorted(answers_of(found, batches)) == sorted(row["completion"] for row in ROWS)
    for batch in batches:
        tokens, labels = batch.tokens_BS[0], batch.labels_BS[0]
        documents = batch.documents.lengths[0] if isolate else tuple(np.diff([0, *starts(found, tokens), S]).tolist())
        for begin, size in zip(np.cumsum([0, *documents]), documents, strict=False):
            inside = tokens[begin : begin + size].tolist()
            if set(inside) == {found.tokenizer.end_of_document}:  # what is left of the row
                continue
            conversation = found.tokenizer.decode(inside)
            asked = [row for row in ROWS if f"user\n{row['prompt']}<" in conversation]
            assert len(asked) == 1, "a row holds whole conversations"
            assert asked[0]["completion"] in answers_of(found, [batch])
            assert labels[begin] == IGNORE
    assert batches[0].num_targets == sum(len(answer) + 1 for answer in answers_of(found, batches[:1]))


def starts(found: PreparedData, tokens: torch.Tensor) -> list[int]:
    """Where conversations but the first begin, by what they look like."""
    text = bytes(min(token, 255) for token in tokens.tolist())
    return [at for at in range(1, S) if text[at:].startswith(b"user\n")]


def test_the_summary_and_the_baseline_count_targets(tmp_path: Path) -> None:
    found = prepared(write(tmp_path), eval_fraction=0.2)
    train, held_out = prepare_summary(found)
    store = found.train[0]
    assert train.documents + held_out.documents == len(ROWS)
    assert store.packing is not None
    assert store.packing.row_tokens == S
    assert store.packing.targets == sum(batch.num_targets for batch in epoch(found))
    assert str(train).endswith(
        f"(train): {train.documents} conversations in {store.num_tokens // S} sequences of 80 tokens "
        f"({store.packing.filler / store.num_tokens:.1%} filler), {store.packing.targets:,} targets"
    )
    counts = np.ones(257)
    for batch in epoch(found):
        np.add.at(counts, batch.labels_BS[batch.labels_BS != IGNORE].numpy(), 1)
    data = EvalData(found.evaluation, row_tokens=S, isolate_documents=True, sequences=99)
    held = np.concatenate(
        [batch.labels_BS[batch.labels_BS != IGNORE].numpy() for batch in data.micro_batches(dp_rank=0, dp=1, micro_sequences=1)]
    )
    assert len(held) == found.evaluation[0].packing.targets
    expected = np.exp(-np.log(counts / counts.sum())[held].mean())
    keys = {"row_tokens": S, "isolate_documents": True, "sequences": 99}
    assert unigram_perplexity(found.train, found.evaluation, 257, **keys) == pytest.approx(expected, rel=1e-9)


def test_what_is_cut_or_left_out_is_counted_and_said_at_every_start(tmp_path: Path) -> None:
    rows = [
        *ROWS[:3],
        {"prompt": "q", "completion": "a" * 100},
        {"prompt": "q" * 100, "completion": "a"},
        {"prompt": "q", "completion": " "},
        {"messages": [{"role": "user", "content": "nobody?"}]},
    ]
    prompt_tokens = len("user\nq|assistant\n")
    path, lost = write(tmp_path, rows), prompt_tokens + 101 - 80
    for _ in range(2):
        found = prepared(path)
        assert found.notes[0].startswith("data: chat template: the tokenizer has none: a plain one")
        assert found.notes[1:] == (
            f"data: {path}: 1 of 7 conversations were longer than 80 tokens: truncated, {lost} answer tokens lost",
            f"data: {path}: 1 of 7 conversations left out: the first answer begins beyond 80 tokens",
            f"data: {path}: 2 of 7 conversations left out: no answer, or only empty ones",
        )
        assert found.train[0].packing is not None
        assert found.train[0].packing.examples == 4
    cut = next(batch for batch in epoch(found) if batch.labels_BS[0, -2] == ord("a"))
    assert cut.num_targets == 80 - prompt_tokens
    assert prepared(path, seq_len=256).notes[1].startswith(f"data: {path}: 2 of 7 conversations left out: no answer")


def test_a_source_of_nothing_to_learn(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "q" * 200, "completion": "a"}, {"prompt": "q", "completion": ""}])
    with pytest.raises(DataError, match=r"holds nothing to learn: of its 2 conversations 1 have no answer, and of 1 the first"):
        prepared(path)


def test_a_bad_row_reaches_the_user_from_the_worker(tmp_path: Path) -> None:
    path = write(tmp_path, [*ROWS, {"text": "x"}])
    with pytest.raises(DataError, match=rf"{path}:61: no conversation: it has 'text', and needs"):
        prepared(path)


def test_a_hostile_template_reaches_the_user_from_the_worker(tmp_path: Path) -> None:
    tokenizer = prepared(write(tmp_path)).tokenizer
    tokenizer.save(tmp_path / "hostile")
    config = json.loads((tmp_path / "hostile" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages.__class__.__base__ }}"
    (tmp_path / "hostile" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"data\.tokenizer: its chat template is not safe"):
        prepared(tmp_path / "chats.jsonl", tokenizer=str(tmp_path / "hostile"))


# -------------------------------------------------------------------------------------------------- cache and fingerprints


def test_a_second_start_reuses_and_all_that_decides_targets_does_not(tmp_path: Path) -> None:
    heard: list[str] = []
    path = write(tmp_path)
    first = prepared(path, lambda done, total, what: heard.append(what))
    assert heard
    heard.clear()
    assert prepared(path, lambda done, total, what: heard.append(what)).fingerprint == first.fingerprint
    assert not heard
    others = [{"learn": "all"}, {"seq_len": 48}, {"isolate_documents": False}, {"tokenizer": "bpe:279"}]
    assert len({first.fingerprint, *(prepared(path, **keys).fingerprint for keys in others)}) == 5


def test_workers_and_shards_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepared(write(tmp_path))
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 500)
    (tmp_path / "again").mkdir()
    two = prepared(Path(shutil.copy(tmp_path / "chats.jsonl", tmp_path / "again")), workers=2)
    names = ("tokens.bin", "targets.bin", "documents.bin", "header.json")
    assert [(one.train[0].path / name).read_bytes() for name in names] == [
        (two.train[0].path / name).read_bytes() for name in names
    ]
    assert one.fingerprint == two.fingerprint


def test_the_same_targets_with_another_mask_are_other_samples(tmp_path: Path) -> None:
    """The mask is in the header's hashes, from which the fingerprint of the order is made."""
    found = prepared(write(tmp_path))
    learn_all = prepared(tmp_path / "chats.jsonl", learn="all")
    assert np.array_equal(found.train[0].tokens[:], learn_all.train[0].tokens[:])
    assert found.train[0].fingerprint != learn_all.train[0].fingerprint


def test_every_flipped_bit_of_the_mask_is_found(tmp_path: Path) -> None:
    store = prepared(write(tmp_path, ROWS[:2])).train[0].path
    whole = (store / "targets.bin").read_bytes()
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (store / "targets.bin").write_bytes(damaged)
        with pytest.raises(DataError, match=r"targets\.bin: block 0 .* is damaged"):
            TokenStore.open(store, verify="sampled")
    (store / "targets.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"targets\.bin: \d+ bytes, \d+ were written"):
        TokenStore.open(store)


def test_damaged_counts_are_named(tmp_path: Path) -> None:
    found = prepared(write(tmp_path))
    counts = found.train[0].path.parent / "counts.json"
    counts.write_text("{}}")
    with pytest.raises(DataError, match=r"counts\.json: damaged"):
        prepared(tmp_path / "chats.jsonl")


# --------------------------------------------------------------------------------------------------------- order and layout


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_order_and_targets_do_not_depend_on_the_layout(dp: int, tmp_path: Path) -> None:
    data = train_data(prepared(write(tmp_path)))
    for step in (0, 3, 1000):
        whole = next(data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=4))
        parts = [batch for rank in range(dp) for batch in data.micro_batches(step, dp_rank=rank, dp=dp, micro_sequences=1)]
        assert torch.equal(torch.cat([part.labels_BS for part in parts]), whole.labels_BS)
        assert torch.equal(torch.cat([part.tokens_BS for part in parts]), whole.tokens_BS)
        unread = list(data.micro_batches(step, dp_rank=0, dp=1, micro_sequences=4, read=False))
        assert (unread[0].num_targets, unread[0].documents) == (whole.num_targets, whole.documents)


# ------------------------------------------------------------------------------------------------------------------ packing


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_every_document_is_in_one_row_that_it_fits(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, np.int64), 30)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    room = [30 - sum(lengths[document] for document in row) for row in rows]
    assert min(room) >= 0
    # Best fit opens a row only when no other has room: no two rows could be one.
    assert all(30 - first + 30 - second > 30 for i, first in enumerate(room) for second in room[:i])
    assert rows == sorted(rows)


def test_packing_is_the_best_fit() -> None:
    assert pack(np.array([3, 7, 5, 5, 2, 8]), 10) == [[1, 0], [2, 3], [5, 4]]
    assert pack(np.array([8, 7, 2]), 10) == [[0, 2], [1]], "the tightest room, not the first or the largest"


def test_packing_many_is_quick_and_tight() -> None:
    lengths = np.random.default_rng(0).integers(10, 1500, 20_000)
    rows = pack(lengths, 4096)
    assert len(rows) * 4096 < lengths.sum() * 1.01


# ------------------------------------------------------------------------------------------------ what is said of rows

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(folder: Path, template: str = TEMPLATE) -> str:
    """A folder with byte tokens and a template."""
    from trainer.data.tokenizer_loading import make_tokenizer

    make_tokenizer("bytes").for_chat().save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return str(folder)


def test_keys_that_nothing_reads_are_named_and_counted(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b"}], "source": "web"}
    found = prepared(write(tmp_path, [row, {**row, "score": 1}]))
    said = [note for note in found.notes if "nothing reads" in note]
    assert said == [
        f"data: {tmp_path / 'chats.jsonl'}: keys of rows that nothing reads: id of a turn (2), source (2), score (1)"
    ]
    again = prepared(tmp_path / "chats.jsonl")  # from the cache
    assert [note for note in again.notes if "nothing reads" in note] == said


def test_what_the_template_leaves_out_is_counted(tmp_path: Path) -> None:
    asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows: list[dict[str, Any]] = [
        {"messages": [asked, {**answered, "reasoning_content": "because"}]},
        {"messages": [asked, answered], "tools": [{"name": "weather"}], "chat_template_kwargs": {"enable_thinking": False}},
    ]
    found = prepared(write(tmp_path, rows), tokenizer=chat_tokenizer(tmp_path / "hf"))
    notes = [note.partition("chats.jsonl: ")[2] for note in found.notes]
    assert "1 of 2 conversations: the chat template leaves out a part of an answer, such as its thought" in notes
    assert "1 of 2 conversations have tools, which the chat template does not write" in notes
    assert "keys of rows that nothing reads: chat_template_kwargs.enable_thinking (1)" in notes


def test_a_system_message_that_the_template_leaves_out_is_counted(tmp_path: Path) -> None:
    """As Mistral's, which writes it only before a question that stands last; an answer that also stands in the question is
    found all the same."""
    template = (
        "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% for m in talk %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system'"
        " else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Answer yes or no."},
                {"role": "user", "content": f"yes or no: is {number} even?"},
                {"role": "assistant", "content": ("yes", "no")[number % 2]},
            ]
        }
        for number in range(40)
    ]
    found = prepared(write(tmp_path, rows), tokenizer=chat_tokenizer(tmp_path / "hf", template), seq_len=128)
    assert "40 of 40 conversations: the chat template leaves out a turn, such as the system's" in " ".join(found.notes)
    packing = found.train[0].packing
    assert packing is not None
    assert packing.targets == sum(len(f" {row['messages'][2]['content']}") + 1 for row in rows)
    assert sorted(answers_of(found, epoch(found, seq_len=128))) == sorted(f" {row['messages'][2]['content']}" for row in rows)


@pytest.mark.parametrize("learn", ["answers", "last"])
def test_only_the_last_answer_may_be_learned(learn: str, tmp_path: Path) -> None:
    turns = [{"role": role, "content": role[0] + str(n)} for n in range(3) for role in ("user", "assistant")]
    found = prepared(write(tmp_path, [{"messages": turns}] * 3), learn=learn)
    expected = ["a2"] if learn == "last" else ["a0", "a1", "a2"]
    assert sorted(answers_of(found, epoch(found))) == sorted(expected * 3)


def test_a_turn_that_is_not_learned_need_not_be_written(tmp_path: Path) -> None:
    """A template that drops earlier answers refuses a row only where they are to be learned."""
    template = TEMPLATE.replace("m.content", "(m.content if loop.last or m.role == 'user' else '')", 1)
    turns = [{"role": role, "content": role[0] + str(n)} for n in range(2) for role in ("user", "assistant")]
    tokenizer = chat_tokenizer(tmp_path / "hf", template)
    with pytest.raises(DataError, match=r"chats\.jsonl:1: the chat template does not write what turn 2 says"):
        prepared(write(tmp_path, [{"messages": turns}]), tokenizer=tokenizer)
    turns[1]["weight"] = 0  # type: ignore[assignment]
    found = prepared(write(tmp_path, [{"messages": turns}]), tokenizer=tokenizer, seq_len=256)
    assert found.train[0].packing is not None
    # To a tokenizer of bytes alone that end is text, and the end of document ends the answer.
    assert found.train[0].packing.targets == len("a1<|im_end|>\n") + 1
