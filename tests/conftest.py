"""Settings of the whole suite."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

# Examples are the same in every run, and no test depends on how fast the machine is.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make tensors as small as these ten times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
