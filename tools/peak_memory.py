"""The most memory that a step takes, of a process of its own. It imports nothing but torch, so that
peers in other environments measure the same."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The bytes of a device that this process takes beyond what it had when this was made.

    On a CPU these are resident pages, weights and optimizer included, without those of mapped
    files: a library's text is read in as it is first used, and says nothing. On a GPU they are
    torch's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        status = _status_kib()
        self.before_kib = status["VmRSS"] - status["RssFile"]

    def begin(self) -> None:
        """Forget the peaks until now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            CLEAR.write_text("5", encoding="ascii")

    def bytes(self) -> int:
        """Return the peak since `begin`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = _status_kib()
        return (status["VmHWM"] - status["RssFile"] - self.before_kib) * 1024


def _status_kib() -> dict[str, int]:
    lines = (line.split() for line in STATUS.read_text(encoding="ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}
