"""One process at a time; where no lock can be made, one line instead of waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import RecipeError
from trainer.files.locks import Lock


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "make",
    [Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path)],
    ids=["dir", "link", "loop"],
)
def test_what_is_there_and_no_lock_is_named(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/.lock: no lock can be made there: .*: remove what is there"):
        Lock(tmp_path / ".lock").acquired(0.0)


def test_others_wait_and_say_so(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / ".lock"), Lock(tmp_path / ".lock")
    waited = []

    def waiting() -> None:
        waited.append(second.acquired(0.0))
        first.release()

    assert first.acquired(0.0)
    with second.held(waiting, every_s=5.0):
        assert not first.acquired(0.0)
    assert waited == [False]
    assert first.acquired(0.0)
    first.release()
