import stat
from pathlib import Path

import pytest
import torch

from trainer.threaded_io import ThreadedHandle


@pytest.fixture
def handle() -> ThreadedHandle:
    return ThreadedHandle(block_size=1000, queue_depth=4, single_submit=False, overlap_events=True, intra_op_parallelism=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1, 249, 250, 251, 5003])
def test_what_is_written_is_read_back(handle: ThreadedHandle, elements: int, dtype: torch.dtype, tmp_path: Path) -> None:
    written = torch.randn(elements).to(dtype)
    path = str(tmp_path / "t.swp")
    assert handle.async_pwrite(written, path, 0) == 0
    assert handle.wait() == 1
    read = torch.empty_like(written)
    assert handle.async_pread(read, path, 0) == 0
    assert handle.wait() == 1
    assert torch.equal(read, written)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_many_transfers_run_together_and_wait_counts_them(handle: ThreadedHandle, tmp_path: Path) -> None:
    tensors = [torch.full((3000 + i,), float(i)) for i in range(12)]
    for i, tensor in enumerate(tensors):
        handle.async_pwrite(tensor, str(tmp_path / str(i)), 0)
    assert handle.wait() == 12
    assert handle.wait() == 0
    read = [torch.empty_like(tensor) for tensor in tensors]
    for i, tensor in enumerate(read):
        handle.async_pread(tensor, str(tmp_path / str(i)), 0)
    assert handle.wait() == 12
    assert all(torch.equal(a, b) for a, b in zip(read, tensors, strict=True))


def test_offsets_and_views(handle: ThreadedHandle, tmp_path: Path) -> None:
    path = str(tmp_path / "t.swp")
    whole = torch.arange(1000.0)
    handle.async_pwrite(whole, path, 0)
    handle.wait()
    part = torch.zeros(1000)
    handle.async_pread(part[100:200], path, 4 * 300)
    handle.wait()
    assert torch.equal(part[100:200], whole[300:400])
    assert not part[:100].any()
    assert not part[200:].any()


def test_a_file_that_became_shorter_is_named(handle: ThreadedHandle, tmp_path: Path) -> None:
    path = tmp_path / "t.swp"
    handle.async_pwrite(torch.ones(1000), str(path), 0)
    handle.wait()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=rf"{path}: swap file has 3999 bytes, 4000 expected"):
        handle.async_pread(torch.empty(1000), str(path), 0)


def test_a_failed_write_surfaces_at_wait(handle: ThreadedHandle) -> None:
    handle.async_pwrite(torch.ones(1000), "/dev/full", 0)
    with pytest.raises(OSError, match="No space left"):
        handle.wait()


def test_pinned_means_inside_one_of_its_buffers(handle: ThreadedHandle) -> None:
    buffer = handle.new_cpu_locked_tensor(100, torch.empty(0, dtype=torch.bfloat16))
    assert buffer.dtype == torch.bfloat16
    assert handle.is_pinned(buffer)
    assert handle.is_pinned(buffer[50:])
    assert not handle.is_pinned(torch.ones(10))
    assert handle.free_cpu_locked_tensor(buffer)
    assert not handle.is_pinned(buffer)
    assert not handle.free_cpu_locked_tensor(buffer)
