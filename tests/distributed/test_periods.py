"""Old and new rows, and new rows that begin as the learned one: on ranks, and through saved states of other ranks."""

from __future__ import annotations

import pytest

from tessera.distributed.saved.states import folder_name, open_saved
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver, load_rows
from tessera.embedding.table import DynamicTable
from tests.distributed.dictionary import Case, Reference, joined, same, train
from tests.distributed.saved_tables import INT8, config, content, load_tables, save_tables, step
from tests.ranks import on_ranks

CASES = {
    "old rows": Case(old_rows_factor=0.2),
    "first values": Case(oov="learned", init="oov", threshold=2),
    "both, bags": Case(oov="learned", init="oov", threshold=2, old_rows_factor=0.5, options=(("bag_tables", ("bc",)),)),
}
PERIODS = (3, 6, 8)  # the steps before which one begins


@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(1, "old rows", marks=pytest.mark.slow),  # 5 s
        pytest.param(1, "first values", marks=pytest.mark.slow),
        (2, "old rows"),
        pytest.param(2, "first values", marks=pytest.mark.slow),
        (2, "both, bags"),
    ],
)
def test_ranks_equal_a_dictionary_of_rows(world, name):
    expected = Reference(CASES[name]).train()
    same(joined(on_ranks(world, train, CASES[name])), expected)
    other = Reference(Case(oov=CASES[name].oov, threshold=CASES[name].threshold)).train()
    assert expected["rows"] != other["rows"], "the case makes a difference"


def make() -> dict[str, DynamicTable]:
    tables = {name: DynamicTable(config(name, name, factor=0.1)) for name in ("sgd", "adam")}
    tables["int8"] = DynamicTable(config("adagrad", "int8", groups=INT8, factor=0.1))
    tables["expiring"] = DynamicTable(config("adagrad", "expiring", factor=0.1, ttl_seconds=4))
    return tables


def go_on(tables: dict[str, DynamicTable], begin: int, end: int, rank: int = 0, ranks: int = 1) -> None:
    for number in range(begin, end):
        for table in tables.values():
            if number in PERIODS:
                table.begin_period()
            step(table, number, rank, ranks)


def train_and_save(process, folder, begin: int, end: int):
    tables, root = make(), Storage(folder)
    if begin:
        load_tables(tables, root.below(folder_name(begin)), process)
    go_on(tables, begin, end, process.rank, process.world_size)
    save_tables(TableSaver(tables), root, folder_name(end), process, end)
    return content(tables)


@pytest.mark.slow
def test_two_to_one_to_three_ranks(tmp_path, process):
    """Ages of rows, and which period it is, are those of tables that never changed their ranks."""
    for world, begin, end in ((2, 0, 4), (1, 4, 7), (3, 7, 10)):
        parts = on_ranks(world, train_and_save, tmp_path, begin, end)
    tables = make()
    go_on(tables, 0, 10)
    found = {name: {i: row for part in parts for i, row in part[name].items()} for name in tables}
    assert found == content(tables)
    periods = {name: {row[-1] for row in rows.values()} for name, rows in found.items()}
    assert all(len(seen) > 1 for seen in periods.values())


def test_a_chain_of_deltas_keeps_ages(tmp_path, process):
    """A period that begins between two states makes old rows of those that the delta does not hold."""
    tables, root, chain = make(), Storage(tmp_path), []
    saver = TableSaver(tables)
    for number in range(1, 9):
        go_on(tables, number, number + 1)
        manifest = save_tables(saver, root, folder_name(number), process, number, chain)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
    again = make()
    load_tables(again, root.below(folder_name(8)), process)
    for each in (tables, again):
        go_on(each, 9, 12)
    assert content(again, numbers=True) == content(tables, numbers=True)


def test_rows_that_another_run_takes_over_are_old(tmp_path, process):
    tables = make()
    go_on(tables, 0, 7)
    save_tables(TableSaver(tables), Storage(tmp_path), folder_name(7), process, 7)
    again = make()
    load_rows(again, open_saved(Storage(tmp_path).below(folder_name(7)), process), process, with_periods=False)
    for table in again.values():
        assert set(table.read_rows(table.rows_in_use()).period.tolist()) == {-1}
