"""Tables that cannot work end a job at its start with one line; a full one evicts or ends it, and never gives zeros."""

import json

import numpy as np
import pyarrow as pa
import pytest

from tests.ctr.train.test_bad_input import ROWS, arguments, refused, run_dir, table, train, write  # noqa: F401
from tests.ranks import run_script

SPLITS = ["data.valid=train", "data.test=train", "trainer.log_every=1"]
TIMED = "data.schema.time=time"


def train_on(world, data, run_dir, *overrides):  # noqa: F811
    if world == 1:
        return train(data, run_dir, *overrides)
    return run_script(*arguments(data, run_dir, *overrides), world=world)


def last_words(done) -> str:
    """The one line that a job says about its failure, behind the launcher's trace on several ranks."""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [done.stderr.strip().splitlines()[-1]], done.stderr
    return said[0]


@pytest.mark.parametrize("limit", ["max_rows=10", pytest.param("max_bytes=2000", marks=pytest.mark.slow)])
def test_a_limit_too_small_for_one_batch(tmp_path, run_dir, limit):  # noqa: F811
    done = train(write(tmp_path, table()), run_dir, f"embedding.{limit}")
    refused(done, "table c: ", limit.split("=")[0], "expected at least 32, which one batch can bring")
    assert not run_dir.exists()


def test_a_limit_too_small_for_a_ranks_part_of_a_batch(tmp_path, run_dir):  # noqa: F811
    done = run_script(*arguments(write(tmp_path, table()), run_dir, "embedding.max_rows=10"), world=2)
    assert done.returncode != 0
    words = "table c: max_rows 5 is a limit of 5 rows; expected at least 16, which one batch can bring (each of 2 ranks"
    assert words in last_words(done)
    assert not run_dir.exists()


def test_a_ttl_needs_a_clock(tmp_path, run_dir):  # noqa: F811
    data = write(tmp_path, table())
    ttl = ["embedding.ttl_days=7", *SPLITS]
    refused(train(data, run_dir, *ttl), "embedding.ttl_days", "data.schema.time", "embedding.clock=wall")
    assert not run_dir.exists()
    done = train(data, run_dir, *ttl, "embedding.clock=wall")
    assert done.returncode == 0, done.stderr


def test_a_ttl_with_a_time_column_that_is_not_there(tmp_path, run_dir):  # noqa: F811
    refused(train(write(tmp_path, table()), run_dir, "embedding.ttl_days=7", TIMED), "part-0.parquet", "'time'")


def test_features_that_share_a_table_have_no_settings_of_their_own(tmp_path, run_dir):  # noqa: F811
    """Dims come from the tower and formats belong to tables, so two features cannot disagree about them."""
    data = write(tmp_path, table(d=np.arange(ROWS)))
    own = "data.schema.features=[{name: x, kind: numeric}, {name: c}, {name: d, table: c, dim: 8}]"
    refused(train(data, run_dir, own), "dim")
    shared = "data.schema.features=[{name: x, kind: numeric}, {name: c}, {name: d, table: c}]"
    refused(train(data, run_dir, shared, "embedding.formats={d: int8}"), "embedding.formats.d", "no table")
    assert not run_dir.exists()


def test_a_float_id_column(tmp_path, run_dir):  # noqa: F811
    data = write(tmp_path, table(), table(c=np.linspace(0, 1, ROWS)))
    refused(train(data, run_dir), "part-1.parquet", "column 'c'", "found double", "expected an integer")
    assert not run_dir.exists()


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_full_table_that_may_not_evict_ends_the_job(tmp_path, run_dir, world):  # noqa: F811
    done = train_on(world, write(tmp_path, table(c=np.arange(ROWS))), run_dir, "embedding.max_rows=40", *SPLITS)
    assert done.returncode == 2
    line = last_words(done)
    assert f"table c: limit of {40 // world} rows" in line and "more wanted" in line and "eviction lru or lfu" in line
    assert ("rank " in line) == (world > 1)  # the rank whose part is full; the other one has stopped too


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("eviction", ["lru", pytest.param("lfu", marks=pytest.mark.slow)])
def test_a_full_table_evicts(tmp_path, run_dir, eviction, world):  # noqa: F811
    full = [f"embedding.eviction={eviction}", "embedding.max_rows=48", *SPLITS]
    done = train_on(world, write(tmp_path, table(c=np.arange(ROWS))), run_dir, *full)
    assert done.returncode == 0, done.stderr
    parsed = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    counts = [line for line in parsed if line["kind"] == "tables"][-1]
    assert counts["new"] == counts["admitted"] == ROWS  # every id has had a row; none read zeros
    assert counts["rejected"] == 0
    assert counts["rows"] <= 48 and counts["rows"] + counts["evicted"] == ROWS


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_batch_of_long_bags_that_no_eviction_can_hold(tmp_path, run_dir, world):  # noqa: F811
    bags = pa.ListArray.from_arrays(np.arange(ROWS + 1) * 10, np.arange(ROWS * 10))
    features = "data.schema.features=[{name: x, kind: numeric}, {name: tags, kind: ids}]"
    full = ["embedding.eviction=lru", "embedding.max_rows=64", features]
    done = train_on(world, write(tmp_path, table(tags=bags)), run_dir, *full)
    assert done.returncode == 2
    line = last_words(done)
    assert f"table tags: limit of {64 // world} rows" in line and "more wanted by one batch" in line
    assert ("rank " in line) == (world > 1)
