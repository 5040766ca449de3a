"""A run over days with two labels: bands of each, what is published and served, and a report of each day."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from tessera.ctr.daily.loop import HELD_STATUS
from tessera.ctr.daily.serve import apply
from tessera.ctr.metrics.exact import auc
from tessera.distributed.rank import Process
from tests.ctr.daily.days import key_of, records, served
from tests.ctr.train.funnel import funnel_table, options
from tests.ctr.train.states import newest, rows_of_state, tensors_of_state
from tests.ctr.train.warm_ranks import WarmRanks

DAYS, ROWS = 3, 400
ANSWERS = ["click", "buy", "click_and_buy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """On the last day purchases follow what they did not before, and clicks are as they were."""
    folder = tmp_path_factory.mktemp("days")
    for day in range(DAYS):
        table = funnel_table(ROWS, day)
        if day == DAYS - 1:
            click, item = table["click"].to_numpy(), table["item"].to_numpy()
            table = table.set_column(1, "buy", pa.array((click & (item % 4 < 2)).astype(np.int8)))
        time = 86400 * (20454 + day) + np.arange(ROWS)
        (folder / f"day={key_of(day)}").mkdir()
        pq.write_table(table.append_column("time", pa.array(time)), folder / f"day={key_of(day)}" / "part-0.parquet")
    return folder


@pytest.fixture(scope="module")
def ranks():
    server = WarmRanks("daily")
    yield server
    server.close()


def job(data: Path, run_dir: Path, *more: str) -> list[str]:
    bands = ["daily.bands.window=3", "daily.bands.min_days=1", "daily.bands.auc=0.2"]
    bands += [f"daily.bands.{name}=null" for name in ("logloss", "normalized_entropy", "calibration")]
    splits = ["data.train=.", "data.valid=null", "data.test=null", "data.schema.time=time", "trainer.batch_size=40"]
    return options(
        data, run_dir, "mmoe", *splits, *bands, "daily.epochs=3", "daily.full_every=9", "trainer.log_every=100", *more
    )


def check_day(run: Path, line: dict) -> None:
    """The record, the report and the predictions of a day say the same of every answer."""
    day = run / "days" / line["partition"]
    report = json.loads((day / "report.json").read_text())
    assert list(line["tasks"]) == list(report["tasks"]) == ANSWERS and (day / "report.html").exists()
    for name in ANSWERS:
        found = pq.read_table(day / "tasks" / name / "predictions", partitioning=None)
        prediction, label, weight = (found[column].to_numpy() for column in ("prediction", "label", "weight"))
        expected = pytest.approx(auc(prediction, label, weight), abs=1e-9)
        assert line["tasks"][name]["auc"] == report["tasks"][name]["auc"] == expected
        assert line["tasks"][name]["rows"] == np.count_nonzero(weight)
        assert (day / "tasks" / name / "report.html").exists()
    assert line["rows"] == ROWS and line["tasks"]["buy"]["rows"] == line["tasks"]["click"]["positives"]


def rows_served(folder: Path) -> dict[str, dict[int, dict[str, bytes]]]:
    """What of rows is served, which their optimizer's state is not."""
    found = rows_of_state(folder, numbers=False)
    return {
        table: {i: {name: value for name, value in row.items() if name != "state"} for i, row in rows.items()}
        for table, rows in found.items()
    }


@pytest.mark.slow
def test_days_of_two_labels(ranks, data, tmp_path):
    """One label out of its band holds the day; accepted, it is trained by two ranks and served as it is."""
    run, output, last = tmp_path / "run", tmp_path / "output", key_of(DAYS - 1)
    assert ranks.run(1, job(data, run), output) == [HELD_STATUS], output.read_text()
    *good, held = records(run)
    assert [line["status"] for line in good] == ["trained"] * (DAYS - 1)
    assert held["status"] == "held" and held["reason"].startswith("buy.auc is 0.")
    assert "expected at least" in held["reason"] and "; click.auc" not in held["reason"]
    assert served(run)["chain"] == [key_of(day) for day in range(DAYS - 1)]
    for line in (*good, held):
        check_day(run, line)
    assert ranks.run(2, job(data, run, f"daily.accept=[{last}]"), output) == [0, 0], output.read_text()
    *before, accepted = records(run)
    assert before == good and accepted["reason"].startswith("accepted although buy.auc is 0.")
    check_day(run, accepted)
    alone = Process(0, 0, 1, torch.device("cpu"), dist.HashStore())
    apply(str(run / "published"), tmp_path / "served", alone)
    assert served(run)["chain"][-1] == last
    assert tensors_of_state(tmp_path / "served", "tower/") == tensors_of_state(newest(run), "tower/")
    assert rows_served(tmp_path / "served") == rows_served(newest(run))
