"""The preparation of what a recipe's data section asks for: tokenizer and token stores, made or
found in the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trainer import schema
from trainer.chat_templates.named import require_tokens, said, source_of, template_named, tokens_of
from trainer.data.build import COUNTS, build_stores
from trainer.data.cache import Cache, Progress, was_built
from trainer.data.digests import Digests, fingerprint_of
from trainer.data.examples import Conversing, Examples
from trainer.data.labelled import Labelled, LabelledText, class_name, in_order, require_classes
from trainer.data.row_format import unread_keys
from trainer.data.rows import order_fingerprint
from trainer.data.sampling import num_windows, order_of
from trainer.data.sources import Corpus, look_at, rows_left_out
from trainer.data.store import VERSION, Packing, TokenStore, Verify
from trainer.data.tail import HELD_OUT, MAIN
from trainer.data.tasks import examples_of
from trainer.data.texts import Texts
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_loading import bpe_size, make_tokenizer, reopen_tokenizer, train_bpe
from trainer.data.translations import Translation
from trainer.errors import DataError, RecipeError
from trainer.files.decoding import read_as
from trainer.files.durable import write_json
from trainer.files.reading import told
from trainer.passes import Drawn, Passes, keep, request_of, stamp_of
from trainer.run_folder import SourcePart
from trainer.tasks import TASKS

CLASSES = "classes.json"
# Of text: more hardly changes the merges, and counting words takes memory.
BPE_TRAINING_BYTES = 256 << 20


@dataclass(frozen=True)
class PreparedData:
    """The facts that a run needs to know about its data."""

    tokenizer: Tokenizer
    examples: Examples | None  # the writer of examples; None: documents are texts
    texts: Texts | None  # the writer of texts; None: documents are examples
    sources: tuple[str, ...]  # names, one per training store
    train: tuple[TokenStore, ...]
    weights: tuple[float, ...] | None  # one per training store; None: by size
    evaluation: tuple[TokenStore, ...]  # empty: nothing is held out
    eval_sources: tuple[str, ...]  # names, one per evaluation store
    passes: Passes  # over the training data; without sources where only evaluations are read
    fingerprint: str  # equal if every training sample is equal; saved with checkpoints
    notes: tuple[str, ...]  # one-line remarks for the console
    corpora: tuple[Corpus, ...]  # the source of each training store
    eval_corpora: tuple[Corpus, ...]  # the source of each evaluation store

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that texts are sorted into; () if the task learns something
        else."""
        return self.examples.classes if isinstance(self.examples, Labelled) else ()

    @property
    def tokens_per_byte(self) -> float | None:
        """The tokens of all held-out texts, their ends included and their openings not, for each
        byte of UTF-8; None where no texts are held out."""
        text_bytes = sum(store.contents.text_bytes for store in self.evaluation)
        if self.texts is None or not text_bytes:
            return None
        opening = len(self.texts.opening)
        return sum(store.num_tokens - opening * store.num_documents for store in self.evaluation) / text_bytes

    @property
    def chat(self) -> Conversing | None:
        """The writer of conversations; None if the task learns from something else."""
        return self.examples.chat if self.examples else None


@dataclass(frozen=True)
class SourceRow:
    """A line of the console's table of sources."""

    source: str
    part: str  # "train" or "held out"
    documents: int
    tokens: int
    text_bytes: int
    packing: Packing | None
    noun: str

    def as_json(self) -> SourcePart:
        """Return what is recorded of it."""
        return SourcePart(source=self.source, part=self.part, noun=self.noun, documents=self.documents, tokens=self.tokens)

    def __str__(self) -> str:
        name = f"{self.source} ({self.part})"
        if self.packing is None:
            return f"{name}: {self.documents:,} documents, {self.tokens:,} tokens"
        rows = self.tokens // self.packing.row_tokens
        share = self.packing.filler / self.tokens
        return (
            f"{name}: {self.packing.examples:,} {self.noun} in {rows:,} sequences of {self.packing.row_tokens:,} tokens "
            f"({share:.1%} filler), {self.packing.targets:,} targets"
        )


def prepare(data: schema.Data, *, seed: int, cache_dir: Path, build: bool, progress: Progress) -> PreparedData:
    """Find or make what `data` asks for, under `cache_dir`.

    `build`: set for one process of a run, which tokenizes what the cache lacks. The others wait for
    it, without a collective, and open what it made; they raise what it raised. RecipeError or
    DataError, with the place in the recipe or in the data.
    """
    asked, cache = data, Cache(cache_dir, request=request_of(data), build=build, progress=progress)
    with cache.reporting_outcome():
        stamp = stamp_of(asked) if build else ""
        digests = Digests(cache_dir)
        corpora, eval_corpora = (_look(data, group, digests) for group in ("sources", "eval_sources"))
        own = _tokenizer(data.tokenizer, corpora, cache, progress)
        if TASKS[data.task].learns_classes and not data.classes:
            data = data.model_copy(update={"classes": _classes((*corpora, *eval_corpora), cache, progress)})
        writer = _Writer.of(data, own)
        stores = _Stores(data, writer, cache, build, progress, [*writer.notes])
        held_out_fraction = 0.0 if eval_corpora else data.eval_fraction
        opened = [stores.of(corpus, held_out_fraction, data.max_rows) for corpus in corpora]
        train = [found[MAIN] for found in opened]
        for corpus, store in zip(corpora, train, strict=True):
            _require_one_sequence(corpus, store, data)
        held_out = [(corpus, found[HELD_OUT]) for corpus, found in zip(corpora, opened, strict=True) if HELD_OUT in found]
        held_out += [(corpus, stores.of(corpus, 0.0, None)[MAIN]) for corpus in eval_corpora]
        weights = _weights(data.sources)
        passes = _passes([corpus.name for corpus in corpora], train, weights, data)
        if build and passes.sources:
            keep(cache_dir, asked, passes, stamp)
    notes = [*stores.notes, *(note for corpus in (*corpora, *eval_corpora) for note in corpus.notes)]
    if held_out_fraction:
        whole = [corpus for corpus, found in zip(corpora, opened, strict=True) if HELD_OUT not in found]
        notes += [_nothing_held_out(corpus, writer, data) for corpus in whole]
    return PreparedData(
        tokenizer=writer.tokenizer,
        examples=writer.examples,
        texts=writer.texts,
        sources=tuple(corpus.name for corpus in corpora),
        train=tuple(train),
        weights=weights,
        evaluation=tuple(store for _, store in held_out),
        eval_sources=tuple(corpus.name for corpus, _ in held_out),
        passes=passes,
        fingerprint=order_fingerprint(
            train,
            weights,
            row_tokens=data.row_tokens,
            seed=seed,
            isolate_documents=data.isolate_documents,
            tails=data.tails == "train",
        ),
        notes=tuple(notes),
        corpora=tuple(corpora),
        eval_corpora=tuple(corpus for corpus, _ in held_out),
    )


@dataclass(frozen=True)
class _Writer:
    """The tokenizer of a run, and what it writes: examples or texts. `notes`: remarks about it."""

    tokenizer: Tokenizer
    examples: Examples | None
    texts: Texts | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, data: schema.Data, own: Tokenizer) -> _Writer:
        """Return what writes the rows of a recipe. `own`: the tokenizer that it names, without what
        the recipe adds."""
        around_turns = tokens_of(data.chat_template)
        tokenizer = own.with_new_tokens(data.new_tokens, unspelt=around_turns)
        if data.chat_template is not None:
            require_tokens(data.chat_template, list(tokenizer.added_tokens))
            tokenizer = tokenizer.changed(chat_template=source_of(data.chat_template))
        if TASKS[data.task].target == "masked":
            tokenizer = tokenizer.for_masking()
        with template_named(data.chat_template):
            examples, texts = examples_of(data, tokenizer), None
        if examples is not None:
            tokenizer = examples.tokenizer
        else:
            texts = Texts.from_recipe(data, tokenizer)
            tokenizer = tokenizer.reading_special() if texts.parse else tokenizer
        notes = [*tokenizer.notes, *_new_token_notes(own, tokenizer, data.new_tokens, around_turns)]
        notes += [said(data.chat_template, has_own=own.has_template)] if TASKS[data.task].answers else []
        notes += [texts.note(tokenizer)] if texts else []
        return cls(tokenizer, examples, texts, tuple(notes))

    @property
    def facts(self) -> list[Any]:
        """The facts that decide, beside the source, what is written."""
        written = [self.examples.fingerprint] if self.examples else []
        return [*written, *(self.texts.facts if self.texts else [])]


@dataclass(frozen=True)
class _Stores:
    """The token stores of sources, made where the cache lacks them. `notes` collects remarks."""

    data: schema.Data
    writer: _Writer
    cache: Cache
    build: bool
    progress: Progress
    notes: list[str]

    def of(self, corpus: Corpus, held_out_fraction: float, max_rows: int | None) -> dict[str, TokenStore]:
        """Return the stores of a source: its main one, and what is held out of it."""
        tail_fraction = held_out_fraction if self.writer.texts and self.data.hold_out_tail else 0.0
        facts = [VERSION, corpus.fingerprint, self.writer.tokenizer.fingerprint, held_out_fraction, *self.writer.facts]
        facts += [] if max_rows is None else ["max_rows", max_rows]
        # Of several documents the rule changes nothing: what is there already is used again.
        if tail_fraction and not self.cache.has(fingerprint_of(facts), HELD_OUT):
            facts.append("tail")
        make = partial(
            build_stores,
            corpus=corpus,
            tokenizer=self.writer.tokenizer,
            task=self.data.task,
            written=self.writer.examples or self.writer.texts or Texts(),
            held_out_fraction=held_out_fraction,
            tail_fraction=tail_fraction,
            max_rows=max_rows,
            workers=self.data.workers,
            progress=self.progress,
        )
        folder = self.cache.folder(fingerprint_of(facts), make, what=f"tokenizing {corpus.name}")
        counts = counts_of(folder)
        self.notes.extend(f"data: {corpus.name}: {remark}" for remark in self._remarks(counts))
        found = _open(folder, corpus, self.writer.tokenizer, verify="sampled" if self.build else "header")
        if tail_fraction and counts["read"] - counts["empty"] == 1 and HELD_OUT in found:
            self.notes.append(_tail_note(corpus, found))
        return found

    def _remarks(self, counts: Counter[str]) -> Iterator[str]:
        yield from filter(None, [rows_left_out(counts), unread_keys(counts)])
        if self.writer.examples:
            yield from self.writer.examples.remarks(counts)


def _nothing_held_out(corpus: Corpus, writer: _Writer, data: schema.Data) -> str:
    one = (writer.examples.noun if writer.examples else "documents").removesuffix("s")
    key = "" if writer.examples or data.hold_out_tail else " (data.hold_out_tail)"
    return f"{corpus.where}: {corpus.name} is a single {one}, so nothing of it is held out for evaluation{key}"


def held_out_pairs(data: schema.Data, *, cache_dir: Path, limit: int) -> list[Translation]:
    """Return the first pairs of `data.eval_sources` with two non-empty sides, at most `limit`, as
    written there."""
    corpora = _look(data, "eval_sources", Digests(cache_dir))
    pairs = (pair for corpus in corpora for shard in corpus.shards for pair in shard.examples(lambda pair: pair) if all(pair))
    return list(islice(pairs, limit))


def was_prepared(data: schema.Data, cache_dir: Path) -> bool:
    """Return whether `prepare` has made all of this under `cache_dir` before. The sources may have
    changed since."""
    return was_built(cache_dir, request=request_of(data))


def prepare_summary(prepared: PreparedData) -> list[SourceRow]:
    """Return the rows of a table: each source's training part, then the held-out parts."""
    parts = [
        *((name, "train", store) for name, store in zip(prepared.sources, prepared.train, strict=True)),
        *((name, "held out", store) for name, store in zip(prepared.eval_sources, prepared.evaluation, strict=True)),
    ]
    noun = prepared.examples.noun if prepared.examples else "documents"
    return [
        SourceRow(name, part, _documents(store), store.num_tokens, store.contents.text_bytes, store.packing, noun)
        for name, part, store in parts
    ]


def _documents(store: TokenStore) -> int:
    return store.packing.examples if store.packing else store.num_documents


def _look(data: schema.Data, group: str, digests: Digests) -> list[Corpus]:
    """Return the sources in one of the lists of `data`."""
    sources = getattr(data, group)
    return [
        look_at(source, where=f"data.{group}[{number}]", digests=digests, task=data.task)
        for number, source in enumerate(sources)
    ]


class _Classes(TypedDict):
    classes: list[str]


def _classes(corpora: Sequence[Corpus], cache: Cache, progress: Progress) -> list[str]:
    """Return the names of the classes found in the sources, in order."""
    what = "looking for the classes"

    def make(staging: Path) -> None:
        write_json(staging / CLASSES, {"classes": in_order(_labels(corpora, progress, what))})

    folder = cache.folder(fingerprint_of(["classes", [corpus.fingerprint for corpus in corpora]]), make, what=what)
    try:
        names = in_order(class_name(name) for name in read_as(_Classes, folder / CLASSES)["classes"])
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / CLASSES}: damaged: {told(error)}; delete {folder} to look again") from None
    return require_classes(names, corpora[0].name)


def _labels(corpora: Sequence[Corpus], progress: Progress, what: str) -> Iterator[str]:
    def label_of(example: LabelledText) -> str:
        return example.label

    done, total = 0, sum(corpus.size for corpus in corpora)
    for corpus in corpora:
        for shard in corpus.shards:
            progress(done, total, what)
            yield from shard.examples(label_of)
            done += shard.size
    progress(done, total, what)


def _tokenizer(spec: str, corpora: Sequence[Corpus], cache: Cache, progress: Progress) -> Tokenizer:
    """Return the tokenizer that `spec` names. One that must be trained is kept in the cache, by
    sources and size."""
    vocab_size = bpe_size(spec)
    if vocab_size is None:
        return make_tokenizer(spec)
    fingerprint = fingerprint_of(["bpe", vocab_size, [corpus.fingerprint for corpus in corpora]])
    what = f"training the tokenizer {spec}"
    folder = cache.folder(
        fingerprint, lambda staging: train_bpe(_sample(corpora, progress, what), vocab_size).save(staging), what=what
    )
    return reopen_tokenizer(folder)


def _new_token_notes(
    own: Tokenizer, tokenizer: Tokenizer, tokens: Sequence[str], around_turns: Collection[str]
) -> Iterator[str]:
    known, found = own.ids_of(tokens), tokenizer.ids_of(tokens)
    for state, group in (("added", found.keys() - known.keys()), ("in the tokenizer already", known.keys())):
        for how, chosen in (
            ("read wherever a text spells them", group - set(around_turns)),
            ("written by the chat template alone", group & set(around_turns)),
        ):
            if chosen:
                listed = ", ".join(f"{token} = {found[token]}" for token in tokens if token in chosen)
                yield f"data.new_tokens: {state}, and {how}: {listed}"


def _sample(corpora: Sequence[Corpus], progress: Progress, what: str) -> Iterator[str]:
    """Yield documents to train a tokenizer on: all, or those of evenly spaced shards if the corpus
    is larger than needed."""
    shards = [shard for corpus in corpora for shard in corpus.shards]
    shards = shards[:: -(-sum(shard.size for shard in shards) // BPE_TRAINING_BYTES)]
    total = sum(shard.size for shard in shards)
    done = 0
    for shard in shards:
        progress(done, total, what)
        yield from shard.texts()
        done += shard.size
    progress(done, total, what)


def _tail_note(corpus: Corpus, found: Mapping[str, TokenStore]) -> str:
    held_out = found[HELD_OUT].num_tokens
    return (
        f"{corpus.where}: {corpus.name} is a single document: its last {held_out:,} of {found[MAIN].num_tokens + held_out:,} "
        "tokens are held out for evaluation (data.hold_out_tail, data.eval_fraction)"
    )


def _open(folder: Path, corpus: Corpus, tokenizer: Tokenizer, verify: Verify) -> dict[str, TokenStore]:
    """Return the stores in a cached folder, which must be of this corpus and this tokenizer."""
    parts = [MAIN, HELD_OUT] if (folder / HELD_OUT).is_dir() else [MAIN]
    found = {part: TokenStore.open(folder / part, verify=verify) for part in parts}
    for store in found.values():
        if (store.contents.source, store.contents.tokenizer) != (corpus.fingerprint, tokenizer.fingerprint):
            raise DataError(f"{store.path}: holds another source or tokenizer than its name says; delete {folder}")
    return found


def counts_of(folder: Path) -> Counter[str]:
    """Return the counts of what became of the rows of a source, which are beside its stores."""
    try:
        return Counter(read_as(dict[str, int], folder / COUNTS))
    except FileNotFoundError:  # of texts whose store was made before rows were counted
        return Counter()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / COUNTS}: damaged: {told(error)}; delete {folder} to tokenize again") from None


def _weights(sources: Sequence[schema.Source]) -> tuple[float, ...] | None:
    """Return the weights of the sources, or None for by size, which means nothing for a single
    one."""
    if len(sources) > 1 and all(source.weight is None for source in sources):
        return None
    return tuple(1.0 if source.weight is None else source.weight for source in sources)


def _passes(names: Sequence[str], stores: Sequence[TokenStore], weights: Sequence[float] | None, data: schema.Data) -> Passes:
    if not stores:
        return Passes(())
    sizes = [num_windows(store.num_tokens, data.row_tokens, tails=data.tails == "train") for store in stores]
    shares = order_of(weights, sizes, seed=0).shares  # the same with every seed
    return Passes(tuple(Drawn(*found) for found in zip(names, sizes, shares, strict=True)))


def _require_one_sequence(corpus: Corpus, store: TokenStore, data: schema.Data) -> None:
    seq_len = data.row_tokens
    if not num_windows(store.num_tokens, seq_len, tails=data.tails == "train"):
        raise RecipeError(
            f"data.seq_len: {seq_len} is too long for {corpus.where} ({corpus.name}): its {store.num_tokens} training tokens "
            f'are fewer than one sequence and its last target ({seq_len + 1}), and data.tails is "drop"; lower data.seq_len, '
            'add documents, or set data.tails to "train"'
        )
