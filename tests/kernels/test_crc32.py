import zlib

import pytest
import torch

from kernels.backend import available_backends
from kernels.crc32 import crc32


def test_the_published_check_value(backend):
    assert crc32(torch.tensor(list(b"123456789"), dtype=torch.uint8)) == 0xCBF43926


def test_every_length_and_beginning(backend):
    """Lengths around the 8 and 64 bytes that are taken at once, from odd addresses, after other bytes."""
    data = torch.randint(0, 256, (4200,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = data.numpy().tobytes()
    for length in [*range(210), 4095, 4096, 4101]:
        for begin in (0, 1, 7):
            part = slice(begin, begin + length)
            for before in (0, 0xDEADBEEF, 0xFFFFFFFF):
                assert crc32(data[part], before) == zlib.crc32(content[part], before), (begin, length, before)


def test_pieces_are_continued(backend):
    data = torch.arange(1000, dtype=torch.int64).to(torch.uint8)
    assert crc32(data[333:], crc32(data[:333])) == crc32(data)


def test_refused_arguments(backend):
    for wrong in (torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)[::2]):
        with pytest.raises(ValueError, match="data: expected contiguous uint8"):
            crc32(wrong)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schema():
    torch.library.opcheck(
        torch.ops.tessera.crc32.default,
        (torch.zeros(100, dtype=torch.uint8), 7),
        test_utils=("test_schema", "test_autograd_registration"),
    )
