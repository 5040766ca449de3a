import pytest
import torch

from tessera.kernels.backend import available_backends
from tessera.kernels.take_places import take_places


def test_each_row_takes_one_place_in_order(backend):
    places = torch.tensor([0, 0, 5, -1, 0, 0, -1], dtype=torch.int32)
    assert take_places(places, torch.tensor([4, -1, 2, 0, 3, 99, 6]), 7).tolist() == [4, 0]
    assert places.tolist() == [9, 0, 5, -1, 8, 0, -1]
    assert take_places(places, torch.tensor([4, 5, 1]), 9).tolist() == [5, 1]
    assert places.tolist() == [9, 11, 5, -1, 8, 10, -1]
    assert take_places(places, torch.tensor([4, 5, 1]), 11).tolist() == []
    assert take_places(places, torch.zeros(0, dtype=torch.int64), 11).tolist() == []


def test_many_rows(backend):
    generator = torch.Generator().manual_seed(0)
    places, expected = torch.zeros(5001, dtype=torch.int32), {}
    places[-1] = -1
    for _ in range(20):
        rows = torch.randperm(6000, generator=generator)[:700] - 10
        rows[rows < 0] = -1
        new = [row for row in rows.tolist() if 0 <= row < 5000 and row not in expected]
        assert take_places(places, rows, len(expected)).tolist() == new
        expected |= {row: len(expected) + i + 1 for i, row in enumerate(new)}
    assert places[:-1].tolist() == [expected.get(row, 0) for row in range(5000)] and places[-1] == -1


def test_refused_arguments(backend):
    with pytest.raises(ValueError, match="places: expected int32"):
        take_places(torch.zeros(3, dtype=torch.int64), torch.tensor([1]), 0)
    with pytest.raises(ValueError, match="rows: expected int64"):
        take_places(torch.zeros(3, dtype=torch.int32), torch.tensor([1.0]), 0)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schema():
    places = torch.tensor([0, 0, 3, -1], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.tessera.take_places.default,
        (places, torch.tensor([1, 2, -1]), 3),
        test_utils=("test_schema", "test_autograd_registration"),
    )
