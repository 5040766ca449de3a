import gc

import pytest
import torch

from kernels.chunks import allocate_chunk


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
