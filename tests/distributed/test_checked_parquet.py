"""Nothing of a file that is not what was written comes out of it, though it is read once and from any place."""

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tessera.distributed.saved import checked_parquet, row_files
from tessera.distributed.saved.checked_parquet import NOTES, CheckedParquet, DamagedFile, problem_but_for_groups
from tessera.distributed.saved.row_files import copied, count_rows, read_columns, write_columns
from tessera.distributed.saved.states import DamagedState, folder_name, open_saved
from tessera.distributed.saved.storage import Storage, seal
from tessera.distributed.saved.tables import TableSaver, load_rows
from tessera.embedding.table import DynamicTable
from tests.distributed.saved_tables import config, content, save_tables, step
from tests.ranks import on_ranks

ROWS = 300


@pytest.fixture
def storage(tmp_path, monkeypatch) -> Storage:
    """With a file "rows/f" of several row groups."""
    monkeypatch.setattr(row_files, "BUCKET_ROWS", 20)
    monkeypatch.setattr(row_files, "GROUP_ROWS", 16)
    storage = Storage(tmp_path)
    columns = {"id": torch.randperm(ROWS), "values": torch.randn(ROWS, 3), "count": torch.arange(ROWS)}
    write_columns(storage, "rows/f", copied(columns), 1)
    return storage


def problem_of(storage: Storage, sealed) -> str | None:
    """As a job finds it: when it opens the state, else while it loads the rows."""
    problem = problem_but_for_groups(storage, "rows/f", sealed)
    if problem is not None:
        return problem
    try:
        list(read_columns(storage, "rows/f", 0, 1))
    except DamagedFile:
        return storage.problem("rows/f", sealed)


def test_opening_reads_no_row_groups(storage, monkeypatch):
    sealed, loaded = storage.written["rows/f"], []
    with CheckedParquet(storage, "rows/f") as file:
        groups = file.metadata.num_row_groups
        load = type(file._window).load
        monkeypatch.setattr(type(file._window), "load", lambda *a, **b: loaded.append(a[1:3]) or load(*a, **b))
    assert problem_of(storage, sealed) is None and groups > 5
    (_, first), (last, end), *spans = loaded
    assert first == 4 and end == sealed.bytes and len(spans) == groups  # Parquet files begin with four letters
    assert [begin for begin, _ in spans] == [first, *(end for _, end in spans[:-1])] and spans[-1][1] == last


@pytest.mark.parametrize(("ranks", "once"), [(1, True), (7, False)])
def test_what_one_rank_alone_reads_is_let_go(storage, monkeypatch, ranks, once):
    """Of one bucket: seven ranks all read all of it."""
    spans = []
    monkeypatch.setattr(checked_parquet, "let_go", lambda file, begin, end: spans.append((begin, end)))
    found = [columns["id"] for rank in range(ranks) for columns in read_columns(storage, "rows/f", rank, ranks)]
    assert torch.cat(found).sort().values.equal(torch.arange(ROWS))
    assert bool(spans) == once
    with CheckedParquet(storage, "rows/f") as file:
        ends = [end for end, _ in file._notes]
    assert [end for _, end in spans] == (ends[1:] if once else [])


def test_counted_rows_are_those_that_are_read(storage):
    for ranks in (1, 2, 3, 4, 7):
        for rank in range(ranks):
            read = sum(columns["id"].numel() for columns in read_columns(storage, "rows/f", rank, ranks))
            counted = count_rows(storage, "rows/f", rank, ranks)
            assert counted == read if ranks < 7 else counted == ROWS // 7


def test_every_flipped_bit_is_found(storage, tmp_path):
    content, sealed = (tmp_path / "rows/f").read_bytes(), storage.written["rows/f"]
    for at in [*range(0, len(content), 37), *range(4), *range(len(content) - 12, len(content))]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "rows/f").write_bytes(damaged)
        problem = problem_of(storage, sealed)
        assert problem == storage.problem("rows/f", sealed) and "has the checksum" in problem, at


@pytest.mark.parametrize("keep", [0, 3, 100, -9, -1])
def test_a_file_that_was_cut(storage, tmp_path, keep):
    content, sealed = (tmp_path / "rows/f").read_bytes(), storage.written["rows/f"]
    (tmp_path / "rows/f").write_bytes(content[:keep])
    assert problem_but_for_groups(storage, "rows/f", sealed).startswith("rows/f has ")


def test_a_file_of_the_same_job_is_not_taken_for_another(storage, tmp_path):
    """Whole and well noted, but not the one that the manifest knows."""
    sealed = storage.written["rows/f"]
    columns = {"id": torch.arange(ROWS), "values": torch.zeros(ROWS, 3), "count": torch.arange(ROWS)}
    write_columns(storage, "rows/f", copied(columns), 1)
    assert "manifest says" in problem_but_for_groups(storage, "rows/f", sealed)


def test_a_file_that_is_cut_or_unreadable_after_it_was_opened(storage, tmp_path, monkeypatch):
    groups = read_columns(storage, "rows/f", 0, 1)
    next(groups)
    with open(tmp_path / "rows/f", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DamagedFile, match="rows/f is damaged in row group"):
        list(groups)
    write_columns(storage, "rows/f", copied({"id": torch.arange(ROWS)}), 1)
    with CheckedParquet(storage, "rows/f") as file:

        def failing(*_, **__):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(file._window, "load", failing)
        with pytest.raises(DamagedFile, match="rows/f cannot be read: Input/output error"):
            file.read(0)


def test_row_groups_do_not_share_memory(storage):
    """The bytes of one are read where those of the one before were."""
    found = list(read_columns(storage, "rows/f", 0, 1))
    assert len(found) > 5
    again = pq.read_table(storage.full("rows/f"))
    for name in ("id", "count"):
        assert torch.cat([columns[name] for columns in found]).tolist() == again[name].to_pylist()
    values = torch.cat([columns["values"] for columns in found])
    assert values.numpy().tobytes() == b"".join(again["values"].to_pylist())


def test_files_of_before_there_were_notes(storage, tmp_path):
    table = pq.read_table(tmp_path / "rows/f")
    with storage.write("rows/f") as stream, pq.ParquetWriter(stream, table.schema, compression="NONE") as writer:
        writer.write_table(table, row_group_size=100)
        writer.add_key_value_metadata({"tessera.bucket_of_row_group": "[0, 0, 0]"})
    sealed = seal((tmp_path / "rows/f").read_bytes())
    assert NOTES.encode() not in pq.read_metadata(tmp_path / "rows/f").metadata
    assert problem_of(storage, sealed) is None
    assert torch.cat([c["id"] for c in read_columns(storage, "rows/f", 0, 1)]).tolist() == table["id"].to_pylist()
    content = bytearray((tmp_path / "rows/f").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "rows/f").write_bytes(content)
    assert "has the checksum" in problem_but_for_groups(storage, "rows/f", sealed)


@pytest.mark.parametrize("value", ["null", "{}", "[]", '["x"]', "[-1]", "[[1]]", "[[0, 0], [1e30, 0]]", "{", "[99999]"])
@pytest.mark.parametrize("key", [NOTES, "tessera.bucket_of_row_group", "dtype"])
def test_wrong_notes_in_a_file_are_damage(storage, tmp_path, key, value):
    """Rows may be read all the same; what is said of wrong notes is one line."""
    table = pq.read_table(tmp_path / "rows/f")
    if key == "dtype":
        place = table.schema.get_field_index("values")
        field = table.schema.field(place).with_metadata({"dtype": value, "width": value})
        table = table.cast(table.schema.set(place, field))
    with storage.write("rows/f") as stream, pq.ParquetWriter(stream, table.schema, compression="NONE") as writer:
        writer.write_table(table, row_group_size=ROWS)
        groups = "[0]"
        writer.add_key_value_metadata({"tessera.bucket_of_row_group": groups, key: value})
    said = ""
    try:
        count_rows(storage, "rows/f", 0, 1)
        list(read_columns(storage, "rows/f", 0, 1))
    except DamagedFile as error:
        said = str(error)
        assert said.startswith("rows/f ") and "\n" not in said
    harmless = {(NOTES, "null"), ("tessera.bucket_of_row_group", "[-1]"), ("tessera.bucket_of_row_group", "[99999]")}
    assert said or (key, value) in harmless


def save_and_load(process, folder):
    """Rank 1 has written a row group that is damaged. Returns what is said on this rank."""
    table, root = DynamicTable(config()), Storage(folder)
    step(table, 1, process.rank, process.world_size)
    save_tables(TableSaver({"a": table}), root, folder_name(1), process, 1)
    if process.rank == 1:
        flip_a_bit(folder / folder_name(1) / "rows" / "a" / "00001-of-00002.parquet")
    dist.barrier()
    return load(process, folder)


def load(process, folder):
    saved = open_saved(Storage(folder).below(folder_name(1)), process, rows_later=True)
    with pytest.raises(DamagedState) as error:
        load_rows({"a": DynamicTable(config())}, saved, process)
    return str(error.value)


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def test_all_ranks_are_told_of_damage_that_one_of_them_finds(tmp_path, process):
    told = on_ranks(2, save_and_load, tmp_path)
    assert told == [load(process, tmp_path)] * 2  # any number of ranks says the same
    expected = f"{tmp_path / folder_name(1)} is passed over: rows/a/00001-of-00002.parquet has the checksum "
    assert told[0].startswith(expected)


def test_behind_a_uri(process):
    table, root = DynamicTable(config()), Storage("memory://checked")
    step(table, 1)
    save_tables(TableSaver({"a": table}), root, folder_name(1), process, 1)
    saved, again = open_saved(root.below(folder_name(1)), process, rows_later=True), {"a": DynamicTable(config())}
    load_rows(again, saved, process)
    assert content(again) == content({"a": table})
    path = f"{folder_name(1)}/rows/a/00000-of-00001.parquet"
    damaged = bytearray(root.read(path))
    damaged[100] ^= 1
    with root.write(path) as stream:
        stream.write(damaged)
    with pytest.raises(DamagedState, match="has the checksum"):
        load_rows({"a": DynamicTable(config())}, saved, process)
