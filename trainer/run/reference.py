"""The log-probabilities of the answers before training: computed once, stored in the run folder,
and read by every later start.

| file | contents |
|---|---|
| reference/FINGERPRINT.bin | for each document of a token store, the log-probability of its targets; little-endian f8 |
| reference/header.json | format, version, and the SHA-256 of each file; written last |

The losses compare with the model as it was before the first step. Every run starts from that model,
either in full or with an adapter beside frozen weights (whose first output is 0). So one pass over
the data before the first step gives all values that are needed, and no second model takes memory or
time in a step. The values are stored with the run, as its checkpoints are: a resumed run or another
layout would compute them with other last bits, or from other weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from parallel.collectives import all_reduce
from trainer.data import PreparedData
from trainer.data.cache import Progress
from trainer.data.loader import Sweep
from trainer.data.store import TokenStore
from trainer.engine.engine import Engine
from trainer.errors import DataError
from trainer.files.durable import private_file, replacing_folder, write_json
from trainer.files.reading import open_regular, read_json

FORMAT = "triaxis-reference"
VERSION = 1
HEADER = "header.json"
Numbers = npt.NDArray[np.float64]


def with_reference(
    prepared: PreparedData, engine: Engine, *, folder: Path, origin: Path | None, writes: bool, progress: Progress
) -> PreparedData:
    """Return the data with the reference log-probabilities, and store these in `folder` where
    `writes`.

    `origin`: the reference folder of the run that this one continues; None: the engine has the
    weights that training starts from. All ranks must call it together.
    """
    stores = (*prepared.train, *prepared.evaluation)
    reference = compute_reference(engine, stores, progress) if origin is None else read_reference(origin, stores)
    if writes and origin != folder:
        write_reference(folder, reference)
    train, evaluation = (
        tuple(store.with_reference(reference[store.fingerprint]) for store in part)
        for part in (prepared.train, prepared.evaluation)
    )
    return replace(prepared, train=train, evaluation=evaluation)


def compute_reference(engine: Engine, stores: Iterable[TokenStore], progress: Progress) -> dict[str, Numbers]:
    """Return the log-probabilities of each store's documents under the engine's weights, by the
    store's fingerprint, on all ranks."""
    distinct = {store.fingerprint: store for store in stores}
    return {fingerprint: _of_store(engine, store, progress) for fingerprint, store in distinct.items()}


def _of_store(engine: Engine, store: TokenStore, progress: Progress) -> Numbers:
    """Return the log-probabilities of a store's documents. Each data-parallel rank computes those
    of a contiguous range of rows."""
    dp = engine.mesh.data
    sweep = Sweep(
        store, row_tokens=engine.plan.row_tokens, dp_rank=dp.rank, dp=dp.size, micro_sequences=engine.plan.micro_sequences
    )
    log_probs = torch.zeros(store.num_documents, dtype=torch.float64, device=engine.device)
    at = sweep.first_document
    for done, batch in enumerate(sweep.micro_batches()):
        progress(done, sweep.num_micro_batches, "log-probabilities of the answers before training")
        engine.watch.tick()
        # filler rows are the last
        of_batch = engine.evaluator.scores(batch)[0, : store.num_documents - at]
        log_probs[at : at + len(of_batch)] = of_batch
        at += len(of_batch)
    return all_reduce(log_probs, dp).cpu().numpy()


def write_reference(folder: Path, reference: Mapping[str, Numbers]) -> None:
    """Write the reference in place of the one that is there."""
    with replacing_folder(folder) as draft:
        sha256 = {}
        for fingerprint, numbers in reference.items():
            content = numbers.astype("<f8").tobytes()
            sha256[fingerprint] = hashlib.sha256(content).hexdigest()
            with private_file(draft / f"{fingerprint}.bin") as file:
                file.write(content)
        write_json(draft / HEADER, {"format": FORMAT, "version": VERSION, "sha256": sha256})


def read_reference(folder: Path, stores: Sequence[TokenStore]) -> dict[str, Numbers]:
    """Return the stored log-probabilities by the fingerprint of their store. DataError where they
    are missing, damaged, or of other data: they cannot be computed from trained weights."""
    try:
        header = read_json(folder / HEADER)
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise ValueError(f"format {header.get('format')!r} version {header.get('version')!r}, not {FORMAT!r} {VERSION}")
        return {store.fingerprint: _read_store(folder, store, header["sha256"]) for store in stores}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no entry for {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{folder}: the log-probabilities of the answers before training cannot be read: {reason}; bring the folder back, "
            "or begin anew with --resume never"
        ) from None


def _read_store(folder: Path, store: TokenStore, sha256: Mapping[str, Any]) -> Numbers:
    path = folder / f"{store.fingerprint}.bin"
    expected = sha256[store.fingerprint]
    with open_regular(path) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"the SHA-256 of {path.name} does not match")
    numbers = np.frombuffer(content, "<f8")
    if len(numbers) != store.num_documents:
        raise ValueError(f"{path.name} has {len(numbers)} numbers for {store.num_documents} documents")
    return numbers
