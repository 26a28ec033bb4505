"""Freed memory of the host is kept for the next step, unless the user says otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource, sys
import torch
from trainer.engine.freed_memory import keep_freed_memory

kept = keep_freed_memory(os.environ)

def step():
    return sum(float(part[0]) for part in [torch.ones(2**22) for _ in range(8)])  # 8 times 16 MiB

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_next_step_takes_the_memory_that_the_last_one_freed() -> None:
    def faults(**environment: str) -> tuple[str, int]:
        command = [sys.executable, "-c", FAULTS]
        said = subprocess.run(command, env={**environment, "PYTHONPATH": "."}, capture_output=True, text=True, check=True)
        kept, pages = said.stdout.split()
        return kept, int(pages)

    kept, few = faults()
    left, many = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert (kept, left) == ("True", "False"), "what the user says is left"
    assert few < 100 < 2**25 // 4096 < many, "pages of 4 KiB"
