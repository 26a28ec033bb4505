"""Cut by one layout, read by another: every element comes back from its place, whatever boxes and ranges it was cut into."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.pieces import Fragment, Piece
from tests.unit.checkpoints import blank
from trainer.checkpoint.geometry import Rectangle, index, overlaps, rectangles
from trainer.checkpoint.manifest import LogicalTensor, Manifest, key_of
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.runs import Run, Stored
from trainer.checkpoint.tensor_file import DTYPES, Slot, TensorFile, write_tensor_file
from trainer.errors import DataError
from trainer.update_rules import WEIGHT

NAME = "h.0.weight"
MOST_FILES = 3
Draw = st.DrawFn
Box = tuple[tuple[int, ...], tuple[int, ...]]  # start, size


# ------------------------------------------------------------------------------------- random tensors and ways to cut them


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    transposed: bool
    written: tuple[Stored, ...]
    wanted: tuple[Fragment, ...]


@st.composite
def shapes(draw: Draw) -> tuple[int, ...]:
    dims = draw(st.integers(0, 3))
    return tuple(draw(st.lists(st.integers(1, 9 if dims < 3 else 4), min_size=dims, max_size=dims)))


@st.composite
def cuts(draw: Draw, size: int) -> list[tuple[int, int]]:
    """[0, size) in consecutive parts: (first, count) of each."""
    at = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
    return [(first, end - first) for first, end in itertools.pairwise([0, *at, size])]


@st.composite
def boxes(draw: Draw, shape: tuple[int, ...]) -> list[Box]:
    """The tensor in boxes; a matrix along both dimensions, each band of rows in columns of its own, others along the first."""
    if not shape:
        return [((), ())]
    found: list[Box] = []
    for first, rows in draw(cuts(shape[0])):
        if len(shape) == 2:
            found += [((first, left), (rows, columns)) for left, columns in draw(cuts(shape[1]))]
        else:
            found.append(((first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])))
    return found


@st.composite
def layouts(draw: Draw, shape: tuple[int, ...], *, transposed: bool) -> tuple[Fragment, ...]:
    """Fragments that together are the tensor."""
    return tuple(
        Fragment(Piece(NAME, shape, start, size, transposed=transposed), offset, count)
        for start, size in draw(boxes(shape))
        for offset, count in draw(cuts(torch.Size(size).numel()))
    )


@st.composite
def cases(draw: Draw) -> Case:
    shape = draw(shapes())
    transposed = len(shape) == 2 and draw(st.booleans())
    written, wanted = (draw(layouts(shape, transposed=transposed)) for _ in range(2))
    stored = tuple(Stored(draw(st.integers(0, MOST_FILES - 1)), part) for part in draw(st.permutations(written)))
    return Case(shape, transposed, stored, wanted)


def values_of(fragment: Fragment, logical: Tensor) -> Tensor:
    """The values that a fragment holds, by torch's own slicing and flattening."""
    flat = fragment.piece.box_of(logical).reshape(-1)
    return flat[fragment.offset : fragment.offset + fragment.count]


def logical_tensor(shape: tuple[int, ...]) -> Tensor:
    """Every element is another number, so that none can stand for another."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 0.5


def write(folder: Path, states: Mapping[str, Tensor], stored: Sequence[Stored]) -> Manifest:
    """Files of a checkpoint that holds one tensor in several states."""
    shape = next(iter(states.values())).shape
    files = []
    for number in range(MOST_FILES):
        mine = [(state, fragment) for state in states for file, fragment in stored if file == number]
        slots = {key_of(f, state): Slot(DTYPES[states[state].dtype], (f.count,)) for state, f in mine}
        assert len(slots) == len(mine)
        tensors = (values_of(fragment, states[state]) for state, fragment in mine)
        files.append(write_tensor_file(folder / f"rank-{number:05d}.safetensors", slots, tensors))
    dtypes = {state: DTYPES[tensor.dtype] for state, tensor in states.items()}
    tensor = LogicalTensor.of(tuple(shape), dtypes, stored)
    return replace(blank(), files=tuple(files), tensors={NAME: tensor})


def without(manifest: Manifest, gone: Stored) -> Manifest:
    tensor = manifest.tensors[NAME]
    kept = [stored for run in tensor.runs for stored in run.stored() if stored != gone]
    return replace(manifest, tensors={NAME: LogicalTensor.of(tensor.shape, tensor.dtypes, kept)})


# ------------------------------------------------------------------------------------------------- written and read


@settings(max_examples=250)
@given(cases())
def test_every_element_comes_back(case: Case) -> None:
    logical = logical_tensor(case.shape)
    states = {WEIGHT: logical, "exp_avg": logical.double() * 3, "seen": logical.long()}
    with TemporaryDirectory() as folder:
        manifest = Manifest.decode(write(Path(folder), states, case.written).encode())
        reader = Reader(Path(folder), manifest)
        for state, tensor in states.items():
            whole = reader.whole(NAME, state)
            assert (whole.dtype, whole.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(whole, tensor)
            for wanted in case.wanted:
                assert torch.equal(reader.read(wanted, state), values_of(wanted, tensor))


@settings(max_examples=100)
@given(cases(), st.data())
def test_a_fragment_that_is_missing_is_noticed_where_it_is_needed(case: Case, data: st.DataObject) -> None:
    logical = logical_tensor(case.shape)
    gone = data.draw(st.sampled_from(case.written))
    lost = set(values_of(gone.fragment, logical).tolist())
    with TemporaryDirectory() as folder:
        manifest = without(write(Path(folder), {WEIGHT: logical}, case.written), gone)
        reader = Reader(Path(folder), manifest)
        with pytest.raises(DataError, match=rf"tensor {NAME} \(weight\): {gone.fragment.count} elements are in no fragment"):
            reader.whole(NAME, WEIGHT)
        for wanted in case.wanted:
            values = values_of(wanted, logical)
            if missing := len(lost & set(values.tolist())):
                with pytest.raises(DataError, match=rf"tensor {NAME} .*: {missing} elements are in no fragment"):
                    reader.read(wanted, WEIGHT)
            else:
                assert torch.equal(reader.read(wanted, WEIGHT), values)
    with pytest.raises(ValueError, match=f"the fragments of tensor {NAME} do not make its shape"):
        Manifest.decode(manifest.encode())


@settings(max_examples=100)
@given(cases(), st.data())
def test_a_tensor_of_another_shape_is_refused(case: Case, data: st.DataObject) -> None:
    other = data.draw(shapes().filter(lambda shape: shape != case.shape))
    with TemporaryDirectory() as folder:
        reader = Reader(Path(folder), write(Path(folder), {WEIGHT: logical_tensor(case.shape)}, case.written))
        with pytest.raises(DataError) as caught:
            reader.read(Fragment.whole(Piece.whole(NAME, other)), WEIGHT)
    (line,) = caught.value.lines
    assert line == f"{folder}: tensor {NAME} has shape {list(case.shape)}, the model's is {list(other)}"


# ------------------------------------------------------------------------------------------------- geometry alone


def elements(boxes: Iterator[Rectangle]) -> list[tuple[int, int]]:
    return [(row, column) for box in boxes for row in range(box.top, box.bottom) for column in range(box.left, box.right)]


def by_counting(fragment: Fragment) -> list[tuple[int, int]]:
    """The elements of a fragment, one by one, in their order: its place in a tensor that numbers them."""
    shape, transposed = fragment.piece.shape, fragment.piece.transposed
    columns = torch.Size(shape[1:]).numel() if shape else 1
    places = (
        divmod(int(number), columns) for number in values_of(fragment, torch.arange(torch.Size(shape).numel()).view(shape))
    )
    return [(column, row) if transposed else (row, column) for row, column in places]


@st.composite
def ranges(draw: Draw) -> Fragment:
    """A range of a box of a matrix of 10 × 10."""
    start = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    offset = draw(st.integers(0, size[0] * size[1] - 1))
    count = draw(st.integers(0, size[0] * size[1] - offset))
    return Fragment(Piece(NAME, (10, 10), start, size), offset, count)


@settings(max_examples=500)
@given(ranges(), st.booleans())
def test_a_range_is_at_most_three_rectangles_without_overlap(fragment: Fragment, transposed: bool) -> None:
    fragment = replace(fragment, piece=replace(fragment.piece, transposed=transposed))
    found = list(rectangles(fragment))
    assert len(found) <= 3
    covered = elements(iter(found))
    assert sorted(covered) == by_counting(fragment)
    assert sum(rectangle.area for rectangle in found) == fragment.count
    assert [index(fragment, row, column) for row, column in by_counting(fragment)] == list(range(fragment.count))


@settings(max_examples=500)
@given(ranges(), ranges())
def test_what_two_ranges_share_is_found_once(a: Fragment, b: Fragment) -> None:
    shared = elements(overlaps(a, b))
    assert sorted(shared) == sorted(set(by_counting(a)) & set(by_counting(b)))
    assert sorted(shared) == sorted(elements(overlaps(b, a)))


@settings(max_examples=200)
@given(cases())
def test_a_layout_s_fragments_cover_the_tensor_without_overlap(case: Case) -> None:
    """What `layouts` makes is what checkpoints are, and seen as matrices none of it meets another part of it."""
    parts = [stored.fragment for stored in case.written]
    covered = [element for part in parts for element in by_counting(part)]
    assert len(covered) == len(set(covered)) == torch.Size(case.shape).numel()
    assert not [shared for a, b in itertools.combinations(parts, 2) for shared in overlaps(a, b)]


# ------------------------------------------------------------------------------------------------- what must not be read


WHOLE = Fragment.whole(Piece.whole(NAME, (4, 6)))
HALVES = (Stored(0, replace(WHOLE, count=12)), Stored(1, replace(WHOLE, offset=12, count=12)))


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, write(tmp_path, {WEIGHT: logical_tensor((4, 6))}, HALVES)


@pytest.mark.parametrize(("name", "state"), [("h.1.weight", WEIGHT), (NAME, "exp_avg"), (NAME.upper(), WEIGHT)])
def test_what_is_not_there_is_named(name: str, state: str, halves: tuple[Path, Manifest]) -> None:
    with pytest.raises(DataError, match=f"no tensor {name} with the state {state}: another model or optimizer saved it"):
        Reader(*halves).read(Fragment.whole(Piece.whole(name, (4, 6))), state)


def test_a_tensor_that_is_stored_the_other_way_round_is_named(halves: tuple[Path, Manifest]) -> None:
    with pytest.raises(DataError, match=f"tensor {NAME} is stored the other way round"):
        Reader(*halves).read(Fragment.whole(Piece.whole(NAME, (4, 6), transposed=True)), WEIGHT)


def test_nothing_is_read_of_nothing(halves: tuple[Path, Manifest]) -> None:
    folder, manifest = halves
    for file in manifest.files:
        (folder / file.name).unlink()
    assert Reader(folder, manifest).read(replace(WHOLE, count=0), WEIGHT).shape == (0,)


def test_only_the_files_that_hold_it_are_opened(halves: tuple[Path, Manifest]) -> None:
    folder, manifest = halves
    (folder / manifest.files[1].name).unlink()
    reader = Reader(folder, manifest)
    assert reader.read(HALVES[0].fragment, WEIGHT).tolist() == [n + 0.5 for n in range(12)]
    with pytest.raises(DataError, match=manifest.files[1].name):
        reader.read(WHOLE, WEIGHT)


def test_elements_that_are_there_twice_do_not_stand_for_those_that_are_not(halves: tuple[Path, Manifest]) -> None:
    """As many elements as the tensor has, but the first half of it twice: the second is nowhere."""
    folder, manifest = halves
    tensor = replace(manifest.tensors[NAME], runs=(Run(*HALVES[0]), Run(*HALVES[0])))
    with pytest.raises(DataError, match=f"tensor {NAME}"):
        Reader(folder, replace(manifest, tensors={NAME: tensor})).whole(NAME, WEIGHT)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (HALVES[1]._replace(file=0), "KeyError"),  # not the file that holds it
        (Stored(1, replace(WHOLE, offset=13, count=11)), "elements are in no fragment|KeyError"),
        # the same elements under another name
        (Stored(1, Fragment(Piece(NAME, (4, 6), (1, 0), (3, 6)), 6, 12)), "KeyError"),
    ],
)
def test_a_fragment_that_is_not_where_the_manifest_says_is_named(
    wrong: Stored, said: str, halves: tuple[Path, Manifest]
) -> None:
    folder, manifest = halves
    tensor = replace(manifest.tensors[NAME], runs=(Run(*HALVES[0]), Run(*wrong)))
    with pytest.raises(DataError, match=said) as caught:
        Reader(folder, replace(manifest, tensors={NAME: tensor})).whole(NAME, WEIGHT)
    assert NAME in caught.value.lines[0]


def test_a_fragment_that_is_longer_than_its_tensor_in_the_file_is_named(halves: tuple[Path, Manifest]) -> None:
    folder, manifest = halves
    longer = (Stored(0, replace(WHOLE, count=13)), Stored(1, replace(WHOLE, offset=13, count=11)))
    tensor = replace(manifest.tensors[NAME], runs=tuple(Run(*stored) for stored in longer))
    with pytest.raises(DataError, match=rf"{manifest.files[0].name}: weight:{NAME}:0,0:0 cannot be read"):
        Reader(folder, replace(manifest, tensors={NAME: tensor})).whole(NAME, WEIGHT)


# ------------------------------------------------------------------------------------------------- the file itself


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES, key=str)), shapes()), max_size=5))
def test_safetensors_reads_our_files(tensors: list[tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """And its own reader agrees about every value, name, shape and format."""
    from safetensors.torch import load_file

    made = {
        f"t{n}": torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) for n, (dtype, shape) in enumerate(tensors)
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        slots = {name: Slot(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in made.items()}
        file = write_tensor_file(path, slots, made.values(), metadata={"format": "pt"})
        assert (file.name, file.num_bytes) == (path.name, path.stat().st_size)
        theirs = load_file(path)
        assert theirs.keys() == made.keys()
        ours = TensorFile(path)
        for name, tensor in made.items():
            assert (theirs[name].dtype, theirs[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(theirs[name], tensor)
            out = torch.empty(tensor.numel(), dtype=tensor.dtype)
            ours.read(name, 0, out)
            assert torch.equal(out, tensor.flatten())


def test_a_large_tensor_is_written_and_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that does not fit into a buffer is: here the buffers hold some ten values."""
    from trainer.checkpoint import reader as reader_module
    from trainer.checkpoint import tensor_file

    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 40)
    monkeypatch.setattr(reader_module, "BUFFER_BYTES", 40, raising=False)
    logical = logical_tensor((31, 7))
    grid = [((top, left), (rows, columns)) for top, rows in ((0, 20), (20, 11)) for left, columns in ((0, 3), (3, 4))]
    pieces = [Piece(NAME, (31, 7), start, size) for start, size in grid]
    stored = [Stored(n % MOST_FILES, Fragment.whole(piece)) for n, piece in enumerate(pieces)]
    reader = Reader(tmp_path, write(tmp_path, {WEIGHT: logical}, stored))
    assert torch.equal(reader.whole(NAME, WEIGHT), logical)
    wanted = Fragment(Piece(NAME, (31, 7), (5, 1), (21, 5)), 7, 90)
    assert torch.equal(reader.read(wanted, WEIGHT), values_of(wanted, logical))


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="w: "):
        write_tensor_file(tmp_path / "x", {"w": Slot("F32", (3,))}, [torch.zeros(4)])
    with pytest.raises(ValueError, match="zip"):
        write_tensor_file(tmp_path / "y", {"w": Slot("F32", (3,))}, [])
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "x", {}, [])
