"""Runs: as many entries of a manifest whatever the number of ranks, and the same fragments in them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pieces import Fragment, Piece
from tests.unit.checkpoints import blank
from tools.campaign.damage import sealed
from trainer.checkpoint.geometry import overlaps
from trainer.checkpoint.manifest import File, LogicalTensor, Manifest
from trainer.checkpoint.report import Report, both, completed, described, of_rank
from trainer.checkpoint.runs import Run, Stored, joined
from trainer.engine.zero_state import StateFragment
from trainer.update_rules import WEIGHT

NAME = "layers.0.weight"
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")


def shares(piece: Piece, ranks: int, *, tensor: int = 1, place: int = 0) -> list[Stored]:
    """One box in equal shares, as ZeRO-3 cuts it; `tensor` ranks apart."""
    share = -(-piece.numel // ranks)
    cut = [(rank, min(share, piece.numel - rank * share)) for rank in range(ranks)]
    return [Stored(rank * tensor + place, Fragment(piece, rank * share, count)) for rank, count in cut if count > 0]


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 4))
def test_equal_shares_are_one_run_and_the_last(rows: int, columns: int, ranks: int, tensor: int) -> None:
    cut = shares(Piece.whole(NAME, (rows, columns)), ranks, tensor=tensor)
    runs = joined(Run(*stored) for stored in cut)
    assert len(runs) <= 2
    assert [stored for run in runs for stored in run.stored()] == cut
    assert sum(run.together.count for run in runs) == rows * columns


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(1, 3)), max_size=30), st.data())
def test_whatever_is_joined_are_the_same_fragments(parts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """Of two boxes, in any order, joined at once or two halves first."""
    boxes = [Piece(NAME, (40, 2), (start, 0), (20, 2)) for start in (0, 20)]
    given_runs = [Run(file, Fragment(boxes[offset % 2], offset, count)) for file, offset, count in parts]
    cut = data.draw(st.integers(0, len(given_runs)))
    wanted = {stored for run in given_runs for stored in run.stored()}
    for runs in (joined(given_runs), joined((*joined(given_runs[:cut]), *joined(given_runs[cut:])))):
        found = [stored for run in runs for stored in run.stored()]
        assert set(found) == wanted
        assert len(found) >= len(wanted)


@settings(max_examples=300)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 12), st.data())
def test_what_meets_a_range_is_found_by_arithmetic(rows: int, columns: int, ranks: int, data: st.DataObject) -> None:
    shape = (rows, columns)
    runs = joined(Run(*stored) for stored in shares(Piece.whole(NAME, shape), ranks))
    start = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    size = tuple(data.draw(st.integers(1, dim - first)) for dim, first in zip(shape, start, strict=True))
    piece = Piece(NAME, shape, start, size)
    offset = data.draw(st.integers(0, piece.numel - 1))
    wanted = Fragment(piece, offset, data.draw(st.integers(1, piece.numel - offset)))
    found = [stored for run in runs for stored in run.meeting(wanted)]
    every = [stored for run in runs for stored in run.stored() if any(overlaps(stored.fragment, wanted))]
    assert set(every) <= set(found)


def test_a_share_of_a_huge_run_is_found_without_a_look_at_the_others() -> None:
    """A million shares of which two are wanted: only they are made."""
    run = Run(0, Fragment(Piece.whole(NAME, (1_000_000, 4)), 0, 4), repeats=1_000_000, stride=1)
    wanted = Fragment(Piece.whole(NAME, (1_000_000, 4)), 2_000_002, 4)
    assert [stored.file for stored in islice(run.meeting(wanted), 9)] == [500_000, 500_001]


# ------------------------------------------------------------------------------------------------- reports


def report_of(rank: int, *, tp: int, dp: int) -> Report:
    """What a rank of ZeRO-3 reports: its shares of two fused tensors' halves, of which one is a matrix cut over tp."""
    place, share_of = rank % tp, rank // tp
    held: list[StateFragment] = []
    for layer in range(2):
        rows = 24 // tp
        piece = Piece(f"layers.{layer}.weight", (24, 10), (place * rows, 0), (rows, 10))
        cut = {stored.file: stored.fragment for stored in shares(piece, dp)}
        held += [StateFragment(cut[share_of], state, torch.float32) for state in STATES if share_of in cut]
    files = [[f"rank-{rank:05d}.safetensors", 8, "0" * 64]] if held else []
    beside = [["hugging_face/config.json", 2, "f" * 64]] if rank == 0 else []
    return of_rank(rank, {"files": files + beside, "tensors": described(rank, held)})


def combined(reports: list[Report]) -> Report:
    """As messages go up the tree, each as JSON."""
    while len(reports) > 1:
        pairs = [reports[at : at + 2] for at in range(0, len(reports), 2)]
        reports = [json.loads(json.dumps(both(*pair))) if len(pair) == 2 else pair[0] for pair in pairs]
    return reports[0]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_manifest_does_not_grow_with_the_data_parallel_ranks(tp: int) -> None:
    entries: dict[int, int] = {}
    for dp in (2, 3, 8, 20, 60):
        whole = completed(blank(), combined([report_of(rank, tp=tp, dp=dp) for rank in range(tp * dp)]))
        assert [file.name for file in whole.files][-1] == "hugging_face/config.json"
        assert whole.tensors.keys() == {"layers.0.weight", "layers.1.weight"}
        for tensor in whole.tensors.values():
            assert tensor.dtypes == dict.fromkeys(STATES, "F32")
            assert sum(run.together.count for run in tensor.runs) == tensor.numel
        entries[dp] = sum(len(tensor.runs) for tensor in whole.tensors.values())
    assert max(entries.values()) <= 2 * tp * 2, "for each tensor and box a run, and a last share"


def test_each_fragment_is_where_its_rank_put_it_also_beside_ranks_that_hold_nothing() -> None:
    """60 elements over 50 ranks are 30 shares of 2; the files of the others are missing, and numbers move up."""
    tp, dp = 4, 50
    whole = completed(blank(), combined([report_of(rank, tp=tp, dp=dp) for rank in range(tp * dp)]))
    assert len(whole.files) == 30 * tp + 1
    for tensor in whole.tensors.values():
        for stored in (stored for run in tensor.runs for stored in run.stored()):
            rank = int(whole.files[stored.file].name[5:10])
            assert stored.fragment.piece.start[0] == rank % tp * 6
            assert stored.fragment.offset == rank // tp * 2


def test_failures_are_reported_in_the_order_of_the_ranks() -> None:
    outcomes: list[dict[str, Any]] = [{}, {"failure": "disk"}, {}, {"failure": "nan", "not_finite": "w"}, {"failure": "x"}]
    whole = combined([of_rank(rank, outcome) for rank, outcome in enumerate(outcomes)])
    assert whole["failures"] == ["rank 1: disk", "rank 3: nan", "rank 4: x"]
    assert whole["not_finite"] == ["w"]


# ------------------------------------------------------------------------------------------------- the format

PIECE = Piece.whole(NAME, (8, 4))
EIGHT = tuple(File(f"rank-{rank:05d}.safetensors", 32, "0" * 64) for rank in range(8))
SHARED = replace(blank(), files=EIGHT, tensors={NAME: LogicalTensor.of((8, 4), {WEIGHT: "F32"}, shares(PIECE, 8))})


def test_a_run_is_one_entry_and_reads_back() -> None:
    assert json.loads(SHARED.encode())["tensors"][NAME][2] == [[0, [0, 0], [8, 4], 0, 4, 0, 8, 1]]
    assert Manifest.decode(SHARED.encode()) == SHARED


def test_a_manifest_of_an_earlier_version_lists_each_fragment_and_reads_the_same() -> None:
    body = json.loads(SHARED.encode())
    body["format"] = "triaxis checkpoint 1"
    body["tensors"][NAME][2] = [[rank, [0, 0], [8, 4], rank * 4, 4, 0] for rank in range(8)]
    earlier = Manifest.decode(sealed(body)).tensors[NAME]
    assert [s for run in earlier.runs for s in run.stored()] == [s for run in SHARED.tensors[NAME].runs for s in run.stored()]


@pytest.mark.parametrize(
    "entry",
    [
        [0, [0, 0], [8, 4], 0, 4, 0, 9, 1],  # beyond the tensor
        [0, [0, 0], [8, 4], 0, 4, 0, 7, 1],  # less than the tensor
        [0, [0, 0], [8, 4], 0, 4, 0, 8, 2],  # beyond the files
        [1, [0, 0], [8, 4], 0, 4, 0, 8, 1],
        [0, [0, 0], [8, 4], 0, 4, 0, 8, 0],
        [0, [0, 0], [8, 4], 0, 4, 0, 8, -1],
        [0, [0, 0], [8, 4], 0, 32, 0, 1, 1],
        [0, [0, 0], [8, 4], 0, 0, 0, 2**40, 1],
        [0, [0, 0], [8, 4], 0, 4, 0, 8],
        [0, [0, 0], [8, 4], 0, 4, 0, "8", 1],
        [0, [0, 0], [8, 4], 0, 4, 0, 8, 1, 1],
    ],
)
def test_a_run_that_makes_no_sense_is_refused(entry: list[Any]) -> None:
    body = json.loads(SHARED.encode())
    body["tensors"][NAME][2] = [entry]
    with pytest.raises(ValueError, match="tensor"):
        Manifest.decode(sealed(body))
