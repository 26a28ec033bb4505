"""What is no regular file, or larger than can be meant, is an error at once, whoever asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.files.reading import (
    open_regular,
    open_to_append,
    read_bytes,
    read_json,
    read_text,
    require_regular,
    require_regular_below,
    told,
)


@pytest.fixture(params=["pipe", "device", "folder", "link to a device", "socketless", "loop", "missing"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "it"
    makers: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: None,
        "folder": path.mkdir,
        "link to a device": lambda: path.symlink_to("/dev/zero"),
        "socketless": lambda: path.symlink_to(tmp_path / "nowhere"),
        "loop": lambda: path.symlink_to(path),
        "missing": lambda: None,
    }
    makers[request.param]()
    return Path("/dev/zero") if request.param == "device" else path


@pytest.mark.timeout(10)
@pytest.mark.parametrize("read", [open_regular, read_bytes, read_text, read_json, require_regular])
def test_none_of_them_is_waited_for(no_file: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(OSError, match=r"not a file|No such file|Too many levels") as error:
        read(no_file)
    assert told(error.value) == error.value.strerror


@pytest.mark.parametrize("name", ["a\0b", "a\udcffb"])
def test_what_can_be_no_name_is_missing_like_any_other(name: str) -> None:
    for read in (open_regular, read_bytes, require_regular):
        with pytest.raises(OSError, match=r"not a possible file name|No such file"):
            read(name)


def test_links_are_followed_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert read_bytes(tmp_path / "link") == b"{}"
    with pytest.raises(OSError, match="Too many levels"):
        read_bytes(tmp_path / "link", follow=False)


def test_a_file_has_a_limit_also_where_its_size_does_not_say_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 101)
    assert len(read_bytes(tmp_path / "file", 101)) == 101
    with pytest.raises(OSError, match="larger than"):
        read_bytes(tmp_path / "file", 100)
    assert Path("/proc/self/status").stat().st_size == 0
    with pytest.raises(OSError, match="larger than"):
        read_bytes("/proc/self/status", 10)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 64 MiB"):
        read_json(tmp_path / "hole")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000])
def test_what_is_no_json_object_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"not (JSON|a JSON object)"):
        read_json(tmp_path / "it.json")


def test_appending_makes_a_file_and_nothing_else(tmp_path: Path) -> None:
    for words in (b"one\n", b"two\n"):
        with open_to_append(tmp_path / "log") as file:
            file.write(words)
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe, not a file"):
        open_to_append(tmp_path / "pipe")


def test_a_library_that_opens_a_whole_folder_finds_only_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    require_regular_below(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="a pipe, not a file"):
        require_regular_below(tmp_path)
