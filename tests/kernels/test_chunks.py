import gc
import mmap
from pathlib import Path

import pytest
import torch

from tessera.kernels.chunks import allocate_chunk, first_rows, touch_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(8, 3), (65_536, 17), (256, 4096, 2)])
def test_chunks_are_zeros(shape, dtype):
    chunk = allocate_chunk(shape, dtype)
    assert chunk.shape == shape and chunk.dtype == dtype and chunk.is_contiguous() and chunk.eq(0).all()
    if chunk.nbytes >= 2 << 20:
        assert chunk.data_ptr() % (2 << 20) == 0
    chunk.view(-1)[[0, -1]] = 1
    assert chunk.view(-1)[[0, -1]].tolist() == [1, 1]


def test_chunks_outlive_what_made_them():
    chunks = [allocate_chunk((65_536, 17)) for _ in range(3)]
    chunks[1].fill_(2)
    view = chunks[1][100]
    del chunks
    gc.collect()
    assert view.eq(2).all()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_first_rows_of_chunks():
    chunks = [torch.arange(8).view(4, 2) + 8 * i for i in range(3)]
    for rows in (0, 1, 4, 7, 12):
        parts = first_rows(chunks, rows)
        assert all(len(part) for part in parts)
        assert torch.cat([chunks[0][:0], *parts]).equal(torch.arange(2 * rows).view(rows, 2))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what memory is resident")
def test_committed_memory_is_there_and_zero():
    chunks = [allocate_chunk((1 << 14, 1024)) for _ in range(3)]  # 64 MiB
    before = resident()
    touch_pages(first_rows(chunks, (1 << 14) + (1 << 12)))
    assert 80 << 20 <= resident() - before + (4 << 20) < 140 << 20
    assert all(chunk.eq(0).all() for chunk in chunks)
    touch_pages([])
