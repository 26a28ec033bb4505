"""Preparing data: once, by any number of workers, whatever kills it or starts beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import schema
from trainer.data import PreparedData, cache, prepare, prepare_summary, sources, unigram_perplexity, workers
from trainer.data.build import choose_held_out
from trainer.errors import DataError, RecipeError, UserError

TEXTS = [f"document {i}: " + "words and äöü " * (i % 17) for i in range(400)]


class Heard:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, str]] = []

    def __call__(self, done: int, total: int, what: str) -> None:
        self.calls.append((done, total, what))

    def of(self, what: str) -> list[tuple[int, int]]:
        return [(done, total) for done, total, heard in self.calls if what in heard]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """400 documents in about ten shards."""
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 8000)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def prepared(
    path: Path | str, cache_dir: Path, progress: cache.Progress | None = None, build: bool = True, **keys: object
) -> PreparedData:
    data = schema.Data.model_validate({"sources": [{"path": str(path)}], "seq_len": 16, "workers": 1, **keys})
    return prepare(data, seed=0, cache_dir=cache_dir, build=build, progress=progress or Heard())


def texts_of(found: PreparedData) -> tuple[list[str], list[str]]:
    """The training and held-out documents, read back from the stores; every one must end as documents do."""

    def read(stores: tuple) -> list[str]:
        texts = []
        for store in stores:
            for begin, end in zip(store.documents[:-1], store.documents[1:], strict=True):
                *ids, last = store.slice(begin, end).tolist()
                assert last == found.tokenizer.end_of_document
                texts.append(found.tokenizer.decode(ids))
        return texts

    return read(found.train), read(found.evaluation)


def content_of(found: PreparedData) -> list[bytes]:
    files = [path for store in (*found.train, *found.evaluation) for path in sorted(store.path.iterdir())]
    return [path.read_bytes() for path in files]


def test_every_document_once_in_order_and_held_out_ones_apart(corpus: Path, tmp_path: Path) -> None:
    heard = Heard()
    found = prepared(corpus, tmp_path / "cache", heard, eval_fraction=0.1)
    train, held_out = texts_of(found)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(train)] == train
    assert [text for text in TEXTS if text in set(held_out)] == held_out
    assert 20 <= len(held_out) <= 60
    size = corpus.stat().st_size
    done = [done for done, _ in heard.of("tokenizing")]
    assert done == sorted(done)
    assert (done[0], done[-1], len(done) > 5) == (0, size, True)
    rows = prepare_summary(found)
    assert [(row.source, row.part, row.documents) for row in rows] == [
        (str(corpus), "train", len(train)),
        (str(corpus), "held out", len(held_out)),
    ]
    assert sum(row.text_bytes for row in rows) == sum(len(text.encode()) for text in TEXTS)
    assert not list((tmp_path / "cache").rglob("shards-*"))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert modes == {0o600}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_workers_do_not_matter(corpus: Path, tmp_path: Path, tokenizer: str) -> None:
    one = prepared(corpus, tmp_path / "one", tokenizer=tokenizer, workers=1)
    two = prepared(corpus, tmp_path / "two", tokenizer=tokenizer, workers=2)
    assert content_of(one) == content_of(two)
    assert one.fingerprint == two.fingerprint


def test_a_second_start_reuses_and_a_changed_source_does_not(corpus: Path, tmp_path: Path) -> None:
    first = prepared(corpus, tmp_path / "cache", tokenizer="bpe:300")
    heard = Heard()
    again = prepared(corpus, tmp_path / "cache", heard, tokenizer="bpe:300")
    assert not heard.calls
    assert again.fingerprint == first.fingerprint
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    changed = prepared(corpus, tmp_path / "cache", heard, tokenizer="bpe:300")
    assert heard.calls
    assert changed.fingerprint != first.fingerprint
    assert prepared(corpus, tmp_path / "cache", tokenizer="bytes").fingerprint != changed.fingerprint


def test_fingerprint_follows_all_that_decides_the_samples(corpus: Path, tmp_path: Path) -> None:
    data = schema.Data.model_validate({"sources": [{"path": str(corpus)}], "seq_len": 16, "workers": 1})

    def fingerprint(seed: int = 0, **keys: object) -> str:
        return prepare(
            data.model_copy(update=keys), seed=seed, cache_dir=tmp_path / "cache", build=True, progress=Heard()
        ).fingerprint

    prints = [fingerprint(), fingerprint(seed=1), fingerprint(seq_len=8), fingerprint(isolate_documents=False)]
    assert len(set(prints)) == 4
    assert fingerprint(workers=2) == prints[0]


@given(hashes=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50), fraction=st.floats(1e-9, 0.5))
def test_both_sides_have_a_document(hashes: list[int], fraction: float) -> None:
    held_out = choose_held_out(np.array(hashes, np.uint64), fraction)
    assert held_out.any()
    assert not held_out.all()
    if 1 < held_out.sum() < len(hashes) - 1:
        assert held_out.tolist() == [value < fraction * 2**64 for value in hashes]
    else:
        assert max(np.array(hashes)[held_out]) <= min(np.array(hashes)[~held_out])


def test_nothing_is_held_out_of_one_document_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("just one document, long enough")
    found = prepared(tmp_path / "one.txt", tmp_path / "cache", hold_out_tail=False)
    assert found.evaluation == ()
    assert found.notes[1:] == (
        f"data.sources[0]: {tmp_path / 'one.txt'} is a single document, so nothing of it is held out for evaluation "
        "(data.hold_out_tail)",
    )


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"line {number}, naïvely 🙂\n" for number in range(400))
    path = tmp_path / "one.txt"
    path.write_text(text)
    found = prepared(path, tmp_path / "cache", eval_fraction=0.1)
    train, held_out = found.train[0], found.evaluation[0]
    beginning, end = (found.tokenizer.decode(store.tokens[:].tolist()) for store in (train, held_out))
    assert beginning + end == text + "<|endoftext|>"  # nothing is in both, and nothing is lost
    assert beginning.endswith("\n")
    assert 0.075 < held_out.num_tokens / (train.num_tokens + held_out.num_tokens) <= 0.1
    assert (train.contents.text_bytes, held_out.contents.text_bytes) == (len(beginning.encode()), len(end.encode()) - 13)
    said = f"its last {held_out.num_tokens:,} of {len(text.encode()) + 1:,} tokens are held out for evaluation"
    assert said in found.notes[-1]
    again = prepared(path, tmp_path / "elsewhere", eval_fraction=0.1)
    assert [store.fingerprint for store in (*again.train, *again.evaluation)] == [train.fingerprint, held_out.fingerprint]
    assert prepared(path, tmp_path / "cache", eval_fraction=0.0).evaluation == ()
    whole = prepared(path, tmp_path / "cache", eval_fraction=0.1, hold_out_tail=False)
    assert found.tokenizer.decode(whole.train[0].tokens[:].tolist()) == text + "<|endoftext|>"


@pytest.mark.parametrize("text", ["ab", "x" * 62, "é" * 40, "x" * 999, "\n" * 63])
def test_the_end_of_any_single_document(text: str, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(text)
    found = prepared(tmp_path / "one.txt", tmp_path / "cache", eval_fraction=0.02)
    tokens = [t for store in (*found.train, *found.evaluation) for t in store.tokens[:].tolist()]
    assert tokens == [*text.encode(), 256]
    assert len(found.evaluation) == (len(tokens) >= 64)
    assert all(store.num_tokens >= 2 for store in found.evaluation)


def test_several_documents_tokenized_before_are_used_again(corpus: Path, tmp_path: Path) -> None:
    before = prepared(corpus, tmp_path / "cache", hold_out_tail=False)
    after = prepared(corpus, tmp_path / "cache")
    assert [store.path for store in after.train] == [store.path for store in before.train]


def test_eval_sources_are_held_out_whole_and_sources_train_whole(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text("held out")
    found = prepared(corpus, tmp_path / "cache", eval_sources=[{"path": str(tmp_path / "eval.txt")}], eval_fraction=0.5)
    assert texts_of(found) == (TEXTS, ["held out"])
    assert found.notes[1:] == ()


def test_the_unigram_baseline_is_the_formula(corpus: Path, tmp_path: Path) -> None:
    found = prepared(corpus, tmp_path / "cache", eval_fraction=0.1)
    counts = 1 + np.bincount(found.train[0].tokens[:], minlength=257)
    store = found.evaluation[0]
    stream = store.slice(0, store.num_tokens)
    targets = np.concatenate(
        [stream[begin + 1 : end] for begin, end in zip(store.documents[:], store.documents[1:], strict=False)]
    )
    expected = np.exp(-np.log(counts / counts.sum())[targets].mean())
    perplexity = unigram_perplexity(found.train, found.evaluation, 257, row_tokens=16, isolate_documents=True, sequences=10**6)
    assert perplexity == pytest.approx(expected, rel=1e-12)
    assert 5 < perplexity < 60


@pytest.mark.parametrize(
    ("content", "keys", "kind", "message"),
    [
        ('{"text": "fine"}\nbroken\n', {}, DataError, r"corpus.jsonl:2: not JSON"),
        ('{"text": ""}\n', {}, DataError, r"data.sources\[0\]: .* holds nothing to learn: its documents are empty"),
        (
            '{"text": "short"}\n',
            {"tails": "drop"},
            RecipeError,
            r"data.seq_len: 16 is too long for data.sources\[0\] .*: its 6 training tokens",
        ),
        ('{"text": "fine"}\nbroken\n', {"tokenizer": "bpe:300"}, DataError, r"corpus.jsonl:2: not JSON"),
        ('{"text": "fine"}\n', {"tokenizer": "bpe:300"}, RecipeError, r"too small for bpe:300"),
    ],
)
def test_failures_reach_builder_and_waiter_alike(
    tmp_path: Path, content: str, keys: dict[str, object], kind: type[UserError], message: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    raised: list[UserError] = []

    def wait() -> None:
        try:
            prepared(path, tmp_path / "cache", build=False, **keys)
        except UserError as error:
            raised.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    with pytest.raises(kind, match=message) as caught:
        prepared(path, tmp_path / "cache", **keys)
    waiter.join(timeout=20)
    assert [(type(error), error.lines) for error in raised] == [(kind, caught.value.lines)]


def test_waiters_wait_and_open_what_was_built(corpus: Path, tmp_path: Path) -> None:
    found: list[PreparedData] = []
    heard = Heard()
    waiter = threading.Thread(
        target=lambda: found.append(prepared(corpus, tmp_path / "cache", heard, build=False, tokenizer="bpe:300"))
    )
    waiter.start()
    while not heard.calls:
        time.sleep(0.01)
    built = prepared(corpus, tmp_path / "cache", tokenizer="bpe:300")
    waiter.join(timeout=20)
    assert "waiting for the building rank" in heard.calls[0][2]
    assert found[0].fingerprint == built.fingerprint


def test_waiter_whose_files_differ_from_the_builders(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SETTLE_S", 0.5)
    waiting = cache.Cache(tmp_path / "cache", request="r" * 16, build=False, progress=Heard())
    building = cache.Cache(tmp_path / "cache", request="r" * 16, build=True, progress=Heard())
    with building.reporting_outcome():
        building.folder("a" * 16, lambda staging: None, what="building")
    with pytest.raises(DataError, match="this machine sees other files"):
        waiting.folder("b" * 16, lambda staging: None, what="building")


def test_an_old_failure_does_not_stop_a_new_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = cache.Cache(tmp_path / "cache", request="r" * 16, build=True, progress=Heard())
    with pytest.raises(DataError, match="of old"), old.reporting_outcome():
        raise DataError("of old")
    outcome = tmp_path / "cache" / f"{'r' * 16}.outcome.json"
    os.utime(outcome, (time.time() - 60, time.time() - 60))
    waiting = cache.Cache(tmp_path / "cache", request="r" * 16, build=False, progress=Heard())
    threading.Timer(0.5, (tmp_path / "cache" / ("a" * 16)).mkdir).start()
    assert waiting.folder("a" * 16, lambda staging: None, what="building").is_dir()
    monkeypatch.setattr(cache, "STALE_S", 0.3)
    with pytest.raises(DataError, match="of old"):
        waiting.folder("b" * 16, lambda staging: None, what="building")


def test_a_failure_that_others_read_is_without_secrets(tmp_path: Path) -> None:
    building = cache.Cache(tmp_path / "cache", request="r" * 16, build=True, progress=Heard())
    with pytest.raises(ValueError, match="hunter2"), building.reporting_outcome():
        raise ValueError("https://me:hunter2@host/ is not to be had")
    outcome = json.loads((tmp_path / "cache" / f"{'r' * 16}.outcome.json").read_text())
    assert outcome["failed"] == ["ValueError: https://[redacted]@host/ is not to be had"]


PROGRAM = """
import os, signal, sys
from pathlib import Path
from trainer import schema
from trainer.data import prepare, sources
path, cache_dir, kill_after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sources.MIN_SHARD_BYTES = 8000
calls = []
def progress(done, total, what):
    calls.append(what)
    if len(calls) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
data = schema.Data.model_validate({"sources": [{"path": path}], "seq_len": 16, "workers": 2})
found = prepare(data, seed=0, cache_dir=cache_dir, build=True, progress=progress)
built = any("tokenizing" in what and "waiting" not in what for what in calls)
print(found.fingerprint, "built" if built else "reused")
"""


def start(corpus: Path, cache_dir: Path, kill_after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(corpus), str(cache_dir), str(kill_after)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("limit_bytes", [1_000, 8_000, 40_000], ids=["tokenizer", "worker", "store"])
def test_a_full_disk_is_one_clear_line(corpus: Path, tmp_path: Path, limit_bytes: int) -> None:
    """A limit on the size of files stands for a full disk: the same failing write, at a place that we choose."""
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))" + PROGRAM
    command = [sys.executable, "-B", "-c", program, str(corpus), str(tmp_path / "cache"), "0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode != 0
    last_line = ended.stderr.strip().splitlines()[-1]
    assert last_line.startswith(f"trainer.errors.DataError: {tmp_path / 'cache'}")
    assert bool(list((tmp_path / "cache").glob("*.building/shards-2"))) == (limit_bytes > 1_000)
    assert bool(list((tmp_path / "cache").glob("*.building/main"))) == (limit_bytes == 40_000)
    assert last_line.endswith("File too large; make room there, or set data.cache_dir")


def processes_of(cache_dir: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(cache_dir).encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue  # it ended meanwhile
    return found


def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("kill_after", [1, 4])
def test_killed_build_resumes_with_unfinished_shards_only(corpus: Path, tmp_path: Path, kill_after: int) -> None:
    killed = start(corpus, tmp_path / "cache", kill_after)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert eventually(lambda: not processes_of(tmp_path / "cache")), "workers outlive the build"
    # Not those whose last file was written when their folder had not yet its name.
    finished = len(list((tmp_path / "cache").glob("*.building/shards-2/" + "[0-9]" * 5 + "/shard.json")))
    assert finished >= kill_after - 1
    whole, resumed = Heard(), Heard()
    undisturbed = prepared(corpus, tmp_path / "undisturbed", whole)
    assert content_of(prepared(corpus, tmp_path / "cache", resumed)) == content_of(undisturbed)
    num_shards = len(whole.calls) - 1  # one call at the start, then one for each shard that is tokenized
    assert len(resumed.calls) - 1 == num_shards - finished
    assert (resumed.calls[0][0] > 0) == (finished > 0)


def test_two_builds_starting_together(corpus: Path, tmp_path: Path) -> None:
    both = [start(corpus, tmp_path / "cache") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (first, how_first), (second, how_second) = (out.split() for out, _ in said)
    assert first == second
    assert sorted([how_first, how_second]) == ["built", "reused"]


def test_second_builder_says_that_it_waits(tmp_path: Path) -> None:
    heard = Heard()
    one = cache.Cache(tmp_path, request="r" * 16, build=True, progress=Heard())
    two = cache.Cache(tmp_path, request="r" * 16, build=True, progress=heard)
    working = threading.Event()

    def make(staging: Path) -> None:
        working.set()
        assert eventually(lambda: bool(heard.calls))

    builder = threading.Thread(target=lambda: one.folder("a" * 16, make, what="tokenizing x"))
    builder.start()
    assert working.wait(10)
    two.folder("a" * 16, lambda staging: pytest.fail("built twice"), what="tokenizing x")
    builder.join()
    assert heard.calls == [(0, 0, "waiting for another process that is tokenizing x")]


def test_damage_between_tokenizing_and_finishing_is_found(corpus: Path, tmp_path: Path) -> None:
    killed = start(corpus, tmp_path / "cache", 4)
    killed.communicate(timeout=60)
    shard = next((tmp_path / "cache").glob("*.building/shards-2/*/tokens.bin"))
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.parent}: damaged: the SHA-256 of tokens.bin does not match"):
        prepared(corpus, tmp_path / "cache")


def test_a_flipped_bit_in_the_finished_store_is_found_by_the_builder(corpus: Path, tmp_path: Path) -> None:
    found = prepared(corpus, tmp_path / "cache")
    tokens = found.train[0].path / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"{tokens}: block 0 .* is damaged: .*; delete {tokens.parent.parent} to tokenize again"
    ):
        prepared(corpus, tmp_path / "cache")


def test_a_worker_that_is_killed_is_one_clear_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = workers.Worker.hand

    def hand_and_kill(self: workers.Worker, number: int, shard: sources.Shard) -> None:
        hand(self, number, shard)
        self._process.kill()

    monkeypatch.setattr(workers.Worker, "hand", hand_and_kill)
    with pytest.raises(RecipeError, match=r"a tokenizing process ended with code -9 .*lower data.workers"):
        prepared(corpus, tmp_path / "cache")


def test_a_fault_of_ours_in_a_worker_is_told_from_a_kill(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hand_nonsense(self: workers.Worker, number: int, shard: sources.Shard) -> None:
        self._tasks.write(json.dumps({"number": number, "shard": {"no": "shard"}}).encode() + b"\n")
        self._tasks.flush()

    monkeypatch.setattr(workers.Worker, "hand", hand_nonsense)
    with pytest.raises(UserError, match=r"a tokenizing process failed: \w+Error: .* please report it") as caught:
        prepared(corpus, tmp_path / "cache")
    assert caught.value.exit_code == 70


def test_cache_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"data.cache_dir: .*/file/cache: Not a directory; name a folder"):
        prepared(corpus, tmp_path / "file" / "cache")


def test_the_standard_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    found = prepared("stdlib", tmp_path / "cache", tokenizer="bpe:1024", workers=2, seq_len=512)
    elapsed_s = time.perf_counter() - began
    train, held_out = prepare_summary(found)
    text_bytes = train.text_bytes + held_out.text_bytes
    with capsys.disabled():
        sys.stdout.write(f"\n[stdlib: {text_bytes / 1e6:.1f} MB in {elapsed_s:.1f} s by 2 workers, BPE training included]\n")
    assert text_bytes > 10e6
    assert 0 < held_out.documents < train.documents
    assert train.text_bytes / train.tokens > 2.0  # bytes per token: BPE does compress
