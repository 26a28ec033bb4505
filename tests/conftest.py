"""The settings of the whole suite."""

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

# Failed assertions in the libraries of the tests show what differed, too.
pytest.register_assert_rewrite("tests.parallel", "tests.unit", "tests.end_to_end")


# Folders of tests that start several processes each. Those of whole runs (launchers, SLURM, faults
# to be noticed) wait for half of their time, so the others may use the cores meanwhile.
SCOPES = {"end_to_end": "waiting", "slurm": "waiting", "parallel": "computing"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler in which one worker begins with the tests of each scope, one after
    another.

    The files of the other tests follow on the workers that are free.
    """
    from xdist.scheduler import LoadScopeScheduling

    class InScopes(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return SCOPES.get(Path(file).parent.name, file)

    # In the order of collection: the folders of processes come first.
    config.option.loadscopereorder = False
    return InScopes(config, log)


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put temporary files where pytest cleans up: torchrun never removes the folder of its logs,
    and W&B leaves some when it is killed."""
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
    """Seed what a test draws without a seed of its own, so that it does not depend on the order of
    the tests."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: threads that wait for each other make tensors as small as these ten times
    slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
