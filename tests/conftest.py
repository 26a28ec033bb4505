"""Settings of the whole suite."""

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Examples are the same in every run, and no test depends on how fast the machine is.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# A failed assertion says what differed in the libraries of the tests too.
pytest.register_assert_rewrite("tests.parallel", "tests.unit", "tests.end_to_end")


# Folders of tests that start several processes each. Tests of whole runs (launchers, SLURM, faults
# to be noticed) wait for half of their time, so another worker may have the cores meanwhile.
KINDS = {"end_to_end": "waiting", "slurm": "waiting", "parallel": "computing"}
ORDER = ("waiting", "computing", "others")  # what takes longest begins first


def kind_of(file: str) -> str:
    return KINDS.get(Path(file).parent.name, "others")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler that gives whole files to workers.

    Workers that run at the same time get files of different kinds, as long as there are any.
    """
    from xdist.scheduler import LoadFileScheduling

    class OfOtherKinds(LoadFileScheduling):  # type: ignore[misc]
        def _assign_work_unit(self, node: Any) -> None:
            running = [list(files)[-1] for other, files in self.assigned_work.items() if files and other is not node]
            others = [file for file in self.workqueue if kind_of(file) not in map(kind_of, running)]
            if others:
                self.workqueue.move_to_end(min(others, key=lambda file: ORDER.index(kind_of(file))), last=False)
            super()._assign_work_unit(node)

    # Apart from their kinds, files run in the order of collection.
    config.option.loadscopereorder = False
    return OfOtherKinds(config, log)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put temporary files where pytest cleans up.

    torchrun never removes the folder of its logs, and W&B leaves some when it is killed.
    """
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("tmp"))
    yield
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.fixture(scope="session", autouse=True)
def nobodys_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide what this user has measured of this machine: plans read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        yield


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Seed what a test draws without a seed of its own.

    So it does not depend on the order of the tests.
    """
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def port() -> Iterator[int]:
    """Hold a TCP port for the ranks that a test starts."""
    from trainer.launch.ports import held_port

    with held_port() as port:
        yield port


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, in a module's fixtures too.

    Threads that wait for each other make tensors as small as these ten times slower.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
