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


# Folders of tests that start several processes each. Those of whole runs (launchers, SLURM, faults to be noticed) wait for
# half of their time, so the others may have the cores meanwhile.
SCOPES = {"end_to_end": "waiting", "slurm": "waiting", "parallel": "computing"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist's workers one begins with the tests of each scope, one after the other; the files of the rest follow on
    those that are free."""
    from xdist.scheduler import LoadScopeScheduling

    class InScopes(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return SCOPES.get(Path(file).parent.name, file)

    config.option.loadscopereorder = False  # in the order of collection: the folders of processes come first
    return InScopes(config, log)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torchrun never removes the folder of its logs, and W&B leaves some when it is killed: they go where pytest cleans up."""
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(tmp_path_factory.mktemp("tmp"))
    yield
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws without a seed of its own is the same in every order of the tests, and whenever they run."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tensors as small as these ten times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
