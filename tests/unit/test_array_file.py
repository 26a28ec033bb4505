"""An array that is read by ranges is the array, for as long as its file is whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import array_file
from trainer.data.array_file import ArrayFile
from trainer.errors import DataError

DTYPE = np.dtype("<i8")


def written(path: Path, values: list[int]) -> ArrayFile:
    np.array(values, DTYPE).tofile(path)
    return ArrayFile(path, DTYPE)


@given(
    st.lists(st.integers(0, 300), max_size=200).map(sorted), st.lists(st.integers(-1, 301), min_size=1, max_size=9), st.data()
)
def test_it_is_searched_and_sliced_as_numpy_does(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], wanted: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("array")
    block = data.draw(st.sampled_from([1, 2, 7, 4096]))
    begin, end = data.draw(st.tuples(st.integers(-210, 210), st.integers(-210, 210)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_file, "SEARCHED", block)
        array, whole = written(folder / "a.bin", values), np.array(values, DTYPE)
        assert len(array) == len(whole)
        assert array[begin:end].tolist() == whole[begin:end].tolist()
        for side in ("left", "right"):
            assert array.searchsorted(wanted, side) == np.searchsorted(whole, wanted, side=side).tolist()


def test_a_file_that_is_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    """Of a mapping the first touch would end the process with SIGBUS."""
    (tmp_path / "data" / "main").mkdir(parents=True)
    path = tmp_path / "data" / "main" / "tokens.bin"
    array = written(path, list(range(10_000)))
    assert array[9_000:9_002].tolist() == [9_000, 9_001]
    os.truncate(path, 8 * 5_000)
    assert array[4_000:4_002].tolist() == [4_000, 4_001]
    with pytest.raises(
        DataError, match=rf"^{path}: was cut short while it was read.*; delete {tmp_path}/data to tokenize again$"
    ):
        array[4_999:5_001]
    with pytest.raises(DataError, match="cut short"):
        array.searchsorted([9_999], "left")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokens.bin")
    with pytest.raises(DataError, match=r"tokens.bin: cannot be read: a pipe, not a file"):
        ArrayFile(tmp_path / "tokens.bin", DTYPE)


def test_it_holds_no_more_files_open_than_it_must(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    arrays = [written(tmp_path / "a.bin", [1]) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    arrays.clear()
    assert len(os.listdir("/proc/self/fd")) == before
