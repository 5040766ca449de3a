"""Messages of ids: written and read as Python does it, id by id."""

import pytest
import torch

from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.message import Owners, owner_of, pack_ids, read_ids
from tessera.kernels.message_layout import FIXED, LARGEST, PART, TOTAL, MessageLayout, layout_of

#: Ranks, kinds, room and the ids of each rank: with room for all, for some and for none, with counts and with numbers.
CASES = [
    (2, 3, 64, 90),
    (3, 5, 8, 100),
    (4, 2, 0, 60),
    (2, 40, 12, 15),
    (3, 70, 4, 50),
    (2, 1, 4, 0),
    (5, 33_000, 8, 20),
]


def given(rank, kinds, count):
    """Ids of one rank with their kinds, times, numbers of 4 bytes and weights."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    kind = torch.randint(0, kinds, (count,), generator=generator).sort().values
    bounds = torch.zeros(kinds + 1, dtype=torch.int64)
    bounds[1:] = torch.bincount(kind, minlength=kinds).cumsum(0)
    columns = [torch.arange(count) * 7 - rank, torch.arange(count, dtype=torch.int32) - 5, torch.rand(count)]
    return ids, kind, bounds, columns


def late_of(packed, columns, layout):
    """What had no room, as int32."""
    order, parts = packed.order.tolist(), packed.parts.tolist()
    begins = [sum(parts[:rank]) for rank in range(len(parts))]
    chosen = [
        order[begin + place] for begin, part in zip(begins, parts, strict=True) for place in range(layout.room, part)
    ]
    units = [
        (column.int() if column.element_size() == 2 else column.view(torch.int32)).view(
            len(column), max(1, column.element_size() // 4)
        )[chosen]
        for column in columns
    ]
    return torch.cat(units, 1), [max(0, part - layout.room) for part in parts]


@pytest.mark.parametrize(("ranks", "kinds", "room", "count"), CASES)
def test_what_is_packed_is_read_by_its_owner(backend, ranks, kinds, room, count):
    layout = MessageLayout(room, kinds, 2, (8, 4, 4))
    sent, packed, late = [given(rank, kinds, count + rank) for rank in range(ranks)], [], []
    for rank, (ids, kind, bounds, columns) in enumerate(sent):
        told = torch.tensor([rank + 0.5, float("-inf")], dtype=torch.float64)
        packed.append(pack_ids(ids, bounds, columns, told, Owners(ranks, ranks), layout))
        owners = owner_of(ids, ranks)
        assert packed[-1].order.tolist() == sorted(range(len(ids)), key=lambda i: owners[i].item())
        assert packed[-1].places[packed[-1].order].tolist() == list(range(len(ids)))
        assert packed[-1].parts.tolist() == [int((owners == r).sum()) for r in range(ranks)]
        number = [kind.to(torch.int16 if layout.number_bytes == 2 else torch.int32)] if layout.numbered else []
        late.append(late_of(packed[-1], [ids, *columns, *number], layout))
    for owner in range(ranks):
        messages = torch.stack([one.message[owner] for one in packed])
        headers = messages[:, :FIXED].tolist()
        assert [header[PART] for header in headers] == [one.parts[owner].item() for one in packed]
        assert [header[TOTAL] for header in headers] == [len(ids) for ids, *_ in sent]
        assert [header[LARGEST] for header in headers] == [one.parts.max().item() for one in packed]
        told = messages[:, FIXED : FIXED + 2].contiguous().view(torch.float64)
        assert told.tolist() == [[rank + 0.5, float("-inf")] for rank in range(ranks)]
        rest = torch.cat([one.split(parts)[owner] for one, parts in late])
        rows = []
        for rank, (ids, kind, _, columns) in enumerate(sent):
            mine = (owner_of(ids, ranks) == owner).nonzero().flatten()
            rows += zip(
                kind[mine].tolist(), [rank] * len(mine), *(c[mine].tolist() for c in (ids, *columns)), strict=True
            )
        arrival = sorted(range(len(rows)), key=lambda i: rows[i][0])
        came = read_ids(messages, rest, len(rows), layout)
        assert came.order.tolist() == arrival
        weights = came.columns[2].view(torch.float32)
        parts = (came.ranks, came.ids, came.columns[0], came.columns[1], weights)
        found = list(zip(*(one.tolist() for one in parts), strict=True))
        assert found == [rows[i][1:] for i in arrival]
        of_kinds = torch.bincount(torch.tensor([row[0] for row in rows], dtype=torch.int64), minlength=kinds)
        assert came.bounds.diff().equal(of_kinds) and came.bounds[0] == 0


def test_ids_go_to_ranks_of_a_host_and_between_hosts(backend):
    ids, _, bounds, columns = given(0, 3, 200)
    told, layout = torch.zeros(0, dtype=torch.float64), MessageLayout(0, 3, 0, (8, 4, 4))
    world, each = 6, 2
    for owners, expected in (
        (Owners(each, world), owner_of(ids, world) % each),
        (Owners(world // each, world, each), owner_of(ids, world) // each),
    ):
        packed = pack_ids(ids, bounds, columns, told, owners, layout)
        assert packed.parts.tolist() == torch.bincount(expected, minlength=owners.ranks).tolist()
        assert expected[packed.order].diff().min() >= 0


@pytest.mark.parametrize(("kinds", "count"), [(3, 90), (200, 90), (3, 2)])
@pytest.mark.skipif("triton" not in available_backends(), reason="Triton is not installed")
def test_what_lies_behind_the_ids_of_all_kinds_goes_to_no_rank(kinds, count):
    ids, _, bounds, columns = given(0, kinds, count)
    told, layout = torch.rand(1, dtype=torch.float64), MessageLayout(24, kinds, 1, (8, 4, 4))
    longer = [torch.cat([one, one.new_full((50,), 7)]) for one in (ids, *columns)]
    with use_backend("triton"):
        alone = pack_ids(ids, bounds, columns, told, Owners(2, 2), layout)
        padded = pack_ids(longer[0], bounds, longer[1:], told, Owners(2, 2), layout)
    assert padded.parts.equal(alone.parts) and padded.order[:count].equal(alone.order)
    assert padded.places.equal(torch.cat([alone.places, torch.zeros(50, dtype=torch.int64)]))
    none = torch.zeros((0, sum(layout.late_units)), dtype=torch.int32)
    for one, other in zip(padded.message, alone.message, strict=True):
        if one[LARGEST] <= layout.room:
            came, expected = (read_ids(m.unsqueeze(0), none, int(one[PART]), layout) for m in (one, other))
            assert came.ids.equal(expected.ids) and came.bounds.equal(expected.bounds)
        assert one[: FIXED + 1].equal(other[: FIXED + 1])


def test_columns_may_be_strided_and_absent(backend):
    ids = torch.arange(40)
    both = torch.stack([ids, ids + 1], 1)
    layout, bounds, told = MessageLayout(32, 1, 0, ()), torch.tensor([0, 40]), torch.zeros(0, dtype=torch.float64)
    packed = pack_ids(both[:, 0], bounds, (), told, Owners(2, 2), layout)
    came = read_ids(packed.message[1:], torch.zeros((0, 2), dtype=torch.int32), 20, layout)
    assert came.ids.tolist() == list(range(1, 40, 2)) and came.columns == ()


def test_refused_arguments(backend):
    ids, _, bounds, columns = given(0, 3, 10)
    told, layout = torch.zeros(1, dtype=torch.float64), MessageLayout(8, 3, 1, (8, 4, 4))
    with pytest.raises(ValueError, match="told: expected float64"):
        pack_ids(ids, bounds, columns, told.float(), Owners(2, 2), layout)
    with pytest.raises(ValueError, match="columns: expected 10 elements"):
        pack_ids(ids, bounds, columns[:2], told, Owners(2, 2), layout)
    with pytest.raises(ValueError, match="ids: expected int64"):
        pack_ids(ids.int(), bounds, columns, told, Owners(2, 2), layout)
    with pytest.raises(ValueError, match="message: expected int64"):
        read_ids(torch.zeros((2, 3), dtype=torch.int64), torch.zeros(0, dtype=torch.int32), 0, layout)
    with pytest.raises(ValueError, match="late: expected int32"):
        read_ids(torch.zeros((2, layout.words), dtype=torch.int64), told, 0, layout)


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "triton"])
def test_messages_that_contradict_themselves_are_refused(backend):
    ids, _, bounds, columns = given(0, 3, 10)
    none, layout = torch.zeros((0, 5), dtype=torch.int32), MessageLayout(16, 3, 0, (8, 4, 4))
    numbered = MessageLayout(4, 100, 0, (8, 4, 4))
    with use_backend(backend):
        message = pack_ids(ids, bounds, columns, torch.zeros(0).double(), Owners(1, 1), layout).message
        with pytest.raises(ValueError, match="count: expected 10 ids, found 9"):
            read_ids(message, none, 9, layout)
        with pytest.raises(ValueError, match="late: expected int32"):
            read_ids(message, torch.zeros((1, 6), dtype=torch.int32), 10, layout)
        message[0, FIXED] = -1
        with pytest.raises(ValueError, match="message: expected ends of kinds"):
            read_ids(message, none, 10, layout)
        message = torch.full((1, numbered.words), -1)
        message[0, PART] = 2
        with pytest.raises(IndexError, match="message: expected kinds below 100"):
            read_ids(message, none, 2, numbered)


def test_numbers_make_a_layout_again():
    for layout in (MessageLayout(8, 200, 3, (8, 4)), MessageLayout(0, 7, 0, ())):
        assert layout_of(layout.numbers) == layout


@pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
def test_schemas_and_fake_kernels():
    ids, _, bounds, columns = given(0, 3, 10)
    told, layout = torch.zeros(1, dtype=torch.float64), MessageLayout(16, 3, 1, (8, 4, 4))
    torch.library.opcheck(
        torch.ops.tessera.pack_ids.default,
        (ids, bounds, columns, told, (1, 1, 1), layout.numbers),
        test_utils=("test_schema", "test_autograd_registration"),  # what no id takes is undefined
    )
    message = pack_ids(ids, bounds, columns, told, Owners(1, 1), layout).message
    late = torch.zeros((0, 6), dtype=torch.int32)
    torch.library.opcheck(torch.ops.tessera.read_ids.default, (message, late, 10, layout.numbers))
