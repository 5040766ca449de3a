"""Row groups outside of a filter are not read, and everything else is as if they were."""

from datetime import date
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tessera.ctr.data.expressions import parse
from tessera.ctr.data.reader import ParquetReader
from tessera.ctr.data.row_group_filter import is_outside
from tessera.ctr.data.row_groups import RowGroupReader
from tests.ctr.data.rows import features, taken_apart, write

GROUPS, SIZE = 12, 50
ROWS = GROUPS * SIZE
X = np.arange(ROWS) // SIZE * 10 + np.arange(ROWS) % 7  # group g holds 10 g to 10 g + 6
DATA = {
    "label": np.zeros(ROWS, np.float32),
    "a": np.arange(ROWS),
    "x": X,
    "f": np.where(np.arange(ROWS) % 9 == 3, np.nan, X.astype(np.float64)),
    "s": pa.array([f"{x:03}" for x in X]),
    "n": pa.array([None if row < 100 else int(x) for row, x in enumerate(X)]),
    "day": pa.array([date(2026, 1, 1 + g) for g in range(GROUPS) for _ in range(SIZE)]),
}


@pytest.mark.parametrize(
    "where, read",
    [
        ("x > 100", 2),
        ("x >= 30 and x < 50", 2),
        ("20 < x and 42 >= x", 3),
        ("x == 33 or s == '071'", 2),
        ("x == 33 or divide(x, 2) == 500", 12),
        ("f > 100.5 and is_valid(s)", 2),
        ("f != 3.0", 12),
        ("s <= '016'", 2),
        ("is_valid(n)", 10),
        ("is_null(n)", 2),
        ("n == 5", 0),
        ("not x > 20", 12),
        ("-x > -20", 12),
        ("x > -1 and x < 1e30", 12),
        ("x == 3.5", 1),
        ("year(day) == 2026 and x < 10", 1),
    ],
)
def test_row_groups_that_cannot_pass_are_outside(tmp_path, where, read):
    path = write(tmp_path, DATA, row_group_size=SIZE)
    reader = ParquetReader(path, features("a"), 32, where=where)
    expression, groups = parse(where, "here"), pq.ParquetFile(f"{path}/part-0.parquet")
    assert sum(not outside for outside in reader.groups.outside) == read
    for group in range(GROUPS):
        found = expression.of(
            dict(zip(DATA, groups.read_row_group(group).select(list(DATA)).combine_chunks(), strict=True))
        )
        if is_outside(expression, groups.metadata.row_group(group)):
            assert not any(found.to_pylist()), group


@pytest.mark.parametrize("window_rows", [20, 64, 5000])
def test_rows_counts_and_positions_are_the_same(tmp_path, monkeypatch, window_rows):
    path, opened = write(tmp_path, DATA, row_group_size=SIZE), []
    parquet = RowGroupReader.parquet
    monkeypatch.setattr(RowGroupReader, "parquet", lambda self, group: opened.append(group) or parquet(self, group))

    def delivered(*, pushed: bool, stop: int = 0) -> tuple[list, dict, set]:
        opened.clear()
        found, counts = [], {}
        for rank in range(2):
            where = "x >= 90 or x == 22"
            options = {"where": where, "lanes": 4, "window_rows": window_rows, "seed": 3}
            made = partial(ParquetReader, path, features("a"), 48, rank, 2, **options)
            reader = made()
            if not pushed:
                reader.groups.outside[:] = False
            batches = reader.epoch(0)
            parts = [next(batches) for _ in range(stop)]
            if stop:  # go on in another process
                state = reader.state(parts[-1])
                batches.close()
                reader = made()
                reader.load_state(state)
                batches = reader.epoch(0)
            parts += list(batches)
            found.append([[row["ids"]["a"][0] for row in taken_apart(one)] + [one.position] for one in parts])
            counts[rank] = dict(reader.bad_row_counts)
        return found, counts, set(opened)

    plain, plain_counts, all_groups = delivered(pushed=False)
    found, counts, groups = delivered(pushed=True)
    assert found == plain and counts == plain_counts
    assert all_groups == set(range(GROUPS)) and groups == {2, 9, 10, 11}
    again, _, groups = delivered(pushed=True, stop=4)
    assert again == plain and groups <= {2, 9, 10, 11}


def test_bad_rows_outside_are_not_looked_at(tmp_path):
    labels = np.where(np.arange(ROWS) < SIZE, 7.0, 0.0)
    path = write(tmp_path, DATA | {"label": labels}, row_group_size=SIZE)
    reader = ParquetReader(path, features("a"), 32, where="x > 50", bad_rows="skip")
    rows = sum(batch.rows for batch in reader.epoch(0))
    assert rows == int((X > 50).sum()) and reader.bad_row_counts == {"where": ROWS - rows}
