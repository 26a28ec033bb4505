"""NVMe transfers on threads: every byte at its place, every failure named."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.engine import built_ops, threaded_io
from trainer.engine.threaded_io import ThreadedHandle

BLOCK = 1024
SIZES = [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 7 * BLOCK + 13]


@pytest.fixture
def handle() -> ThreadedHandle:
    return ThreadedHandle(block_size=BLOCK, queue_depth=2, single_submit=False, overlap_events=True, intra_op_parallelism=2)


@pytest.fixture(autouse=True)
def no_file_left_open(tmp_path: Path) -> Iterator[None]:
    """None of this test's: the process has others, which come and go."""
    yield
    open_files = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
    assert not [path for path in open_files if path.startswith(str(tmp_path))]


def random_bytes(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1, BLOCK, 10_007])
def test_what_is_written_is_read(size: int, offset: int, handle: ThreadedHandle, tmp_path: Path) -> None:
    path, data = str(tmp_path / "x.swp"), random_bytes(size)
    assert handle.async_pwrite(data, path, offset) == 0
    assert handle.wait() == 1
    assert Path(path).read_bytes()[offset:] == data.numpy().tobytes()
    back = torch.zeros_like(data)
    assert handle.async_pread(back, path, offset) == 0
    assert handle.wait() == 1
    assert torch.equal(back, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(700,), (7, 333), (3, 5, 77), ()])
def test_any_format_and_shape(dtype: torch.dtype, shape: tuple[int, ...], handle: ThreadedHandle, tmp_path: Path) -> None:
    data = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(1000).to(dtype)
    handle.async_pwrite(data, str(tmp_path / "x.swp"), 0)
    handle.wait()
    assert (tmp_path / "x.swp").stat().st_size == data.nbytes
    back = torch.zeros_like(data)
    handle.async_pread(back, str(tmp_path / "x.swp"), 0)
    handle.wait()
    assert torch.equal(back, data)


def test_a_view_of_a_buffer_is_filled_in_place(handle: ThreadedHandle, tmp_path: Path) -> None:
    data, buffer = random_bytes(2000), torch.zeros(6000, dtype=torch.uint8)
    handle.async_pwrite(data, str(tmp_path / "x.swp"), 0)
    handle.wait()
    handle.async_pread(buffer.narrow(0, 1500, 2000), str(tmp_path / "x.swp"), 0)
    handle.wait()
    assert torch.equal(buffer[1500:3500], data)
    assert not buffer[:1500].any()
    assert not buffer[3500:].any()


def test_an_empty_tensor(handle: ThreadedHandle, tmp_path: Path) -> None:
    handle.async_pwrite(torch.empty(0), str(tmp_path / "x.swp"), 0)
    handle.async_pread(torch.empty(0), str(tmp_path / "x.swp"), 0)
    assert handle.wait() == 2


def test_many_transfers_at_once_and_how_many_ended(handle: ThreadedHandle, tmp_path: Path) -> None:
    assert handle.wait() == 0
    tensors = [random_bytes(size * 11, seed) for seed, size in enumerate(SIZES * 5)]
    for number, data in enumerate(tensors):
        handle.async_pwrite(data, str(tmp_path / str(number)), number)
    assert handle.wait() == len(tensors)
    assert handle.wait() == 0
    backs = [torch.zeros_like(data) for data in tensors]
    for number, back in enumerate(backs):
        handle.async_pread(back, str(tmp_path / str(number)), number)
    assert handle.wait() == len(tensors)
    for back, data in zip(backs, tensors, strict=True):
        assert torch.equal(back, data)


def test_parts_of_one_file_at_once(handle: ThreadedHandle, tmp_path: Path) -> None:
    path, data = str(tmp_path / "x.swp"), random_bytes(9000)
    for part in reversed(range(9)):
        handle.async_pwrite(data[part * 1000 : (part + 1) * 1000], path, part * 1000)
    assert handle.wait() == 9
    assert Path(path).read_bytes() == data.numpy().tobytes()


def test_requests_have_the_block_size(handle: ThreadedHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, lock = [], threading.Lock()

    def pwrite(file: int, memory: memoryview, offset: int) -> int:
        with lock:
            requests.append((offset, len(memory)))
        return original(file, memory, offset)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    handle.async_pwrite(torch.zeros(50, 53, dtype=torch.uint8), str(tmp_path / "x.swp"), 7)
    handle.wait()
    assert sorted(requests) == [(7, BLOCK), (7 + BLOCK, BLOCK), (7 + 2 * BLOCK, 50 * 53 - 2 * BLOCK)]


def test_short_reads_and_writes_go_on(handle: ThreadedHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may move less than it was asked to, for instance when a signal comes."""
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, memory, offset: pwrite(file, memory[:100], offset))
    monkeypatch.setattr(os, "preadv", lambda file, memories, offset: preadv(file, [memories[0][:100]], offset))
    data, back = random_bytes(3333), torch.zeros(3333, dtype=torch.uint8)
    handle.async_pwrite(data, str(tmp_path / "x.swp"), 0)
    handle.wait()
    handle.async_pread(back, str(tmp_path / "x.swp"), 0)
    handle.wait()
    assert torch.equal(back, data)


def test_only_the_user_may_read_a_swap_file(handle: ThreadedHandle, tmp_path: Path) -> None:
    handle.async_pwrite(torch.zeros(3), str(tmp_path / "x.swp"), 0)
    handle.wait()
    assert stat.S_IMODE((tmp_path / "x.swp").stat().st_mode) == 0o600


def test_a_file_that_is_too_short_is_named(handle: ThreadedHandle, tmp_path: Path) -> None:
    path = tmp_path / "x.swp"
    path.write_bytes(b"x" * 99)
    for offset in (0, 200):
        with pytest.raises(OSError, match=f"{path}: swap file has 99 bytes, {100 + offset} expected"):
            handle.async_pread(torch.zeros(25), str(path), offset)
    assert handle.wait() == 0


def test_a_file_that_shrinks_during_the_transfer_is_named(
    handle: ThreadedHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.swp"
    path.write_bytes(b"x" * 5000)
    monkeypatch.setattr(os, "preadv", lambda file, memories, offset: 0)  # what the kernel answers past the end
    handle.async_pread(torch.zeros(5000, dtype=torch.uint8), str(path), 0)
    with pytest.raises(OSError, match=f"{path}: swap file ended early"):
        handle.wait()


def test_a_file_that_is_not_there(handle: ThreadedHandle, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.swp"):
        handle.async_pread(torch.zeros(3), str(tmp_path / "none.swp"), 0)


def test_a_full_disk_is_named_and_the_other_transfers_end(handle: ThreadedHandle, tmp_path: Path) -> None:
    data = random_bytes(50_000)
    handle.async_pwrite(data, "/dev/full", 0)
    handle.async_pwrite(data, str(tmp_path / "other.swp"), 0)
    with pytest.raises(OSError, match="/dev/full: No space left on device") as failed:
        handle.wait()
    assert failed.value.errno == errno.ENOSPC
    assert (tmp_path / "other.swp").read_bytes() == data.numpy().tobytes()
    assert handle.wait() == 0, "a failure is told once"


def test_pinned_is_what_lies_in_our_buffers(handle: ThreadedHandle) -> None:
    buffer, other = handle.new_cpu_locked_tensor(100, torch.empty(0, dtype=torch.float16)), torch.zeros(100)
    assert (buffer.dtype, buffer.shape) == (torch.float16, (100,))
    for view in (buffer, buffer[3:], buffer[99:], buffer.narrow(0, 10, 5), buffer.view(10, 10)[4]):
        assert handle.is_pinned(view)
    assert not handle.is_pinned(other)
    assert not handle.free_cpu_locked_tensor(other)
    assert handle.free_cpu_locked_tensor(buffer)
    assert not handle.is_pinned(buffer)
    assert not handle.free_cpu_locked_tensor(buffer)


def test_what_is_installed_is_used_and_nothing_is_ever_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A build in torch's cache does not count: another environment's flags would start a compiler, for minutes."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    builder = threaded_io.AsyncIOBuilder
    monkeypatch.setattr(builder, "load", builder.load)  # put back at the end
    before = builder.load
    monkeypatch.setitem(built_ops.installed_ops, builder.NAME, True)
    assert threaded_io.use_threads_where_async_io_is_missing() is None
    assert builder.load is before
    monkeypatch.setitem(built_ops.installed_ops, builder.NAME, False)
    remark = threaded_io.use_threads_where_async_io_is_missing()
    assert remark is not None
    assert threaded_io.BUILD_COMMAND in remark
    assert builder().load(verbose=False).aio_handle is ThreadedHandle
