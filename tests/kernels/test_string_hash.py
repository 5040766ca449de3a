import random

import pytest
import torch

from tessera.kernels.backend import available_backends
from tessera.kernels.string_hash import hex_to_int64, xxh64
from tests.kernels.property_tests import HealthCheck, given, settings, st

# Published values of XXH64 with seed 0.
PUBLISHED = {
    b"": 0xEF46DB3751D8E999,
    b"a": 0xD24EC4F1A98C6E5B,
    b"abc": 0x44BC2CF5AD770999,
    b"The quick brown fox jumps over the lazy dog": 0x0B242D361FDA71BC,
}


def column(strings, lead=b""):
    """(data, offsets) of a string column; `lead` stands before the first one, as in a sliced Arrow array."""
    offsets = [len(lead)]
    for string in strings:
        offsets.append(offsets[-1] + len(string))
    data = torch.frombuffer(bytearray(lead + b"".join(strings) + b"!"), dtype=torch.uint8)[:-1]
    return data, torch.tensor(offsets, dtype=torch.int64)


def unsigned(ids):
    return [i & (2**64 - 1) for i in ids.tolist()]


def test_published_values(backend):
    assert unsigned(xxh64(*column(list(PUBLISHED)))) == list(PUBLISHED.values())


def test_every_length_up_to_130_agrees_with_the_xxhash_package(backend):
    xxhash = pytest.importorskip("xxhash")
    draw = random.Random(0)
    strings = [draw.randbytes(length) for length in range(131) for _ in range(3)]
    draw.shuffle(strings)
    assert unsigned(xxh64(*column(strings))) == [xxhash.xxh64_intdigest(s) for s in strings]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(strings=st.lists(st.binary(max_size=70), max_size=20), lead=st.binary(max_size=5))
def test_random_columns_agree_with_the_xxhash_package(backend, strings, lead):
    xxhash = pytest.importorskip("xxhash")
    assert unsigned(xxh64(*column(strings, lead))) == [xxhash.xxh64_intdigest(s) for s in strings]


def test_no_strings(backend):
    empty = torch.zeros(0, dtype=torch.uint8)
    assert xxh64(empty, torch.zeros(1, dtype=torch.int64)).shape == (0,)
    ids, ok = hex_to_int64(empty, torch.zeros(1, dtype=torch.int64))
    assert ids.shape == (0,) and ok.dtype == torch.bool and ok.shape == (0,)


def test_strided_arguments(backend):
    data, offsets = column([b"abc", b"", b"tessera"])
    wide = torch.stack([data, data + 1], dim=1)
    assert xxh64(wide[:, 0], torch.stack([offsets, offsets], dim=1)[:, 0]).equal(xxh64(data, offsets))


def test_hexadecimal_numbers(backend):
    good = [b"0", b"7f", b"DEADbeef", b"f" * 16, b"8000000000000000", b"000000000000001", b"1234567890abcde"]
    bad = [b"", b"00000000000000000", b"0x1f", b"-1", b" 1", b"g", b"68fd1e6\xff", b"12 4", b"f" * 40]
    ids, ok = hex_to_int64(*column(good + bad, b"zz"))
    assert unsigned(ids) == [int(s, 16) for s in good] + [0] * len(bad)
    assert ok.tolist() == [True] * len(good) + [False] * len(bad)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_hexadecimal_round_trip(backend, numbers):
    ids, ok = hex_to_int64(*column([f"{n:x}".encode() for n in numbers]))
    assert unsigned(ids) == numbers and bool(ok.all())


@pytest.mark.parametrize("op", [xxh64, hex_to_int64])
@pytest.mark.parametrize("offsets", [[0, 3, 2, 4], [-1, 4], [0, 5]])
def test_offsets_outside_the_data_are_refused(backend, op, offsets):
    with pytest.raises(ValueError, match="offsets must not decrease and must stay inside the 4 bytes"):
        op(torch.zeros(4, dtype=torch.uint8), torch.tensor(offsets))


def test_wrong_dtypes_and_shapes_are_refused(backend):
    data, offsets = column([b"abc"])
    with pytest.raises(ValueError, match="data: expected uint8"):
        xxh64(data.long(), offsets)
    with pytest.raises(ValueError, match="offsets: expected int64"):
        xxh64(data, offsets.int())
    with pytest.raises(ValueError, match="offsets: expected int64"):
        hex_to_int64(data, offsets[:0])


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
@pytest.mark.parametrize("op", ["xxh64", "hex_to_int64"])
def test_schema_and_fake_kernel_of_the_compiled_op(op):
    arguments = column([b"abc", b"", b"1f"])
    torch.library.opcheck(getattr(torch.ops.tessera, op).default, arguments)
