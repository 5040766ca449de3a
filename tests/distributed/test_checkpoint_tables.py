"""Rows of saved states: on any number of ranks, through chains of deltas, and for other readers."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tessera.distributed.saved import row_files
from tessera.distributed.saved.compact import compact
from tessera.distributed.saved.row_files import copied, read_columns, write_columns
from tessera.distributed.saved.states import CheckpointError, folder_name, latest, open_saved, retain
from tessera.distributed.saved.storage import Storage
from tessera.distributed.saved.tables import TableSaver
from tessera.embedding.config import Admission, Group
from tessera.embedding.errors import TesseraError
from tessera.embedding.table import DynamicTable
from tessera.kernels.message import owner_of
from tessera.kernels.mix import mix64
from tests.distributed.saved_tables import EXACT, INT8, config, content, load_tables, save_tables, step
from tests.ranks import on_ranks

OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "ftrl")


def make(process) -> dict[str, DynamicTable]:
    tables = {name: DynamicTable(config(name, name)) for name in OPTIMIZERS}
    for name in OPTIMIZERS[:-1]:  # int formats have no ftrl
        tables[f"int8_{name}"] = DynamicTable(config(name, f"int8_{name}", groups=INT8))
    tables["narrow"] = DynamicTable(
        config("adagrad", "narrow", groups=(Group("v", 2, 0.5, "fp16"), Group("w", 1, 0.5)))
    )
    tables["exact"] = DynamicTable(config("adam", "exact", admission=EXACT))
    tables["old"] = DynamicTable(config("adagrad", "old", ttl_seconds=4))
    return tables


def train_and_save(process, folder, number: int, begin: int, end: int):
    """Continue from step `begin` of the folder (0: from nothing) to `end`, on other ranks than those that saved."""
    tables, root = make(process), Storage(folder)
    lost = load_tables(tables, root.below(folder_name(begin)), process) if begin else []
    loaded = content(tables)
    for i in range(begin, end):
        for table in tables.values():
            step(table, i, process.rank, process.world_size)
    save_tables(TableSaver(tables), root, folder_name(end), process, end)
    ids = [i for rows in loaded.values() for i in rows]
    owners = owner_of(mix64(torch.tensor(ids, dtype=torch.int64)), process.world_size)
    assert (owners == process.rank).all()
    return loaded, content(tables), lost


def union(parts: list[dict]) -> dict:
    found = {name: {} for name in parts[0]}
    for part in parts:
        for name, rows in part.items():
            assert not found[name].keys() & rows.keys()
            found[name] |= rows
    return found


def test_two_to_one_to_three_to_two_ranks(tmp_path, process):
    """Rows, states, counts and pending ids are those of a run that never changed its ranks."""
    before = None
    for number, (world, begin, end) in enumerate([(2, 0, 4), (1, 4, 6), (3, 6, 9), (2, 9, 12)]):
        results = on_ranks(world, train_and_save, tmp_path, number, begin, end)
        if before is not None:
            assert union([loaded for loaded, _, _ in results]) == before
        before = union([trained for _, trained, _ in results])
    tables = make(process)
    for i in range(12):
        for table in tables.values():
            step(table, i)
    assert content(tables) == before
    assert before["exact"] and len(before["old"]) < len(before["adam"])


def test_a_rank_reads_only_its_share(tmp_path, process, monkeypatch):
    monkeypatch.setattr(row_files, "BUCKET_ROWS", 8)
    monkeypatch.setattr(row_files, "GROUP_ROWS", 32)
    ids = torch.randperm(1 << 12)
    for rank in range(2):
        mine = ids[owner_of(mix64(ids), 2) == rank]
        write_columns(Storage(tmp_path), f"{rank}", copied({"id": mine}), 2)
    original = pq.ParquetFile.read_row_group
    for ranks in (1, 3, 4, 5, 7, 8):
        rows_read = []

        def counted(self, group, rows_read=rows_read, **options):
            table = original(self, group, **options)
            rows_read.append(table.num_rows)
            return table

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
        got = []
        for rank in range(ranks):
            rows_read.clear()
            share = [c["id"] for name in "01" for c in read_columns(Storage(tmp_path), name, rank, ranks)]
            got.append(torch.cat(share))
            assert max(rows_read) <= 32
            if ranks != 7:  # 240 buckets are not divided by 7: there, every rank looks at all rows
                assert sum(rows_read) == got[-1].numel()
        assert torch.equal(torch.cat(got).sort().values, torch.arange(1 << 12))


def test_a_chain_of_deltas_is_the_table(tmp_path, process):
    """Rows come, change, expire, are evicted, come back; ids that were given up stay away."""
    options = {"ttl_seconds": 5, "max_rows": 285, "eviction": "lru"}
    table, root = DynamicTable(config("adam", **options)), Storage(tmp_path)
    saver, chain, sizes = TableSaver({"a": table}), [], []
    for number in range(1, 16):
        step(table, number)
        manifest = save_tables(saver, root, folder_name(number), process, number, chain)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
        sizes.append(sum(file["bytes"] for path, file in manifest["files"].items() if path.startswith("rows/")))
        again = {"a": DynamicTable(config("adam", **options))}
        load_tables(again, root.below(folder_name(number)), process)
        assert content(again, numbers=True) == content({"a": table}, numbers=True)
    assert table.stats()["expired"] > 0 and table.stats()["evicted"] > 0
    for number in range(16, 24):  # both go on alike
        step(table, number)
        step(again["a"], number)
    assert content(again, numbers=True) == content({"a": table}, numbers=True)


def delta_chain(root: Storage, process, steps: int = 3) -> DynamicTable:
    table = DynamicTable(config(ttl_seconds=3))
    saver, chain = TableSaver({"a": table}), []
    for number in range(1, steps + 1):
        step(table, number)
        manifest = save_tables(saver, root, folder_name(number), process, number, chain)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
    return table


def test_a_broken_link_makes_the_states_behind_it_unreadable(tmp_path, process):
    root, warnings = Storage(tmp_path), []
    delta_chain(root, process)
    path = tmp_path / folder_name(2) / "rows" / "a" / "00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert latest(root, process, warnings.append).step == 1
    assert len(warnings) == 2 and all("rows/a" in warning for warning in warnings)
    save_tables(TableSaver({"a": DynamicTable(config())}), root, folder_name(2), process, 2)
    with pytest.raises(CheckpointError, match="which it builds on, is not the one that was there"):
        open_saved(root.below(folder_name(3)), process)


def test_states_that_others_build_on_are_kept(tmp_path, process):
    root = Storage(tmp_path)
    delta_chain(root, process)
    retain(root, 1)
    assert latest(root, process, pytest.fail).step == 3


def test_compaction_gives_one_full_state_of_the_same_rows(tmp_path, process):
    root = Storage(tmp_path)
    table = delta_chain(root, process, 5)
    with pytest.raises(CheckpointError, match=f"{folder_name(5)} builds on {folder_name(4)}"):
        compact(root, open_saved(root.below(folder_name(4)), process), process)
    manifest = compact(root, latest(root, process, pytest.fail), process)
    assert manifest["kind"] == "full" and not manifest["chain"]
    retain(root, 1)
    saved = latest(root, process, pytest.fail)
    assert len(saved.folders) == 1 and saved.training["n"] == 5
    again = {"a": DynamicTable(config(ttl_seconds=3))}
    load_tables(again, saved.folders[0], process)
    assert content(again, numbers=True) == content({"a": table}, numbers=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(5)]


def test_compaction_of_a_table_without_rows(tmp_path, process):
    root, table, chain = Storage(tmp_path), DynamicTable(config()), []
    saver = TableSaver({"a": table})
    for number in (1, 2):
        manifest = save_tables(saver, root, folder_name(number), process, number, chain)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
    compact(root, latest(root, process, pytest.fail), process)
    again = {"a": DynamicTable(config())}
    load_tables(again, root.below(folder_name(2)), process)
    assert content(again) == {"a": {}}
    step(again["a"], 1)  # the columns are those of the table


def test_a_full_state_follows_when_too_many_ids_were_evicted(process):
    table = DynamicTable(config(ttl_seconds=2, evicted_kept=50))
    saver = TableSaver({"a": table})
    assert not saver.can_follow()
    saver.follow(deltas=True)
    assert saver.can_follow()
    for number in range(8):
        step(table, number)
    assert not saver.can_follow()


def save_where_one_rank_forgets(process, folder):
    """Two states, the second a delta if it can be. Rank 1 alone gives up more ids than its table remembers."""
    tables = {"a": DynamicTable(config(ttl_seconds=2, evicted_kept=50 if process.rank else 10_000))}
    saver, root, chain = TableSaver(tables), Storage(folder), []
    for number in range(8):
        step(tables["a"], number, process.rank, process.world_size)
        if number not in (1, 7):
            continue
        delta = bool(chain) and saver.can_follow()
        manifest = save_tables(saver, root, folder_name(number), process, number, chain if delta else None)
        chain.append({"name": folder_name(number), "checksum": manifest["checksum"]})
    again = {"a": DynamicTable(config(ttl_seconds=2))}
    load_tables(again, root.below(folder_name(7)), process)
    return manifest["kind"], content(again, numbers=True) == content(tables, numbers=True)


def test_ranks_agree_on_a_full_state_when_one_of_them_has_forgotten_ids(tmp_path):
    """Else rank 0 would call the state a delta, and rows that rank 1 gave up would come back from the one before."""
    assert on_ranks(2, save_where_one_rank_forgets, tmp_path) == [("full", True), ("full", True)]


def save_on_a_full_disk(process, folder):
    """The first state is written; the disk of rank 1 is full before the second."""
    tables, root = {"a": DynamicTable(config())}, Storage(folder)
    saver = TableSaver(tables)
    step(tables["a"], 1, process.rank, process.world_size)
    save_tables(saver, root, folder_name(1), process, 1)
    if process.rank == 1:
        Storage.write = refuse
    with pytest.raises(CheckpointError) as error:
        save_tables(saver, root, folder_name(2), process, 2)
    return str(error.value), latest(root, process, pytest.fail).step, sorted(path.name for path in folder.iterdir())


def refuse(storage, path):
    raise OSError(28, "No space left on device")


def test_all_ranks_are_told_which_one_has_no_space(tmp_path):
    told = on_ranks(2, save_on_a_full_disk, tmp_path)
    problem = "rank 1: No space left on device; what was saved before is untouched"
    assert told == [(f"{tmp_path / folder_name(2)} cannot be written: {problem}", 1, [folder_name(1)])] * 2


def sliding(process, folder, begin: int):
    tables = {"a": DynamicTable(config(admission=Admission("sliding", threshold=2, capacity=1 << 12)))}
    lost = load_tables(tables, folder / folder_name(begin), process) if begin else []
    step(tables["a"], begin + 1, process.rank, process.world_size)
    save_tables(TableSaver(tables), Storage(folder), folder_name(begin + 1), process, begin + 1)
    return lost


@pytest.mark.slow
def test_a_sliding_filter_goes_to_more_ranks_and_says_when_it_cannot(tmp_path):
    on_ranks(1, sliding, tmp_path, 0)
    assert on_ranks(2, sliding, tmp_path, 1) == [[], []]
    lost = on_ranks(3, sliding, tmp_path, 2)
    assert lost[0] == ["table a: a sliding admission filter cannot go from 2 to 3 ranks; it begins to count anew"]


def test_rows_of_another_width_are_refused(tmp_path, process):
    root = Storage(tmp_path)
    delta_chain(root, process, 1)
    other = {"a": DynamicTable(config("sgd"))}
    with pytest.raises(TesseraError, match="column state holds 12 x float32; the model's table has 0 x float32"):
        load_tables(other, root.below(folder_name(1)), process)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8])
def test_columns_come_back_exactly(tmp_path, process, dtype):
    values = torch.randn(1000, 6).mul(50).to(dtype)
    columns = {"id": torch.randperm(1000), "values": values, "step_size": torch.rand(1000, 2)}
    write_columns(Storage(tmp_path), "rows", copied(columns), 1)
    (back,) = read_columns(Storage(tmp_path), "rows", 0, 1)
    for name, column in columns.items():
        assert back[name].dtype == column.dtype and torch.equal(back[name], column)


def test_any_parquet_reader_reads_the_rows(tmp_path, process):
    """As docs/checkpoints.md tells; pandas' `to_numpy` of the column gives the same bytes objects."""
    table = delta_chain(Storage(tmp_path), process, 1)
    read = pq.read_table(tmp_path / folder_name(1) / "rows" / "a" / "00000-of-00001.parquet")
    values = np.frombuffer(b"".join(read["values"].to_pylist()), "<f4").reshape(read.num_rows, -1)
    expected = table.gather(table.lookup(torch.from_numpy(read["id"].to_numpy().copy()), 0, training=False))
    assert np.array_equal(values, expected.numpy())
    assert read.schema.field("values").metadata == {b"dtype": b"float32", b"width": b"5"}
