"""Predictions for rows without labels: those of `evaluate`, in the order of the data, on any number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ctr.train.states import arguments, write_data
from tests.ranks import PYTHONPATH, ROOT, free_port, run_script

NEEDED_BY_TRAINING_ALONE = ("label", "weight", "group", "time")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run; beside it data with labels, the predictions of `evaluate`, and the same rows without labels."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data", 300, 150)
    done = run_script("scripts/train.py", *arguments(folder / "data", folder / "run", "trainer.batch_size=50"))
    assert done.returncode == 0, done.stderr
    write_data(folder / "new", 40, 230, seed=3)
    files = sorted((folder / "new" / "valid").rglob("*.parquet"))
    table = pa.concat_tables([pq.read_table(path) for path in files])
    names = [name for name in table.column_names if name not in NEEDED_BY_TRAINING_ALONE]
    table = table.select(names).append_column("request", pa.array([f"r{i}" for i in range(table.num_rows)]))
    for name, first, stop, group in (("day=1/a", 0, 101, 7), ("day=1/b", 101, 102, 9), ("day=2/a", 102, 230, 40)):
        path = folder / "requests" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(first, stop - first), path, row_group_size=group)
    options = ("--split", "valid", f"data.path={folder / 'new'}", "--output", str(folder / "evaluated"))
    done = run_script("scripts/evaluate.py", str(folder / "run"), *options)
    assert done.returncode == 0, done.stderr
    return folder


def score(run: Path, output: Path, *more: str, world: int = 1, data: str = "requests") -> tuple[int, str]:
    options = ("--data", str(run / data), "--output", str(output), *more)
    done = run_script("scripts/score.py", str(run / "run"), *options, world=world)
    return done.returncode, done.stdout if not done.returncode else done.stderr


def expected(run: Path) -> np.ndarray:
    table = pa.concat_tables([pq.read_table(one) for one in sorted((run / "evaluated/predictions").glob("*.parquet"))])
    return table["prediction"].to_numpy()[np.argsort(table["row"].to_numpy())]


def rows_of(output: Path) -> pa.Table:
    files = [path for path in sorted(output.rglob("*.parquet")) if not path.name.startswith(".")]
    return pa.concat_tables([pq.read_table(path, partitioning=None) for path in files])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_predictions_of_evaluate_beside_the_columns_to_keep(run, tmp_path, world):
    status, said = score(run, tmp_path / "out", "--keep", "request", "trainer.batch_size=30", world=world)
    assert status == 0, said
    found = rows_of(tmp_path / "out")
    assert found.column_names == ["request", "prediction"] and found["request"].to_pylist()[:3] == ["r0", "r1", "r2"]
    assert found["request"].to_pylist() == [f"r{i}" for i in range(230)]
    np.testing.assert_allclose(found["prediction"].to_numpy(), expected(run), rtol=0, atol=1e-6)
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.parquet"))
    assert names == ["day=1/a.parquet", "day=1/b.parquet", "day=2/a.parquet"]
    assert (tmp_path / "out" / "_SUCCESS").exists() and "230 predictions in 3 files" in said
    done = json.loads((tmp_path / "out" / "_score.json").read_text())
    assert done["rows"] == 230 and done["bad_rows"] == 0 and done["keep"] == ["request"]


def test_a_stopped_job_goes_on_behind_the_files_that_are_there(run, tmp_path):
    status, said = score(run, tmp_path / "out", "--keep", "request")
    assert status == 0, said
    whole = rows_of(tmp_path / "out")
    (tmp_path / "out" / "day=1" / "b.parquet").unlink()
    for name in ("_score.json", "_SUCCESS"):
        content = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).unlink()
        if name == "_score.json":
            (tmp_path / "out" / ".score.json").write_text(content)
    kept = (tmp_path / "out" / "day=2" / "a.parquet").stat().st_mtime_ns
    status, said = score(run, tmp_path / "out", "--keep", "request", world=2)
    assert status == 0 and "2 of them from an earlier start" in said, said
    assert rows_of(tmp_path / "out").equals(whole)
    assert (tmp_path / "out" / "day=2" / "a.parquet").stat().st_mtime_ns == kept
    assert score(run, tmp_path / "out", "--keep", "request")[0] == 0  # done: nothing is left to do
    status, said = score(run, tmp_path / "out")
    assert status == 2 and "holds predictions of another keep" in said.splitlines()[-1]


def test_a_large_file_becomes_several_that_ranks_share(run, tmp_path):
    from tests.ranks import on_ranks

    (files, summary), _ = on_ranks(2, score_in_parts, str(run), str(tmp_path / "out"))
    assert files == [
        "day=1/a.0000-of-0002.parquet",
        "day=1/a.0001-of-0002.parquet",
        "day=1/b.parquet",
        "day=2/a.0000-of-0003.parquet",
        "day=2/a.0001-of-0003.parquet",
        "day=2/a.0002-of-0003.parquet",
    ]
    np.testing.assert_allclose(rows_of(tmp_path / "out")["prediction"].to_numpy(), expected(run), rtol=0, atol=1e-6)


def score_in_parts(process, folder: str, output: str) -> tuple[list[str], str]:
    from tessera.ctr.runs.score import run_config
    from tessera.ctr.runs.score_rows import score_rows

    run, out = Path(folder), Path(output)
    config = run_config(run / "run", [])
    scored = score_rows(config, process, run / "run", str(run / "requests"), out, rows_of_unit=60)
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.parquet")), scored.summary()


def test_bad_rows_have_a_null_if_they_are_skipped_and_stop_the_job_if_not(run, tmp_path):
    table = pq.read_table(run / "requests" / "day=2" / "a.parquet", partitioning=None)
    place, field = next((i, f) for i, f in enumerate(table.schema) if pa.types.is_floating(f.type))
    values = table.column(place).to_pylist()
    values[5] = float("nan")
    table = table.set_column(place, field, pa.array(values, field.type))
    (run / "broken").mkdir(exist_ok=True)
    pq.write_table(table, run / "broken" / "a.parquet")
    status, said = score(run, tmp_path / "raise", data="broken")
    assert status == 2 and "a.parquet" in said.splitlines()[-1] and not (tmp_path / "raise" / "a.parquet").exists()
    status, said = score(run, tmp_path / "skip", "data.bad_rows=skip", data="broken")
    assert status == 0 and "1 bad rows have none" in said
    found = rows_of(tmp_path / "skip")["prediction"]
    done = json.loads((tmp_path / "skip" / "_score.json").read_text())
    assert (done["rows"], done["bad_rows"]) == (127, 1)
    assert found.null_count == 1 and found[5].as_py() is None and len(found) == 128


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--keep", "requst"], "no column 'requst' to keep; did you mean 'request'?"),
        (["--keep", "request,request"], "--keep names request twice"),
        (["data.test=elsewhere"], "override 'data.test=elsewhere': the rows to score are named by --data"),
        (["--keep", "prediction"], "--keep prediction: the predictions have this name; rename the column in the data"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, options, line):
    status, said = score(run, tmp_path / "out", *options)
    assert status == 2 and line in said.splitlines()[-1], said
    assert not (tmp_path / "out").exists()


def test_the_result_never_lies_in_what_is_read(run):
    status, said = score(run, run / "requests" / "out")
    assert status == 2 and "which is read; expected another place, nothing was written" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_job_killed_on_two_ranks_is_finished_by_one(run, tmp_path):
    table = rows_of(run / "requests")
    (tmp_path / "big").mkdir()
    for name, copies in (("a", 60), ("b", 300), ("c", 60), ("d", 300)):
        pq.write_table(pa.concat_tables([table] * copies), tmp_path / "big" / f"{name}.parquet", row_group_size=2000)
    data = str(tmp_path / "big")
    status, said = score(run, tmp_path / "whole", "--keep", "request", world=2, data=data)
    assert status == 0, said
    command = [
        "scripts/score.py",
        str(run / "run"),
        "--data",
        data,
        "--output",
        str(tmp_path / "cut"),
        "--keep",
        "request",
    ]
    numbers = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [{**os.environ, **numbers, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": PYTHONPATH} for rank in "01"]
    ranks = [subprocess.Popen([sys.executable, *command], cwd=ROOT, env=one) for one in places]
    while not [one for one in (tmp_path / "cut").glob("*.parquet") if not one.name.startswith(".")]:
        assert all(rank.poll() is None for rank in ranks), "the job ended before it was killed"
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
        rank.wait()
    assert not (tmp_path / "cut" / "_SUCCESS").exists()
    status, said = score(run, tmp_path / "cut", "--keep", "request", data=data)
    assert status == 0 and "from an earlier start" in said, said
    found, whole = rows_of(tmp_path / "cut"), rows_of(tmp_path / "whole")
    assert found["request"].equals(whole["request"])
    # Ranks cut batches elsewhere, and sums of another size of batch are rounded otherwise.
    np.testing.assert_allclose(found["prediction"], whole["prediction"], rtol=0, atol=1e-6)
