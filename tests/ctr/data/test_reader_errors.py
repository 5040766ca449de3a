"""What a user may get wrong, and bad rows under both policies."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tessera.ctr.data.errors import DataError, SchemaError
from tessera.ctr.data.reader import ParquetReader
from tessera.embedding.errors import ConfigError

from .rows import features, read_in_order, taken_apart, write

N, NOW = 100, 1_767_225_600


def table(**replaced) -> dict:
    columns = {
        "label": np.arange(N) % 2,
        "user": np.arange(N),
        "age": np.ones(N, np.float32),
        "tags": pa.array([[1]] * N),
        **replaced,
    }
    return {name: column for name, column in columns.items() if column is not None}


SCHEMA = features("user", {"name": "age", "kind": "numeric"}, {"name": "tags", "kind": "ids"})


def message_of(error_type, path, schema=SCHEMA, **options) -> str:
    with pytest.raises(error_type) as error:
        for _ in ParquetReader(path, schema, 10, **options).epoch(0):
            pass
    assert type(error.value) is error_type
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "replaced, words",
    [
        ({"user": None, "usr": np.arange(N)}, ["'user'", "nowhere", "did you mean 'usr'"]),
        ({"user": np.arange(N) / 2}, ["'user'", "double", "integer", "not as floats"]),
        ({"user": pa.array(["x"] * N)}, ["'user'", "string", "integer"]),
        ({"age": pa.array(["x"] * N)}, ["'age'", "string", "number"]),
        ({"tags": np.arange(N)}, ["'tags'", "int64", "list"]),
        ({"tags": pa.array([[0.5]] * N)}, ["'tags'", "list<", "double", "integer"]),
        ({"label": pa.array(["0"] * N)}, ["'label'", "string", "0 or 1"]),
        ({"label": None}, ["'label'", "nowhere"]),
    ],
)
def test_the_third_file_of_five_disagrees(tmp_path, replaced, words):
    path = write(tmp_path / "d", table(), table(), table(**replaced), table(), table())
    message = message_of(SchemaError, path)
    for word in [f"{path}/part-2.parquet", *words]:
        assert word in message, message


def test_nothing_to_read(tmp_path):
    assert "not found" in message_of(DataError, str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "no parquet file" in message_of(DataError, str(tmp_path / "empty"))
    path = write(tmp_path / "d", {name: column[:0] for name, column in table().items()})
    assert "0 rows" in message_of(DataError, path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_bytes(b"text" * 100)
    message = message_of(DataError, str(tmp_path / "bad"))
    assert "x.parquet" in message and "footer" in message


def test_settings(tmp_path):
    path = write(tmp_path / "d", table())
    for options, word in [
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"lanes": 0}, "lanes: found 0"),
        ({"window_rows": -1}, "window_rows: found -1"),
        ({"threads": 0}, "threads: found 0"),
        ({"bad_rows": "skp"}, "bad_rows: found 'skp'; did you mean 'skip'"),
        ({"world_size": 3, "lanes": 2}, "data.lanes: found 2 for 3 ranks"),
    ]:
        with pytest.raises(ConfigError, match=word):
            ParquetReader(path, SCHEMA, **{"batch_size": 10, **options})


def changed(column, row, value):
    column = np.array(column, np.float64)
    column[row] = value
    return column


def times(row, value):
    return pa.array([value if i == row else NOW + i for i in range(N)])


BAD_ROWS = [
    ("label", changed(np.arange(N) % 2, 57, 7), "label", "7.0", "0 or 1"),
    ("label", pa.array([None if i == 57 else 1 for i in range(N)]), "label", "null", "0 or 1"),
    ("label", changed(np.zeros(N), 57, np.nan), "label", "nan", "0 or 1"),
    ("age", changed(np.ones(N), 57, np.nan), "numeric", "nan", "finite"),
    ("age", changed(np.ones(N), 57, -np.inf), "numeric", "-inf", "finite"),
    ("age", changed(np.ones(N), 57, 1e300), "numeric", "1e+300", "finite"),
    ("age", changed(np.ones(N), 57, 3e38), "numeric", "3e+38", "at most 1e+18 either way"),
    ("age", changed(np.ones(N), 57, -2e19), "numeric", "-2e+19", "at most 1e+18 either way"),
    ("w", changed(np.ones(N), 57, -1), "weight", "-1.0", "at least 0"),
    ("w", changed(np.ones(N), 57, 3e38), "weight", "3e+38", "at most 1e+18"),
    ("w", pa.array([None if i == 57 else 1 for i in range(N)]), "weight", "null", "at least 0"),
    ("t", times(57, None), "time", "null", "a time"),
    ("t", times(57, 2**40), "time", f"{2**40} s (the year 36812)", "a time from 1990-01-01 to 2100-01-01"),
    ("t", times(57, -1), "time", "-1 s (the year 1969)", "a time from 1990-01-01"),
    ("t", times(57, NOW * 1000), "time", f"{NOW * 1000} s (the year 57", "as ms it would be plausible"),
    ("t", times(57, 4_102_444_800), "time", "4102444800 s (the year 2100)", "data.schema.time_from"),
    ("h", pa.array(["0x1" if i == 57 else "1f" for i in range(N)]), "id", "'0x1'", "hexadecimal"),
]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("column, values, reason, found, expected", BAD_ROWS)
def test_a_bad_row_is_named_or_dropped(tmp_path, shuffle, column, values, reason, found, expected):
    path = write(tmp_path / "d", table(**{column: values}), row_group_size=20)
    keys = {"w": {"weight": "w"}, "t": {"time": "t"}}.get(column, {})
    hex_feature = [{"name": "h", "dtype": "hex"}] if column == "h" else []
    schema = features("user", {"name": "age", "kind": "numeric"}, *hex_feature, **keys)
    message = message_of(DataError, path, schema, shuffle=shuffle, lanes=3)
    for word in ("part-0.parquet", "row group 2 row 17", f"column {column!r}", f"found {found}", expected):
        assert word in message, message
    reader = ParquetReader(path, schema, 10, shuffle=shuffle, lanes=3, bad_rows="skip", numbered=True)
    batches = list(reader.epoch(0))
    users = [row["ids"]["user"][0] for batch in batches for row in taken_apart(batch)]
    assert sorted(users) == [i for i in range(N) if i != 57]
    assert torch.cat([batch.number[: batch.rows] for batch in batches]).tolist() == users, "dropped rows count, too"
    assert reader.bad_row_counts == {reason: 1}
    assert all(len(batch.weight) == 10 for batch in batches), "a dropped row leaves padding"
    assert sum(batch.weight.sum().item() for batch in batches) == N - 1


def test_an_infinite_bucketised_number_is_bad(tmp_path):
    path = write(tmp_path / "d", table(age=changed(np.ones(N), 3, np.inf)))
    feature = {"name": "age", "kind": "numeric", "transform": "bucketise", "boundaries": [0.5]}
    assert "row 3: column 'age' found inf" in message_of(DataError, path, features(feature))


def corrupt(file: str, column: str, group: int) -> None:
    """Overwrite the stored bytes of one column of one row group."""
    metadata = pq.ParquetFile(file).metadata.row_group(group)
    chunk = next(metadata.column(i) for i in range(metadata.num_columns) if metadata.column(i).path_in_schema == column)
    with open(file, "r+b") as stored:
        stored.seek(chunk.data_page_offset)
        stored.write(b"\xff" * chunk.total_compressed_size)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_corrupt_page_is_named_or_its_row_group_dropped(tmp_path, world_size, checksum):
    """The rows that are dropped are the same whatever the number of ranks."""
    random = np.random.default_rng(0)
    user = random.integers(0, 2**62, 600)
    columns = {"label": user % 2, "user": user, "number": np.arange(600)}
    options = {"use_dictionary": False, "compression": "zstd", "write_page_checksum": checksum}
    path = write(tmp_path / "d", columns, columns, row_group_size=200, **options)
    corrupt(f"{path}/part-1.parquet", "number", 1)
    schema = features("user", "number")
    message = message_of(DataError, path, schema, lanes=4)
    assert "part-1.parquet row group 1 column 'number': cannot be decoded" in message
    numbers = []
    dropped = 0
    for rank in range(world_size):
        reader = ParquetReader(path, schema, 50, rank, world_size, bad_rows="skip", lanes=4)
        numbers += [row["ids"]["number"][0] for batch in reader.epoch(0) for row in taken_apart(batch)]
        dropped += reader.bad_row_counts.get("corrupt_row_group", 0)
    assert sorted(numbers) == sorted([*range(600), *range(200), *range(400, 600)]) and dropped == 200


def test_a_flipped_bit_is_named_where_pages_have_checksums(tmp_path):
    """Without them other values would be trained."""
    columns = {"label": np.arange(100) % 2, "user": np.arange(100)}
    path = write(tmp_path / "d", columns, use_dictionary=False, compression="none", write_page_checksum=True)
    chunk = pq.ParquetFile(f"{path}/part-0.parquet").metadata.row_group(0).column(1)
    with open(f"{path}/part-0.parquet", "r+b") as stored:
        stored.seek(chunk.data_page_offset + chunk.total_compressed_size - 3)
        before = stored.read(1)
        stored.seek(-1, 1)
        stored.write(bytes([before[0] ^ 1]))
    message = message_of(DataError, path, features("user"), lanes=2)
    assert "part-0.parquet row group 0: cannot be decoded: could not verify page integrity" in message


def test_a_window_without_a_single_good_row(tmp_path):
    user = np.random.default_rng(0).integers(0, 2**62, 40)
    columns = table(user=user, **{k: v[:40] for k, v in table().items() if k != "user"})
    path = write(tmp_path / "d", columns, use_dictionary=False, compression="zstd")
    corrupt(f"{path}/part-0.parquet", "user", 0)
    reader = ParquetReader(path, SCHEMA, 10, bad_rows="skip", lanes=2)
    batches = list(reader.epoch(0))
    assert [batch.rows for batch in batches] == [0] * 4 and reader.bad_row_counts == {"corrupt_row_group": 40}
    assert batches[0].ids.values().numel() == 0 and batches[0].weight.sum() == 0


def test_a_file_that_vanishes_is_no_reason_to_drop_rows(tmp_path):
    path = write(tmp_path / "d", table(), table())
    reader = ParquetReader(path, SCHEMA, 10, bad_rows="skip")
    (tmp_path / "d" / "part-1.parquet").unlink()
    with pytest.raises(DataError, match="part-1.parquet: cannot be opened"):
        list(reader.epoch(0))


def test_a_state_of_other_data_or_settings_is_refused(tmp_path):
    path = write(tmp_path / "d", table(), row_group_size=30)
    state = ParquetReader(path, SCHEMA, 10).state()
    for options, word in [
        ({"lanes": 8}, "data.lanes found 8, expected 16"),
        ({"seed": 3}, "seed found 3, expected 0"),
        ({"window_rows": 10}, "window_rows found 10, expected 32768"),
        ({"shuffle": False}, "shuffle found False, expected True"),
    ]:
        with pytest.raises(DataError, match=word):
            ParquetReader(path, SCHEMA, 10, **options).load_state(state)
    other = write(tmp_path / "other", table(), row_group_size=31)
    with pytest.raises(DataError, match="files have come, gone or changed"):
        ParquetReader(other, SCHEMA, 10).load_state(state)


def flipped(rows: int, share: int) -> dict:
    return {"label": (np.arange(rows) % share == 0).astype(np.int8), "id": np.arange(rows)}


@pytest.mark.parametrize("name", ["part-1.parquet", "part-0.parquet"])
def test_a_state_of_data_with_other_values_is_refused(tmp_path, name):
    """Names, rows, sizes and statistics agree; only values differ."""
    schema = features("id")
    path = write(tmp_path / "d", flipped(64, 2), flipped(64, 2), compression="none")
    state = json.loads(json.dumps(ParquetReader(path, schema, 10).state()))
    ParquetReader(path, schema, 10).load_state(state)
    before = (tmp_path / "d" / name).stat().st_size
    pq.write_table(
        pa.table({**flipped(64, 2), "label": 1 - flipped(64, 2)["label"]}), tmp_path / "d" / name, compression="none"
    )
    assert (tmp_path / "d" / name).stat().st_size == before
    with pytest.raises(DataError, match=f"{name} has changed since the state was saved; put back .*warm_start"):
        ParquetReader(path, schema, 10).load_state(state)
    ParquetReader(path, schema, 10).load_state({key: state[key] for key in state if key not in ("contents", "rows")})


def test_a_state_of_many_files_stays_small_and_names_the_changed_one(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.ctr.data.footers.CONTENTS", 4)
    schema = features("id")
    path = write(tmp_path / "d", *[flipped(8, 2)] * 10)
    state = ParquetReader(path, schema, 10).state()
    assert len(state["contents"]) == 4
    pq.write_table(pa.table(flipped(8, 3)), tmp_path / "d" / "part-7.parquet")
    with pytest.raises(DataError, match="part-6.parquet or one of the 2 behind it has changed"):
        ParquetReader(path, schema, 10).load_state(state)
    (tmp_path / "d" / "part-7.parquet").unlink()
    with pytest.raises(DataError, match="files have come, gone or changed: found 72 rows in 9 files, expected 80 rows"):
        ParquetReader(path, schema, 10).load_state(state)


def test_files_with_large_footers_and_large_files_are_told_apart_by_their_footers(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.ctr.data.footers.SMALL_BYTES", 512)
    monkeypatch.setattr("tessera.ctr.data.footers.TAIL_BYTES", 256)
    monkeypatch.setattr("tessera.ctr.data.seals.TAIL_BYTES", 64)
    schema = features("id")
    path = write(tmp_path / "d", flipped(2000, 2), row_group_size=20)
    reader = ParquetReader(path, schema, 100)
    assert reader.rows == 2000 and len(reader.groups.rows) == 100
    state = reader.state()
    write(tmp_path / "d", flipped(2000, 7), row_group_size=20)
    with pytest.raises(DataError, match="part-0.parquet has changed"):
        ParquetReader(path, schema, 100).load_state(state)


def test_a_state_inside_another_epoch_is_refused(tmp_path):
    reader = ParquetReader(write(tmp_path / "d", table()), SCHEMA, 10)
    epoch = reader.epoch(1)
    next(epoch)
    reader.load_state(reader.state())
    with pytest.raises(DataError, match="row 10 of 100 of epoch 1.*epoch 2"):
        reader.epoch(2)


def test_a_state_inside_an_epoch_of_an_older_order_is_refused(tmp_path):
    """Its position would mean other rows; at the end of an epoch, and unshuffled, all orders agree."""
    path = write(tmp_path / "d", table())
    for shuffle in (True, False):
        reader = ParquetReader(path, SCHEMA, 10, shuffle=shuffle)
        epoch = reader.epoch(1)
        next(epoch)
        inside = {key: value for key, value in reader.state().items() if key != "order"}
        if shuffle:
            with pytest.raises(DataError, match="found row 10 of an epoch in row order 1, expected order 2"):
                reader.load_state(inside)
        else:
            reader.load_state(inside)
        for _ in epoch:
            pass
        behind = {key: value for key, value in reader.state().items() if key != "order"}
        reader.load_state(behind)


def test_reading_in_order_helper_sees_all_rows(tmp_path):
    rows = read_in_order(write(tmp_path / "d", table()), SCHEMA)
    assert [row["ids"]["user"] for row in rows] == [[i] for i in range(N)]
