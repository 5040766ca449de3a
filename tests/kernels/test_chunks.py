import pytest
import torch

from kernels.backend import available_backends
from kernels.chunks import allocate_chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(8, 3), (65_536, 17), (256, 4096, 2)])
def test_chunks_are_plain_tensors(backend, shape, dtype):
    chunk = allocate_chunk(shape, dtype)
    assert chunk.shape == shape and chunk.dtype == dtype and chunk.is_contiguous()
    if chunk.nbytes >= 2 << 20:
        assert chunk.data_ptr() % (2 << 20) == 0
    chunk.view(-1)[[0, -1]] = 1
    assert chunk.view(-1)[[0, -1]].tolist() == [1, 1]


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schema_and_fake_kernel():
    torch.library.opcheck(torch.ops.tessera.advise_large_pages.default, (torch.zeros(5), 4096))
