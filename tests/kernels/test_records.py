"""Records of many tables: their layout, what ops refuse, and the ops that work on flat ids. What they compute is tested
against tables, in tests/embedding/test_table_set.py."""

import pytest
import torch

from tessera.kernels import records
from tessera.kernels.backend import available_backends, use_backend
from tessera.kernels.formats import FORMATS
from tessera.kernels.id_map import IdMap
from tessera.kernels.layout import packed_layout, plain_layout
from tessera.kernels.optimizers import OPTIMIZERS, OptimizerSettings
from tessera.kernels.record_layout import META_BYTES, is_plain, layout_of, record_layout
from tessera.kernels.records import FirstValues, Positions, keys_of
from tessera.kernels.unique import positions_of, unique_tables
from tests.kernels.property_tests import HealthCheck, given, settings, st

PLAIN = record_layout([plain_layout(16, "rowwise_adagrad"), plain_layout(1, "rowwise_adagrad")])
MIXED = record_layout([packed_layout("int4", 5, "sgd"), plain_layout(3, "sgd")])
PLAIN_SGD = record_layout([plain_layout(16, "sgd"), plain_layout(1, "sgd")])
SETTINGS, RATES = OptimizerSettings(0.1), torch.full((3,), 0.1, dtype=torch.float64)
needs_cpp = pytest.mark.skipif("cpp" not in available_backends(), reason="the compiled kernels are not available")
needs_triton = pytest.mark.skipif("triton" not in available_backends(), reason="Triton's interpreter is not available")


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def chunks_of(layout, rows=(4, 4, 8)):
    return [torch.zeros((count, layout.bytes), dtype=torch.uint8) for count in rows]


def filled(layout=PLAIN):
    """(chunks with rows 0 to 5, of ids 10 to 15 of tables 0, 0, 0, 1, 1, 2; keys)."""
    chunks, keys = chunks_of(layout), keys_of(0, [[(t, 9, 0.1) for _ in layout.groups] for t in range(3)])
    first = FirstValues(0.0, (0.1,) * len(layout.groups))
    records.add(chunks, torch.arange(6), torch.arange(10, 16), tensor([0, 0, 0, 1, 1, 2]), layout, keys, first, 5)
    return chunks, keys


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dims", [(16, 1), (3,), (1, 45, 8)])
def test_parts_of_a_record_do_not_meet(optimizer, dims):
    for format in FORMATS:
        groups = [plain_layout(dims[0], optimizer), *(packed_layout(format, dim, optimizer) for dim in dims[1:])]
        layout = record_layout(groups)
        used = torch.zeros(layout.bytes, dtype=torch.int64)
        used[layout.meta_at : layout.meta_at + META_BYTES] += 1
        for group, begin in zip(layout.groups, layout.begins, strict=True):
            if is_plain(group):
                used[group.values_at : group.values_at + 4 * group.dim] += 1
                used[group.state_at : group.state_at + 4 * group.state_floats] += 1
            else:
                used[begin : begin + group.bytes] += 1
        assert used.max() == 1 and layout.bytes % 16 == 0 and layout.meta_at % 8 == 0
        assert layout.bytes - int(used.sum()) < max(16, layout.bytes / 6 + 16)
        assert layout_of(layout.numbers) == layout


def test_plain_values_come_first_in_whole_lines():
    assert [group.values_at for group in PLAIN.groups] == [0, 64] and PLAIN.plain and PLAIN.width == 17
    assert (PLAIN.meta_at, PLAIN.bytes) == (80, 128)
    assert not MIXED.plain
    assert record_layout([plain_layout(12, "sgd")]).bytes == 80  # whole lines would cost more than a sixth


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables=st.lists(st.lists(st.integers(-3, 3), max_size=12), min_size=1, max_size=6))
def test_unique_of_tables_is_that_of_each(backend, tables):
    ids = tensor([id_ for table in tables for id_ in table])
    bounds = tensor([0, *(len(table) for table in tables)]).cumsum(0)
    unique, inverse, counts, ends = unique_tables(ids, bounds)
    assert unique[inverse].equal(ids) and counts.equal(torch.bincount(inverse, minlength=unique.numel()))
    for t, table in enumerate(tables):
        assert unique[ends[t] : ends[t + 1]].tolist() == list(dict.fromkeys(table))
        own = inverse[bounds[t] : bounds[t + 1]]
        assert bool(((own >= ends[t]) & (own < ends[t + 1])).all())
    order, begins = positions_of(inverse, counts)
    for place in range(unique.numel()):
        assert order[begins[place] : begins[place + 1]].equal((inverse == place).nonzero().flatten())


@needs_cpp
def test_unique_of_tables_on_threads():
    """More ids than one thread takes, in tables of very different size."""
    bounds = torch.tensor([0, 0, 30_000, 30_001, 45_000, 90_000, 90_000])
    ids, before, found = torch.randint(0, 5_000, (90_000,)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(unique_tables(ids, bounds))
    finally:
        torch.set_num_threads(before)
    with use_backend("reference"):
        expected = unique_tables(ids, bounds)
    assert all(part.equal(right) for one in found for part, right in zip(one, expected, strict=True))


def test_a_group_without_spread_starts_at_zero(backend):
    chunks, keys = chunks_of(PLAIN), keys_of(0, [[(1, 2, 0.0), (3, 4, 0.1)]])
    zeros = tensor([0])
    records.add(chunks, zeros, zeros, zeros, PLAIN, keys, FirstValues(0.0, (0.0, 0.0)), 1)
    values = records.gather(chunks, tensor([0, -1]), PLAIN)
    assert values[0, :16].eq(0).all() and values[0, 16] != 0 and values[1].eq(0).all()


def test_gradients_of_a_row_are_summed_in_order(backend):
    chunks, keys = filled()
    before = records.gather(chunks, torch.arange(6), PLAIN)
    grads, inverse = torch.randn(40, 17), torch.arange(40) % 3
    inverse[inverse == 1] = 2  # row 1 of the batch has none
    positions = Positions(*positions_of(inverse, torch.bincount(inverse, minlength=4)))
    records.update(chunks, tensor([5, 1, 0, -1]), grads, PLAIN, SETTINGS, RATES, keys, 1, positions)
    other, _ = filled()
    sums = torch.zeros(4, 17).index_add_(0, inverse, grads)
    records.update(other, tensor([5, 1, 0, -1]), sums, PLAIN, SETTINGS, RATES, keys, 1)
    assert all(one.equal(two) for one, two in zip(chunks, other, strict=True))
    changed = (records.gather(chunks, torch.arange(6), PLAIN) != before).any(dim=1)
    assert changed.tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("layout", [PLAIN, MIXED])
def test_bytes_are_read_and_written_as_they_are(backend, layout):
    chunks, _ = filled(layout)
    whole = torch.cat(chunks).clone()
    rows = tensor([5, -1, 0, 12])
    read = records.read(chunks, rows, layout)
    assert read.equal(torch.where(rows[:, None] < 0, 0, whole[rows]))
    assert records.read(chunks, rows, layout, 4, 12).equal(read[:, 4:16])
    assert records.read(chunks, rows[:0], layout, 4, 12).shape == (0, 12)
    records.write(chunks, rows, read[:, 4:16] + 1, layout, 4)
    expected = whole.clone()
    expected[rows[rows >= 0], 4:16] += 1
    assert torch.cat(chunks).equal(expected)
    records.write(chunks, rows, torch.full((1, layout.bytes), 7, dtype=torch.uint8), layout)
    expected[rows[rows >= 0]] = 7
    assert torch.cat(chunks).equal(expected)


def test_bytes_before_the_meta_data_are_the_caller_s(backend):
    layout = record_layout([plain_layout(16, "sgd")], before_meta=8)
    chunks, keys = filled(layout)
    assert layout.meta_at == 72 and records.read(chunks, torch.arange(6), layout, 64, 8).eq(0).all()
    records.write(chunks, torch.arange(6), torch.full((1, 8), 9, dtype=torch.uint8), layout, 64)
    records.update(chunks, torch.arange(6), torch.ones(6, 16), layout, SETTINGS, RATES, keys, 1)
    assert records.read(chunks, torch.arange(6), layout, 64, 8).eq(9).all()


@pytest.mark.parametrize("layout", [PLAIN, MIXED])
def test_what_is_out_of_range_is_refused(backend, layout):
    chunks, keys = filled(layout)
    first, one = FirstValues(0.0, (0.0, 0.0)), tensor([1])
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        records.gather(chunks, tensor([16]), layout)
    with pytest.raises(IndexError, match="inverse: expected below 1"):
        records.gather(chunks, one, layout, tensor([1]))
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        records.update(chunks, tensor([16]), torch.zeros(1, layout.width), layout, SETTINGS, RATES, keys, 1)
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        records.read(chunks, tensor([16]), layout)
    with pytest.raises(IndexError, match="rows: expected below 16, found 16"):
        records.write(chunks, tensor([16]), torch.zeros(1, 4, dtype=torch.uint8), layout)
    wrong = Positions(tensor([1]), tensor([0, 1]))
    with pytest.raises(IndexError, match="(order|inverse): expected below 1"):
        records.update(chunks, one, torch.zeros(1, layout.width), layout, SETTINGS, RATES, keys, 1, wrong)
    with pytest.raises(IndexError, match="(tables|inverse): expected below 3"):
        records.add(chunks, one, one, tensor([3]), layout, keys, first, 1)
    with pytest.raises(IndexError, match="rows: expected below 16"):
        records.add(chunks, tensor([16]), one, tensor([0]), layout, keys, first, 1)
    with pytest.raises(IndexError, match="inverse: expected below 1"):
        positions_of(tensor([1]), tensor([1]))


def test_wrong_arguments_are_refused(backend):
    chunks, keys = filled()
    one, id_map = tensor([1]), IdMap()
    for bounds in ([0, 2], [0, 2, 1], [0]):
        if backend.startswith("triton") and len(bounds) > 1:
            continue  # a kernel cannot ask for more than is cheap
        with pytest.raises(ValueError, match="bounds: expected"):
            records.find(id_map, chunks, one, tensor(bounds), PLAIN)
        with pytest.raises(ValueError, match="bounds: expected"):
            unique_tables(one, tensor(bounds))
    with pytest.raises(ValueError, match="now: expected one or 1 elements, found 2"):
        records.find(id_map, chunks, one, tensor([0, 1]), PLAIN, tensor([1, 2]))
    with pytest.raises(ValueError, match="counts: expected 1 elements, found 2"):
        records.find(id_map, chunks, one, tensor([0, 1]), PLAIN, 1, tensor([1, 2]))
    with pytest.raises(ValueError, match=r"grads: expected float32 \[1, 17\]"):
        records.update(chunks, one, torch.zeros(1, 16), PLAIN, SETTINGS, RATES, keys, 1)
    with pytest.raises(ValueError, match=r"rates: expected float64 \[3\]"):
        records.update(chunks, one, torch.zeros(1, 17), PLAIN, SETTINGS, RATES[:2], keys, 1)
    with pytest.raises(ValueError, match="begins: expected 2, found 3"):
        records.update(
            chunks, one, torch.zeros(1, 17), PLAIN, SETTINGS, RATES, keys, 1, Positions(one, tensor([0, 1, 1]))
        )
    with pytest.raises(ValueError, match=r"bytes: expected 1 or more inside \[0, 128\), found \[120, 136\)"):
        records.read(chunks, one, PLAIN, 120, 16)
    with pytest.raises(ValueError, match=r"stored: expected uint8 \[1 or 1, bytes\], found torch.float32 \[1, 4\]"):
        records.write(chunks, one, torch.zeros(1, 4), PLAIN)
    with pytest.raises(ValueError, match="tables: expected 1 as there are rows, found 2"):
        records.add(chunks, one, one, tensor([0, 1]), PLAIN, keys, FirstValues(0.0, (0.0, 0.0)), 1)


GROUPS = {
    "plain": [plain_layout(16, "adagrad"), plain_layout(1, "adagrad")],
    "ftrl": [plain_layout(5, "ftrl")],
    "int8": [plain_layout(1, "adagrad"), packed_layout("int8", 16, "adagrad")],
    "codes": [packed_layout("int4", 7, "sgd"), packed_layout("int2", 6, "sgd", rounding="nearest")],
    "half": [packed_layout("bf16", 16, "sgd"), packed_layout("fp16", 6, "sgd", rounding="nearest")],
    "rowwise": [plain_layout(16, "rowwise_adagrad"), plain_layout(1, "rowwise_adagrad")],
    "moments": [packed_layout("bf16", 4, "adam", state_format="bf16"), plain_layout(3, "adam")],
}


def life(groups, steps=2, decay_floats=0):
    """Records after they were added, what is read of them, and records after updates; bytes of chunks, and values."""
    layout, generator = record_layout(groups, decay_floats=decay_floats), torch.Generator().manual_seed(0)
    decayed = -torch.tensor([0.1, 0.7, 3.0], dtype=torch.float64) if decay_floats else None
    tables = torch.randint(0, 3, (30,), generator=generator)
    ids, rows = torch.arange(30) * 2**57 - 5, torch.randperm(32, generator=generator)[:30]
    keys = keys_of(3, [[(7 * t + i, 9 + t, 0.1 * t) for i, _ in enumerate(groups)] for t in range(3)])
    chunks = [torch.full((count, layout.bytes), 77, dtype=torch.uint8) for count in (8, 8, 16)]
    first = FirstValues(0.0 if groups[0].optimizer == "adam" else 0.5, (0.01,) * len(groups))
    records.add(chunks, rows, ids, tables, layout, keys, first, torch.arange(30), torch.arange(1, 31), 3)
    found, rows = [torch.cat(chunks)[rows]], torch.cat([rows, tensor([-1])])
    inverse = torch.randint(0, 31, (200,), generator=generator)
    if decay_floats:
        noted = torch.ones(1, decay_floats, dtype=torch.float64).mul_(0.5).view(torch.uint8)
        records.write(chunks, rows, noted, layout, layout.decay_at)
    found.append(records.gather(chunks, rows, layout, inverse, decayed))
    counts, rates = torch.bincount(inverse, minlength=31), torch.tensor([0.1, 0.03, 0.2], dtype=torch.float64)
    how = OptimizerSettings(0.1, weight_decay=0.01, l1=0.01, l2=0.1)
    for step in range(steps):
        grads, positions = torch.randn((200, layout.width), generator=generator), positions_of(inverse, counts)
        decayed = None if decayed is None else decayed - 0.1
        records.update(chunks, rows, grads, layout, how, rates, keys, step, Positions(*positions), 4, decayed, 0.5)
    return [*found, torch.cat(chunks)[rows[:-1]], records.gather(chunks, rows, layout, None, decayed)]


@needs_cpp
@needs_triton
@pytest.mark.parametrize("kind", GROUPS)
def test_kernels_for_gpus_give_the_bits_of_the_compiled_ones(kind):
    """Sums over columns and powers are each backend's own: mean squares of row-wise Adagrad, Adam's correction."""
    found = []
    for name in ("cpp", "triton"):
        with use_backend(name):
            found.append(life(GROUPS[kind]))
    exact = kind not in ("rowwise", "moments")
    for ours, theirs in zip(*found, strict=True):
        assert not exact or ours.equal(theirs)
    torch.testing.assert_close(found[1][-1], found[0][-1], rtol=1e-2 if kind == "moments" else 1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("other", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("kind", ["plain", "ftrl", "int8", "moments"])
def test_decayed_records_are_alike_on_all_backends(kind, other):
    found = []
    for name in ("cpp", other):
        with use_backend(name):
            found.append(life(GROUPS[kind], decay_floats=2))
    without = life(GROUPS[kind])
    assert (found[0][1].abs().sum() < without[1].abs().sum()) and not found[0][2].equal(found[0][0])
    for place in (1, 3):
        tolerance = 2e-2 if kind == "moments" else 1e-5
        torch.testing.assert_close(found[1][place], found[0][place], rtol=tolerance, atol=1e-6)


def test_how_far_rows_are_decayed_is_given_where_records_note_it():
    layout = record_layout([plain_layout(16, "sgd")], decay_floats=1)
    decayed = torch.zeros(1, dtype=torch.float64)
    for one, told in ((layout, None), (PLAIN_SGD, decayed)):
        with pytest.raises(ValueError, match="decayed: expected where records know how far they are decayed"):
            records.gather(chunks_of(one), tensor([0]), one, None, told)
        with pytest.raises(ValueError, match="decayed: expected where records know how far they are decayed"):
            grads, every = torch.zeros(1, one.width), keys_of(0, [[(1, 2, 0.1)] * len(one.groups)])
            records.update(chunks_of(one), tensor([0]), grads, one, SETTINGS, RATES[:1], every, 1, None, 0, told)
    with pytest.raises(ValueError, match=r"decayed: expected float64 \[tables\], found torch.float32 \[1\]"):
        records.gather(chunks_of(layout), tensor([0]), layout, None, decayed.float())


@needs_cpp
@needs_triton
def test_rows_of_many_positions_are_summed_in_pieces():
    """Up to LONG positions in order; of more, whole pieces by others, which is an order of its own: the same each
    time."""
    lengths = tensor([1, 128, 129, 300, 0, 200, 3])
    inverse = torch.arange(7).repeat_interleave(lengths)[
        torch.randperm(761, generator=torch.Generator().manual_seed(0))
    ]
    positions = Positions(*positions_of(inverse, lengths))
    rows, zeros, grads, found = torch.arange(7), torch.zeros(7, dtype=torch.int64), torch.randn(761, 17), []
    for name in ("cpp", "triton", "triton"):
        with use_backend(name):
            chunks, keys = chunks_of(PLAIN_SGD), keys_of(0, [[(1, 2, 0.0), (3, 4, 0.0)]])
            records.add(chunks, rows, rows, zeros, PLAIN_SGD, keys, FirstValues(0.0, (0.0, 0.0)), 5)
            records.update(chunks, rows, grads, PLAIN_SGD, SETTINGS, RATES[:1], keys, 1, positions)
            found.append(records.gather(chunks, rows, PLAIN_SGD))
    short = lengths <= 128
    assert found[1].equal(found[2]) and found[1][short].equal(found[0][short])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@needs_triton
def test_ids_without_rows_are_listed_and_placed():
    """Batches that are padded, as where nobody waits for how many distinct ids there are."""
    id_map, generator = IdMap(), torch.Generator().manual_seed(3)
    ids = torch.cat([torch.arange(300), torch.arange(400)])
    id_map.insert(ids, torch.arange(700), torch.arange(2).repeat_interleave(tensor([300, 400])) * 2)
    chunks, flat = chunks_of(PLAIN, (1024,)), torch.randint(-100, 420, (600,), generator=generator)
    bounds = tensor([0, 200, 250, 600])
    expected, inverse, often, ends = unique_tables(flat, bounds)
    many = expected.numel()
    rows, unknown, *_ = records.find_unknown(id_map, chunks, expected, ends, PLAIN, 9, often)
    with use_backend("triton"):
        unique, ours, counts, last = unique_tables(flat, bounds, padded=True)
        assert unique[:many].equal(expected) and counts[:many].equal(often) and not counts[many:].any()
        assert unique.numel() == 600 and ours.equal(inverse) and last.equal(ends)
        found, listed, *_ = records.find_unknown(id_map, chunks, unique, last, PLAIN, 9, counts)
        assert found[:many].equal(rows) and found[many:].eq(-1).all()
        assert listed.positions.equal(unknown.positions) and listed.tables.equal(unknown.tables)
        assert listed.of_tables == unknown.of_tables and listed.segments is not None
        fresh = torch.arange(700, 700 + listed.positions.numel())
        id_map.place(unique[listed.positions], fresh, listed.tables, listed.segments)
        again = records.find_unknown(id_map, chunks, unique, last, PLAIN, 9, counts)
        assert again[1] is None and again[0][listed.positions].equal(fresh) and len(id_map) == 700 + fresh.numel()
        many_more = torch.arange(1000, 6000)
        _, listed, *_ = records.find_unknown(id_map, chunks, many_more, tensor([0, 5000, 5000, 5000]), PLAIN, 9)
        assert listed.of_tables == [5000, 0, 0] and listed.segments is None  # the segment has to be split
    assert records.find(id_map, chunks, expected, ends, PLAIN)[unknown.positions].equal(fresh)


@needs_cpp
@pytest.mark.parametrize("rows", [(4, 8), (4, 4, 4, 8), (3, 3), (4, 4, 8, 4)])
def test_chunks_that_do_not_double_are_refused(rows):
    with pytest.raises(ValueError, match="chunks: expected a power of two, then as many rows as before"):
        records.gather(chunks_of(PLAIN, rows), tensor([0]), PLAIN)


@needs_cpp
@pytest.mark.parametrize("layout", [PLAIN, MIXED])
def test_schemas_and_fake_kernels(layout):
    chunks, keys = filled(layout)
    id_map, ops, rows = IdMap(), torch.ops.tessera, tensor([3, -1, 1])
    id_map.insert(tensor([10, 13]), tensor([0, 3]), tensor([0, 1]))
    ids, bounds, now = tensor([10, 13, 14]), tensor([0, 1, 3]), tensor([7])
    numbers, first = list(layout.numbers), [0.0, 0.1, 0.1]
    torch.library.opcheck(ops.unique_tables.default, (ids, bounds))
    torch.library.opcheck(ops.positions_of.default, (tensor([1, 0, 1]), tensor([1, 2])))
    torch.library.opcheck(ops.records_find.default, (*id_map.places, chunks, ids, bounds, now, ids, numbers))
    torch.library.opcheck(ops.records_gather.default, (chunks, rows, numbers, tensor([2, 0])))
    torch.library.opcheck(ops.records_read.default, (chunks, rows, numbers, 4, 8))
    torch.library.opcheck(ops.records_write.default, (chunks, rows, torch.zeros(3, 8, dtype=torch.uint8), numbers, 4))
    arguments = (chunks, rows, ids, tensor([0, 1, 1]), now, None, *keys, numbers, first, 0)
    torch.library.opcheck(ops.records_add.default, arguments)
    grads = torch.ones(3, layout.width)
    arguments = (
        chunks,
        rows,
        grads,
        tensor([0, 1, 2]),
        tensor([0, 1, 2, 3]),
        keys.numbers,
        RATES,
        numbers,
        list(SETTINGS),
        1,
        2,
    )
    torch.library.opcheck(ops.records_update.default, arguments)
