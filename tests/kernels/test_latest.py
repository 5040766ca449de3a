"""The latest time of each place, against a loop over Python numbers."""

import pytest
import torch

from tessera.kernels.backend import available_backends
from tessera.kernels.latest import latest_of_bags
from tests.kernels.property_tests import HealthCheck, given, settings, st

NONE = -(2**39)


def by_loop(times, lengths, places, count):
    found, at = [NONE] * count, 0
    for bag, length in enumerate(lengths):
        for place in places[at : at + length]:
            found[place] = max(found[place], times[bag % len(times)])
        at += length
    return found


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@st.composite
def batches(draw):
    rows, keys, count = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    times = draw(st.lists(st.integers(NONE, 2**39 - 1), min_size=rows, max_size=rows))
    lengths = draw(st.lists(st.integers(0, 3), min_size=rows * keys, max_size=rows * keys))
    places = draw(st.lists(st.integers(0, count - 1), min_size=sum(lengths), max_size=sum(lengths)))
    return times, lengths, places, count


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_against_a_loop(backend, batch):
    times, lengths, places, count = batch
    found = latest_of_bags(
        torch.tensor(times), offsets_of(lengths), torch.tensor(places, dtype=torch.int64), count, NONE
    )
    assert found.tolist() == by_loop(times, lengths, places, count)


def test_a_batch_without_rows_names_nothing(backend):
    nothing = torch.zeros(0, dtype=torch.int64)
    assert latest_of_bags(nothing, torch.zeros(1, dtype=torch.int64), nothing, 2, NONE).tolist() == [NONE, NONE]


def test_refused_arguments(backend):
    times, places = torch.tensor([5, 7]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"times: expected int64 \[n\], found torch.float32"):
        latest_of_bags(times.float(), offsets_of([1, 1]), places, 2, NONE)
    for lengths in ([1, 0], []):
        with pytest.raises(ValueError, match=r"offsets: expected int64 \[keys \* . \+ 1\]"):
            latest_of_bags(times if lengths else times[:0], offsets_of([1, *lengths]), places, 2, NONE)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_numbers_out_of_range_end_in_an_error():
    times, places = torch.tensor([5, 7]), torch.tensor([0, 1])
    for wrong in (torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match="places: expected below 2, found"):
            latest_of_bags(times, offsets_of([1, 1]), wrong, 2, NONE)
    for offsets in ([0, 1, 3], [0, 3, 2], [1, 1, 2]):
        with pytest.raises(IndexError, match="offsets: expected"):
            latest_of_bags(times, torch.tensor(offsets), places, 2, NONE)


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schema_and_fake_kernel():
    arguments = (torch.tensor([5, 7]), torch.tensor([0, 2, 3]), torch.tensor([1, 0, 1]), 2, NONE)
    torch.library.opcheck(torch.ops.tessera.latest_of_bags.default, arguments)
