"""A real SLURM of two nodes on this machine, for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.campaign.slurm import Lab, LabError


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("slurm") / "lab")
    if missing := lab.missing():
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge")
    try:
        try:
            lab.start()
        except LabError as error:
            pytest.skip(f"SLURM does not start here: {error}")
        yield lab
    finally:
        lab.stop()
