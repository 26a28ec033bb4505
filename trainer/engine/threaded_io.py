"""NVMe transfers without libaio or a compiler: DeepSpeed's swap handle, on threads that call pread
and pwrite.

DeepSpeed would compile its `async_io` extension at first use. That takes minutes, a compiler and
libaio's headers, and a build that was killed leaves a lock on which every later start waits for
ever. So the extension is used where it is already built (`built_ops.py`), and these threads
everywhere else. Reads and writes release the GIL, so both overlap with computation.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor

from trainer.engine.built_ops import use_built

BUILD_COMMAND = "triaxis doctor --build"


class ThreadedHandle:
    """The methods of an `aio_handle` that DeepSpeed's swappers call. Transfers start at once;
    `wait` returns when all are done."""

    def __init__(
        self, block_size: int, queue_depth: int, single_submit: bool, overlap_events: bool, intra_op_parallelism: int
    ) -> None:
        """Start the threads. `block_size` [bytes] cuts a transfer into requests, of which
        `queue_depth` · `intra_op_parallelism`, at most 32, run at a time. The other two arguments
        are libaio's own and have no effect here."""
        self._block_size = block_size
        self._threads = ThreadPoolExecutor(min(32, queue_depth * intra_op_parallelism), thread_name_prefix="nvme")
        self._transfers: list[_Transfer] = []
        self._buffers: list[Tensor] = []

    def new_cpu_locked_tensor(self, num_elements: int, like: Tensor) -> Tensor:
        buffer = torch.empty(num_elements, dtype=like.dtype, pin_memory=torch.cuda.is_available())
        self._buffers.append(buffer)
        return buffer

    def free_cpu_locked_tensor(self, buffer: Tensor) -> bool:
        before = len(self._buffers)
        self._buffers = [own for own in self._buffers if own.data_ptr() != buffer.data_ptr()]
        return len(self._buffers) < before

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether the tensor is in one of our buffers, which is what DeepSpeed means by
        pinned."""
        start = tensor.data_ptr()
        return any(own.data_ptr() <= start < own.data_ptr() + own.nbytes for own in self._buffers)

    def async_pread(self, tensor: Tensor, path: str, offset: int) -> int:
        file = os.open(path, os.O_RDONLY)
        size = os.fstat(file).st_size
        if size < offset + tensor.nbytes:
            os.close(file)
            raise OSError(
                f"{path}: swap file has {size} bytes, {offset + tensor.nbytes} expected: it was damaged during the run"
            )
        self._start(_read_block, path, file, tensor, offset)
        return 0

    def async_pwrite(self, tensor: Tensor, path: str, offset: int) -> int:
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._start(_write_block, path, file, tensor, offset)
        return 0

    def wait(self) -> int:
        """Wait for all transfers since the last call, and return their number. OSError for the
        first that failed."""
        transfers, self._transfers = self._transfers, []
        for transfer in transfers:
            transfer.end()
        for transfer in transfers:
            transfer.check()
        return len(transfers)

    def _start(self, move: Any, path: str, file: int, tensor: Tensor, offset: int) -> None:
        memory = tensor.detach().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        blocks = [
            self._threads.submit(move, file, memory[at : at + self._block_size], offset + at)
            for at in range(0, len(memory), self._block_size)
        ]
        self._transfers.append(_Transfer(path, file, blocks))


@dataclass(frozen=True)
class _Transfer:
    path: str
    file: int
    blocks: list[Future[None]]

    def end(self) -> None:
        wait(self.blocks)
        os.close(self.file)

    def check(self) -> None:
        for block in self.blocks:
            try:
                block.result()
            except OSError as error:
                raise OSError(error.errno, f"{self.path}: {error.strerror or error}") from error


def _read_block(file: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(file, [memory[done:]], offset + done)
        if count == 0:
            raise OSError("swap file ended early: it was damaged during the run")
        done += count


def _write_block(file: int, memory: memoryview, offset: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(file, memory[done:], offset + done)


def use_threads_where_async_io_is_missing() -> str | None:
    """Give DeepSpeed this handle unless its extension is built. Return a remark for the console
    when it is not."""
    try:
        if use_built(AsyncIOBuilder.NAME):
            return None
        state = "is not built here"
    except (ImportError, OSError) as error:  # built for what is no longer here
        state = f"cannot be loaded here ({str(error).splitlines()[0]})"
    AsyncIOBuilder.load = lambda self, verbose=True: SimpleNamespace(aio_handle=ThreadedHandle)
    return (
        f"DeepSpeed's async_io {state}: NVMe offload reads and writes with threads, which is slower on fast disks; "
        f"to build it (needs a compiler and libaio-dev): {BUILD_COMMAND}"
    )
