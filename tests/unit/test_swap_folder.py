import copy
import stat
from pathlib import Path

import pytest

from trainer.engine.swap_folder import private_swap_folders
from trainer.errors import RecipeError


def on_nvme(path: Path) -> dict:
    block = {"device": "nvme", "nvme_path": str(path)}
    return {"zero_optimization": {"offload_optimizer": dict(block), "offload_param": dict(block)}}


def test_runs_and_ranks_that_share_a_drive_do_not_share_files(tmp_path: Path) -> None:
    config = on_nvme(tmp_path / "nvme")
    before = copy.deepcopy(config)
    seen = set()
    for run in ("a/run", "b/run"):
        for rank in (0, 1):
            with private_swap_folders(config, tmp_path / run, rank) as private:
                blocks = private["zero_optimization"]
                path = Path(blocks["offload_optimizer"]["nvme_path"])
                assert blocks["offload_param"]["nvme_path"] == str(path)
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
                (path / "weights.swp").write_bytes(b"x")
                seen.add(path)
            assert not path.exists(), "gone when the run ends"
    assert len(seen) == 4
    assert config == before


def test_what_a_killed_run_left_is_removed_at_its_next_start(tmp_path: Path) -> None:
    config = on_nvme(tmp_path)
    with private_swap_folders(config, tmp_path / "run", 0) as private:
        folder = Path(private["zero_optimization"]["offload_param"]["nvme_path"])
    folder.mkdir()
    (folder / "stale.swp").write_bytes(b"x")
    with private_swap_folders(config, tmp_path / "run", 0):
        assert list(folder.iterdir()) == []


def test_nothing_happens_without_nvme(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with private_swap_folders(config, tmp_path / "run", 0) as private:
        assert private == config
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="nvme_path") as caught, private_swap_folders(on_nvme(tmp_path / "file"), tmp_path, 0):
        pass
    assert caught.value.exit_code == 78
