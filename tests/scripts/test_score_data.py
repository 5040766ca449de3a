"""`tessera score` and `api.score` on data of other shapes than training had, and on broken results."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from tessera.ctr import api
from tessera.ctr.data.units import Unit
from tessera.ctr.runs.score import run_config
from tessera.ctr.runs.score_rows import _missing, score_rows
from tessera.distributed.failure import explain
from tessera.distributed.folder_lock import FolderInUse, FolderLock
from tessera.embedding.errors import TesseraError
from tessera.scripts.score import parse
from tests.ctr.train.states import arguments, write_data
from tests.ranks import on_ranks, run_script


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data", 200, 50)
    for name, seed in (("run", 1), ("other", 2)):
        more = ("trainer.batch_size=50", f"trainer.seed={seed}")
        done = run_script("scripts/train.py", *arguments(folder / "data", folder / name, *more))
        assert done.returncode == 0, done.stderr
    return folder


def requests(rows: int = 20, **more: pa.Array) -> pa.Table:
    numbers = np.arange(rows)
    return pa.table({"d": numbers, "c": numbers % 7, "row": numbers, "x": numbers / 10.0, **more})


def write(path: Path, table: pa.Table, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def score(run: Path, data, output: Path, keep: tuple = (), world: int = 1, which: str = "run", overrides: tuple = ()):
    """What each rank says: the summary, or the message of the error."""
    return on_ranks(world, _score, run / which, data, output, keep, overrides)


def _score(process, run_dir: Path, data, output: Path, keep, overrides) -> str:
    try:
        return score_rows(run_config(run_dir, list(overrides)), process, run_dir, data, output, keep).summary()
    except TesseraError as error:
        return f"error: {error}"


@pytest.mark.parametrize("world", [1, 2])
def test_files_and_row_groups_without_rows_have_their_files(run, tmp_path, world):
    table = requests()
    write(tmp_path / "data" / "a.parquet", table, row_group_size=6)
    write(tmp_path / "data" / "b.parquet", table.slice(0, 0))
    with pq.ParquetWriter(tmp_path / "data" / "c.parquet", table.schema):
        pass
    with pq.ParquetWriter(tmp_path / "data" / "d.parquet", table.schema) as writer:
        for first, rows in ((0, 0), (0, 5), (0, 0), (5, 5), (0, 0)):
            writer.write_table(table.slice(first, rows))
    said = score(run, tmp_path / "data", tmp_path / "out", ("row",), world, overrides=("trainer.batch_size=4",))
    assert said[0].startswith("30 predictions in 4 files"), said
    for name, rows in (("a", 20), ("b", 0), ("c", 0), ("d", 10)):
        found = pq.read_table(tmp_path / "out" / f"{name}.parquet")
        assert found.column_names == ["row", "prediction"] and found["row"].to_pylist() == list(range(rows))


def test_columns_of_every_type_are_kept_as_they_are(run, tmp_path):
    names, numbers = [f"r{i}" for i in range(20)], np.arange(20)
    columns = {
        "dictionary": pa.array(names).dictionary_encode(),
        "large": pa.array(names, pa.large_string()),
        "list": pa.array([[i] * (i % 3) for i in range(20)]),
        "struct": pa.array([{"a": i, "prediction": {"b": [i]}} for i in range(20)]),
        "map": pa.array([[("k", i)] for i in range(20)], pa.map_(pa.string(), pa.int64())),
        "unsigned": pa.array(numbers.astype(np.uint64) + np.uint64(2**63)),
        "time": pa.array(numbers, pa.timestamp("ns", tz="Europe/Berlin")),
        "decimal": pa.array([None] * 20, pa.decimal128(30, 2)),
        "null": pa.nulls(20),
        "a.b": pa.array(names),
        "number": pa.array(names),
        "": pa.array(names),
    }
    write(tmp_path / "data" / "a.parquet", requests(**columns), row_group_size=7)
    said = score(run, tmp_path / "data", tmp_path / "out", tuple(columns))
    assert said[0].startswith("20 predictions"), said
    found = pq.read_table(tmp_path / "out" / "a.parquet")
    for name, column in columns.items():
        assert pa.concat_arrays(found[name].chunks).equals(column) or found[name].to_pylist() == column.to_pylist(), (
            name
        )
        assert found[name].type == column.type, name


def test_a_column_to_keep_without_any_value_has_the_type_that_others_have(run, tmp_path):
    names = pa.array([f"r{i}" for i in range(20)])
    for name, column in (("a", pa.nulls(20)), ("b", names), ("c", pa.nulls(20))):
        write(tmp_path / "data" / f"{name}.parquet", requests(request=column))
    assert score(run, tmp_path / "data", tmp_path / "out", ("request",))[0].startswith("60 predictions")
    for name, nulls in (("a", 20), ("b", 0), ("c", 20)):
        found = pq.read_table(tmp_path / "out" / f"{name}.parquet")["request"]
        assert found.type == pa.string() and found.null_count == nulls


def test_what_cannot_be_scored_is_one_line_and_leaves_nothing(run, tmp_path):
    twice = pa.table([*requests().columns, pa.array(range(20)), pa.array(range(20))], [*"dc", "row", "x", "r", "r"])
    write(tmp_path / "twice" / "a.parquet", twice)
    (said,) = score(run, tmp_path / "twice", tmp_path / "out", ("r",))
    assert said.endswith("a.parquet: column 'r' to keep is there 2 times; expected once")
    write(tmp_path / "suffix" / "a.parquet", requests())
    write(tmp_path / "suffix" / "a.parq", requests())
    (said,) = score(run, tmp_path / "suffix", tmp_path / "out")
    assert "a.parquet would be written for two files" in said and "suffix" in said
    write(tmp_path / "days" / "1" / "a.parquet", requests())
    (said,) = score(run, str(tmp_path / "days" / "*"), tmp_path / "days" / "out")
    assert "is matched by" in said, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "days" / "out").exists()


def test_a_half_written_day_is_not_scored_however_the_folders_of_days_are_called(run, tmp_path):
    for day in ("events-20260101", "events-20260102"):
        write(tmp_path / "data" / day / "a.parquet", requests())
    (tmp_path / "data" / "events-20260101" / "_SUCCESS").touch()
    (said,) = score(
        run,
        tmp_path / "data",
        tmp_path / "out",
        overrides=("data.partition.name=", "data.partition.format=events-%Y%m%d"),
    )
    assert "holds no _SUCCESS" in said, said


def test_a_batch_that_is_larger_than_all_rows_takes_no_memory_for_more(run, tmp_path):
    write(tmp_path / "data" / "a.parquet", requests())
    (said,) = score(run, tmp_path / "data", tmp_path / "out", overrides=("trainer.batch_size=100000000",))
    assert said.startswith("20 predictions"), said


def test_a_result_is_continued_by_the_same_model_alone_and_only_if_its_record_can_be_read(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    write(tmp_path / "data" / "a.parquet", requests())
    write(tmp_path / "data" / "b.parquet", requests())
    out = tmp_path / "out"
    assert score(tmp_path, tmp_path / "data", out)[0].startswith("40 predictions")
    record = (out / "_score.json").read_text()
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(run / "other", tmp_path / "run")  # trained anew in the same place, for as many steps
    (out / "b.parquet").unlink()
    (said,) = score(tmp_path, tmp_path / "data", out)
    assert "holds predictions of another checksum of the model" in said and not (out / "b.parquet").exists()
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(run / "run", tmp_path / "run")
    for broken in ("", "[1]", "{"):
        (out / "_score.json").write_text(broken)
        (said,) = score(tmp_path, tmp_path / "data", out)
        assert "holds a _score.json that cannot be read" in said and (out / "_score.json").read_text() == broken
    (out / "_score.json").write_text(record)
    assert "1 of them from an earlier start" in score(tmp_path, tmp_path / "data", out)[0]


def test_a_result_is_a_data_set_and_other_data_are_named(run, tmp_path):
    for name in "ab":
        write(tmp_path / "data" / f"{name}.parquet", requests())
    on_ranks(1, _score_and_tell_the_folder, run / "run", tmp_path / "data", tmp_path / "out")
    assert pq.read_table(tmp_path / "out").num_rows == 40
    write(tmp_path / "data" / "b.parquet", requests(more=pa.array(range(20))))
    (said,) = score(run, tmp_path / "data", tmp_path / "out")
    assert said.endswith("holds predictions of other data: b.parquet has come, gone or changed; expected a new folder")
    (tmp_path / "out" / "_score.json").unlink()
    (said,) = score(run, tmp_path / "data", tmp_path / "out")
    assert said.endswith("holds a.parquet and no record of its model and data; expected a new folder"), said


def _score_and_tell_the_folder(process, run_dir: Path, data: Path, output: Path) -> None:
    score_rows(run_config(run_dir, []), process, run_dir, data, output)
    assert process.folder == str(output)  # what a full disk's error names


def test_two_jobs_on_one_result_are_one_line_that_blames_no_resource(tmp_path):
    held = FolderLock(tmp_path)
    with pytest.raises(FolderInUse) as error:
        FolderLock(tmp_path)
    held.release()
    assert explain(error.value, None) == (2, f"error: {error.value}") and "is in use by process" in str(error.value)


def test_a_result_with_a_gap_does_not_say_that_it_is_whole(tmp_path):
    units = [Unit(f"{name}.parquet", 0, 1, 5) for name in "ab"]
    for name in ("a.parquet", "b.parquet", "_SUCCESS"):
        (tmp_path / name).touch()
    assert _missing(tmp_path, units) == [] and (tmp_path / "_SUCCESS").exists()
    (tmp_path / "b.parquet").unlink()
    assert _missing(tmp_path, units) == units[1:] and not (tmp_path / "_SUCCESS").exists()


def test_names_with_commas_stand_between_quotes_and_overrides_may_stand_behind_data():
    options = parse(["run", "--output", "o", "--keep", 'a,"b,c",d', "--data", "x", "y", "trainer.batch_size=3"])
    assert options.keep == ["a", "b,c", "d"]
    assert options.data == ["x", "y"] and options.overrides == ["trainer.batch_size=3"]
    assert parse(["run", "--data", "x", "--output", "o", "--keep", ""]).keep == []


def test_api_takes_paths_batches_and_no_rows_and_refuses_the_rest_in_one_line(run, tmp_path):
    write(tmp_path / "data" / "a.parquet", requests())
    on_ranks(1, call, run, tmp_path)


def call(process, run: Path, folder: Path) -> None:
    dist.destroy_process_group()
    expected = api.score(run / "run", requests(), keep="row")
    assert expected.column_names == ["row", "prediction"] and expected.num_rows == 20
    assert api.score(run / "run", folder / "data", keep=["row"]).equals(expected)
    assert api.score(run / "run", [folder / "data"], keep=["row"]).equals(expected)
    assert api.score(run / "run", requests().to_batches()[0], keep=["row"]).equals(expected)
    nothing = api.score(run / "run", requests().slice(0, 0), keep=["row"])
    assert nothing.schema.equals(expected.schema) and nothing.num_rows == 0
    wrong = [
        (requests().slice(0, 0), "data has no column 'rwo' to keep; did you mean 'row'"),
        (requests(), "data-in-memory.parquet: no column 'rwo' to keep"),
        (requests(rwo=pa.array([None] * 20, pa.month_day_nano_interval())), "data cannot be written as parquet"),
        ({"x": [1]}, "data is a dict; expected an Arrow table, a pandas data frame, or paths"),
        (None, "data is a NoneType; expected"),
    ]
    for data, message in wrong:
        with pytest.raises(TesseraError) as error:
            api.score(run / "run", data, keep=["rwo"])
        assert message in str(error.value) and "\n" not in str(error.value), error.value
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
