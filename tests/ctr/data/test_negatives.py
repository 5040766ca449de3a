"""Reading part of the negatives: which rows, in any order and on any number of ranks."""

import numpy as np
import pytest

from tessera.ctr.data.errors import DataError
from tessera.ctr.data.negatives import Negatives
from tessera.ctr.data.reader import ParquetReader
from tests.ctr.data.rows import features, taken_apart, write

ROWS = 3000


def read(path: str, world_size: int = 1, **options) -> tuple[list[int], int]:
    """The ids of the rows that are read, in no order, and how many negatives were left out."""
    ids, left_out = [], 0
    for rank in range(world_size):
        options = {"batch_size": 64, "lanes": 4, "window_rows": 100, "seed": 3, **options}
        reader = ParquetReader(path, features("a"), rank=rank, world_size=world_size, **options)
        ids += [row["ids"]["a"][0] for batch in reader.epoch(options.get("epoch", 0)) for row in taken_apart(batch)]
        left_out += reader.bad_row_counts.get("sampled", 0)
    return sorted(ids), left_out


def test_rows_are_chosen_by_their_number_alone(tmp_path):
    label = np.arange(ROWS) % 3 == 0
    table = {"label": label.astype(np.float32), "a": np.arange(ROWS)}
    path = write(tmp_path, table, row_group_size=170)
    found, left_out = read(path, negative_rate=0.25)
    kept = label | Negatives(0.25, 3).kept(np.arange(ROWS))
    assert found == np.flatnonzero(kept).tolist() and left_out == ROWS - kept.sum()
    assert (kept & ~label).sum() == pytest.approx(0.25 * 2000, abs=4 * (2000 * 0.25 * 0.75) ** 0.5)
    assert read(path, 2, negative_rate=0.25) == read(path, lanes=8, threads=2, negative_rate=0.25) == (found, left_out)
    assert read(path, negative_rate=0.25, shuffle=False)[0] == found
    assert set(found) < set(read(path, negative_rate=0.5)[0]), "a larger share keeps these and more"
    assert read(path, negative_rate=0.25, seed=4)[0] != found
    assert read(path) == (list(range(ROWS)), 0)


def test_bad_rows_count_as_such_and_stop_as_ever(tmp_path):
    label = np.zeros(500, np.float32)
    label[77] = 2
    path = write(tmp_path, {"label": label, "a": np.arange(500)})
    with pytest.raises(DataError, match="row 77: column 'label' found 2"):
        read(path, negative_rate=0.1)
    reader = ParquetReader(path, features("a"), 64, bad_rows="skip", negative_rate=0.1)
    rows = sum(batch.rows for batch in reader.epoch(0))
    assert reader.bad_row_counts == {"label": 1, "sampled": 499 - rows} and 0 < rows < 100


def test_a_state_goes_on_with_the_same_share_alone(tmp_path):
    path = write(tmp_path, {"label": np.zeros(300, np.float32), "a": np.arange(300)})
    reader = ParquetReader(path, features("a"), 50, negative_rate=0.5)
    batches = reader.epoch(0)
    first = [row["ids"]["a"][0] for row in taken_apart(next(batches))]
    state = reader.state()
    rest = ParquetReader(path, features("a"), 50, negative_rate=0.5)
    rest.load_state(state)
    both = first + [row["ids"]["a"][0] for batch in rest.epoch(0) for row in taken_apart(batch)]
    assert sorted(both) == np.flatnonzero(Negatives(0.5, 0).kept(np.arange(300))).tolist()
    other = ParquetReader(path, features("a"), 50)
    with pytest.raises(DataError, match="data.negative_rate found 1.0, expected 0.5 as saved"):
        other.load_state(state)
    del state["negative_rate"]  # of a version that knew no such key
    other.load_state(state)
