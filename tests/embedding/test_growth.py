"""A table that a GPU has no memory for ends in a line that names it, and is as it was."""

import pytest
import torch

from tessera.distributed.failure import explain
from tessera.embedding import growth, record_store, row_index, row_store
from tessera.embedding.config import DynamicTableConfig, Group
from tessera.embedding.errors import TableFull
from tessera.embedding.optim import RowOptimizer
from tessera.embedding.row_batch import RowBatch
from tessera.embedding.set_table import OwnedTable, SetTable
from tessera.embedding.table import DynamicTable
from tessera.embedding.table_set import TableSet
from tessera.kernels import records
from tessera.kernels.chunks import allocate_chunk
from tessera.kernels.id_map import IdMap

KNOWN, MANY = torch.arange(100) * 7919, torch.arange(1, 6001) * 2**40 + 1
CHUNK = 64
OF_A_TABLE = {"store": (0, 1, 7), "index": (0, 5), "map": (0, 1)}
OF_A_SET = {"records": (0, 3), "map": (0, 1)}


def alone(config: DynamicTableConfig) -> SetTable:
    """A set of one table."""
    return SetTable(TableSet([config]), 0)


def table_of(kind=DynamicTable, **more) -> OwnedTable:
    groups = (Group("v", 4, 0.5), Group("w", 1, 0.5))
    config = DynamicTableConfig("user", ("f",), groups, RowOptimizer("adam"), seed=3, chunk_rows=CHUNK, **more)
    table = kind(config)
    table.lookup(KNOWN, 1)
    table.expire(1)
    return table


def content(table: OwnedTable) -> dict[str, torch.Tensor]:
    rows = vars(table.read_rows(table.rows_in_use()))
    return {name: value for name, value in rows.items() if value is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


class Memory:
    """Lets so many chunks more be had, of one kind: of `store` (both groups), `index` or `map`; or of a set's
    `records`."""

    def __init__(self, monkeypatch, kind: str, chunks: int) -> None:
        self.left = chunks
        grow = IdMap._grow
        if kind == "map":
            monkeypatch.setattr(IdMap, "_grow", lambda ids: self.take(grow, ids))
        else:
            module = {"store": row_store, "index": row_index, "records": record_store}[kind]
            monkeypatch.setattr(module, "allocate_chunk", lambda *shape: self.take(allocate_chunk, *shape))

    def take(self, give, *arguments):
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")
        self.left -= 1
        return give(*arguments)


@pytest.mark.parametrize(
    ("make", "kind", "chunks"),
    [(DynamicTable, kind, chunks) for kind, some in OF_A_TABLE.items() for chunks in some]
    + [(alone, kind, chunks) for kind, some in OF_A_SET.items() for chunks in some],
)
def test_a_table_without_memory_is_named_and_is_as_it_was(monkeypatch, make, kind, chunks):
    """Wherever it fails: between two groups, between two chunks, or when a part of the ids has its places already."""
    monkeypatch.setattr(records, "chunk_rows", lambda reserved: max(128, min(reserved, 512)))
    table, other = table_of(make, ttl_seconds=50), table_of(make, ttl_seconds=50)
    for one in (table, other):
        one.lookup(KNOWN[:60], 40)
        assert one.expire(60) == 40  # so some rows are taken again
    before = content(table)
    memory = Memory(monkeypatch, kind, chunks)
    with pytest.raises(
        TableFull, match=r"^table user: 60 rows in use, [\d,]+ bytes, 6,000 more wanted, and the GPU's memory is full"
    ):
        table.lookup(MANY, 61)
    assert same(content(table), before) and len(table) == 60
    assert table.lookup(MANY, 61, training=False).eq(-1).all()
    memory.left = -1  # as much as is asked for
    assert table.lookup(MANY, 61).equal(other.lookup(MANY, 61))
    assert same(content(table), content(other))


def test_the_line_says_what_to_do(monkeypatch):
    table = table_of()
    Memory(monkeypatch, "store", 0)
    with pytest.raises(TableFull) as raised:
        table.lookup(MANY, 2)
    status, line = explain(raised.value, None)
    assert status == 2 and "\n" not in line and "set max_rows or max_bytes with eviction lru or lfu" in line
    assert "Tried to allocate 20.00 MiB)" in line and "embedding.cache_rows" in line


def test_a_set_names_the_table_that_wants_most(monkeypatch):
    groups = (Group("v", 4, 0.5),)
    tables = TableSet([DynamicTableConfig(name, (name,), groups) for name in ("user", "item")])
    tables.lookup(KNOWN, torch.tensor([0, 30, 100]), 1)
    Memory(monkeypatch, "records", 0)
    with pytest.raises(
        TableFull, match=r"^table item: 70 rows in use, [\d,]+ bytes, 5,000 more wanted, and the GPU's memory is full"
    ):
        tables.lookup(MANY, torch.tensor([0, 1000, 6000]), 2)
    assert tables.rows_in_use == [30, 70] and tables.find(MANY, torch.tensor([0, 1000, 6000])).eq(-1).all()
    assert tables.lookup(KNOWN, torch.tensor([0, 30, 100]), 3).ge(0).all()


@pytest.mark.parametrize(("make", "memory"), [(DynamicTable, ("store", 1)), (alone, ("records", 0))])
@pytest.mark.parametrize("reserved", [True, False])
def test_a_state_that_does_not_fit_is_told_alike(monkeypatch, make, memory, reserved):
    table, source = make(table_of().config), table_of()
    batch = source.read_rows(source.rows_in_use())
    Memory(monkeypatch, *memory)
    with pytest.raises(TableFull, match="^table user: 0 rows in use, 0 bytes, 100 more wanted"):
        if reserved:
            table.reserve(100)
        table.import_rows(RowBatch(**{**vars(batch), "rows": None}))


def test_tables_without_a_limit_share_what_the_tower_leaves(monkeypatch):
    """First come, first served; a limit of one's own is not held to it."""
    first, second, limited = table_of(), table_of(), table_of(max_rows=4000)
    per_chunk = CHUNK * first.config.bytes_per_row
    left = [5 * per_chunk]
    monkeypatch.setattr(growth, "room_for_tables", lambda device: left[0])
    ids = MANY[: 3 * CHUNK]
    first.lookup(ids, 2)  # 28 rows of the last chunk were free: 3 chunks more
    left[0] -= 3 * per_chunk
    with pytest.raises(
        TableFull, match=rf"user: 100 .* 192 more .*{3 * per_chunk:,} bytes wanted, {2 * per_chunk:,} bytes free"
    ):
        second.lookup(ids, 2)
    second.lookup(ids[: 2 * CHUNK], 2)
    left[0] = 0
    second.lookup(ids[: 2 * CHUNK], 3)  # what is there asks for nothing
    limited.lookup(ids, 2)


def test_sets_share_what_the_tower_leaves(monkeypatch):
    monkeypatch.setattr(records, "chunk_rows", lambda reserved: 128)
    free, limited = table_of(alone), table_of(alone, max_rows=4000)
    monkeypatch.setattr(growth, "room_for_tables", lambda device: 128 * free.set.layout.bytes)
    with pytest.raises(TableFull, match=r"user: 100 .* 200 more .*bytes wanted"):
        free.lookup(MANY[:200], 2)
    free.lookup(MANY[:100], 2)
    limited.lookup(MANY[:1000], 2)


@pytest.mark.parametrize(("total", "kept"), [(8 << 30, 1 << 30), (80 << 30, 4 << 30)])
def test_a_reserve_is_kept_for_the_tower(monkeypatch, total, kept):
    assert growth.room_for_tables(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for free, room in ((6 << 30, (6 << 30) - kept), (kept - 1, 0)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, total))
        assert growth.room_for_tables(torch.device("cuda", 1)) == room
