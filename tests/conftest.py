"""Settings of the whole suite."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

# Examples are the same in every run, and no test depends on how fast the machine is.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


OF_PROCESSES = ("parallel", "end_to_end", "slurm")  # folders whose tests start several processes each


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Where pytest-xdist has several workers, one of them has all tests that start processes: two at a time would want more
    cores than a small machine has."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.path.relative_to(here).parts[0] in OF_PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tensors as small as these ten times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
